"""How the networks of a task are cut: by Torch-Pruning, with its ratio found by bisection, and by Prunus."""

from __future__ import annotations

import copy
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import prunus
from prunus.cost import count
from prunus.tracing import call_model
from tasks.task import Task

THEIRS = ("Torch-Pruning L2, local", "Torch-Pruning L2, global", "Torch-Pruning Taylor, global")
MAGNITUDE = "Prunus magnitude"
OURS = (MAGNITUDE, "Prunus")
NEAR, ROUNDS, SECONDS = 0.99, 10, 240
"""Torch-Pruning's ratio is right when its network has this share of the allowed operations; how often, long to try."""


class Cannot(Exception):
    """Torch-Pruning does not do a task; the message says why."""


def ours(task: Task, share: float, way: str) -> tuple[nn.Module, nn.Module, prunus.RepairReport]:
    """A network with ``share`` of the multiply-adds, as the cut left it and repaired."""
    model, bare = copy.deepcopy(task.model), copy.deepcopy(task.model)
    data = {"data": task.calibration, "samples": 100_000}
    if way == MAGNITUDE:
        data["importance"] = prunus.importance.MagnitudeImportance()
    options = {"ignored_layers": task.keep(model), **task.options, **data}
    result = prunus.prune(model, task.example, prunus.Target(macs=share), **options)
    result.plan.apply(bare)
    if result.repair is None:
        raise RuntimeError("prune(data=) repaired nothing")
    return bare, model, result.repair


def theirs(task: Task, share: float, way: str) -> nn.Module:
    """Torch-Pruning's network with at most ``share`` of the multiply-adds.

    Raises:
        Cannot: it crashes, takes too long, or does not get there.
    """
    importance, ranking = way.removeprefix("Torch-Pruning ").split(", ")
    return within(task, share, lambda ratio: by_torch_pruning(task, ratio, importance, ranking))


def within(task: Task, share: float, cut: Callable[[float], nn.Module]) -> nn.Module:
    """The largest network of those that ``cut`` makes of a ratio that has at most ``share`` of the multiply-adds.

    Raises:
        Cannot: it crashes, takes too long, or does not get there.
    """
    dense, low, high = count(task.model, task.example).macs, 0.0, 1.0
    best, reason = None, "its smallest network is larger"
    with _limit(SECONDS):
        for _ in range(ROUNDS):
            middle = (low + high) / 2
            try:
                model = cut(middle)
                found = count(model, task.example).macs / (share * dense)
            except TimeoutError as error:
                raise Cannot(str(error)) from error
            except Exception as error:  # whatever a library raises about a network that it does not know
                high, reason = middle, _told(error)
                continue
            if found > 1:
                low = middle
                continue
            high, best = middle, model
            if found >= NEAR:
                break
    if best is None:
        raise Cannot(reason)
    return best


def _told(error: Exception) -> str:
    """An error in a line; where it says nothing, the line that raised it."""
    text = str(error).partition("\n")[0] or str(traceback.extract_tb(error.__traceback__)[-1].line)
    return f"{type(error).__name__}: {text}"[:120]


def by_torch_pruning(task: Task, ratio: float, importance: str, ranking: str) -> nn.Module:
    """Torch-Pruning's network with a share ``ratio`` of every group gone, by one of its scores."""
    import torch_pruning as tp

    makers: dict[str, Callable[[], Any]] = {
        "L1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "L2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "BN scale": tp.importance.BNScaleImportance,
        "LAMP": tp.importance.LAMPImportance,
        "FPGM": tp.importance.FPGMImportance,
        "Taylor": tp.importance.GroupTaylorImportance,
        "Hessian": tp.importance.GroupHessianImportance,
    }
    model, score = task.prepare(copy.deepcopy(task.model)), makers[importance]()
    if importance == "Taylor":
        task.loss(model).backward()
    if importance == "Hessian":
        _see_samples(task, model, score)
    pruner = tp.pruner.BasePruner(
        *(model, task.example),
        importance=score,
        global_pruning=ranking != "local",
        isomorphic=ranking == "isomorphic",
        pruning_ratio=ratio,
        ignored_layers=task.keep(model),
        **task.theirs(model, ratio),
    )
    pruner.step()
    task.finish(model, pruner)
    model.zero_grad()
    return model.eval()


def _see_samples(task: Task, model: nn.Module, score: Any, count: int = 64) -> None:
    """Let a score see the gradients of random projections of the outputs, sample by sample."""
    generator = torch.Generator().manual_seed(0)
    batches = [b if isinstance(b, tuple) else (b,) for b in task.calibration]
    samples = [tuple(t[k : k + 1] for t in batch) for batch in batches for k in range(len(batch[0]))]
    for sample in samples[:count]:
        model.zero_grad()
        output = model(*sample)
        (output * (torch.randint(0, 2, output.shape, generator=generator) * 2 - 1)).sum().backward()
        score.accumulate_grad(model)


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes more processor time, which a busy machine does not change."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def has_norms(model: nn.Module) -> bool:
    """Whether there are statistics to compute anew."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def renormed(model: nn.Module, batches: Sequence[Any]) -> nn.Module:
    """A copy whose batch norms hold the exact averages over the batches."""
    model = copy.deepcopy(model)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
    with torch.no_grad():
        for batch in batches:
            call_model(model, batch)
    return model.eval()
