"""Second moments of inputs and targets, summed batch by batch in a memory that does not grow with the samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        self._sums: tuple[Tensor, ...] = ()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add rows: x is (groups, rows, inputs), y is (groups, rows, outputs)."""
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        y = y.to(x.dtype)
        if self._shifts is None:
            self._shifts = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
        x, y = x - self._shifts[0], y - self._shifts[1]
        parts = (_gram(x), y.transpose(1, 2) @ x, x.sum(1), y.sum(1), y.square().sum(1))
        if self._sums:
            for total, part in zip(self._sums, parts, strict=True):
                total.add_(part)
        else:
            self._sums = tuple(part.double() for part in parts)
        self.count += x.shape[1]

    def moments(self) -> Moments | None:
        """What the rows give (None: there were none, or they are not finite); they are gone afterwards."""
        if self._shifts is None or not all(bool(torch.isfinite(s).all()) for s in self._sums):
            return None
        cov, cross, x, y, yy = (s.div_(self.count) for s in self._sums)  # in place: these may be large
        self._sums = ()
        shift_x, shift_y = (s.squeeze(1).double() for s in self._shifts)
        cov.baddbmm_(x.unsqueeze(2), x.unsqueeze(1), alpha=-1)
        cross.baddbmm_(y.unsqueeze(2), x.unsqueeze(1), alpha=-1)
        return Moments(self.count, x + shift_x, y + shift_y, cov, cross, (yy - y.square()).clamp_min(0))


WIDE, BLOCKS = 512, 4


def _gram(x: Tensor) -> Tensor:
    """``x.mT @ x``; the lower half of what is wide is copied from the upper one."""
    if x.shape[2] < WIDE:
        return x.mT @ x
    parts = x.tensor_split(BLOCKS, 2)
    grid = [[a.mT @ b if k <= j else None for j, b in enumerate(parts)] for k, a in enumerate(parts)]
    full = [[grid[j][k].mT if b is None else b for j, b in enumerate(row)] for k, row in enumerate(grid)]  # type: ignore[union-attr]
    return torch.cat([torch.cat(row, 2) for row in full], 1)
