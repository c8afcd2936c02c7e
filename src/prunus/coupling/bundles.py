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

from prunus.coupling.constraints import Constraints, is_own_size
from prunus.coupling.families import Draft, Family
from prunus.coupling.pieces import components
from prunus.coupling.units import Units
from prunus.labels import Ids, distinct, marks
from prunus.ledger import Ledger
from prunus.sizes import Attribute, Extent, expression_of, leaves

_Partial: TypeAlias = "list[tuple[int, Ids, Ids]]"  # rows of a balance, coarse units that take a part, how much


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
    partial = [_partial_takers(units, balance.ids) for balance in ledger.balances]
    draft = _lanes(ledger, units, kind, partial)
    _balance(ledger, units, draft, partial)
    _pin_overlapping(units, draft)
    _pin_misaligned(ledger, units, draft)
    if ledger.requirements or ledger.limits:
        constraints = Constraints(ledger, units, draft, read, rows_first)
        constraints.settle()
        constraints.respect(ledger.limits)
    families = []
    for family in distinct(draft.family_of[draft.family_of >= 0]).tolist():
        members = np.flatnonzero(draft.family_of == family)
        made = Family(
            tuple(draft.lanes[k] for k in members.tolist()),
            units.is_coarse(int(draft.lanes[members[0]][0])),
            draft.step.get(family, 1),
            draft.least.get(family, 1),
        )
        if made.count < 2 and (len(made.lanes) > 1 or made.step > 1):
            draft.pin(family, "its parts cannot shrink in step: their sizes have no common divisor")
        elif kind[units.fine_of(made.units)].any():
            families.append(made)
    families.sort(key=lambda f: int(f.lanes[0][0]))
    return Bundling(tuple(families), draft.lane_of, draft.why)


def _lanes(ledger: Ledger, units: Units, kind: Ids, partial: list[_Partial]) -> Draft:
    """Units of one kind that are in the same rows of the same balances form a lane."""
    mark = np.zeros(units.total, dtype=np.uint64)
    rows = [row for balance in ledger.balances for row in balance.ids]
    numbers = marks(len(rows), 1)
    _add_marks(mark, units, rows, numbers)
    begin = 0
    for balance, takings in zip(ledger.balances, partial, strict=True):
        for k, takers, times in takings:
            mark[takers] += numbers[begin + k] * times.astype(np.uint64)
        begin += len(balance.ids)
    parts = _sized_parts(ledger)
    numbers = marks(len(parts), 2)
    _add_marks(mark, units, [ids.reshape(-1) for ids in parts], numbers)
    whole = [k for k, ids in enumerate(parts) if ids.ndim == 1]
    _add_marks_of_takers(mark, units, [parts[k] for k in whole], numbers[whole])
    fine = units.fine_of(np.arange(units.total))
    free = np.flatnonzero(units.free[fine])
    keys = mark[free] + kind[fine[free]].astype(np.uint64)
    starts = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))[: keys.size]
    _, first, inverse = np.unique(keys[starts], return_index=True, return_inverse=True)
    rank = np.repeat(np.argsort(np.argsort(first))[inverse], np.diff(np.concatenate((starts, [keys.size]))))
    lane_of = np.full(units.total, -1, dtype=np.int64)
    lane_of[free] = rank
    ends = np.cumsum(np.bincount(rank, minlength=len(first)))
    lanes = np.split(free[np.argsort(rank, kind="stable")], ends[:-1]) if free.size else []
    return Draft(lane_of, list(lanes), np.arange(len(lanes)))


def _add_marks(mark: NDArray[np.uint64], units: Units, rows: Sequence[Ids], numbers: NDArray[np.uint64]) -> None:
    """Add the number of each row to the units that may be chosen in it."""
    if rows:
        members = units.unit_of(np.concatenate(rows))
        number = np.repeat(numbers, [row.size for row in rows])
        np.add.at(mark, members[members >= 0], number[members >= 0])


def _add_marks_of_takers(
    mark: NDArray[np.uint64], units: Units, rows: Sequence[Ids], numbers: NDArray[np.uint64]
) -> None:
    """Add the number of each row to the coarse units that take its positions, once for each position."""
    if rows:
        places, takers = units.takings(units.pieces.of(np.concatenate(rows)))
        np.add.at(mark, takers, np.repeat(numbers, [row.size for row in rows])[places])


def _sized_parts(ledger: Ledger) -> list[Ids]:
    """Every stretch of atoms whose number the code asks for, or computes with, once."""
    found: dict[int, Ids] = {}
    for requirement in ledger.requirements:
        if not is_own_size(requirement):
            found[id(requirement.ids)] = requirement.ids
            for leaf in leaves(expression_of(requirement.asked)):
                if isinstance(leaf, Extent):
                    found[id(leaf.ids)] = leaf.ids
    return list(found.values())


def _partial_takers(units: Units, ids: Ids) -> _Partial:
    """Rows of which coarse units take a part (not all), each with the units that do and how much each takes."""
    if units.taker.size == 0:
        return []
    pieces = units.pieces.of(ids)
    mark = units.taker_mark[pieces]
    rows = np.flatnonzero((mark != mark[:, :1]).any(axis=1))
    if rows.size == 0:
        return []
    place, taker = units.takings(pieces[rows].reshape(-1))
    pairs, times = np.unique(place // ids.shape[1] * units.total + taker, return_counts=True)
    pairs, times = pairs[times < ids.shape[1]], times[times < ids.shape[1]]
    own, first = np.unique(pairs // units.total, return_index=True)
    parts = np.split(pairs % units.total, first[1:]), np.split(times, first[1:])
    return list(zip(rows[own].tolist(), *parts, strict=True)) if own.size else []


def _pin_misaligned(ledger: Ledger, units: Units, draft: Draft) -> None:
    """Pin coarse units that take a part of a row, but not the same part of every row that is aligned with it."""
    for item in ledger.aligned:
        takers = [taker for _, found, _ in _partial_takers(units, item.ids) for taker in found.tolist()]
        pieces = units.pieces.of(item.ids) if takers else item.ids
        for taker in dict.fromkeys(takers):
            gone = np.isin(pieces, units.takes[int(units.fine_of(np.array(taker)))])
            family = int(draft.family_of[draft.lane_of[taker]])
            if family >= 0 and not (gone == gone[0]).all():
                draft.pin(family, item.reason)


def _balance(ledger: Ledger, units: Units, draft: Draft, partial: list[_Partial]) -> None:
    """Join the lanes of each balance; pin them where the rows do not have equally many free units."""
    left: list[int] = []
    right: list[int] = []
    uneven: list[tuple[Ids, str]] = []
    for balance, takings in zip(ledger.balances, partial, strict=True):
        rows = units.unit_of(balance.ids)
        inside = np.zeros(len(draft.lanes), dtype=bool)
        inside[draft.lane_of[rows[rows >= 0]]] = True
        members = np.flatnonzero(inside)
        whole = [distinct(draft.lane_of[takers]) for _, takers, _ in takings]
        if whole:
            lanes = distinct(np.concatenate(whole))
            left += [int(lanes[0])] * (lanes.size - 1)
            right += lanes[1:].tolist()
            taken = [int(n.sum()) for _, _, n in takings]
            if len(taken) < len(rows) or min(taken) < max(taken):
                uneven.append((lanes, balance.reason))
        if members.size == 0:
            continue
        free = (rows >= 0).sum(axis=1)
        if (free != free[0]).any():
            uneven.append((members, balance.reason))
        left += [int(members[0])] * (members.size - 1)
        right += members[1:].tolist()
    for ids in ledger.whole_rows:
        for _, takers, _ in _partial_takers(units, ids):
            uneven.append((distinct(draft.lane_of[takers]), "it would take a part of rows that are alike"))
    draft.family_of[:] = components(len(draft.lanes), np.array(left, dtype=np.int64), np.array(right, dtype=np.int64))
    for members, reason in uneven:
        for family in distinct(draft.family_of[members]).tolist():
            if family >= 0:
                draft.pin(family, f"{reason}, and a part of one of them has to stay")


def _pin_overlapping(units: Units, draft: Draft) -> None:
    """Rows that share positions cannot take each other's place: they stay whole."""
    if units.taker.size == 0:
        return
    lane = draft.lane_of[units.base[units.taker]]
    keys, times = np.unique(lane * len(units.pieces.start) + units.taken, return_counts=True)
    for k in distinct(keys[times > 1] // len(units.pieces.start)).tolist():
        if k >= 0 and draft.family_of[k] >= 0:
            draft.pin(int(draft.family_of[k]), "its rows share positions")
