"""Budgets: what must hold afterwards, and the removals that just meet it, found on the plan's cost.

The model is not touched. An allocation is an order of single removals (see :mod:`prunus.allocation`); a budget is met
by the shortest prefix of that order that meets it, and what the last removal took too much is then given back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from prunus.allocation import Course, Lost
from prunus.errors import InputError, TargetError
from prunus.labels import Ids
from prunus.plan import Footprint

BUDGETS = ("macs", "params", "memory", "latency")
CLOSE = 0.005  # of a budget: what is left of it is not worth another look
SLACK = 0.02  # of a budget: the result says why when more than this is left of it
TRIES = 80  # of single removals that are given back

Costs = Mapping[str, float]  # by the name of the budget


@dataclass(frozen=True, repr=False)
class Target:
    """What must hold afterwards. Several budgets may be asked for at once.

    A float is a share of the dense model's cost, in (0, 1); an int is a number.

    Args:
        macs: multiply-adds of one run on the example inputs, at most.
        params: parameters, at most.
        memory: bytes of the parameters and of the activations that are alive at once, at most; see
            :class:`prunus.cost.MemoryModel`.
        latency: time of one run on the device that the model is on, at most; 1 or more is in milliseconds. It is
            predicted from a measured table; see :class:`prunus.cost.LatencyTable`.
        ratio: instead of a budget, the share of every group's units that goes, in (0, 1).

    Raises:
        InputError: nothing is asked, or a value is out of range.

    Example:
        >>> Target(macs=0.5)
        Target(macs=0.5)
        >>> Target(params=1_000_000, macs=0.5).asked
        {'macs': 0.5, 'params': 1000000}
    """

    macs: float | int | None = None
    params: float | int | None = None
    ratio: float | None = None
    memory: float | int | None = None
    latency: float | int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise InputError("the target asks for nothing: give macs=, params=, memory=, latency= or ratio=")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise InputError(f"Target({name}={value!r}) is no number")
            number: Any = value
            if name != "ratio" and (number <= 0 or (_is_share(name, number) and number >= 1)):
                raise InputError(f"Target({name}={value!r}): give a share between 0 and 1, or a positive int")
        if self.ratio is None:
            return
        if not 0 < self.ratio < 1:
            raise InputError(f"Target(ratio={self.ratio!r}): give a share between 0 and 1")
        if self.asked:
            raise InputError(f"Target: give either ratio= or budgets ({', '.join(self.asked)}), not both")

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return f"Target({', '.join(f'{name}={value!r}' for name, value in given if value is not None)})"

    @property
    def asked(self) -> dict[str, float | int]:
        """The budgets that were given."""
        return {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}

    def limits(self, dense: Costs) -> dict[str, float]:
        """The most that each budget allows, in its own unit, for a model that costs ``dense``.

        Example:
            >>> Target(macs=0.5, params=300).limits({"macs": 1000.0, "params": 500.0})
            {'macs': 500.0, 'params': 300.0}
        """
        return {name: float(v * dense[name] if _is_share(name, v) else v) for name, v in self.asked.items()}

    def met_by(self, dense: Footprint, now: Footprint) -> bool:
        """Whether ``now`` is within the budgets of ``macs`` and ``params``, which are relative to ``dense``."""
        asked = Target(macs=self.macs, params=self.params) if self.macs or self.params else None
        limits = asked.limits({"macs": dense.macs, "params": dense.params}) if asked else {}
        return all(getattr(now, name) <= most for name, most in limits.items())


def _is_share(name: str, value: Any) -> bool:
    """Whether a number is a share of the dense cost; a latency of 1 or more is in milliseconds."""
    return not isinstance(value, Integral) and (name != "latency" or value < 1)


@dataclass(frozen=True)
class Budget:
    """What was asked for and what was found: ``dense``, ``limits`` and ``reached`` by the name of the budget.

    ``note`` says why more than 2 % of the tightest budget is left ("" where it is not); ``measured`` has the latency of
    the dense and of the pruned model in milliseconds, the shortest of several turns, where a latency was asked for.
    """

    target: Target
    dense: Costs
    limits: Costs
    reached: Costs
    note: str = ""
    measured: tuple[float, float] | None = None

    def __str__(self) -> str:
        lines = [
            f"{name}: {_show(name, self.reached[name])} of at most {_show(name, most)} "
            f"({self.reached[name] / max(self.dense[name], 1e-12):.1%} of the dense model's)"
            for name, most in self.limits.items()
        ]
        if self.measured is not None:
            before, after = self.measured
            lines.append(f"latency measured: {before:.3g} ms -> {after:.3g} ms ({after / before:.1%})")
        return "\n".join([*lines, self.note] if self.note else lines)


def _show(name: str, value: float) -> str:
    return f"{value:.3g} ms" if name == "latency" else f"{round(value):,}{' bytes' if name == 'memory' else ''}"


@dataclass(frozen=True)
class Found:
    """Removals that meet a target, and what the model costs without them."""

    units: Ids
    lost: Lost
    budget: Budget


def meet(
    target: Target, course: Course, costs: Callable[[Ids], Costs], obstacles: Callable[[str], str] = lambda name: ""
) -> Found:
    """The shortest stretch of a course that meets the budgets, and then single removals given back.

    Args:
        target: budgets (no ratio).
        course: single removals, in the order in which they are made.
        costs: what the model costs without some units, for each budget that is asked for.
        obstacles: what stands in the way of a budget, for the message.

    Raises:
        TargetError: the whole course does not meet them.
    """
    search = _Search(target, course, costs)
    length = search.shortest(course)
    if length is None:
        worst = max(search.limits, key=lambda name: search.last[name] / search.limits[name])
        shares = ", ".join(f"{name} {search.last[name] / search.dense[name]:.1%}" for name in search.limits)
        raise TargetError(
            f"{target} cannot be met: with everything removed that may go, {shares} of the dense model's are left"
            f"{obstacles(worst)}; ask for a larger share, or ask DependencyGraph.explain(layer) why a layer has to stay"
        )
    lost = search.closest(length)
    units = course.units(lost)
    reached_costs = search.costs_of(lost)
    note = search.note(lost) if search.slack(reached_costs) > SLACK else ""
    return Found(units, lost, Budget(target, search.dense, search.limits, reached_costs, note))


class _Search:
    """One search: it remembers what removals cost."""

    def __init__(self, target: Target, course: Course, costs: Callable[[Ids], Costs]) -> None:
        self.course, self._costs = course, costs
        self.known: dict[bytes, Costs] = {}
        self.dense = costs(np.empty(0, dtype=np.int64))
        free = [name for name, cost in self.dense.items() if cost <= 0]
        if free:
            raise InputError(
                f"{target}: {free[0]} of the model are 0 on the example inputs; pass inputs that are not empty"
            )
        self.limits = target.limits(self.dense)
        self.last: Costs = self.dense

    def costs_of(self, lost: Lost) -> Costs:
        key = lost.tobytes()
        if key not in self.known:
            self.known[key] = self._costs(self.course.units(lost))
        self.last = self.known[key]
        return self.last

    def met(self, lost: Lost) -> bool:
        found = self.costs_of(lost)
        return all(found[name] <= most for name, most in self.limits.items())

    def slack(self, found: Costs) -> float:
        """The share that is left of the budget that is nearest to its limit."""
        return min((1 - found[name] / most for name, most in self.limits.items()), default=0.0)

    def shortest(self, course: Course) -> int | None:
        """The length of the shortest prefix of a course that meets the limits."""
        low, high = -1, len(course)
        if not self.met(course.lost(high)):
            return None
        if self.met(course.lost(0)):
            return 0
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.met(course.lost(middle)) else (middle, high)
        return high

    def closest(self, length: int) -> Lost:
        """The prefix of that length, improved by giving back what still fits.

        Where too much is left all the same, because its last removal is a large one, the course goes on without it.
        """
        best = self._given_back(self.course.lost(length), length)
        for family in self.course.latest(length)[:8]:
            if self.slack(self.costs_of(best)) <= SLACK:
                break
            detour = self.course.without(family, length)
            other = self.shortest(detour)
            if other is not None:
                lost = self._given_back(detour.lost(other), length)
                if self.slack(self.costs_of(lost)) < self.slack(self.costs_of(best)):
                    best = lost
        return best

    def _given_back(self, lost: Lost, length: int) -> Lost:
        """Single removals taken back, the latest of the course first, as long as the limits are met."""
        refused: set[tuple[int, int]] = set()
        tries, moved = 0, True
        while moved:
            moved = False
            for family in self.course.latest(length):
                if self.slack(self.costs_of(lost)) <= CLOSE or tries >= TRIES:
                    return lost
                before = self.course.before(family, int(lost[family]))
                if before is None or (family, before) in refused:
                    continue
                tries += 1
                less = lost.copy()
                less[family] = before
                if self.met(less):
                    lost, moved = less, True
                else:
                    refused.add((family, before))
        return lost

    def note(self, lost: Lost) -> str:
        """Why the limits are not met more closely: the smallest removal that could be given back."""
        smallest = math.inf
        now = self.costs_of(lost)
        tight = min(self.limits, key=lambda name: 1 - now[name] / self.limits[name])
        for family in range(len(lost)):
            before = self.course.before(family, int(lost[family]))
            if before is not None:
                less = lost.copy()
                less[family] = before
                smallest = min(smallest, (self.costs_of(less)[tight] - now[tight]) / self.limits[tight])
        if math.isinf(smallest):
            return f"{tight}: what goes in any case takes it below the budget by itself; nothing else was removed"
        return (
            f"{tight}: {1 - now[tight] / self.limits[tight]:.1%} of the budget is left, because the smallest thing "
            f"that could stay (what must go together, in its steps) costs {smallest:.1%} of it"
        )


def best_of(
    candidates: Sequence[Course],
    solve: Callable[[Course], Found],
    metric: Callable[[Found], float],
    mutate: Callable[[Course, Any], Course],
    tries: int,
) -> tuple[Found, float]:
    """The allocation, among ``candidates`` and random changes of the best so far, after which the metric is highest.

    Args:
        candidates: allocations to try first, at least one.
        solve: meets the budget with an allocation.
        metric: judges it, higher is better; nan is the worst.
        mutate: changes an allocation at random.
        tries: how many allocations are judged altogether.

    Source: evolutionary search over widths on a calibration metric, as in EvoPress (arXiv 2410.14649), with a
    population of one.
    """
    random = np.random.default_rng(0)
    best: tuple[float, Course, Found] | None = None
    for k in range(tries):
        course = candidates[k] if best is None or k < len(candidates) else mutate(best[1], random)
        found = solve(course)
        value = _number(metric(found))
        value = -math.inf if math.isnan(value) else value
        if best is None or value > best[0]:
            best = value, course, found
    if best is None:
        raise InputError(f"search={tries!r}: at least one allocation must be tried")
    return best[2], best[0]


def _number(value: Any) -> float:
    """What a metric returned, as a number.

    Raises:
        InputError: it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"the metric returned {str(value)[:40]!r}: it must return one number") from error


__all__ = ["BUDGETS", "Budget", "Costs", "Found", "Target", "best_of", "meet"]
