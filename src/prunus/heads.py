"""Heads and what is inside them, as separate choices: whole rows go first, then positions of those that are left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prunus.coupling import Coupling, Family
from prunus.labels import Ids
from prunus.plan import Alive
from prunus.selection import Policy, Ranking, Scores, choose_each, default_families, rank

_NONE: Ids = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Offer:
    """What may be removed.

    ``rows`` are families of whole heads (rows over which a contraction is batched: heads of attention, experts, groups
    of a convolution), bundled as in ``by_rows``; ``families`` are all others, bundled as in ``coupling``.
    """

    coupling: Coupling
    by_rows: Coupling
    rows: tuple[Family, ...]
    families: tuple[Family, ...]

    def __len__(self) -> int:
        return len(self.rows) + len(self.families)


def offer(coupling: Coupling, prune_num_heads: bool = False, prune_head_dims: bool = True) -> Offer:
    """The families to choose from.

    Without ``prune_num_heads``, whole rows are only on offer where their positions cannot go one by one; without
    ``prune_head_dims``, what is inside rows stays, and whatever only shrinks with it.
    """
    families = default_families(coupling)
    if not prune_head_dims:
        inside = _inside(coupling)
        families = tuple(f for f in families if f.coarse or not inside[f.units].any())
    if not prune_num_heads:
        return Offer(coupling, coupling, (), families)
    by_rows = coupling.by_rows
    batched = coupling.batched
    rows = tuple(f for f in by_rows.families if batched[f.units].any())
    taken = np.zeros(coupling.units.total, dtype=bool)
    for family in rows:
        taken[family.units] = True
    taken &= coupling.units.coarse
    return Offer(coupling, by_rows, rows, tuple(f for f in families if not taken[f.units].any()))


def _inside(coupling: Coupling) -> NDArray[np.bool_]:
    """Units that are positions inside rows over which a contraction is batched, or inside rows in those."""
    outer = np.zeros(coupling.units.total, dtype=bool)
    for ids in coupling.trace.ledger.batched:
        outer[coupling.unit_of_atom[ids.reshape(-1)]] = True
    inside = np.zeros(coupling.units.total, dtype=bool)
    while True:
        before = np.count_nonzero(inside)
        for rows in coupling.trace.ledger.rows_of:
            inside[coupling.unit_of_atom[rows.fine[outer[coupling.unit_of_atom[rows.coarse]]]]] = True
        if np.count_nonzero(inside) == before:
            return inside
        outer |= inside


def choose_offered(found: Offer, scores: Sequence[Scores], alive: Alive, policy: Policy) -> Ids:
    """The units to remove now: whole rows, and then positions of what is left.

    Args:
        found: what may be removed.
        scores: of the units of whole rows, and of all others.
        alive: the atoms that are left.
        policy: how far to go.
    """
    gone = choose_rows(found, scores[0], alive, policy)
    return np.concatenate((gone, choose_positions(found, scores[1], alive, policy, gone)))


def choose_rows(found: Offer, scores: Scores, alive: Alive, policy: Policy) -> Ids:
    """The units of the whole rows to remove now (a width need not be a multiple in heads)."""
    return np.concatenate([_NONE, *rows_to_go(found, scores, alive, policy)])


def rows_to_go(found: Offer, scores: Scores, alive: Alive, policy: Policy) -> list[Ids]:
    """The same for each of ``found.rows``."""
    if not found.rows:
        return []
    living = found.coupling.alive_units(alive)
    return choose_each([rank(f, scores, living) for f in found.rows], replace(policy, round_to=None))


def choose_positions(found: Offer, scores: Scores, alive: Alive, policy: Policy, gone: Ids) -> Ids:
    """The units to remove of every other family, after the rows ``gone``."""
    return np.concatenate([_NONE, *positions_to_go(found, scores, alive, policy, gone)])


def positions_to_go(found: Offer, scores: Scores, alive: Alive, policy: Policy, gone: Ids) -> list[Ids]:
    """The same for each of ``found.families``."""
    living = found.coupling.alive_units(found.coupling.without(alive, gone) if gone.size else alive)
    rankings = [with_widths(found.coupling, rank(f, scores, living), policy.round_to) for f in found.families]
    return choose_each(rankings, policy)


def with_widths(coupling: Coupling, ranking: Ranking, round_to: int | None) -> Ranking:
    """The ranking with how many positions a bundle takes of each dim of each tensor, if widths are to be rounded."""
    if round_to is None or round_to <= 1 or not len(ranking):
        return ranking
    return replace(ranking, widths=tuple(sorted(set(positions_of(coupling, ranking.table[0]).values()))))


def positions_of(coupling: Coupling, units: Ids) -> dict[tuple[int, int], int]:
    """How many positions of each ``(held, dim)`` some units take."""
    found: dict[tuple[int, int], int] = {}
    groups, counts = np.unique(coupling.group_of_unit[units], return_counts=True)
    for group, count in zip(groups.tolist(), counts.tolist(), strict=True):
        for part in coupling.groups[group].slices if group >= 0 else ():
            key = part.held, part.dim
            found[key] = found.get(key, 0) + count * part.positions.shape[1]
    return found


def count_rows(coupling: Coupling, alive: Alive, atoms: Ids) -> tuple[int, int]:
    """How many rows (heads) along ``atoms`` there were, and how many are left."""
    whole = [r for r in coupling.trace.ledger.rows_of if np.isin(r.fine, atoms).all()]
    batched = np.zeros(coupling.units.total, dtype=bool)
    for ids in coupling.trace.ledger.batched:
        batched[coupling.unit_of_atom[ids.reshape(-1)]] = True
    coarse = [r.coarse[batched[coupling.unit_of_atom[r.coarse]]] for r in whole]
    found = _distinct(coupling, coarse)
    return len(found), len(_distinct(coupling, [found[alive[found]]]))


def _distinct(coupling: Coupling, atoms: Sequence[Ids]) -> Ids:
    """One atom for each class."""
    if not atoms:
        return np.empty(0, dtype=np.int64)
    flat = np.concatenate(atoms)
    classes = coupling.pieces.classes[coupling.pieces.of(flat)]
    return flat[np.unique(classes, return_index=True)[1]]
