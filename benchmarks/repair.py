"""Accuracy after a cut: Prunus with repair against Torch-Pruning, at equal operations, in one run.

    python benchmarks/repair.py                      # everything in the extra "bench"; about an hour
    python benchmarks/repair.py --tasks digits minilm --seeds 0 --no-finetune
    python benchmarks/repair.py --seeds 0 1 --speedups 2 3 5 --out runs/bench/repair.json
    python benchmarks/repair.py --read a.json b.json # tables and verdicts of runs that were made in parts

For each speed-up and each way to choose channels up to four figures are given: as the cut left the network; with batch
norm statistics computed anew on the same samples (which any user can do); repaired, without training; and after the
same short fine-tune for all (same steps, same data, the better of two learning rates for each), ours from the repaired
network. Channels are chosen by the defaults of Prunus and by the scores of Torch-Pruning (L2 with local and global
ranking, Taylor with global ranking), whose ratio is found by bisection so that its network needs at most the same share
of the multiply-adds. No labels are used but by Taylor and to fine-tune. The networks are trained first, and kept.

At the end each promise is compared with what was measured; the exit status is 1 if one is not kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from prunus.cost import count
from tasks.cuts import OURS, THEIRS, Cannot, has_norms, ours, renormed, theirs
from tasks.digits import digits
from tasks.gcn import gcn
from tasks.lstm import lstm
from tasks.minilm import minilm
from tasks.task import Task
from tasks.verdicts import Rows
from tasks.vit import vit
from tasks.yolo import yolo

TASKS: dict[str, Callable[[int, Path], Task]] = {
    "digits": digits,
    "yolo": yolo,
    "vit": vit,
    "minilm": minilm,
    "lstm": lstm,
    "gcn": gcn,
}


def tuned(task: Task, model: nn.Module) -> dict[str, Any]:
    """The score after the short fine-tune, with the better rate."""
    scores = []
    for rate in task.rates:
        torch.manual_seed(0)
        network = copy.deepcopy(model)
        task.tune(network, rate)
        scores.append(task.score(network))
    return {"fine-tuned": max(scores), "rate": task.rates[scores.index(max(scores))]}


def measure(task: Task, speedup: float, way: str, finetune: bool) -> dict[str, Any]:
    """The figures of one way at one speed-up."""
    found: dict[str, Any] = {}
    start = time.process_time()
    if way in OURS:
        model, best, report = ours(task, 1 / speedup, way)
        found["repaired"], found["error"] = task.score(best), report.after
    else:
        try:
            model = best = theirs(task, 1 / speedup, way)
        except Cannot as error:
            return {"cannot": str(error)}
    found["seconds"] = time.process_time() - start
    found["macs"] = count(model, task.example).macs / count(task.model, task.example).macs
    found["as cut"] = task.score(model)
    if has_norms(model):
        found["norms anew"] = task.score(renormed(model, task.calibration))
    return found | (tuned(task, best) if finetune else {})


def run(options: Any, console: Console) -> list[dict[str, Any]]:
    """Measure everything that was asked for."""
    rows: list[dict[str, Any]] = []

    def note(**row: Any) -> None:
        rows.append(row)
        short = (f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items() if k != "title")
        console.print(*short, sep=" | ", highlight=False, soft_wrap=True)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(rows, indent=1))

    for name in options.tasks:
        for seed in options.seeds:
            task = TASKS[name](seed, options.cache)
            note(task=name, title=task.name, seed=seed, way="dense", score=task.score(task.model))
            for speedup in options.speedups:
                for way in (*THEIRS, *OURS):
                    figures = measure(task, speedup, way, options.finetune)
                    note(task=name, seed=seed, speedup=speedup, way=way, **figures)
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> bool:
    """Print tables and verdicts; whether all promises are kept."""
    kept = True
    for name in dict.fromkeys(r["task"] for r in rows):
        own = [r for r in rows if r["task"] == name]
        task = Rows(name, next(r["title"] for r in own if "title" in r), own)
        console.print(task.table())
        for line in task.refusals():
            console.print(line)
        for good, text in task.promises():
            kept = kept and good
            console.print(f"{'kept    ' if good else 'NOT KEPT'} {text}")
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--speedups", nargs="+", type=float, default=[2.0, 3.0, 5.0])
    parser.add_argument("--finetune", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--read", nargs="+", type=Path)
    options = parser.parse_args()
    console = Console(width=160)
    if options.read:
        rows = [row for path in options.read for row in json.loads(path.read_text())]
    else:
        rows = run(options, console)
    return 0 if show(rows, console) else 1


if __name__ == "__main__":
    raise SystemExit(main())
