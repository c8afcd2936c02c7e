"""Block elimination: what it costs to remove columns of a weight when the others make up for them as well as they can.

For a weight W (outputs, columns) whose inputs have covariance H, with G the inverse of H, removing the columns R costs
``sum over o of f[o] W[o, R] inv(G[R, R]) W[o, R]' / 2``, changes W to ``W - W[:, R] inv(G[R, R]) G[R, :]``, and G to
``G - G[:, R] inv(G[R, R]) G[R, :]``. (Hassibi & Stork 1993, for blocks; Kurtic et al. 2023, ZipLM, arXiv 2302.04089.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Consumer:
    """A weight that reads a group.

    ``weight`` is (blocks, outputs, columns), each output already times the root of what it counts; ``inverse`` (blocks,
    columns, columns) is that of the covariance of what it reads; ``columns[u]`` belong to unit ``u``. All in float64.
    """

    weight: torch.Tensor
    inverse: torch.Tensor
    columns: torch.Tensor

    def costs(self, units: torch.Tensor) -> torch.Tensor:
        """What it costs to remove each of ``units`` alone."""
        columns = self.columns[units]
        blocks = self.inverse[:, columns[:, :, None], columns[:, None, :]]  # (blocks, units, own, own)
        own = self.weight[:, :, columns].permute(0, 2, 3, 1)  # (blocks, units, own, outputs)
        return _squares(blocks, own).sum(dim=(0, 2, 3)) / 2

    def copy(self) -> Consumer:
        """The same, to be changed in place."""
        return Consumer(self.weight.clone(), self.inverse.clone(), self.columns)

    def remove(self, units: torch.Tensor) -> torch.Tensor:
        """Remove ``units`` together, in place (their columns become zero), and give what that costs."""
        gone = self.columns[units].flatten()
        factor = torch.linalg.cholesky(self.inverse[:, gone[:, None], gone[None, :]])
        rows = torch.linalg.solve_triangular(factor, self.inverse[:, gone], upper=False)
        weights = torch.linalg.solve_triangular(factor, self.weight[:, :, gone].mT, upper=False)
        self.inverse.baddbmm_(rows.mT, rows, alpha=-1)
        self.weight.baddbmm_(weights.mT, rows, alpha=-1)
        return weights.square().sum() / 2


def _squares(blocks: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The squares whose sum is ``own' inv(blocks) own``."""
    if blocks.shape[-1] == 1:
        return own.square() / blocks
    return torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), own, upper=False).square()


def inverse_of(covariance: torch.Tensor, ridge: float) -> torch.Tensor:
    """The inverse of ``covariance`` with a share ``ridge`` of each variance added, so that scales do not matter."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    floor = 1e-10 * variance.mean(dim=-1, keepdim=True) + torch.finfo(torch.float64).tiny
    damped = covariance + torch.diag_embed(ridge * variance.clamp_min(0) + floor)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool((failed > 0).any()):  # rounding made it indefinite
        damped = damped + torch.diag_embed((1e-4 * variance.mean(dim=-1, keepdim=True)).expand_as(variance))
        factor = torch.linalg.cholesky(damped)
    return torch.cholesky_inverse(factor)


def eliminate(consumers: Sequence[Consumer], extra: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove all units, cheapest first, at most ``steps`` times some at once: their order, and what each adds.

    Several consumers go in lock-step; ``extra`` (units,) is added to the cost of each unit. Of units that go at once
    the joint cost is exact, and shared out in proportion to what each costs alone.
    """
    consumers = [consumer.copy() for consumer in consumers]
    left = torch.arange(len(extra), device=extra.device)
    many = -(-len(extra) // max(steps, 1))
    order, added = [], []
    while len(left):
        alone = extra[left]
        for consumer in consumers:
            alone = alone + consumer.costs(left)
        ranks = alone.argsort(stable=True)
        now = left[ranks[:many]]
        joint = extra[now].sum()
        for consumer in consumers:
            joint = joint + consumer.remove(now)
        share = alone[ranks[:many]]
        order.append(now)
        added.append(joint * share / share.sum() if float(share.sum()) > 0 else share)
        left = left[ranks[many:]].sort().values
    return torch.cat(order), torch.cat(added)
