"""Selection: which bundles go, for a share of each family."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, gcd, isfinite, lcm

import numpy as np
import torch
from numpy.typing import NDArray

from prunus.coupling import Coupling, Family, UnitGroup
from prunus.labels import Ids

Scores = NDArray[np.float64]  # one for each unit; NaN: not scored


def default_families(coupling: Coupling) -> tuple[Family, ...]:
    """The families to choose from: rows as a whole (heads) only where their positions cannot go one by one."""
    if not any(family.coarse for family in coupling.families):
        return coupling.families
    own = coupling.units
    alone = np.zeros(own.total, dtype=bool)
    for family in coupling.families:
        alone[family.units] = not family.coarse
    before = np.concatenate(([0], np.cumsum(alone)))
    inside = coupling.pieces.fine[own.taken]
    opened = np.zeros(own.total, dtype=bool)
    begin = own.base[inside]
    opened[own.base[own.taker[before[begin + own.width[inside]] > before[begin]]]] = True
    return tuple(f for f in coupling.families if not f.coarse or not opened[f.units].any())


def score_units(
    coupling: Coupling, families: Sequence[Family], score: Callable[[UnitGroup], torch.Tensor | None]
) -> Scores:
    """The criterion's scores of every unit of ``families``, group by group."""
    scores: Scores = np.full(coupling.units.total, np.nan)
    wanted = np.zeros(coupling.units.total, dtype=bool)
    for family in families:
        wanted[family.units] = True
    for group in coupling.groups:
        if wanted[group.units].any():
            found = score(group)
            if found is not None:
                scores[group.units] = found.numpy()
    return scores


@dataclass(frozen=True)
class Ranking:
    """The living bundles of a family, least important first: row ``k`` of ``table`` are the units of one.

    ``scores[k]`` is the mean score of its units; ``widths`` are how many positions a bundle takes of each dim that the
    family cuts, for rounding.
    """

    family: Family
    table: Ids
    scores: Scores
    widths: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def bundles(self) -> tuple[Ids, ...]:
        """The rows of the table."""
        return tuple(self.table)

    def step(self, round_to: int | None) -> int:
        """The number of bundles of which a multiple must stay, so that every width is a multiple of ``round_to``."""
        if round_to is None or round_to <= 1 or not len(self):
            return 1
        return lcm(*(round_to // gcd(round_to, w) for w in self.widths or (self.table.shape[1],)))


def rank(family: Family, scores: Scores, living: NDArray[np.bool_]) -> Ranking:
    """Bundle the living units of each lane by rank of importance (ties by position)."""
    parts, values = [], []
    lanes, quotas = family.left(living)
    if not lanes:
        return Ranking(family, np.empty((0, 0), dtype=np.int64), np.empty(0))
    own = scores[lanes[0] if len(lanes) == 1 else np.concatenate(lanes)]
    if not isfinite(own.sum()):
        own = np.nan_to_num(own, nan=0.0)
    begin = 0
    for left, quota in zip(lanes, quotas, strict=True):
        score, begin = own[begin : begin + len(left)], begin + len(left)
        order = np.argsort(score, kind="stable")[: len(left) // quota * quota]
        parts.append(left[order].reshape(-1, quota))
        values.append(score[order] if quota == 1 else score[order].reshape(-1, quota).mean(axis=1))
    if len(lanes) == 1:
        return Ranking(family, parts[0], values[0])
    count = min(len(p) for p in parts)
    return Ranking(
        family, np.concatenate([p[:count] for p in parts], axis=1), np.mean([v[:count] for v in values], axis=0)
    )


@dataclass(frozen=True)
class Policy:
    """How far selection may go.

    ``ratio_of`` gives the share that goes from a family (None: leave it); ``cap`` is the largest share of any family
    over the whole job, and ``cap_of`` that of one family (None: ``cap``); ``least_of`` is how many bundles of a family,
    as they were at first, stay at least; ``round_to`` makes the widths that stay multiples of it, where a family allows
    it. Families with the same ``scope_of`` compete for what goes; without it each stands alone.
    """

    ratio_of: Callable[[Family], float | None]
    cap: float = 1.0
    round_to: int | None = None
    scope_of: Callable[[Family], Hashable] | None = None
    cap_of: Callable[[Family], float | None] | None = None
    least_of: Callable[[Family], int] | None = None

    def floor(self, ranking: Ranking, share: float = 1.0) -> int:
        """How many bundles stay when ``share`` of them goes; one, or as many as the model needs, always stays."""
        family = ranking.family
        own = self.cap_of(family) if self.cap_of is not None else None
        capped = ceil(family.count * (1 - (self.cap if own is None else own)) - 1e-9)
        least = 1 if self.least_of is None else self.least_of(family)
        if least > 1 and len(ranking):  # bundles are smaller where heads went
            least = -(-least * len(family.units) // (family.count * ranking.table.shape[1]))
        least = max(least, family.least)
        return min(family.count, max(least, capped, int(family.count * (1 - share) + 1e-9)))


def choose(rankings: Sequence[Ranking], policy: Policy) -> Ids:
    """The units to remove now, so that each family has lost its share of what it had at first."""
    return np.concatenate([np.empty(0, dtype=np.int64), *choose_each(rankings, policy)])


def choose_each(rankings: Sequence[Ranking], policy: Policy) -> list[Ids]:
    """The same, family by family."""
    keep = [len(r) for r in rankings]
    for scope in _scopes(rankings, policy):
        for k, kept in zip(scope, _kept([rankings[k] for k in scope], policy), strict=True):
            keep[k] = _rounded(rankings[k], kept, policy)
    return [r.table[: max(0, len(r) - kept)].reshape(-1) for r, kept in zip(rankings, keep, strict=True)]


def _scopes(rankings: Sequence[Ranking], policy: Policy) -> list[list[int]]:
    """The families that compete with each other; those that are left alone are in none."""
    found: dict[Hashable, list[int]] = {}
    for k, ranking in enumerate(rankings):
        if policy.ratio_of(ranking.family) is None:
            continue
        key: Hashable = k if policy.scope_of is None else policy.scope_of(ranking.family)
        found.setdefault(key, []).append(k)
    return list(found.values())


def _kept(rankings: Sequence[Ranking], policy: Policy) -> list[int]:
    """One threshold over the scores of a scope; each family keeps at least what its cap and its minimum leave."""
    shares = [policy.ratio_of(r.family) or 0.0 for r in rankings]
    if len(rankings) == 1:
        return [policy.floor(rankings[0], shares[0])]
    keep = np.array([len(r) for r in rankings])
    total = sum(r.family.count * (1 - share) for r, share in zip(rankings, shares, strict=True))
    excess = max(0, int(keep.sum()) - int(total + 1e-9))
    spare = [max(0, len(r) - policy.floor(r)) for r in rankings]
    scores = np.concatenate([r.scores[:n] for r, n in zip(rankings, spare, strict=True)])
    owner = np.repeat(np.arange(len(rankings)), spare)
    first = owner[np.argsort(scores, kind="stable")[:excess]]
    return [int(n) for n in keep - np.bincount(first, minlength=len(rankings))]


def _rounded(ranking: Ranking, kept: int, policy: Policy) -> int:
    """The number nearest to ``kept`` that makes all widths multiples of ``round_to``, never below the family's floor.

    A family that loses nothing is not rounded.
    """
    step, now = ranking.step(policy.round_to), len(ranking)
    if kept >= now or step == 1:
        return min(kept, now)
    least = -(-policy.floor(ranking) // step) * step
    nearest = (2 * kept + step) // (2 * step) * step
    return min(max(nearest, step, least), now)
