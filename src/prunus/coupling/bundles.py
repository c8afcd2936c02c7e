"""Bundles: what selection removes at once.

Some rows must stay equally long (the head dims of every head, the two halves of a chunk), and some widths must keep
their ratio (a stream of ``heads * head_dim`` channels and the head dims themselves). Units that no constraint tells
apart form a *lane*; lanes that a constraint joins form a *family*. Cutting every lane of a family by the same share
keeps all constraints of degree one, so a family of lanes with sizes ``s`` has ``gcd(s)`` bundles, and a bundle takes
``s / gcd(s)`` units of each lane, chosen by rank of importance within the lane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from prunus.coupling.constraints import Constraints, Demand, demands_of
from prunus.coupling.families import Draft, Family
from prunus.coupling.pieces import components, runs_of
from prunus.coupling.units import Units
from prunus.labels import Ids, distinct, marks
from prunus.ledger import Ledger
from prunus.sizes import Attribute

_Partial: TypeAlias = "tuple[Ids, Ids, Ids]"  # rows of a balance, coarse units that take a part of each, how much
_NONE: Ids = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Bundling:
    """The families, and for each unit that may not go because of a constraint, the reason."""

    families: tuple[Family, ...]
    lane_of: Ids
    why: dict[int, str]  # lane -> reason


def find_bundles(
    ledger: Ledger, units: Units, kind: Ids, read: Callable[[Attribute], int], *, rows_first: bool = False
) -> Bundling:
    """Join units into families by the balances and the required sizes.

    Args:
        ledger: what was recorded.
        units: the candidates.
        kind: a number for each fine atom, equal where units cut the same dims.
        read: the present value of a module's attribute.
        rows_first: where a size can follow either whole rows (heads) or the positions inside them, let it follow rows.
    """
    located = [units.pieces.of(balance.ids) for balance in ledger.balances]
    balanced = [units.unit_of(balance.ids, at) for balance, at in zip(ledger.balances, located, strict=True)]
    partial = [_partial_takers(units, at) for at in located]
    demands = demands_of(ledger.requirements)
    draft = _lanes(demands, units, kind, balanced, partial)
    _balance(ledger, units, draft, balanced, partial)
    _pin_overlapping(units, draft)
    _pin_misaligned(ledger, units, draft)
    if demands or ledger.limits:
        constraints = Constraints(demands, ledger, units, draft, read, rows_first)
        constraints.settle()
        constraints.respect(ledger.limits)
    return Bundling(tuple(_families(units, kind, draft)), draft.lane_of, draft.why)


def _families(units: Units, kind: Ids, draft: Draft) -> list[Family]:
    """The families that cut something, by first unit; those whose parts cannot shrink in step are pinned."""
    members: dict[int, list[int]] = {}
    for lane, family in enumerate(draft.family_of.tolist()):
        members.setdefault(family, []).append(lane)
    members.pop(-1, None)
    first = np.array([lane.item(0) for lane in draft.lanes], dtype=np.int64)
    coarse, cuts = units.coarse[first].tolist(), (kind[units.fine_of(first)] != 0).tolist()
    families = []
    for family, lanes in members.items():
        step, least = draft.step.get(family, 1), draft.least.get(family, 1)
        made = Family(tuple([draft.lanes[k] for k in lanes]), coarse[lanes[0]], step, least)
        if made.count < 2 and (len(lanes) > 1 or step > 1):
            draft.pin(family, "its parts cannot shrink in step: their sizes have no common divisor")
        elif any(cuts[k] for k in lanes):
            families.append(made)
    families.sort(key=lambda f: f.lanes[0].item(0))
    return families


def _lanes(
    demands: Sequence[Demand], units: Units, kind: Ids, balanced: Sequence[Ids], partial: Sequence[_Partial]
) -> Draft:
    """Units of one kind that are in the same rows of the same balances, and sized alike, form a lane."""
    mark = np.zeros(units.total, dtype=np.uint64)
    if balanced:
        height, width = np.array([rows.shape for rows in balanced]).T
        numbers = marks(int(height.sum()), 1)
        _add_marks(mark, np.concatenate([rows.reshape(-1) for rows in balanced]), numbers.repeat(width.repeat(height)))
        for begin, (row, taker, times) in zip(height.cumsum() - height, partial, strict=True):
            if row.size:
                np.add.at(mark, taker, numbers[begin + row] * times.astype(np.uint64))
    if parts := list({id(ids): ids for demand in demands for ids in demand.rows}.values()):
        _mark_parts(mark, units, parts)
    fine = np.arange(units.width.size).repeat(units.width)
    free = np.flatnonzero(units.free[fine])
    keys = mark[free] + kind[fine[free]].view(np.uint64)
    bounds = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1], [True])))[: keys.size + 1]  # of equal keys
    number: dict[int, int] = {}
    lane = [number.setdefault(key, len(number)) for key in keys[bounds[:-1]].tolist()]
    rank = np.array(lane, dtype=np.int64).repeat(bounds[1:] - bounds[:-1])
    lane_of = np.full(units.total, -1)
    lane_of[free] = rank
    order = rank.argsort(kind="stable")
    lanes = [members for _, members in runs_of(rank[order], free[order])]
    return Draft(lane_of, lanes, np.arange(len(lanes)))


def _add_marks(mark: NDArray[np.uint64], members: Ids, numbers: NDArray[np.uint64]) -> None:
    """Add a number to each of the units (-1: none)."""
    chosen = members >= 0
    np.add.at(mark, members[chosen], numbers[chosen])


def _mark_parts(mark: NDArray[np.uint64], units: Units, parts: list[Ids]) -> None:
    """Add a number for each part to its units, and to the coarse units that take positions of it, for each of them."""
    numbers = marks(len(parts), 2)
    flat, size = np.concatenate([ids.reshape(-1) for ids in parts]), [ids.size for ids in parts]
    pieces = units.pieces.of(flat)
    _add_marks(mark, units.unit_of(flat, pieces), numbers.repeat(size))
    if units.taker.size:
        numbers[[ids.ndim > 1 for ids in parts]] = 0
        places, takers = units.takings(pieces)
        np.add.at(mark, takers, numbers.repeat(size)[places])


def _partial_takers(units: Units, pieces: Ids) -> _Partial:
    """Rows (of pieces) of which coarse units take a part, not all: each with a unit that does and how much it takes."""
    if units.taker.size:
        mark = units.taker_mark[pieces]
        differs = mark != mark[:, :1]
        if differs.any():
            rows = np.flatnonzero(differs.any(axis=1))
            place, taker = units.takings(pieces[rows].reshape(-1))
            pairs, times = np.unique(rows[place // pieces.shape[1]] * units.total + taker, return_counts=True)
            part = times < pieces.shape[1]
            row, taker = np.divmod(pairs[part], units.total)
            return row, taker, times[part]
    return _NONE, _NONE, _NONE


def _pin_misaligned(ledger: Ledger, units: Units, draft: Draft) -> None:
    """Pin coarse units that take a part of a row, but not the same part of every row that is aligned with it."""
    for item in ledger.aligned:
        pieces = units.pieces.of(item.ids)
        _, takers, _ = _partial_takers(units, pieces)
        for taker in distinct(takers).tolist():
            family = int(draft.family_of[draft.lane_of[taker]])
            if family >= 0:
                gone = np.isin(pieces, units.takes[int(units.fine_of(np.array(taker)))])
                if not (gone == gone[0]).all():
                    draft.pin(family, item.reason)


def _balance(ledger: Ledger, units: Units, draft: Draft, balanced: list[Ids], partial: list[_Partial]) -> None:
    """Join the lanes of each balance; pin them where the rows do not have equally many free units."""
    joined: list[Ids] = []
    uneven: list[tuple[Ids, str]] = []
    for balance, rows, (row, taker, times) in zip(ledger.balances, balanced, partial, strict=True):
        if row.size:
            joined.append(distinct(draft.lane_of[taker]))
            taken = np.bincount(row, times, len(rows))
            if (taken != taken[0]).any():
                uneven.append((joined[-1], balance.reason))
        chosen = rows >= 0
        members = distinct(draft.lane_of[rows[chosen]])
        if members.size:
            joined.append(members)
            free = chosen.sum(axis=1)
            if (free != free[0]).any():
                uneven.append((members, balance.reason))
    for ids in ledger.whole_rows:
        _, taker, _ = _partial_takers(units, units.pieces.of(ids))
        if taker.size:
            uneven.append((distinct(draft.lane_of[taker]), "it would take a part of rows that are alike"))
    if joined:
        left = np.concatenate([lanes[:1].repeat(lanes.size) for lanes in joined])
        draft.family_of[:] = components(len(draft.lanes), left, np.concatenate(joined))
    for members, reason in uneven:
        for family in distinct(draft.family_of[members]).tolist():
            if family >= 0:
                draft.pin(family, f"{reason}, and a part of one of them has to stay")


def _pin_overlapping(units: Units, draft: Draft) -> None:
    """Rows that share positions cannot take each other's place: they stay whole."""
    if units.taker.size == 0:
        return
    lane = draft.lane_of[units.base[units.taker]]
    keys = np.sort(lane * len(units.pieces.start) + units.taken)
    for k in distinct(keys[1:][keys[1:] == keys[:-1]] // len(units.pieces.start)).tolist():
        if k >= 0 and draft.family_of[k] >= 0:
            draft.pin(int(draft.family_of[k]), "its rows share positions")
