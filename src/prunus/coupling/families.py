"""Families: lanes of units that shrink together, while constraints join and pin them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd

import numpy as np
from numpy.typing import NDArray

from prunus.labels import Ids


@dataclass(frozen=True)
class Family:
    """Lanes of units that shrink together: ``count`` bundles of ``len(lane) // count`` units of each lane.

    ``step`` is how many of the smallest possible bundles must go at once to keep the model's sizes whole numbers;
    ``least`` is how many bundles must stay.
    """

    lanes: tuple[Ids, ...]
    coarse: bool
    step: int = 1
    least: int = 1

    @cached_property
    def count(self) -> int:
        """The number of bundles."""
        return gcd(*map(len, self.lanes)) // self.step

    @cached_property
    def units(self) -> Ids:
        """Every unit of the family."""
        return np.concatenate(self.lanes)

    def left(self, living: NDArray[np.bool_]) -> tuple[list[Ids], list[int]]:
        """The living units of each lane that has any, and how many of them a bundle takes now.

        Lanes lose units with other families too (the channels of a stream whose width is heads times head dims).
        """
        lanes = [units for lane in self.lanes if (units := lane[living[lane]]).size]
        count = gcd(*map(len, lanes)) // self.step
        return lanes, [len(units) // max(count, 1) for units in lanes]


@dataclass
class Draft:
    """Families while constraints join and pin them: ``family_of[lane]``, -1 for a lane that has to stay."""

    lane_of: Ids
    lanes: list[Ids]
    family_of: Ids
    why: dict[int, str] = field(default_factory=dict)
    step: dict[int, int] = field(default_factory=dict)  # family -> see Family.step
    least: dict[int, int] = field(default_factory=dict)  # family -> see Family.least

    def members(self, family: int) -> list[int]:
        """The lanes of a family."""
        return (self.family_of == family).nonzero()[0].tolist()

    def join(self, families: Iterable[int]) -> None:
        """Make one family of several."""
        chosen = sorted(set(families))
        for other in chosen[1:]:
            self.family_of[self.family_of == other] = chosen[0]

    def pin(self, family: int, why: str) -> None:
        """Let all lanes of a family stay."""
        for lane in self.members(family):
            self.why[lane] = why
        self.family_of[self.family_of == family] = -1
