"""Ridge regression towards the weights that are there, its strength chosen on rows that were held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from prunus.repair.moments import Moments

TINY = 1e-12


@dataclass(frozen=True)
class Fit:
    """Weights (groups, outputs, inputs) and bias (groups, outputs), and their error on the held-out rows."""

    weight: Tensor
    bias: Tensor
    ridge: float | None  # None: only the bias changed
    before: float  # mean squared error over the variance of the targets
    after: float


def error_of(weight: Tensor, bias: Tensor, held: Moments) -> float:
    """The mean squared error of ``weight @ x + bias``, as a share of the variance of the targets.

    Args:
        weight: (groups, outputs, inputs).
        bias: (groups, outputs).
        held: moments of the rows to judge by.
    """
    gap = held.mean_y - bias - torch.einsum("goi,gi->go", weight, held.mean_x)
    explained = ((weight @ held.cov - 2 * held.cross) * weight).sum(2)
    total = (held.var_y + explained + gap.square()).sum()
    return max(0.0, float(total)) / max(float(held.var_y.sum()), TINY)


def refit(
    weight: Tensor, bias: Tensor | None, fit: Moments, held: Moments, ridges: Sequence[float], free_bias: bool
) -> Fit:
    """The best of several ridge regressions, judged on the held-out moments.

    Solved is ``min |y - W x - b|^2 + ridge * m * |W - weight|^2`` with m the mean square of the inputs.

    Args:
        weight: the weights that are there, (groups, outputs, inputs).
        bias: the bias that is there, (groups, outputs), or None for zeros.
        fit: moments of the rows to fit.
        held: moments of the rows to judge by.
        ridges: the strengths to choose from, rising.
        free_bias: whether the bias may change.
    """
    weight = weight.double()
    old = weight.new_zeros(weight.shape[:2]) if bias is None else bias.double()
    before = error_of(weight, old, held)
    solve = _solver(weight, old, fit, free_bias)
    tried: dict[int, Fit] = {}

    def at(k: int) -> float:
        """The error with the k-th ridge, found out at most once."""
        if not 0 <= k < len(ridges):
            return inf
        if k not in tried:
            new = solve(ridges[k])
            shift = _bias(new, old, fit, free_bias)
            after = inf if new is None else error_of(new, shift, held)
            tried[k] = Fit(weight if new is None else new, shift, ridges[k], before, after)
        return tried[k].after

    here = len(ridges) // 2
    while ridges and min(at(here - 1), at(here + 1)) < at(here):  # the error has one valley
        here += 1 if at(here + 1) < at(here - 1) else -1
    shift = _bias(weight, old, fit, free_bias)
    plain = Fit(weight, shift, None, before, error_of(weight, shift, held))
    keep = Fit(weight, old, None, before, before)
    return min((keep, plain, *tried.values()), key=lambda f: f.after)


def _bias(weight: Tensor | None, old: Tensor, fit: Moments, free: bool) -> Tensor:
    """The bias that makes the means agree."""
    return fit.mean_y - torch.einsum("goi,gi->go", weight, fit.mean_x) if free and weight is not None else old


def _solver(weight: Tensor, bias: Tensor, fit: Moments, free_bias: bool) -> Callable[[float], Tensor | None]:
    """From a ridge to the weights; None where they cannot be computed."""
    gram, cross = fit.cov, fit.cross
    if not free_bias:
        gram = gram + fit.mean_x.unsqueeze(2) * fit.mean_x.unsqueeze(1)
        cross = cross + (fit.mean_y - bias).unsqueeze(2) * fit.mean_x.unsqueeze(1)
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)
    missing = (cross - weight @ gram).transpose(1, 2)

    def solve(ridge: float) -> Tensor | None:
        if not bool((scale > 0).any()):
            return None
        factor = gram.clone()
        factor.diagonal(dim1=1, dim2=2).add_((ridge * scale.clamp_min(TINY)).unsqueeze(1))
        factor, failed = torch.linalg.cholesky_ex(factor)
        return None if bool(failed.any()) else weight + torch.cholesky_solve(missing, factor).transpose(1, 2)

    return solve
