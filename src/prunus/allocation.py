"""Allocation: in which order single removals are made, over all families, when a budget has to be met.

Every family is a *ladder*: its bundles, least important first, taken in steps that its widths allow. An allocation
gives each step a key; the steps in ascending order of key are a *course*, and each prefix of it is a choice of what
goes. All take the least important of a family first; they differ in what they take from which family.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunus.coupling import Family
from prunus.errors import InputError
from prunus.heads import Offer, with_widths
from prunus.labels import Ids
from prunus.plan import Alive
from prunus.selection import Policy, Ranking, Scores, choose_each, rank

Lost = NDArray[np.int64]  # how many bundles each ladder has lost
Keys = NDArray[np.float64]

HUGE = 1e200  # stands for an infinite score
LAST = 0.95  # steps that take more than this share of a family come after all others, unless shares are equal
UNBOUND = Policy(lambda family: None)  # everything may go but what the model needs


@dataclass(frozen=True)
class Ladder:
    """A family's steps: after step ``k`` it has lost ``stops[k]`` of its bundles; ``losses[k]`` is the score that goes.

    ``number`` is its place among all ladders.
    """

    number: int
    family: Family
    ranking: Ranking
    stops: Ids
    losses: Scores

    @property
    def shares(self) -> Keys:
        """The share of the family that is gone after each step."""
        return self.stops / max(self.family.count, 1)

    @property
    def sizes(self) -> Ids:
        """How many bundles each step takes."""
        return np.diff(self.stops, prepend=0)


def ladder(number: int, ranking: Ranking, scores: Scores, policy: Policy) -> Ladder:
    """The steps of a family.

    Args:
        number: its place among all ladders.
        ranking: its living bundles.
        scores: of every unit.
        policy: how far they go, and in which steps.
    """
    family, count = ranking.family, len(ranking)
    least, step = policy.floor(ranking), ranking.step(policy.round_to)
    kept = np.arange(max(count - 1, 0) // step * step, 0, -step, dtype=np.int64)
    stops = count - kept[kept >= least]
    if not stops.size:
        return Ladder(number, family, ranking, stops, np.empty(0))
    sums = np.nan_to_num(scores[ranking.table], nan=0.0, posinf=HUGE, neginf=-HUGE)
    total = np.concatenate(([0.0], np.cumsum(sums.sum(axis=1))))
    return Ladder(number, family, ranking, stops, np.diff(total[stops], prepend=0.0))


@dataclass(frozen=True)
class Course:
    """Steps of all ladders in the order in which they are made; the n-th leaves ladder ``of[n]`` at ``at[n]`` lost.

    ``fixed`` is what each ladder loses in any case; ``choose`` gives the units for what the ladders have lost.
    """

    ladders: tuple[Ladder, ...]
    of: Ids
    at: Ids
    fixed: Lost
    choose: Callable[[Lost], Ids]
    keys: tuple[Keys, ...] = ()

    def __len__(self) -> int:
        return len(self.of)

    def lost(self, length: int) -> Lost:
        """What each ladder has lost after the first ``length`` steps."""
        found = self.fixed.copy()
        np.maximum.at(found, self.of[:length], self.at[:length])
        return found

    def units(self, lost: Lost) -> Ids:
        """The units that go."""
        return self.choose(lost)

    def latest(self, length: int) -> list[int]:
        """The ladders that the first ``length`` steps have touched, the last one first."""
        seen = self.of[:length][::-1]
        order = np.unique(seen, return_index=True)
        picked: list[int] = order[0][np.argsort(order[1])].tolist()
        return picked

    def before(self, number: int, lost: int) -> int | None:
        """What a ladder had lost one step before (None: it may not go back)."""
        if lost <= self.fixed[number]:
            return None
        stops = self._stops[number]
        earlier = stops[stops < lost]
        return max(int(earlier[-1]) if earlier.size else 0, int(self.fixed[number]))

    @cached_property
    def _stops(self) -> dict[int, Ids]:
        return {one.number: one.stops for one in self.ladders}

    def without(self, number: int, length: int) -> Course:
        """The same course, but that ladder stops one step before it would after ``length`` steps."""
        limit = self.before(number, int(self.lost(length)[number]))
        stays = (self.of != number) | (self.at <= (limit or 0))
        return replace(self, of=self.of[stays], at=self.at[stays])


@dataclass(frozen=True)
class Offered:
    """Everything on offer as ladders (whole rows first), what goes in any case, and how to turn losses into units."""

    ladders: tuple[Ladder, ...]
    fixed: Lost
    choose: Callable[[Lost], Ids]


def offered(
    found: Offer,
    scores: Sequence[Scores],
    alive: Alive,
    policy: Policy = UNBOUND,
) -> Offered:
    """The ladders of an offer.

    Args:
        found: what may be removed.
        scores: of the units of whole rows, and of all others.
        alive: the atoms that are left.
        policy: caps, minimum widths, rounding (whole rows are not rounded). Families that it gives a share lose that
            share in any case, and have no steps.
    """
    living = found.coupling.alive_units(alive)
    rows = [rank(f, scores[0], living) for f in found.rows]
    others = [with_widths(found.coupling, rank(f, scores[1], living), policy.round_to) for f in found.families]
    of_rows = replace(policy, round_to=None)
    ladders = [ladder(k, r, scores[0], of_rows) for k, r in enumerate(rows)]
    ladders += [ladder(len(rows) + k, r, scores[1], policy) for k, r in enumerate(others)]
    settled = [len(gone) for gone in (*choose_each(rows, of_rows), *choose_each(others, policy))]
    fixed = np.zeros(len(ladders), dtype=np.int64)
    for k, one in enumerate(ladders):
        if policy.ratio_of(one.family) is not None:
            fixed[k] = settled[k] // max(one.ranking.table.shape[1], 1)
            ladders[k] = replace(one, stops=one.stops[:0], losses=one.losses[:0])
    flat = [r.table.reshape(-1) for r in (*rows, *others)]
    width = [r.table.shape[1] for r in (*rows, *others)]

    def choose(lost: Lost) -> Ids:
        first = [flat[k][: width[k] * n] for k, n in enumerate(lost[: len(rows)].tolist())]
        gone = np.concatenate(first) if first else np.empty(0, dtype=np.int64)
        after = lost[len(rows) :].tolist()
        if gone.size == 0:
            return np.concatenate(
                [gone, *(flat[len(rows) + k][: width[len(rows) + k] * n] for k, n in enumerate(after))]
            )
        still = found.coupling.alive_units(found.coupling.without(alive, gone))
        parts = [gone]
        for one, n in zip(others, after, strict=True):
            now = rank(one.family, scores[1], still)
            parts.append(now.table[: max(0, len(now) - max(len(one) - n, policy.floor(now)))].reshape(-1))
        return np.concatenate(parts)

    return Offered(tuple(ladders), fixed, choose)


Allocation = Callable[[Sequence[Ladder], "Mapping[int, float]"], "list[Keys]"]
"""``(ladders, cost of one bundle of each, as a share of the dense cost) -> keys of the steps of each``."""


def _uniform(ladders: Sequence[Ladder], costs: Mapping[int, float]) -> list[Keys]:
    """Every family loses the same share."""
    return [one.shares for one in ladders]


def _by_score(ladders: Sequence[Ladder], costs: Mapping[int, float]) -> list[Keys]:
    """The lowest mean score of a step first, whatever the family."""
    return [_rising(one, one.losses / one.sizes) for one in ladders]


def _by_score_and_cost(ladders: Sequence[Ladder], costs: Mapping[int, float]) -> list[Keys]:
    """The lowest score lost for each bit of cost saved first; what saves nothing is never worth its score."""
    tiny = 1e-12
    return [_rising(one, one.losses / (one.sizes * max(costs[one.number], tiny))) for one in ladders]


def _rising(one: Ladder, keys: Keys) -> Keys:
    """Keys that never fall along a ladder; the last steps of a family come after those of all others."""
    rising = np.maximum.accumulate(np.clip(keys, -HUGE, HUGE))
    return np.where(one.shares > LAST, np.inf, rising)


def within(scope_of: Callable[[Family], Hashable]) -> Allocation:
    """Families of one scope compete by the mean score of a step; every scope loses the same share of its bundles.

    With a scope for each family this is "uniform", with one for all it is "global".

    Source: Fang et al. 2024, "Isomorphic Pruning for Vision Models" (arXiv 2407.04616), for budgets.
    """

    def keys(ladders: Sequence[Ladder], costs: Mapping[int, float]) -> list[Keys]:
        scopes: dict[Hashable, list[int]] = {}
        for k, one in enumerate(ladders):
            scopes.setdefault(scope_of(one.family), []).append(k)
        found = [one.shares for one in ladders]
        for places in scopes.values():
            if len(places) > 1:
                own = [ladders[k] for k in places]
                for k, share in zip(places, _shared(own), strict=True):
                    found[k] = share
        return found

    return keys


def _shared(ladders: Sequence[Ladder]) -> list[Keys]:
    """The share of all bundles of some ladders that is gone after each step, the lowest mean score first."""
    keys = np.concatenate(_by_score(ladders, {}))
    order = np.argsort(keys, kind="stable")
    gone = np.empty_like(keys)
    gone[order] = np.cumsum(np.concatenate([one.sizes for one in ladders])[order])
    shares = np.where(np.isinf(keys), np.inf, gone / max(sum(one.family.count for one in ladders), 1))
    return np.split(shares, np.cumsum([len(one.stops) for one in ladders])[:-1])


ALLOCATIONS: Mapping[str, Allocation] = MappingProxyType(
    {"uniform": _uniform, "global": _by_score, "greedy": _by_score_and_cost}
)
"""By name: the same share of every family, one threshold over all scores, score for each bit of cost."""


def keys_of(allocation: str | Allocation, ladders: Sequence[Ladder], costs: Callable[[], Mapping[int, float]]) -> Any:
    """The keys that an allocation gives to the steps of ``ladders``.

    Raises:
        InputError: there is no such allocation, or a caller's own gives keys that do not fit.
    """
    if callable(allocation):
        found = [np.asarray(k, dtype=np.float64) for k in allocation(ladders, costs())]
        if [k.shape for k in found] != [one.stops.shape for one in ladders]:
            raise InputError("the allocation must return one array for each ladder, with one key for each of its stops")
        return found
    check_allocation(allocation)
    return ALLOCATIONS[allocation](ladders, costs() if allocation == "greedy" else {})


def check_allocation(allocation: Any) -> None:
    """Refuse what names no allocation.

    Raises:
        InputError: it is neither a name nor callable.
    """
    if not callable(allocation) and allocation not in ALLOCATIONS:
        raise InputError(f"allocation={allocation!r}: choose one of {', '.join(ALLOCATIONS)}, or pass a callable")


def course(ladders: Sequence[Ladder], keys: Sequence[Keys], fixed: Lost, choose: Callable[[Lost], Ids]) -> Course:
    """The steps in ascending order of key; ties in the order of the ladders."""
    of = np.concatenate([np.full(len(one.stops), one.number) for one in ladders] or [np.empty(0, dtype=np.int64)])
    at = np.concatenate([one.stops for one in ladders] or [np.empty(0, dtype=np.int64)])
    flat = np.concatenate(list(keys) or [np.empty(0)])
    order = np.lexsort((at, flat))
    return Course(tuple(ladders), of[order].astype(np.int64), at[order], fixed, choose, tuple(keys))


def blend(first: Course, second: Course, weight: float) -> Course:
    """A course between two: steps in the order of the weighted mean of their ranks in both."""
    ranks = [_ranks(one.keys) for one in (first, second)]
    mixed = [(1 - weight) * a + weight * b for a, b in zip(*ranks, strict=True)]
    return course(first.ladders, mixed, first.fixed, first.choose)


def mutated(one: Course, random: np.random.Generator) -> Course:
    """The course with some ladders hurried and some held back: their ranks times e to the power of a normal number."""
    hurry = np.exp(random.normal(0.0, 0.5, len(one.ladders)) * (random.random(len(one.ladders)) < 0.3))
    return course(one.ladders, [k * h for k, h in zip(_ranks(one.keys), hurry, strict=True)], one.fixed, one.choose)


def _ranks(keys: Sequence[Keys]) -> list[Keys]:
    """Keys as ranks in (0, 1]."""
    flat = np.concatenate(list(keys) or [np.empty(0)])
    _, ranks = np.unique(flat, return_inverse=True)
    ends = np.cumsum([len(k) for k in keys])[:-1]
    return np.split((ranks.reshape(-1) + 1.0) / max(flat.size, 1), ends)
