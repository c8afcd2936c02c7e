"""How :func:`prunus.prune` meets a budget: the costs asked for, the allocation, the search over allocations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunus.allocation import Allocation, Course, Offered, blend, check_allocation, course, keys_of, mutated
from prunus.budget import BUDGETS, Costs, Found, Target, best_of, meet
from prunus.cost.extents import PlanCost
from prunus.coupling import Coupling
from prunus.errors import InputError
from prunus.labels import Ids
from prunus.obstacles import obstacles
from prunus.plan import Alive

Measure = Callable[[Alive], float]


@dataclass(frozen=True)
class Wish:
    """How a budget is to be spent.

    ``allocation`` names an order of removals (or is one); ``search`` allocations are judged, if it is above 0.
    """

    allocation: str | Allocation = "uniform"
    search: int = 0

    def __post_init__(self) -> None:
        check_allocation(self.allocation)


def check_search(search: int, metric: Callable[[Any], float] | None, has_data: bool) -> None:
    """Refuse a search that nothing judges, and a judge without a search.

    Raises:
        InputError: that is what was asked for.
    """
    if type(search) is not int or search < 0:
        raise InputError(f"search={search!r}: give the number of allocations to try, 0 or more")
    if metric is not None and not callable(metric):
        raise InputError(f"metric={metric!r}: pass a function of the model that returns a number")
    if search and metric is None and not has_data:
        raise InputError("a search over allocations needs something that judges them: pass metric=, or data=")
    if metric is not None and not search:
        raise InputError("metric= judges allocations: say how many with search=")


def costs_of(coupling: Coupling, alive: Alive, target: Target, special: dict[str, Measure]) -> Callable[[Ids], Costs]:
    """What the model costs without some units, for each budget of the target.

    ``special`` measures what is not in the footprint: memory, latency.
    """
    count = PlanCost(coupling)

    def costs(units: Ids) -> Costs:
        left = coupling.without(alive, units)
        found: dict[str, float] = {}
        if {"macs", "params"} & target.asked.keys():
            macs, params = count(left)
            found = {"macs": float(macs), "params": float(params)}
        found.update({name: special[name](left) for name in target.asked if name in special})
        return {name: found[name] for name in BUDGETS if name in target.asked}

    return costs


def spend(
    coupling: Coupling,
    alive: Alive,
    choices: Offered,
    target: Target,
    wish: Wish,
    special: dict[str, Measure],
    judge: Callable[[Ids], float] | None = None,
) -> Found:
    """The units to remove so that the budgets of ``target`` are met.

    Args:
        coupling: the traced model.
        alive: the atoms that are left of it.
        choices: what may be removed.
        target: budgets (no ratio).
        wish: how to spend them.
        special: what measures memory and latency, where the target asks for them.
        judge: the metric of the model without some units, for a search.

    Raises:
        TargetError: the target cannot be met.
    """
    costs = costs_of(coupling, alive, target, special)

    def marginal() -> dict[int, float]:
        dense = costs(np.empty(0, dtype=np.int64))
        found = {}
        for one in choices.ladders:
            lost = choices.fixed.copy()
            before = costs(choices.choose(lost)) if lost.any() else dense
            lost[one.number] = one.stops[0] if one.stops.size else lost[one.number]
            after = costs(choices.choose(lost))
            saved = sum((before[name] - after[name]) / max(dense[name], 1e-12) for name in dense)
            found[one.number] = saved / max(int(one.sizes[0]) if one.stops.size else 1, 1)
        return found

    def course_of(allocation: str | Allocation) -> Course:
        keys = keys_of(allocation, choices.ladders, marginal)
        return course(choices.ladders, keys, choices.fixed, choices.choose)

    def solve(one: Course) -> Found:
        return meet(target, one, costs, lambda name: obstacles(coupling, alive, choices, name))

    first = course_of(wish.allocation)
    if not wish.search or judge is None:
        return solve(first)
    others = [course_of(name) for name in ("uniform", "greedy") if name != wish.allocation]
    candidates = [first, *others, *(blend(first, other, 0.5) for other in others)]
    return best_of(candidates, solve, lambda found: judge(found.units), mutated, wish.search)[0]
