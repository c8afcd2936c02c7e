"""Second moments of inputs and targets, summed batch by batch in a memory that does not grow with the samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.distributed import count, summed


@dataclass(frozen=True)
class Moments:
    """Means and covariances of rows of inputs x and targets y, for each of g groups."""

    count: int
    mean_x: Tensor  # (g, d)
    mean_y: Tensor  # (g, o)
    cov: Tensor  # (g, d, d)
    cross: Tensor  # (g, o, d): targets with inputs
    var_y: Tensor  # (g, o)


class Sums:
    """Sums of products about a point near the mean, in float64; what is multiplied is float32 or better."""

    def __init__(self) -> None:
        self.count = 0
        self._shifts: tuple[Tensor, Tensor] | None = None
        self._panels: list[Tensor] = []  # of inputs with inputs: rows from the diagonal on, which is all there is to it
        self._sums: tuple[Tensor, ...] = ()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: x is (groups, rows, inputs), y is (groups, rows, outputs)."""
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        y = y.to(x.dtype)
        if self._shifts is None:
            self._shifts = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - self._shifts[0], y - self._shifts[1]
        new = not self._sums
        for k, start in enumerate(range(0, x.shape[2], PANEL)):
            part = (x[:, :, start : start + PANEL].mT @ x[:, :, start:]).double()
            if new:
                self._panels.append(part)
            else:
                self._panels[k].add_(part)
        parts = (y.mT @ x, x.sum(1), y.sum(1), y.square().sum(1))
        if new:
            self._sums = tuple(part.double() for part in parts)
        else:
            for total, part in zip(self._sums, parts, strict=True):
                total.add_(part.double())  # adding numbers of another type is slow
        self.count += x.shape[1]

    def moments(self, weight: Tensor | None = None, place: str = "") -> Moments | None:
        """What the rows give (None: there were none, or they are not finite); they are gone afterwards.

        Args:
            weight: (groups, outputs, inputs), whose rows these are: those of all ranks count.
            place: a name for the place in the work where ranks meet.
        """
        found = self._own()
        if weight is not None and count() > 1:
            found = _over_ranks(found, weight, place)
        if found is None or not all(bool(torch.isfinite(m).all()) for m in (found.cov, found.cross, found.var_y)):
            return None
        return found

    def _own(self) -> Moments | None:
        """Those of this rank, finite or not."""
        if self._shifts is None:
            return None
        cov = self._gram().div_(self.count)
        cross, x, y, yy = (s.div_(self.count) for s in self._sums)  # in place: these may be large
        self._sums = ()
        shift_x, shift_y = (s.squeeze(1).double() for s in self._shifts)
        cov.baddbmm_(x.unsqueeze(2), x.unsqueeze(1), alpha=-1)
        cross.baddbmm_(y.unsqueeze(2), x.unsqueeze(1), alpha=-1)
        return Moments(self.count, x + shift_x, y + shift_y, cov, cross, (yy - y.square()).clamp_min(0))

    def _gram(self) -> Tensor:
        """The panels and their mirror images as one; they are gone afterwards."""
        if len(self._panels) == 1:
            return self._panels.pop()
        groups, _, size = self._panels[0].shape
        full = self._panels[0].new_empty(groups, size, size)
        while self._panels:
            panel = self._panels.pop()
            start = size - panel.shape[2]
            stop = start + panel.shape[1]
            full[:, start:stop, start:] = panel
            full[:, stop:, start:stop] = panel[:, :, stop - start :].mT
        return full


def _over_ranks(own: Moments | None, weight: Tensor, place: str) -> Moments | None:
    """The moments of the rows of all ranks."""
    if own is None:
        groups, outputs, inputs = weight.shape
        sizes = ((groups, inputs), (groups, outputs), (groups, inputs, inputs), (groups, outputs, inputs))
        zeros = [torch.zeros(s, dtype=torch.float64, device=weight.device) for s in (*sizes, sizes[1])]
        own = Moments(0, *zeros)
    n = torch.tensor([float(own.count)], dtype=torch.float64, device=weight.device)
    mean_x, mean_y = own.mean_x * n, own.mean_y * n
    total = n.clone()
    summed([total, mean_x, mean_y], f"the means at {place}")
    if not total:
        return None
    mean_x, mean_y = mean_x / total, mean_y / total
    x, y = own.mean_x - mean_x, own.mean_y - mean_y
    sums = [
        own.cov.baddbmm_(x.unsqueeze(2), x.unsqueeze(1)).mul_(n),
        own.cross.baddbmm_(y.unsqueeze(2), x.unsqueeze(1)).mul_(n),
        own.var_y.add_(y.square()).mul_(n),
    ]
    summed(sums, f"the second moments at {place}")
    cov, cross, var_y = (s.div_(total) for s in sums)
    return Moments(int(total), mean_x, mean_y, cov, cross, var_y)


PANEL = 256  # of rows: half of the products are left out then, and the rest keeps the processor busy
