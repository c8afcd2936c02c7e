"""Scores of groups: how much is lost when a unit goes. Low scores go first.

A criterion is called with a group and returns one score for each of its units, or None for "cannot say".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

import torch
from torch import nn

from prunus.errors import InputError
from prunus.importance.members import Member

Normalizer: TypeAlias = "str | Callable[[torch.Tensor], torch.Tensor] | None"

TINY = 1e-12
DEFAULT_TYPES: tuple[type, ...] = (nn.Module,)


class ScoredGroup(Protocol):
    """What a criterion needs of a group."""

    @property
    def parts(self) -> Sequence[tuple[torch.Tensor, list[Member]]]:
        """Units of one signature: their places in the group, and their members."""

    @property
    def size(self) -> int:
        """The number of units."""


class Importance:
    """Base of criteria that users write: implement ``__call__(group) -> scores``."""

    def __call__(self, group: ScoredGroup) -> torch.Tensor | None:
        """One score for each unit of the group, or None."""
        raise NotImplementedError(f"{type(self).__name__} does not implement __call__(group)")


class MagnitudeImportance(Importance):
    """The p-norm (to the power p) of everything that goes with a unit, averaged over the layers of its group.

    Args:
        p: the power, 2 for squared weights, 1 for absolute ones.
        group_reduction: over the layers of a group: mean, sum, max, prod or first (the group's first layer only).
        normalizer: over the units of a group: mean, sum, max, standarization, gaussian, lamp, sentinel_K (divide by
            the K-th largest), a callable, or None.
        bias: also count biases.
        target_types: count only parameters of modules of these types (default: all modules).

    Source: Li et al. 2017 (arXiv 1608.08710) for single layers; Fang et al. 2023 (DepGraph, arXiv 2301.12900), section
    3.3, for the sum over the coupled layers.

    Example:
        >>> import torch, prunus as tp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> DG = tp.DependencyGraph().build_dependency(model, torch.randn(1, 4))
        >>> group = next(DG.get_all_groups())
        >>> tp.importance.MagnitudeImportance(p=2)(group).shape
        torch.Size([3])
    """

    def __init__(
        self,
        p: int = 2,
        group_reduction: str = "mean",
        normalizer: Normalizer = "mean",
        bias: bool = False,
        target_types: Sequence[type] = DEFAULT_TYPES,
    ) -> None:
        if group_reduction not in _REDUCTIONS:
            raise InputError(f"group_reduction={group_reduction!r}: choose one of {sorted(_REDUCTIONS)}")
        self.p = p
        self.group_reduction = group_reduction
        self.normalizer = normalizer
        self.bias = bias
        self.target_types = tuple(target_types)

    @torch.no_grad()
    def __call__(self, group: ScoredGroup) -> torch.Tensor | None:
        """One score for each unit, or None if no parameter of the group counts."""
        scores = torch.zeros(group.size, dtype=torch.float32)
        counted = False
        for places, members in group.parts:
            chosen = [self._slices(m) for m in members if self._counts(m)]
            if chosen:
                counted = True
                scores[places] = _REDUCTIONS[self.group_reduction](torch.stack(chosen))
        return normalize(scores, self.normalizer) if counted else None

    def _counts(self, member: Member) -> bool:
        if not isinstance(member.tensor, nn.Parameter) or (member.is_bias and not self.bias):
            return False
        return isinstance(member.owner, self.target_types)

    def _slices(self, member: Member) -> torch.Tensor:
        """The sum over each unit's slices."""
        weight = member.tensor.detach().float().abs()
        others = [d for d in range(weight.dim()) if d != member.dim]
        powers = weight.square() if self.p == 2 else weight if self.p == 1 else weight.pow(self.p)
        positions = powers.sum(dim=others) if others else powers
        return positions.cpu()[member.index].sum(dim=1)


class RandomImportance(Importance):
    """Uniform random scores, from torch's generator."""

    def __call__(self, group: ScoredGroup) -> torch.Tensor:
        """One random score for each unit."""
        return torch.rand(group.size, dtype=torch.float32)


_REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda s: s.mean(dim=0),
    "sum": lambda s: s.sum(dim=0),
    "max": lambda s: s.amax(dim=0),
    "prod": lambda s: s.prod(dim=0),
    "first": lambda s: s[0],
}


def normalize(scores: torch.Tensor, how: Normalizer) -> torch.Tensor:
    """Make the scores of different groups comparable.

    Raises:
        InputError: ``how`` names no normaliser.
    """
    if how is None:
        return scores
    if callable(how):
        return how(scores)
    if how in _NORMALIZERS:
        return _NORMALIZERS[how](scores)
    if how.startswith("sentinel_") and how.removeprefix("sentinel_").isdigit():
        rank = min(int(how.removeprefix("sentinel_")), len(scores)) - 1
        return scores / (scores.sort(descending=True).values[max(rank, 0)] + TINY)
    raise InputError(f"normalizer={how!r}: choose one of {', '.join(_NORMALIZERS)}, sentinel_K, a callable or None")


def _lamp(scores: torch.Tensor) -> torch.Tensor:
    """Lee et al. 2021 (arXiv 2010.07611): each score over the sum of those that are not smaller."""
    order = scores.argsort(descending=True)
    found = torch.empty_like(scores)
    found[order] = scores[order] / (scores[order].cumsum(0) + TINY)
    return found


def _standardize(scores: torch.Tensor) -> torch.Tensor:
    return (scores - scores.min()) / (scores.max() - scores.min() + TINY)


_NORMALIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda s: s / (s.sum() + TINY),
    "mean": lambda s: s / (s.mean() + TINY),
    "max": lambda s: s / (s.max() + TINY),
    "standarization": _standardize,
    "standardization": _standardize,
    "gaussian": lambda s: (s - s.mean()) / (s.std(correction=0) + TINY),
    "lamp": _lamp,
}
