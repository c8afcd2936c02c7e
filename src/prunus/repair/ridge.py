"""Ridge regression towards the weights that are there, its strength chosen on rows that were held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from prunus.distributed import copied, count
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
    return _with_bias(_without_mean(weight, held), weight, bias, held)


def _without_mean(weight: Tensor, held: Moments) -> Tensor:
    """The variance of the errors, (groups, outputs)."""
    return held.var_y + ((weight @ held.cov).sub_(held.cross, alpha=2) * weight).sum(2)


def _with_bias(spread: Tensor, weight: Tensor, bias: Tensor, held: Moments) -> float:
    gap = held.mean_y - bias - torch.einsum("goi,gi->go", weight, held.mean_x)
    return max(0.0, float((spread + gap.square()).sum())) / max(float(held.var_y.sum()), TINY)


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
    spread = _without_mean(weight, held)
    before = _with_bias(spread, weight, old, held)
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
    for step in (-1, 1):  # the error has one valley
        if not ridges or here != len(ridges) // 2:
            break
        while at(here + step) < at(here):
            here += step
    shift = _bias(weight, old, fit, free_bias)
    plain = Fit(weight, shift, None, before, _with_bias(spread, weight, shift, held))
    keep = Fit(weight, old, None, before, before)
    return min((keep, plain, *tried.values()), key=lambda f: f.after)


def as_on_first_rank(fit: Fit, place: str) -> Fit:
    """The same on all ranks of ``torch.distributed``, whatever their processors make of the last bits.

    Args:
        fit: what this rank found.
        place: a name for the place in the work where ranks meet.
    """
    if count() == 1:
        return fit
    ridge = -1.0 if fit.ridge is None else fit.ridge
    numbers = torch.tensor([ridge, fit.before, fit.after], dtype=torch.float64, device=fit.weight.device)
    weight, bias = fit.weight.clone(), fit.bias.clone()
    copied([numbers, weight, bias], f"the fit of {place}")
    ridge, before, after = numbers.tolist()
    return Fit(weight, bias, None if ridge < 0 else ridge, before, after)


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
