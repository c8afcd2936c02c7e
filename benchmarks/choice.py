"""What the choice of channels is worth by itself: all scores, nothing repaired and nothing trained, in one run.

    python benchmarks/choice.py                          # digits and MiniLM, two seeds
    python benchmarks/choice.py --tasks digits --seeds 0 --out runs/bench/choice.json

For each score of Prunus and of Torch-Pruning, and each way to spread the cut over the groups, networks with a half, a
third and a fifth of the multiply-adds are judged as the cut left them and, where they have batch norms, with their
statistics computed anew on 400 samples. Torch-Pruning's ratio is found by bisection. Scores that look at gradients get
them from labelled training samples (digits) or from random projections of the embeddings (MiniLM), both the same; the
default of Prunus sees inputs without labels. The promise: it is at least as good as the best of Torch-Pruning's scores.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import prunus
from prunus import importance as scores
from prunus.cost import count
from tasks.cuts import Cannot, by_torch_pruning, has_norms, renormed, within
from tasks.digits import digits
from tasks.minilm import minilm
from tasks.task import Task

TASKS: dict[str, Callable[[int, Path], Task]] = {"digits": digits, "minilm": minilm}
TRAINED = ("digits",)
"""Tasks with another network for each seed."""
THEIRS = ("L2", "L1", "BN scale", "LAMP", "FPGM", "Taylor", "Hessian")
RANKINGS = ("local", "global", "isomorphic")
DEFAULT, WITHOUT_DATA = "Prunus, default with data", "Prunus, default without data"


Scores = dict[str, tuple[Any, tuple[str, ...]]]


def our_scores(task: Task) -> Scores:
    """Each score, and the allocations that it is tried with."""
    unlabelled = prunus.calibrate(task.model, task.calibration, input_fn=lambda batch: batch)
    both = ("uniform", "greedy")
    found: Scores = {
        "random": (scores.RandomImportance(), ("uniform",)),
        "L2": (scores.MagnitudeImportance(), ("uniform", "global")),
        "L2, rescaling undone": (scores.InvariantMagnitudeImportance(), ("uniform", "global")),
        "LAMP": (scores.LAMPImportance(), ("uniform", "global")),
        "FPGM": (scores.FPGMImportance(), ("uniform", "global")),
        "Wanda": (scores.WandaImportance(unlabelled), ("uniform",)),
        "FLAP": (scores.FLAPImportance(unlabelled), ("uniform", "global")),
        "activations": (scores.ActivationImportance(calibration=unlabelled), ("uniform",)),
        "Fisher": (scores.FisherImportance(unlabelled, normalizer=None), both),
        "output error, each layer alone": (scores.OutputErrorImportance(unlabelled, weighted=False), ("uniform",)),
        "output error": (scores.OutputErrorImportance(unlabelled), both),
    }
    if has_norms(task.model):
        found["BN scale"] = (scores.BNScaleImportance(), ("uniform", "global"))
    labelled = copy.deepcopy(task.model)
    task.loss(labelled).backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in labelled.named_parameters()}
    found["Taylor"] = (_WithGradients(scores.TaylorImportance(), gradients), ("uniform", "global"))
    return found


class _WithGradients(scores.Importance):
    """A score that reads ``.grad``, for copies of a model that have none."""

    def __init__(self, inner: Any, gradients: dict[str, Any]) -> None:
        self.inner, self.gradients = inner, gradients

    def __call__(self, group: Any) -> Any:
        for _, members in group.parts:
            for member in members:
                member.tensor.grad = self.gradients.get(member.name)
        return self.inner(group)


def networks(task: Task, share: float, own: Scores) -> Iterator[tuple[str, nn.Module | str]]:
    """Every way's network, or why there is none."""
    for name in THEIRS:
        if name == "BN scale" and not has_norms(task.model):
            continue
        for ranking in RANKINGS:
            try:
                model: nn.Module | str = within(task, share, partial(_theirs, task, name, ranking))
            except Cannot as error:
                model = str(error)
            yield f"Torch-Pruning {name}, {ranking}", model

    def cut(**options: Any) -> nn.Module:
        model = copy.deepcopy(task.model)
        options = {"ignored_layers": task.keep(model), **task.options, **options}
        plan = prunus.prune(model, task.example, prunus.Target(macs=share), **options).plan
        bare = copy.deepcopy(task.model)
        plan.apply(bare)
        return bare

    for name, (score, allocations) in own.items():
        for allocation in allocations:
            yield f"Prunus {name}, {allocation}", cut(importance=score, allocation=allocation)
    yield WITHOUT_DATA, cut()
    yield DEFAULT, cut(data=task.calibration, samples=100_000)


def _theirs(task: Task, name: str, ranking: str, ratio: float) -> nn.Module:
    return by_torch_pruning(task, ratio, name, ranking)


def measure(task: Task, speedup: float, own: Scores) -> Iterator[dict[str, Any]]:
    """One row for each way."""
    dense = count(task.model, task.example).macs
    for way, model in networks(task, 1 / speedup, own):
        if isinstance(model, str):
            yield {"way": way, "cannot": model}
            continue
        row = {"way": way, "macs": count(model, task.example).macs / dense, "as cut": task.score(model)}
        if has_norms(model):
            row["norms anew"] = task.score(renormed(model, task.calibration))
        yield row


def show(rows: list[dict[str, Any]], console: Console) -> bool:
    """A table for each task, and whether the promise is kept."""
    kept = True
    for name in dict.fromkeys(r["task"] for r in rows):
        own = [r for r in rows if r["task"] == name]
        states = [s for s in ("as cut", "norms anew") if any(s in r for r in own)]
        speedups = sorted({r["speedup"] for r in own})
        table = Table(title=f"{name}: the choice alone", title_justify="left")
        table.add_column("channels chosen by")
        for speedup in speedups:
            for state in states:
                table.add_column(f"{speedup:g}x {state}", justify="right")
        means = {
            (way, speedup, state): statistics.mean(values)
            for way in dict.fromkeys(r["way"] for r in own)
            for speedup in speedups
            for state in states
            if (values := [r[state] for r in own if (r["way"], r["speedup"]) == (way, speedup) and state in r])
        }
        for way in dict.fromkeys(r["way"] for r in own):
            cells = [f"{means[key]:.1f}" if (key := (way, s, t)) in means else "-" for s in speedups for t in states]
            table.add_row(way, *cells)
        console.print(table)
        for speedup in speedups:
            theirs = {k[0]: v for k, v in means.items() if k[0].startswith("Torch") and k[1:] == (speedup, states[-1])}
            best = max(theirs, key=lambda way: theirs[way])
            ours = means[DEFAULT, speedup, states[-1]]
            good = ours >= theirs[best]
            kept = kept and good
            console.print(
                f"{'kept    ' if good else 'NOT KEPT'} {name} {speedup:g}x {states[-1]}: {ours:.1f}, not below the "
                f"{theirs[best]:.1f} of {best}"
            )
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--speedups", nargs="+", type=float, default=[2.0, 3.0, 5.0])
    parser.add_argument("--cache", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch_pruning")
    console, rows = Console(width=140), []
    for name in options.tasks:
        for seed in options.seeds if name in TRAINED else options.seeds[:1]:
            torch.manual_seed(seed)
            task = TASKS[name](seed, options.cache)
            own = our_scores(task)
            for speedup in options.speedups:
                for row in measure(task, speedup, own):
                    rows.append({"task": name, "seed": seed, "speedup": speedup, **row})
                    console.print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
                    if options.out:
                        options.out.parent.mkdir(parents=True, exist_ok=True)
                        options.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0 if show(rows, console) else 1


if __name__ == "__main__":
    raise SystemExit(main())
