"""How :func:`prunus.prune` meets a latency: predictions from a measured table, made to fit by one real measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from prunus.allocation import Offered
from prunus.budget import BUDGETS, Found, Target
from prunus.cost import LatencyModel
from prunus.errors import InputError, TargetError
from prunus.labels import Ids
from prunus.plan import Alive, footprint
from prunus.spending import Measure, Wish, spend

ROUNDINGS = (1, 8, 16, 32)  # widths that stay are multiples of one of them
CORRECTIONS = 6  # of the search's limit, by what the calls take at the very widths that it found
CLOSE = 0.02  # of the limit: a plan within it is not corrected again
UNSTEADY = 1.25  # by so much two measurements of one model may differ
TRUST = 0.03  # a prediction that is further from what is measured is made again, from what was measured
LESSONS = 3  # how often
TOO_SLOW = 0.1  # a plan that takes so much longer than predicted does not count, where there is no better one
FACTOR = 4.0  # by which a model may at most gain more, or less, than its calls do alone


@dataclass(frozen=True)
class Timing:
    """What a search for time needs.

    ``model`` predicts; ``race`` gives the milliseconds of the whole model and of the one without some units, run in
    turns; ``choices`` gives what may be removed when the widths that stay are multiples of a number; ``without`` gives
    the atoms that are left without some units.
    """

    model: LatencyModel
    race: Callable[[Ids], tuple[float, float]]
    choices: Callable[[int | None], Offered]
    without: Callable[[Ids], Alive]


@dataclass(frozen=True)
class _Fit:
    """Predictions that are right for the whole model and for every plan that was timed, and linear between them.

    ``points`` are the milliseconds of the calls alone and of the model, from the fastest to the whole model; what is
    faster than all of them lies on the line through the first and the last.
    """

    model: LatencyModel
    points: tuple[tuple[float, float], ...]

    def __call__(self, alive: Alive) -> float:
        return self._fitted(self.model(alive))

    def exact(self, alive: Alive) -> float:
        """What is left takes so long when every call is timed at its very widths."""
        return self._fitted(self.model.exact(alive))

    def _fitted(self, alone: float) -> float:
        (low, least), (whole, dense) = self.points[0], self.points[-1]
        if alone >= low and len(self.points) > 1:
            alones, times = zip(*self.points, strict=True)
            return float(np.interp(alone, alones, times))
        rise = (dense - least) / (whole - low) if low < whole else 1.0
        return dense - rise * (whole - alone)

    def taught(self, alive: Alive, measured: float) -> _Fit:
        """The same with one more plan; longer calls are never taken to be faster."""
        alone = self.model.exact(alive)
        whole, dense = self.points[-1]
        gain = (dense - measured) / max(whole - alone, 1e-9)
        measured = dense - min(max(gain, 1 / FACTOR), FACTOR) * (whole - alone)
        points = sorted([*self.points[:-1], (alone, measured)])
        longest = accumulate((ms for _, ms in points), max)
        return replace(self, points=(*zip((ms for ms, _ in points), longest, strict=True), (whole, dense)))


@dataclass(frozen=True)
class _Plan:
    """A plan that was timed, and its multiply-adds."""

    found: Found
    macs: int

    @property
    def shares(self) -> tuple[float, float]:
        """The predicted and the measured share of the whole model's latency."""
        budget = self.found.budget
        whole, cut = budget.measured or (1.0, 1.0)
        return budget.reached["latency"] / budget.dense["latency"], cut / whole

    @property
    def off(self) -> float:
        """By how much more than predicted it takes."""
        predicted, measured = self.shares
        return measured / predicted - 1


def _worth(plan: _Plan) -> tuple[bool, float]:
    """Plans whose prediction held come first; then what has most multiply-adds left, or what is the least off."""
    held = abs(plan.off) <= TRUST
    return held, plan.macs if held else -abs(plan.off)


@dataclass(frozen=True)
class _Search:
    """Plans whose predicted latency is at most ``limit`` milliseconds."""

    alive: Alive
    timing: Timing
    target: Target
    limit: float
    wish: Wish
    special: dict[str, Measure]
    judge: Callable[[Ids], float] | None

    def solve(self, fit: _Fit, choices: Offered, most: float, wish: Wish) -> Found:
        """A plan that takes at most so long when times are read between measured widths."""
        model = self.timing.model
        asked = replace(self.target, latency=min(max(most / model.dense, 1e-9), 1 - 1e-9))
        special: dict[str, Measure] = {**self.special, "latency": fit}
        return spend(model.coupling, self.alive, choices, asked, wish, special, self.judge)

    def corrected(self, fit: _Fit, step: int) -> Found:
        """A plan with widths in multiples of ``step`` that takes at most the limit at its very widths.

        Raises:
            TargetError: there is none.
        """
        choices, most = self.timing.choices(step), self.limit
        found: Found | None = None
        reached = 0.0
        for _ in range(CORRECTIONS):
            next_one = self.solve(fit, choices, most, Wish(self.wish.allocation))
            exact = fit.exact(self.timing.without(next_one.units))
            if exact <= self.limit and exact > reached:
                found, reached = next_one, exact
            if (1 - CLOSE) * self.limit <= exact <= self.limit:
                break
            between = next_one.budget.reached["latency"]  # what this plan was thought to take
            most = min(most, between * 0.995) * self.limit / exact if exact > self.limit else most * self.limit / exact
        if found is None:
            raise TargetError(f"{self.target}: times at single widths vary too much; try again on an idle machine")
        if self.wish.search:
            found = self.solve(fit, choices, most, self.wish)
            reached = fit.exact(self.timing.without(found.units))
        budget = found.budget
        costs = {**budget.reached, "latency": reached}
        limits = {**budget.limits, "latency": self.limit}
        note = f"widths in multiples of {step} are the fastest here" if step > 1 else ""
        return replace(found, budget=replace(budget, target=self.target, reached=costs, limits=limits, note=note))

    def at(self, step: int) -> _Plan:
        """The plan with widths in multiples of ``step``, after predictions learned from what plans were measured at.

        Raises:
            TargetError: there is none.
        """
        model = self.timing.model
        fit = _Fit(model, ((model.dense, model.dense),))
        plans = [self.timed(fit, step)]
        while abs(plans[-1].off) > TRUST and len(plans) <= LESSONS:
            last = plans[-1]
            fit = fit.taught(self.timing.without(last.found.units), last.shares[1] * model.dense)
            try:
                plans.append(self.timed(fit, step))
            except TargetError:
                if (nearest := max(plans, key=_worth)).off > TOO_SLOW:
                    raise
                return nearest
        return max(plans, key=_worth)

    def timed(self, fit: _Fit, step: int) -> _Plan:
        """A corrected plan, timed."""
        found = self.corrected(fit, step)
        budget = replace(found.budget, measured=self.timing.race(found.units))
        left = footprint(self.timing.model.coupling, self.timing.without(found.units))
        return _Plan(replace(found, budget=budget), left.macs)


def spend_time(
    alive: Alive,
    timing: Timing,
    target: Target,
    wish: Wish,
    special: dict[str, Measure],
    round_to: int | None = None,
    judge: Callable[[Ids], float] | None = None,
) -> Found:
    """The units to remove so that a target with a latency is met.

    Widths of any number and in multiples of 8, 16 and 32 are compared (or only ``round_to``). For each, a plan is found
    whose calls, timed at the very widths, take the time that is left, and it is timed against the whole model, in
    turns; where that is not what was predicted, predictions learn from it and the plan is found again, three times at
    most. Of the plans whose predictions held, the one with the most multiply-adds left wins.

    Args:
        alive: the atoms that are there now.
        timing: predictions and measurements.
        target: budgets with a latency.
        wish: how to spend them.
        special: what measures memory, where the target asks for it.
        round_to: the caller's own choice.
        judge: the metric of the model without some units, for a search.

    Raises:
        InputError: the model is as fast as that already.
        TargetError: the target cannot be met.
    """
    model = timing.model
    limit = target.limits({**dict.fromkeys(BUDGETS, 1.0), "latency": model.dense})["latency"]
    if limit >= model.dense:
        raise InputError(f"{target}: the model takes {model.dense:.3g} ms as it is, which is within the budget already")
    search = _Search(alive, timing, target, limit, wish, special, judge)
    plans: list[_Plan] = []
    failures: list[TargetError] = []
    for step in ROUNDINGS if round_to is None else (round_to,):
        try:
            plans.append(search.at(step))
        except TargetError as error:
            failures.append(error)
    if not plans:
        raise failures[0]
    budget = (best := max(plans, key=_worth).found).budget
    note = budget.note + (_unsteady(model.dense, budget.measured[0]) if budget.measured else "")
    return replace(best, budget=replace(budget, note=note.removeprefix("; ")))


def _unsteady(one: float, other: float) -> str:
    """A clause that says so where two measurements of one model differ too much to be relied on."""
    if max(one, other) <= UNSTEADY * min(one, other):
        return ""
    return f"; the whole model took {one:.3g} ms, then {other:.3g} ms, so the machine was busy: try again when idle"
