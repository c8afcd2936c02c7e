"""Accuracy without any training after a cut: Prunus with repair against Torch-Pruning, at equal operations, in one run.

    python benchmarks/repair.py                      # needs scikit-learn
    python benchmarks/repair.py --tasks minilm --seeds 0
    python benchmarks/repair.py --seeds 0 1 --speedups 2 3 5 --out runs/bench/repair.json

For each speed-up and each way to choose channels three figures are given: as the cut left the network, with batch norm
statistics computed anew on the same samples (which any user can do), and repaired. Channels are chosen by the defaults
of Prunus and by the scores of Torch-Pruning (L2 with local and global ranking, Taylor with global ranking), whose ratio
is found by bisection so that its network needs at most the same share of the multiply-adds. No labels are used but by
Taylor. The networks are trained first, and kept in runs/tasks.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import prunus
from prunus.cost import count
from prunus.tracing import call_model
from tasks.digits import digits
from tasks.minilm import minilm
from tasks.task import Task

WAYS = ("Torch-Pruning L2, local", "Torch-Pruning L2, global", "Torch-Pruning Taylor, global", "Prunus")
STATES = ("as cut", "norms anew", "repaired")


def renormed(model: nn.Module, batches: Sequence[Any]) -> nn.Module:
    """A copy whose batch norms hold the exact averages over the batches."""
    model = copy.deepcopy(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            call_model(model, batch)
    return model.eval()


def by_torch_pruning(task: Task, share: float, importance: str, global_ranking: bool) -> nn.Module:
    """Torch-Pruning's network with at most ``share`` of the multiply-adds."""
    import torch_pruning as tp

    dense = count(task.model, task.example).macs

    def cut(ratio: float) -> nn.Module:
        model = copy.deepcopy(task.model)
        taylor = importance == "Taylor"
        score = tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2)
        if taylor:
            task.loss(model).backward()
        pruner = tp.pruner.BasePruner(
            *(model, task.example),
            importance=score,
            global_pruning=global_ranking,
            pruning_ratio=ratio,
            ignored_layers=task.keep(model),
            **task.theirs(model, ratio),
        )
        pruner.step()
        task.finish(model, pruner)
        model.zero_grad()
        return model

    low, high, best = 0.0, 1.0, None
    for _ in range(10):
        middle = (low + high) / 2
        model = cut(middle)
        if count(model, task.example).macs <= share * dense:
            high, best = middle, model
        else:
            low = middle
    if best is None:
        raise RuntimeError(f"Torch-Pruning {importance} does not get to {share:.0%} of the multiply-adds")
    return best


def measure(task: Task, speedup: float, way: str) -> dict[str, Any]:
    """The three figures of one way at one speed-up."""
    found: dict[str, Any] = {}
    if way == "Prunus":
        model = copy.deepcopy(task.model)
        keep = task.keep(model)
        cut = prunus.prune(model, task.example, prunus.Target(macs=1 / speedup), ignored_layers=keep, **task.options)
        found["macs"] = cut.after.macs / cut.before.macs
        found["as cut"], found["norms anew"] = task.score(model), task.score(renormed(model, task.calibration))
        repaired = copy.deepcopy(task.model)
        start = time.process_time()
        report = prunus.repair(repaired, cut.plan, task.calibration, samples=100_000)
        found["seconds"] = time.process_time() - start
        found["repaired"], found["error"] = task.score(repaired), report.after
        return found
    importance, ranking = way.removeprefix("Torch-Pruning ").split(", ")
    model = by_torch_pruning(task, 1 / speedup, importance, ranking == "global")
    found["macs"] = count(model, task.example).macs / count(task.model, task.example).macs
    found["as cut"], found["norms anew"] = task.score(model), task.score(renormed(model, task.calibration))
    return found


def table_of(name: str, dense: float, speedups: Sequence[float], rows: Any) -> Table:
    """Means over the seeds."""
    table = Table(title=f"{name}: {dense:.1f} % dense, nothing trained after the cut", title_justify="left")
    table.add_column("channels chosen by")
    for speedup in speedups:
        for state in STATES:
            table.add_column(f"{speedup:g}x {state}", justify="right")
    for way in WAYS:
        cells = []
        for speedup in speedups:
            for state in STATES:
                values = [r[state] for r in rows if r["way"] == way and r["speedup"] == speedup and state in r]
                cells.append(f"{statistics.mean(values):.1f}" if values else "")
        table.add_row(way, *cells)
    return table


def verdict(dense: float, speedups: Sequence[float], rows: Any) -> dict[str, float]:
    """For each speed-up, our drop as a share of theirs with new norms."""

    def mean(speedup: float, way: str, state: str) -> float:
        return statistics.mean(r[state] for r in rows if r["way"] == way and r["speedup"] == speedup)

    shares = {}
    for speedup in speedups:
        theirs = max(mean(speedup, way, state) for way in WAYS[:-1] for state in STATES[:2])
        shares[f"{speedup:g}x"] = (dense - mean(speedup, "Prunus", "repaired")) / max(dense - theirs, 1e-9)
    return shares


TASKS: dict[str, Callable[[int, Path], Task]] = {"digits": digits, "minilm": minilm}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["digits"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--speedups", nargs="+", type=float, default=[2.0, 3.0, 5.0])
    parser.add_argument("--cache", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    console, result = Console(width=140), {}
    for name in options.tasks:
        rows, dense = [], []
        for seed in options.seeds:
            task = TASKS[name](seed, options.cache)
            dense.append(task.score(task.model))
            for speedup in options.speedups:
                for way in WAYS:
                    row = {"seed": seed, "speedup": speedup, "way": way, **measure(task, speedup, way)}
                    rows.append(row)
                    console.print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
        mean = statistics.mean(dense)
        shares = verdict(mean, options.speedups, rows)
        console.print(table_of(task.name, mean, options.speedups, rows))
        console.print("drop, as a share of Torch-Pruning's best with norms anew:", shares)
        result[name] = {"dense": dense, "rows": rows, "shares": shares}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
