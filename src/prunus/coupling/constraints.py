"""Constraints: the sizes that the code asks for join families, or keep them whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache, cached_property
from math import gcd, lcm
from typing import NamedTuple

import numpy as np

from prunus.coupling.families import Draft
from prunus.coupling.units import Units
from prunus.labels import Ids, first_row
from prunus.ledger import Ledger, Limit, Requirement
from prunus.sizes import Attribute, Binary, Expression, Extent, expression_of, leaves
from prunus.solving import evaluate, solve_all

TINY = 1e-6


class Demand(NamedTuple):
    """The code asks for as many positions as an expression tells, in rows: the first; the others are of its extents."""

    asked: Requirement
    expression: Expression
    rows: tuple[Ids, ...]
    attributes: tuple[Attribute, ...]


def demands_of(requirements: Iterable[Requirement]) -> list[Demand]:
    """What the code asks for; that a dim is as long as itself always holds."""
    found = []
    for asked in requirements:
        expression = expression_of(asked.asked)
        if not (isinstance(expression, Extent) and expression.ids is asked.ids):
            used = leaves(expression)
            rows = (asked.ids, *[leaf.ids for leaf in used if isinstance(leaf, Extent)])
            found.append(Demand(asked, expression, rows, tuple([a for a in used if isinstance(a, Attribute)])))
    return found


class Constraints:
    """The sizes that the code asks for, checked by letting each family shrink by itself."""

    def __init__(
        self,
        demands: Sequence[Demand],
        ledger: Ledger,
        units: Units,
        draft: Draft,
        read: Callable[[Attribute], int],
        rows_first: bool,
    ) -> None:
        self.rows_first = rows_first
        self.units = units
        self.draft = draft
        self.read = cache(read)
        self._coarse: dict[int, bool] = {}
        self._split = [rows.coarse for rows in ledger.rows_of if rows.split]
        self._solved: dict[int, dict[Attribute, float]] = {}
        self._constant: set[Attribute] = set()  # those that no family may change, as one of them would need fractions
        self.by_lane: dict[int, set[int]] = {}
        self.using: dict[Attribute, list[int]] = {}
        rows = [*(ids for demand in demands for ids in demand.rows), *(limit.ids for limit in ledger.limits)]
        self._contents = _contents(units, draft, rows)
        different: dict[Hashable, Demand] = {}  # two alike are off by the same
        for demand in demands:
            ids = demand.asked.ids
            different.setdefault((demand.expression, ids.shape[-1], *self.content(ids).items()), demand)
        self.demands = list(different.values())
        for k, demand in enumerate(self.demands):
            for ids in demand.rows:
                for lane in self.content(ids):
                    self.by_lane.setdefault(lane, set()).add(k)
            for attribute in demand.attributes:
                self.using.setdefault(attribute, []).append(k)

    @cached_property
    def _only_divides(self) -> frozenset[Attribute | Extent]:
        """The attributes by which the code divides wherever it uses them: they count nothing that can go."""
        dividing = {
            a: sum(divisors(self.demands[k].expression).count(a) for k in used) for a, used in self.using.items()
        }
        return frozenset(a for a, n in dividing.items() if n == len(self.using[a]))

    @cached_property
    def _rows(self) -> set[int]:
        """The units that are rows of a split (heads)."""
        return set(self.units.unit_of(np.concatenate(self._split)).tolist()) if self._split else set()

    def content(self, ids: Ids) -> dict[int, int]:
        """How many positions of a row go with each lane (a coarse unit that takes one of several rows is left out)."""
        return self._contents[id(ids)]

    def settle(self) -> None:
        """Join families that only together keep every size right; pin those that cannot."""
        families = {int(self.draft.family_of[lane]) for lane in self.by_lane}
        errors = {f: self._errors(f) for f in sorted(families) if f >= 0}
        while involved := _by_requirement(errors):
            joins = [chosen for off in involved.values() if (chosen := self._balancing(off))]
            if joins:
                self._join(joins, errors)
                continue
            if self._hold(involved, errors):
                continue
            first, off = next(iter(involved.items()))
            for family in off:
                del errors[family]
                self.draft.pin(family, _reason(self.demands[first]))
        for family in errors:
            self.draft.step[family] = self._step(family)

    def _hold(self, involved: Mapping[int, Mapping[int, float]], errors: dict[int, dict[int, float]]) -> bool:
        """Keep attributes by which the code divides, and that a family cannot change in whole numbers, as they are.

        Other families, which could change them, must shrink in step with that one then. Whether there are any.
        """
        dividing = {d for k in involved for d in divisors(self.demands[k].expression) if d in self._only_divides}
        held = {a for f in errors for a, v in self._solved[f].items() if a in dividing and v != self.read(a)}
        self._constant |= held
        for family in errors if held else ():
            if held.intersection(self._solved[family]):
                errors[family] = self._errors(family)
        return bool(held)

    def _stays(self, expression: Expression, size: float, attribute: Attribute) -> bool:
        """An attribute by which the code divides changes in whole numbers only where the quotient stays the same."""
        if attribute in self._constant or attribute not in divisors(expression):
            return attribute in self._constant
        now = evaluate(expression, lambda leaf: leaf.ids.shape[-1] if isinstance(leaf, Extent) else self.read(leaf))
        return size != now

    def respect(self, limits: Iterable[Limit]) -> None:
        """Steps and least numbers of bundles that keep the limits; a family that cannot keep them is pinned."""
        for ids, least, multiple, reason in limits:
            inside: dict[int, int] = {}
            for lane, n in self.content(ids).items():
                family = int(self.draft.family_of[lane])
                inside[family] = inside.get(family, 0) + n
            inside.pop(-1, None)
            for family, n in inside.items():
                whole = gcd(*(len(self.draft.lanes[k]) for k in self.draft.members(family)))
                step = self.draft.step.get(family, 1)
                if ids.shape[-1] % multiple == 0:
                    step = lcm(step, multiple // gcd(multiple, n // whole))
                if n % whole or whole % step:
                    self.draft.pin(family, reason)
                    continue
                self.draft.step[family] = step
                must_stay = -(-least * (whole // step) // n)
                self.draft.least[family] = max(self.draft.least.get(family, 1), must_stay)

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
        solved = self._solved[family]
        count = gcd(*(len(self.draft.lanes[k]) for k in self.draft.members(family)))
        changes = [(self.read(attribute) - half) * 2 / count for attribute, half in solved.items()]
        if all(change == round(change) for change in changes):
            return 1
        return lcm(*(Fraction(change).limit_denominator(count).denominator for change in changes))

    def _balancing(self, errors: dict[int, float]) -> list[int]:
        """The families whose errors have opposite signs: fine ones alone if they do, else all.

        With rows first: the rows, and what is off in the other direction.
        """
        if not _opposed(errors.values()):
            return []
        fine = {f: e for f, e in errors.items() if not self._is_coarse(f)}
        signs = {e > 0 for f, e in errors.items() if f not in fine}
        by_rows = {f: e for f, e in errors.items() if f not in fine or (e > 0) not in signs}
        for chosen in (by_rows, fine, errors) if self.rows_first and signs else (fine, errors):
            if _opposed(chosen.values()):
                return list(chosen)
        return []

    def _is_coarse(self, family: int) -> bool:
        """Whether its units are rows of a split (heads); a channel that takes columns of a flattened dim is not."""
        found = self._coarse.get(family)
        if found is None:
            lane = self.draft.members(family)[0]
            found = self._coarse[family] = int(self.draft.lanes[lane][0]) in self._rows
        return found

    def _errors(self, family: int) -> dict[int, float]:
        """By how much each requirement is off (asked minus there) when half of a family goes."""
        members = set(self.draft.members(family))
        relevant = self._relevant(members)

        def extent(ids: Ids) -> float:
            return ids.shape[-1] - sum([n for lane, n in self.content(ids).items() if lane in members]) / 2

        demands = [(self.demands[k].expression, extent(self.demands[k].asked.ids)) for k in relevant]
        self._solved[family], values = solve_all(demands, extent, self.read, self._stays)
        errors = {}
        for k, (_, size), value in zip(relevant, demands, values, strict=True):
            if value is not None and abs(value - size) > TINY:
                errors[k] = value - size
        return errors

    def _relevant(self, lanes: Iterable[int]) -> list[int]:
        """The requirements that some lanes touch, and those that share an attribute with them."""
        found = set().union(*(self.by_lane.get(lane, ()) for lane in lanes))
        todo = list(found)
        seen: set[Attribute] = set()
        while todo:
            for attribute in self.demands[todo.pop()].attributes:
                if attribute not in seen:
                    seen.add(attribute)
                    new = [k for k in self.using[attribute] if k not in found]
                    found.update(new)
                    todo += new
        return sorted(found)


def _opposed(errors: Collection[float]) -> bool:
    """Whether errors of both signs are among them."""
    return len(errors) > 1 and min(errors) < 0 < max(errors)


def _by_requirement(errors: Mapping[int, Mapping[int, float]]) -> dict[int, dict[int, float]]:
    """The errors of families, sorted by requirement."""
    found: dict[int, dict[int, float]] = {}
    for family, own in errors.items():
        for k, error in own.items():
            found.setdefault(k, {})[family] = error
    return dict(sorted(found.items()))


def divisors(expression: Expression) -> list[Attribute | Extent]:
    """The attributes and extents by which an expression divides."""
    if not isinstance(expression, Binary):
        return []
    inside = [*divisors(expression.left), *divisors(expression.right)]
    return [*inside, *leaves(expression.right)] if expression.operator == "//" else inside


def _contents(units: Units, draft: Draft, rows: Iterable[Ids]) -> dict[int, dict[int, int]]:
    """For each row (by object) how many of its positions go with each lane; see :meth:`Constraints.content`."""
    every = {id(ids): ids for ids in rows}
    found: list[dict[int, int]] = [{} for _ in every]
    firsts = [first_row(ids) for ids in every.values()]
    if not firsts:
        return {}
    flat = np.concatenate(firsts)
    row = np.arange(len(firsts)).repeat([first.size for first in firsts])
    for (k, lane), n in _tally(row, draft.lane_of[units.of_atom[flat]]).items():
        if lane >= 0:
            found[k][lane] = n
    if units.taker.size:
        place, taker = units.takings(units.pieces.of(flat))
        single = [ids.ndim == 1 for ids in every.values()]
        for (k, unit), n in _tally(row[place], taker).items():
            if n < firsts[k].size or single[k]:
                lane = draft.lane_of.item(unit)
                found[k][lane] = found[k].get(lane, 0) + n
    return dict(zip(every, found, strict=True))


def _tally(rows: Ids, values: Ids) -> dict[tuple[int, int], int]:
    """How often each value occurs in each row."""
    found: dict[tuple[int, int], int] = {}
    if rows.size:
        ends = np.flatnonzero((rows[1:] != rows[:-1]) | (values[1:] != values[:-1])).tolist()
        begins = [0, *(end + 1 for end in ends)]
        pairs = zip(rows[begins].tolist(), values[begins].tolist(), strict=True)
        for pair, begin, end in zip(pairs, begins, [*begins[1:], rows.size], strict=True):
            found[pair] = found.get(pair, 0) + end - begin
    return found


def _reason(demand: Demand) -> str:
    if isinstance(demand.expression, int):
        return (
            f"the code sizes it with the number {demand.expression} at {demand.asked.place}; "
            "write -1 or a size read from the tensor there to free it"
        )
    return f"the code sizes it by {demand.expression}, which ties it to a size that stays"
