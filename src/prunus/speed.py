"""How :func:`prunus.prune` meets a latency: predictions from a measured table, made to fit by one real measurement."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

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
TURNS = 5
UNSTEADY = 1.25  # by so much two measurements of one model may differ
TRUST = 0.04  # a prediction that is further from what is measured is made again, from what was measured
LESSONS = 2  # how often


@dataclass(frozen=True)
class Timing:
    """What a search for time needs.

    ``model`` predicts; ``measure`` times the model without some units; ``choices`` gives what may be removed when the
    widths that stay are multiples of a number; ``without`` gives the atoms that are left without some units.
    """

    model: LatencyModel
    measure: Callable[[Ids], float]
    choices: Callable[[int | None], Offered]
    without: Callable[[Ids], Alive]

    def in_turns(self, units: Ids) -> tuple[float, float]:
        """The milliseconds of the whole model and of the one without ``units``: the shortest of several turns."""
        turns = [(self.model.measured(), self.measure(units)) for _ in range(TURNS)]
        return min(a for a, _ in turns), min(b for _, b in turns)


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

    def solve(self, choices: Offered, most: float, wish: Wish) -> Found:
        """A plan that takes at most so long when times are read between measured widths."""
        model = self.timing.model
        asked = replace(self.target, latency=min(max(most / model.dense, 1e-9), 1 - 1e-9))
        special: dict[str, Measure] = {**self.special, "latency": model}
        return spend(model.coupling, self.alive, choices, asked, wish, special, self.judge)

    def exact(self, found: Found) -> float:
        """What a plan takes when every call is timed at its very widths."""
        return self.timing.model.exact(self.timing.without(found.units))

    def learn(self, found: Found, times: tuple[float, float]) -> None:
        """Let predictions fit what the whole model and a plan were measured at, in turns."""
        whole, cut = times
        self.timing.model.calibrate(self.timing.without(found.units), cut / whole * self.timing.model.dense)

    def corrected(self, step: int | None) -> Found:
        """A plan with widths in multiples of ``step`` that takes at most the limit at its very widths.

        Raises:
            TargetError: there is none.
        """
        choices, most = self.timing.choices(step), self.limit
        found: Found | None = None
        reached = 0.0
        for _ in range(CORRECTIONS):
            next_one = self.solve(choices, most, Wish(self.wish.allocation))
            exact = self.exact(next_one)
            if exact <= self.limit and exact > reached:
                found, reached = next_one, exact
            if (1 - CLOSE) * self.limit <= exact <= self.limit:
                break
            between = next_one.budget.reached["latency"]  # what this plan was thought to take
            most = min(most, between * 0.995) * self.limit / exact if exact > self.limit else most * self.limit / exact
        if found is None:
            raise TargetError(f"{self.target}: times at single widths vary too much; try again on an idle machine")
        if self.wish.search:
            found = self.solve(choices, most, self.wish)
            reached = self.exact(found)
        budget = found.budget
        costs = {**budget.reached, "latency": reached}
        limits = {**budget.limits, "latency": self.limit}
        note = f"widths in multiples of {step} are the fastest here" if step is not None and step > 1 else ""
        return replace(found, budget=replace(budget, target=self.target, reached=costs, limits=limits, note=note))


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

    A first plan is measured, so that predictions fit this model on this machine. Then widths of any number and in
    multiples of 8, 16 and 32 are compared (or only ``round_to``), each with its calls timed at the very widths, and
    the plan with the most multiply-adds left wins. It is then timed against the whole model, in turns; where that is
    not what was predicted, predictions learn from it and the widths are found again, twice at most.

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
    first = search.solve(timing.choices(round_to), limit, Wish(wish.allocation))
    turns = timing.in_turns(first.units)
    search.learn(first, turns)
    plans: list[tuple[int, int, Found]] = []
    failures: list[TargetError] = []
    for step in ROUNDINGS if round_to is None else (round_to,):
        try:
            found = search.corrected(step)
            plans.append((footprint(model.coupling, timing.without(found.units)).macs, step, found))
        except TargetError as error:
            failures.append(error)
    if not plans:
        raise TargetError(f"{failures[0]}{_unsteady(model.dense, turns[0])}")
    best = max(plans, key=lambda pair: pair[0])[2]
    step = next(step for _, step, found in plans if found is best)
    for again in range(LESSONS + 1):
        times = timing.in_turns(best.units)
        predicted = best.budget.reached["latency"] / model.dense
        if again == LESSONS or abs(times[1] / times[0] / predicted - 1) <= TRUST:
            break
        search.learn(best, times)
        with suppress(TargetError):  # else the plan stays, and what it was measured at is told
            best = search.corrected(step)
    note = best.budget.note + _unsteady(model.dense, times[0])
    return replace(best, budget=replace(best.budget, measured=times, note=note.removeprefix("; ")))


def _unsteady(one: float, other: float) -> str:
    """A clause that says so where two measurements of one model differ too much to be relied on."""
    if max(one, other) <= UNSTEADY * min(one, other):
        return ""
    return f"; the whole model took {one:.3g} ms, then {other:.3g} ms, so the machine was busy: try again when idle"
