"""Bundles: what selection removes at once.

Some rows must stay equally long (the head dims of every head, the two halves of a chunk), and some widths must keep
their ratio (a stream of ``heads * head_dim`` channels and the head dims themselves). Units that no constraint tells
apart form a *lane*; lanes that a constraint joins form a *family*. Cutting every lane of a family by the same share
keeps all constraints of degree one, so a family of lanes with sizes ``s`` has ``gcd(s)`` bundles, and a bundle takes
``s / gcd(s)`` units of each lane, chosen by rank of importance within the lane.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from math import gcd, lcm
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from prunus.coupling.pieces import components
from prunus.coupling.units import Units
from prunus.labels import Ids, Ledger, Limit, Requirement, first_row
from prunus.sizes import Attribute, Expression, Extent, expression_of, leaves, solve_all

TINY = 1e-6


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


_Partial: TypeAlias = "list[tuple[int, Ids, Ids]]"  # rows of a balance, coarse units that take a part, how much


@dataclass
class _Draft:
    """Families while constraints join and pin them: ``family_of[lane]``, -1 for a lane that has to stay."""

    lane_of: Ids
    lanes: list[Ids]
    family_of: Ids
    why: dict[int, str] = field(default_factory=dict)
    step: dict[int, int] = field(default_factory=dict)  # family -> see Family.step
    least: dict[int, int] = field(default_factory=dict)  # family -> see Family.least

    def join(self, families: Iterable[int]) -> None:
        chosen = sorted(set(families))
        self.family_of[np.isin(self.family_of, chosen)] = chosen[0]

    def pin(self, family: int, why: str) -> None:
        for lane in np.flatnonzero(self.family_of == family).tolist():
            self.why[lane] = why
        self.family_of[self.family_of == family] = -1


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
        constraints = _Constraints(ledger, units, draft, read, rows_first)
        constraints.settle()
        constraints.respect(ledger.limits)
    families = []
    for family in np.unique(draft.family_of[draft.family_of >= 0]).tolist():
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


def _lanes(ledger: Ledger, units: Units, kind: Ids, partial: list[_Partial]) -> _Draft:
    """Units of one kind that are in the same rows of the same balances form a lane."""
    random = np.random.default_rng(0)
    mark = np.zeros(units.total, dtype=np.uint64)
    for balance, takings in zip(ledger.balances, partial, strict=True):
        rows = units.unit_of(balance.ids)
        numbers = np.broadcast_to(random.integers(1, 2**63, size=(len(rows), 1), dtype=np.uint64), rows.shape)
        np.add.at(mark, rows[rows >= 0], numbers[rows >= 0])
        for k, takers, times in takings:
            mark[takers] += numbers[k, 0] * times.astype(np.uint64)
    parts = _sized_parts(ledger)
    for ids, number in zip(parts, random.integers(1, 2**63, size=len(parts), dtype=np.uint64), strict=True):
        members = units.unit_of(ids).reshape(-1)
        np.add.at(mark, members[members >= 0], number)
        if ids.ndim == 1:
            takers, times = np.unique(units.takers_of(units.pieces.of(ids)), return_counts=True)
            mark[takers] += number * times.astype(np.uint64)
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
    return _Draft(lane_of, list(lanes), np.arange(len(lanes)))


def _sized_parts(ledger: Ledger) -> list[Ids]:
    """Every stretch of atoms whose number the code asks for, or computes with, once."""
    found: dict[int, Ids] = {}
    for requirement in ledger.requirements:
        if not _is_own_size(requirement):
            found[id(requirement.ids)] = requirement.ids
            for leaf in leaves(expression_of(requirement.asked)):
                if isinstance(leaf, Extent):
                    found[id(leaf.ids)] = leaf.ids
    return list(found.values())


def _partial_takers(units: Units, ids: Ids) -> _Partial:
    """Rows of which coarse units take a part (not all), each with the units that do and how much each takes."""
    pieces = units.pieces.of(ids)
    mark = units.taker_mark[pieces]
    rows = np.flatnonzero((mark != mark[:, :1]).any(axis=1))
    place, taker = units.takings(pieces[rows].reshape(-1))
    pairs, times = np.unique(place // ids.shape[1] * units.total + taker, return_counts=True)
    pairs, times = pairs[times < ids.shape[1]], times[times < ids.shape[1]]
    own, first = np.unique(pairs // units.total, return_index=True)
    parts = np.split(pairs % units.total, first[1:]), np.split(times, first[1:])
    return list(zip(rows[own].tolist(), *parts, strict=True)) if own.size else []


def _pin_misaligned(ledger: Ledger, units: Units, draft: _Draft) -> None:
    """Pin coarse units that take a part of a row, but not the same part of every row that is aligned with it."""
    for item in ledger.aligned:
        takers = [taker for _, found, _ in _partial_takers(units, item.ids) for taker in found.tolist()]
        pieces = units.pieces.of(item.ids) if takers else item.ids
        for taker in dict.fromkeys(takers):
            gone = np.isin(pieces, units.takes[int(units.fine_of(np.array(taker)))])
            family = int(draft.family_of[draft.lane_of[taker]])
            if family >= 0 and not (gone == gone[0]).all():
                draft.pin(family, item.reason)


def _balance(ledger: Ledger, units: Units, draft: _Draft, partial: list[_Partial]) -> None:
    """Join the lanes of each balance; pin them where the rows do not have equally many free units."""
    left: list[int] = []
    right: list[int] = []
    uneven: list[tuple[Ids, str]] = []
    for balance, takings in zip(ledger.balances, partial, strict=True):
        rows = units.unit_of(balance.ids)
        inside = np.zeros(len(draft.lanes), dtype=bool)
        inside[draft.lane_of[rows[rows >= 0]]] = True
        members = np.flatnonzero(inside)
        whole = [np.unique(draft.lane_of[takers]) for _, takers, _ in takings]
        if whole:
            lanes = np.unique(np.concatenate(whole))
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
            uneven.append((np.unique(draft.lane_of[takers]), "it would take a part of rows that are alike"))
    draft.family_of[:] = components(len(draft.lanes), np.array(left, dtype=np.int64), np.array(right, dtype=np.int64))
    for members, reason in uneven:
        for family in np.unique(draft.family_of[members]).tolist():
            if family >= 0:
                draft.pin(family, f"{reason}, and a part of one of them has to stay")


def _pin_overlapping(units: Units, draft: _Draft) -> None:
    """Rows that share positions cannot take each other's place: they stay whole."""
    lane = draft.lane_of[units.base[units.taker]]
    keys, times = np.unique(lane * len(units.pieces.start) + units.taken, return_counts=True)
    for k in np.unique(keys[times > 1] // len(units.pieces.start)).tolist():
        if k >= 0 and draft.family_of[k] >= 0:
            draft.pin(int(draft.family_of[k]), "its rows share positions")


class _Constraints:
    """The sizes that the code asks for, checked by letting each family shrink by itself."""

    def __init__(
        self, ledger: Ledger, units: Units, draft: _Draft, read: Callable[[Attribute], int], rows_first: bool
    ) -> None:
        self.rows_first = rows_first
        self.units = units
        self.draft = draft
        self.read = read
        pieces = units.pieces
        free = np.repeat(units.free[pieces.fine], pieces.length)
        self._piece_at = np.repeat(np.arange(len(pieces.start)), pieces.length)
        self._lane_at = np.where(free, draft.lane_of[units.of_atom], -1)
        self._contents: dict[int, tuple[Ids, dict[int, int]]] = {}
        self._coarse: dict[int, bool] = {}
        self._solved: dict[int, dict[Attribute, float]] = {}
        self.requirements: list[Requirement] = []
        self.expressions: list[Expression] = []
        self.by_lane: dict[int, set[int]] = {}
        self.using: dict[Attribute, list[int]] = {}
        for requirement in ledger.requirements:
            self._add(requirement, expression_of(requirement.asked))

    def _add(self, requirement: Requirement, expression: Expression) -> None:
        """Keep a requirement if something that may go changes one of its sizes."""
        used = list(leaves(expression))
        if _is_own_size(requirement):
            return
        rows = [requirement.ids, *(leaf.ids for leaf in used if isinstance(leaf, Extent))]
        k = len(self.requirements)
        self.requirements.append(requirement)
        self.expressions.append(expression)
        for row in rows:
            for lane in self.content(row):
                self.by_lane.setdefault(lane, set()).add(k)
        for leaf in used:
            if isinstance(leaf, Attribute):
                self.using.setdefault(leaf, []).append(k)

    def content(self, ids: Ids) -> dict[int, int]:
        """How many positions of a row go with each lane (a coarse unit that takes one of several rows is left out)."""
        cached = self._contents.get(id(ids))
        if cached is not None:
            return cached[1]
        row = first_row(ids)
        found = _tally(self._lane_at[row])
        found.pop(-1, None)
        for unit, n in _tally(self.units.takers_of(self._piece_at[row])).items():
            if n < row.size or ids.ndim == 1:
                lane = int(self.draft.lane_of[unit])
                found[lane] = found.get(lane, 0) + n
        self._contents[id(ids)] = (ids, found)
        return found

    def settle(self) -> None:
        """Join families that only together keep every size right; pin those that cannot."""
        families = {int(self.draft.family_of[lane]) for lane in self.by_lane}
        errors = {f: self._errors(f) for f in sorted(families) if f >= 0}
        while involved := _by_requirement(errors):
            joins = [chosen for off in involved.values() if (chosen := self._balancing(off))]
            if joins:
                self._join(joins, errors)
                continue
            first, off = next(iter(involved.items()))
            for family in off:
                del errors[family]
                self.draft.pin(family, _reason(self.expressions[first], self.requirements[first]))
        for family in errors:
            self.draft.step[family] = self._step(family)

    def respect(self, limits: Iterable[Limit]) -> None:
        """Steps and least numbers of bundles that keep the limits; a family that cannot keep them is pinned."""
        for ids, least, multiple, reason in limits:
            inside: dict[int, int] = {}
            for lane, n in self.content(ids).items():
                family = int(self.draft.family_of[lane])
                inside[family] = inside.get(family, 0) + n
            inside.pop(-1, None)
            for family, n in inside.items():
                whole = int(np.gcd.reduce([len(self.draft.lanes[k]) for k in self._lanes_of(family)]))
                step = self.draft.step.get(family, 1)
                if ids.shape[-1] % multiple == 0:
                    step = lcm(step, multiple // gcd(multiple, n // whole))
                if n % whole or whole % step:
                    self.draft.pin(family, reason)
                    continue
                self.draft.step[family] = step
                must_stay = -(-least * (whole // step) // n)
                self.draft.least[family] = max(self.draft.least.get(family, 1), must_stay)

    def _lanes_of(self, family: int) -> list[int]:
        return np.flatnonzero(self.draft.family_of == family).tolist()

    def _join(self, joins: list[list[int]], errors: dict[int, dict[int, float]]) -> None:
        """Join sets of families (those that overlap become one), and look at the results again."""
        home: dict[int, set[int]] = {}
        for families in joins:
            merged = set(families).union(*(home.get(f, ()) for f in families))
            home.update(dict.fromkeys(merged, merged))
        for merged in {id(m): m for m in home.values()}.values():
            for family in merged:
                del errors[family]
                self._coarse.pop(family, None)
            self.draft.join(merged)
        for family in sorted({min(m) for m in home.values()}):
            errors[family] = self._errors(family)

    def _step(self, family: int) -> int:
        """How many bundles must go at once so that every attribute stays a whole number."""
        lanes = [self.draft.lanes[k] for k in np.flatnonzero(self.draft.family_of == family).tolist()]
        count = gcd(*map(len, lanes))
        solved = self._solved.get(family, {})
        changes = [(self.read(attribute) - half) * 2 / count for attribute, half in solved.items()]
        if all(change == round(change) for change in changes):
            return 1
        return lcm(*(Fraction(change).limit_denominator(count).denominator for change in changes))

    def _balancing(self, errors: dict[int, float]) -> list[int]:
        """The families whose errors have opposite signs: fine ones alone if they do, else all.

        With rows first: the rows, and what is off in the other direction.
        """
        fine = {f: e for f, e in errors.items() if not self._is_coarse(f)}
        signs = {e > 0 for f, e in errors.items() if f not in fine}
        by_rows = {f: e for f, e in errors.items() if f not in fine or (e > 0) not in signs}
        for chosen in (by_rows, fine, errors) if self.rows_first and signs else (fine, errors):
            if any(e > 0 for e in chosen.values()) and any(e < 0 for e in chosen.values()):
                return list(chosen)
        return []

    def _is_coarse(self, family: int) -> bool:
        found = self._coarse.get(family)
        if found is None:
            lane = int(np.flatnonzero(self.draft.family_of == family)[0])
            found = self._coarse[family] = self.units.is_coarse(int(self.draft.lanes[lane][0]))
        return found

    def _errors(self, family: int) -> dict[int, float]:
        """By how much each requirement is off (asked minus there) when half of a family goes."""
        relevant = self._relevant(family)
        members = set(np.flatnonzero(self.draft.family_of == family).tolist())
        extents: dict[int, float] = {}

        def extent(ids: Ids) -> float:
            found = extents.get(id(ids))
            if found is None:
                gone = sum(n for lane, n in self.content(ids).items() if lane in members)
                found = extents[id(ids)] = ids.shape[-1] - gone / 2
            return found

        demands = [(self.expressions[k], extent(self.requirements[k].ids)) for k in relevant]
        self._solved[family], values = solve_all(demands, extent, self.read)
        errors = {}
        for k, (_, size), value in zip(relevant, demands, values, strict=True):
            if value is not None and abs(value - size) > TINY:
                errors[k] = value - size
        return errors

    def _relevant(self, family: int) -> list[int]:
        """The requirements that a family touches, and those that share an attribute with them."""
        members = np.flatnonzero(self.draft.family_of == family).tolist()
        found = set().union(*(self.by_lane.get(lane, set()) for lane in members))
        todo = list(found)
        while todo:
            for leaf in leaves(self.expressions[todo.pop()]):
                for k in self.using.get(leaf, ()) if isinstance(leaf, Attribute) else ():
                    if k not in found:
                        found.add(k)
                        todo.append(k)
        return sorted(found)


def _by_requirement(errors: Mapping[int, Mapping[int, float]]) -> dict[int, dict[int, float]]:
    """The errors of families, sorted by requirement."""
    found: dict[int, dict[int, float]] = {}
    for family, own in errors.items():
        for k, error in own.items():
            found.setdefault(k, {})[family] = error
    return dict(sorted(found.items()))


def _is_own_size(requirement: Requirement) -> bool:
    """Whether the code sizes a dim by that dim's own size, which always holds."""
    expression = expression_of(requirement.asked)
    return isinstance(expression, Extent) and expression.ids is requirement.ids


def _tally(values: Ids) -> dict[int, int]:
    """How often each value occurs."""
    if values.size and (values == values[0]).all():
        return {int(values[0]): values.size}
    if values.size == 0:
        return {}
    times = np.bincount(values + 1)
    found = np.flatnonzero(times)
    return dict(zip((found - 1).tolist(), times[found].tolist(), strict=True))


def _reason(expression: Expression, requirement: Requirement) -> str:
    if isinstance(expression, int):
        return (
            f"the code sizes it with the number {expression} at {requirement.place}; "
            "write -1 or a size read from the tensor there to free it"
        )
    return f"the code sizes it by {expression}, which ties it to a size that stays"
