"""Running statistics of batch norms, computed anew on the samples: exactly, and each after the norms before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from prunus.distributed import copied, gathered
from prunus.higher import SeesInside
from prunus.repair.chains import BATCH_NORMS
from prunus.repair.crowd import Heap, Place, crowds
from prunus.repair.lanes import Lane
from prunus.repair.samples import LEAST_SAMPLES, Batch, held_share
from prunus.repair.sites import arguments
from prunus.repair.sweep import Run
from prunus.repair.twins import sharing
from prunus.repair.watch import guarded


@dataclass(frozen=True)
class _At:
    """A batch norm that is about to run."""

    nth: int
    x: Tensor
    mean: Tensor
    var: Tensor


class _Watch(SeesInside):
    def __init__(self, lane: Lane[_At]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lane, self.nth = lane, -1

    def see(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        self.lane.check()
        if func.overloadpacket.__name__ in BATCH_NORMS:
            a = arguments(func, args, kwargs)
            if a["running_mean"] is not None and not a.get("training", a.get("train")):
                self.nth += 1
                self.lane.halt(_At(self.nth, a["input"], a["running_mean"], a["running_var"]))
        return func(*args, **kwargs)


def reestimate(model: nn.Module, batches: Sequence[Batch], run: Run, held: Sequence[int], room: int) -> int:
    """Set the running statistics of all batch norms to those of the samples that are not held out.

    A norm that runs several times gets those of all its runs so far.

    Args:
        model: its buffers are written to.
        batches: the samples.
        run: calls a model on inputs.
        held: bytes that one batch holds at each norm, in the order in which they run.
        room: bytes that batches may hold together while they wait for each other.

    Returns:
        how many norms were set.
    """
    seen: dict[int, list[_Part]] = {}
    batches = [batch for batch in batches if not batch.held]
    enough = next(
        (k for k, n in enumerate(accumulate(b.count for b in batches), 1) if n >= LEAST_SAMPLES), len(batches)
    )
    lanes: list[Lane[_At]] = []
    heap = Heap()
    with guarded():
        try:
            for nth, count in enumerate(crowds([Place(n) for n in held], len(batches), enough, room)):
                for lane in lanes[count:]:
                    lane.close()
                del lanes[count:]
                lanes += [Lane(_runner(sharing(model), batch.inputs, run)) for batch in batches[len(lanes) : count]]
                for lane in lanes:
                    while not lane.over and (lane.stop is None or lane.stop.nth < nth):
                        lane.advance()
                    heap.tidy()
                pairs = zip(batches, lanes, strict=False)
                here = [(b, lane.stop) for b, lane in pairs if lane.stop is not None and lane.stop.nth == nth]
                found = [part for own in gathered(_parts(here), f"batch norm {nth}") for part in own]
                if here and here[0][1] is not None:
                    _set(here[0][1], seen.setdefault(id(here[0][1].mean), []), found)
            copied([b for b in model.buffers() if b.is_floating_point()], "the end of batch norms")
            return int(max(gathered(len(seen), "the number of batch norms")))
        finally:
            for lane in lanes:
                lane.close()


def _runner(model: nn.Module, inputs: Any, run: Run) -> Any:
    def go(lane: Lane[_At]) -> Any:
        with guarded(), _Watch(lane):
            return run(model, inputs)

    return go


_Part = tuple[int, Tensor, Tensor]  # how many values, their mean and their variance


def _parts(stops: Sequence[tuple[Batch, _At | None]]) -> list[_Part]:
    """What each batch says about a norm."""
    parts: list[_Part] = []
    for batch, at in stops:
        if at is None:
            continue
        n = at.x.shape[0]
        stay = n - held_share(n) if batch.held is None else n * (not batch.held)
        x = at.x[:stay]
        if batch.mask is not None and batch.mask.shape == (n, *x.shape[2:]):
            x = x.movedim(1, -1)[batch.mask[:stay]]
        if x.numel():
            x = x if x.dtype == torch.float64 else x.float()
            var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
            parts.append((x.numel() // x.shape[1], mean.double(), var.double()))
    return parts


def _set(norm: _At, parts: list[_Part], more: Sequence[_Part]) -> None:
    """Mean and variance over all batches and places, as one; ``more`` is added to the ``parts`` of earlier runs."""
    parts += [(n, m.to(norm.mean.device), v.to(norm.mean.device)) for n, m, v in more]
    total = sum(n for n, _, _ in parts)
    if total < 2:
        return
    mean = sum((m * n for n, m, _ in parts), torch.zeros(())) / total
    var = sum(((v + (m - mean).square()) * n for n, m, v in parts), torch.zeros(())) / (total - 1)
    if bool(torch.isfinite(mean).all() and torch.isfinite(var).all()):
        norm.mean.copy_(mean)
        norm.var.copy_(var)
