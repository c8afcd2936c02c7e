"""What all criteria share: the scores of each layer of a group are reduced to one per unit, and made comparable.

A criterion is called with a group and returns one score for each of its units, or None for "cannot say". Units with low
scores go first.
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
    """Base of criteria that users write: implement ``__call__(group) -> scores``.

    ``comparable`` says that scores are in units of the loss, so that those of different groups compare as they are.
    """

    comparable = False

    def __call__(self, group: ScoredGroup) -> torch.Tensor | None:
        """One score for each unit of the group, or None."""
        raise NotImplementedError(f"{type(self).__name__} does not implement __call__(group)")


class LayerwiseImportance(Importance):
    """Scores each tensor of a group by itself, reduces over them, and normalises over the group's units.

    A criterion of this kind says in :meth:`slices` what each unit's slices of one tensor are worth.

    Args:
        group_reduction: over the tensors of a group: mean, sum, max, prod, first (the group's first tensor only), gate
            (its last only), or None: all of them, as a matrix (tensors, units).
        normalizer: over the units of a group: mean, sum, max, standarization, gaussian, lamp, sentinel_K (divide by the
            K-th largest score, or, for K below 1, by the score at that share of the ascending scores), a callable, or
            None.
        bias: also count biases.
        target_types: count only parameters of modules of these types (default: all modules).

    Raises:
        InputError: a reduction or normaliser is not known.
    """

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: Normalizer = "mean",
        bias: bool = False,
        target_types: Sequence[type] = DEFAULT_TYPES,
    ) -> None:
        if group_reduction is not None and group_reduction not in _REDUCTIONS:
            raise InputError(f"group_reduction={group_reduction!r}: choose one of {sorted(_REDUCTIONS)}, or None")
        normalizer_of(normalizer)
        self.group_reduction = group_reduction
        self.normalizer = normalizer
        self.bias = bias
        self.target_types = tuple(target_types)

    def slices(self, member: Member) -> torch.Tensor | None:
        """What each unit's slices of one tensor are worth, one number per unit; None: this tensor cannot say."""
        raise NotImplementedError(f"{type(self).__name__} does not implement slices(member)")

    def counts(self, member: Member) -> bool:
        """Whether a tensor takes part: parameters of the target types, biases on request."""
        if not isinstance(member.tensor, nn.Parameter) or (member.is_bias and not self.bias):
            return False
        return isinstance(member.owner, self.target_types)

    @torch.no_grad()
    def __call__(self, group: ScoredGroup) -> torch.Tensor | None:
        """One score for each unit, or None if no parameter of the group counts.

        Raises:
            InputError: the group is empty.
        """
        if self.group_reduction is not None:
            reduce = _REDUCTIONS[self.group_reduction]
            return by_parts(
                group, lambda ms: None if (found := self._layers(ms)) is None else reduce(found), self.normalizer
            )
        check_not_empty(group)
        parts = [(p, found) for p, ms in group.parts if (found := self._layers(ms)) is not None]
        return normalize(_joined(parts, group.size), self.normalizer) if parts else None

    def _layers(self, members: Sequence[Member]) -> torch.Tensor | None:
        """The scores that each tensor gives its units, (tensors, units)."""
        chosen = [found for m in members if self.counts(m) and (found := self.slices(m)) is not None]
        return torch.stack(chosen) if chosen else None


def by_parts(
    group: ScoredGroup, score: Callable[[list[Member]], torch.Tensor | None], normalizer: Normalizer
) -> torch.Tensor | None:
    """The normalised scores of a group, part by part; zero where a part cannot say, None where none can.

    Raises:
        InputError: the group is empty.
    """
    check_not_empty(group)
    parts = [(places, found) for places, members in group.parts if (found := score(members)) is not None]
    if not parts:
        return None
    places, found = parts[0]
    if len(places) == group.size:
        return normalize(found.float().cpu(), normalizer)
    scores = torch.zeros(group.size, dtype=torch.float32)
    for places, found in parts:
        scores[places] = found
    return normalize(scores, normalizer)


def check_not_empty(group: ScoredGroup) -> None:
    """Refuse a group without units.

    Raises:
        InputError: the group is empty.
    """
    if group.size == 0:
        raise InputError("the group has no units left, so there is nothing to score: rebuild it from the graph")


def _joined(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], size: int) -> torch.Tensor:
    """The scores of all tensors as a matrix (tensors, units); zero where a unit does not cut that many."""
    found = torch.zeros(max(len(layers) for _, layers in parts), size, dtype=torch.float32)
    for places, layers in parts:
        found[: len(layers), places] = layers
    return found


def to_units(positions: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Sums over each unit's positions: ``positions`` (..., size) and ``index`` (units, per unit) give (..., units)."""
    index = index.to(positions.device)
    if index.shape[1] == 1:
        return positions.index_select(-1, index.reshape(-1)).float().cpu()
    return positions[..., index].sum(dim=-1).float().cpu()


def along(values: torch.Tensor, dim: int) -> torch.Tensor:
    """The sum over all dims but one: over those before it first, which runs along memory."""
    summed = values.sum(dim=tuple(range(dim))) if dim else values
    return summed.sum(dim=tuple(range(1, summed.dim()))) if summed.dim() > 1 else summed


_REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda s: s.mean(dim=0),
    "sum": lambda s: s.sum(dim=0),
    "max": lambda s: s.amax(dim=0),
    "prod": lambda s: s.prod(dim=0),
    "first": lambda s: s[0],
    "gate": lambda s: s[-1],
}


def normalize(scores: torch.Tensor, how: Normalizer) -> torch.Tensor:
    """Make the scores of different groups comparable.

    Raises:
        InputError: ``how`` names no normaliser.

    Example:
        >>> normalize(torch.tensor([1.0, 3.0]), "mean")
        tensor([0.5000, 1.5000])
    """
    return normalizer_of(how)(scores)


def normalizer_of(how: Normalizer) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that a normaliser's name stands for.

    Raises:
        InputError: ``how`` names no normaliser.
    """
    if how is None:
        return lambda scores: scores
    if callable(how):
        return how
    if how in _NORMALIZERS:
        return _NORMALIZERS[how]
    rank = how.removeprefix("sentinel_") if how.startswith("sentinel_") else ""
    if rank.replace(".", "", 1).isdigit():
        return lambda scores: scores / (_sentinel(scores, float(rank)) + TINY)
    raise InputError(f"normalizer={how!r}: choose one of {', '.join(_NORMALIZERS)}, sentinel_K, a callable or None")


def _sentinel(scores: torch.Tensor, rank: float) -> torch.Tensor:
    """The ``rank``-th largest score; for a rank below 1, the one at that share of the ascending scores."""
    ascending = scores.flatten().sort().values
    place = int(rank * len(ascending)) if rank < 1 else len(ascending) - int(rank)
    return ascending[max(place, 0)]


def _lamp(scores: torch.Tensor) -> torch.Tensor:
    """Lee et al. 2021 (arXiv 2010.07611): each score over the sum of those that are not smaller."""
    falling, order = scores.sort(descending=True)
    return torch.empty_like(scores).scatter_(-1, order, falling / (falling.cumsum(-1) + TINY))


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
