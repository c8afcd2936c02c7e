"""Schedules: the share that is gone after each step, as a list that begins with 0 and ends with the whole share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from prunus.errors import InputError

Schedule = Callable[[float, int], Sequence[float]]
"""``(ratio, steps) -> shares gone after 0, 1, ... steps``."""


def linear_scheduler(pruning_ratio: float, steps: int) -> list[float]:
    """The share grows by the same amount in every step: ``[0, ratio / steps, ..., ratio]``.

    Example:
        >>> linear_scheduler(0.5, 5)
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    """
    return [pruning_ratio * k / steps for k in range(steps + 1)]


def cosine_scheduler(ratio: float, steps: int) -> list[float]:
    """The share grows slowly, then fast, then slowly: half a period of a cosine.

    Example:
        >>> [round(share, 3) for share in cosine_scheduler(0.5, 4)]
        [0.0, 0.073, 0.25, 0.427, 0.5]
    """
    return [ratio * (1 - math.cos(math.pi * k / steps)) / 2 for k in range(steps + 1)]


def exponential_scheduler(ratio: float, steps: int) -> list[float]:
    """Every step removes the same share of what is left: large steps first.

    Example:
        >>> exponential_scheduler(0.75, 2)
        [0.0, 0.5, 0.75]
    """
    return [1 - (1 - ratio) ** (k / steps) for k in range(steps)] + [ratio]


def cubic_scheduler(ratio: float, steps: int) -> list[float]:
    """Large steps first, then ever smaller ones.

    Source: Zhu and Gupta 2017, "To prune, or not to prune" (arXiv 1710.01878), equation 1.

    Example:
        >>> cubic_scheduler(0.5, 2)
        [0.0, 0.4375, 0.5]
    """
    return [ratio * (1 - (1 - k / steps) ** 3) for k in range(steps + 1)]


def shares_of(schedule: Schedule, ratio: float, steps: int) -> list[float]:
    """What a schedule says, checked.

    Raises:
        InputError: it does not give ``steps + 1`` numbers that do not fall, from 0 on and below 1.
    """
    name = getattr(schedule, "__name__", repr(schedule))
    try:
        shares = [float(share) for share in schedule(ratio, steps)]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"iterative_pruning_ratio_scheduler={name} must give numbers for (ratio, steps): {error}"
        ) from error
    if len(shares) != steps + 1:
        raise InputError(
            f"iterative_pruning_ratio_scheduler={name} gave {len(shares)} shares for {steps} step(s); give "
            f"{steps + 1}: after 0, 1, ... {steps} steps"
        )
    if not all(0 <= share < 1 for share in shares) or any(b < a for a, b in pairwise(shares)):
        raise InputError(
            f"iterative_pruning_ratio_scheduler={name} gave {shares}; shares must be at least 0, below 1, and not fall"
        )
    return shares


__all__ = [
    "Schedule",
    "cosine_scheduler",
    "cubic_scheduler",
    "exponential_scheduler",
    "linear_scheduler",
    "shares_of",
]
