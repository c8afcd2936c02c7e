"""Selection: which bundles go, for a share of each family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from prunus.coupling import Coupling, Family, UnitGroup
from prunus.errors import InputError
from prunus.labels import Ids

Scores = NDArray[np.float64]  # one for each unit; NaN: not scored


def default_families(coupling: Coupling) -> tuple[Family, ...]:
    """The families to choose from: rows as a whole (heads) only where their positions cannot go one by one."""
    fine = [f for f in coupling.families if not f.coarse]
    covered = np.zeros(coupling.units.total, dtype=bool)
    for family in fine:
        covered[family.units] = True
    chosen = list(fine)
    for family in coupling.families:
        if family.coarse and not covered[coupling.unit_of_atom[coupling.atoms_of(family.units)]].any():
            chosen.append(family)
    return tuple(sorted(chosen, key=lambda f: int(f.lanes[0][0])))


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
                values = found.detach().double().cpu().numpy()
                if values.shape != group.units.shape:
                    raise InputError(
                        f"the importance returned {values.shape[0] if values.ndim else 'one'} score(s) for a group of "
                        f"{len(group.units)}; it must return one for each unit"
                    )
                if np.isnan(values).any():
                    raise InputError("the importance returned NaN; check weights and gradients for NaN")
                scores[group.units] = values
    return scores


@dataclass(frozen=True)
class Ranking:
    """The living bundles of a family, least important first: ``bundles[k]`` are units, ``scores[k]`` their mean."""

    family: Family
    bundles: tuple[Ids, ...]
    scores: Scores


def rank(family: Family, scores: Scores, living: NDArray[np.bool_]) -> Ranking:
    """Bundle the living units of each lane by rank of importance (ties by position)."""
    parts, values = [], []
    lanes, quotas = family.left(living)
    if not lanes:
        return Ranking(family, (), np.empty(0))
    for left, quota in zip(lanes, quotas, strict=True):
        order = left[np.argsort(np.nan_to_num(scores[left], nan=0.0), kind="stable")]
        rows = order[: len(order) // quota * quota].reshape(-1, quota)
        parts.append(rows)
        values.append(np.nan_to_num(scores[rows], nan=0.0).mean(axis=1))
    count = min(len(p) for p in parts)
    bundles = np.concatenate([p[:count] for p in parts], axis=1)
    return Ranking(family, tuple(bundles), np.mean([v[:count] for v in values], axis=0))


@dataclass(frozen=True)
class Policy:
    """How far selection may go.

    ``ratio_of`` gives the share that goes from a family (None: leave it); ``cap`` is the largest share of any family
    over the whole job; ``round_to`` makes the widths that stay multiples of it, where a family allows it.
    """

    ratio_of: Callable[[Family], float | None]
    cap: float = 1.0
    round_to: int | None = None
    all_families_compete: bool = False


def choose(rankings: Sequence[Ranking], policy: Policy) -> Ids:
    """The units to remove now, so that each family has lost its share of what it had at first."""
    keep = _kept_globally(rankings, policy) if policy.all_families_compete else _kept_locally(rankings, policy)
    chosen = [np.empty(0, dtype=np.int64)]
    for ranking, wanted in zip(rankings, keep, strict=True):
        kept = _rounded(ranking, wanted, policy.round_to)
        chosen += ranking.bundles[: max(0, len(ranking.bundles) - kept)]
    return np.concatenate(chosen)


def _floor(family: Family, share: float) -> int:
    """How many bundles stay when ``share`` of them goes; one, or as many as the model needs, always stays."""
    return max(family.least, int(family.count * (1 - share) + 1e-9))


def _kept_locally(rankings: Sequence[Ranking], policy: Policy) -> list[int]:
    shares = [policy.ratio_of(r.family) for r in rankings]
    return [
        len(r.bundles) if share is None else _floor(r.family, min(share, policy.cap))
        for r, share in zip(rankings, shares, strict=True)
    ]


def _kept_globally(rankings: Sequence[Ranking], policy: Policy) -> list[int]:
    """One threshold over the scores of all families that take part; each keeps at least what the cap leaves."""
    shares = [policy.ratio_of(r.family) for r in rankings]
    keep = [len(r.bundles) for r in rankings]
    part = [k for k, share in enumerate(shares) if share is not None]
    if not part:
        return keep
    total = sum(rankings[k].family.count * (1 - (shares[k] or 0.0)) for k in part)
    excess = sum(keep[k] for k in part) - int(total + 1e-9)
    scores = np.concatenate([rankings[k].scores for k in part])
    owner = np.repeat(part, [len(rankings[k].bundles) for k in part])
    for k in owner[np.argsort(scores, kind="stable")].tolist():
        if excess <= 0:
            break
        if keep[k] > _floor(rankings[k].family, policy.cap):
            keep[k] -= 1
            excess -= 1
    return keep


def _rounded(ranking: Ranking, kept: int, round_to: int | None) -> int:
    """The number nearest to ``kept`` that makes the family's width a multiple of ``round_to``; never nothing."""
    if round_to is None or round_to <= 1 or not ranking.bundles:
        return kept
    width = len(ranking.bundles[0])
    step = round_to // int(np.gcd(round_to, width))
    nearest = (2 * kept + step) // (2 * step) * step
    return min(max(nearest, step, ranking.family.least), len(ranking.bundles))
