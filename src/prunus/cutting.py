"""What :func:`prunus.prune` does: choose, cut, and let what is left make up for it, in one round or in several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from prunus.allocation import Allocation, Offered, check_allocation, offered, within
from prunus.budget import Budget, Found, Target
from prunus.cost import LatencyModel, LatencyTable, MemoryModel
from prunus.distributed import gathered
from prunus.errors import InputError, NothingToPruneError
from prunus.graph import DependencyGraph
from prunus.heads import Offer, choose_offered, offer
from prunus.importance import MagnitudeImportance
from prunus.labels import Ids
from prunus.plan import Plan, footprint, make_plan
from prunus.pruner import Criterion, score_offer
from prunus.pruner.beginning import something
from prunus.pruner.scoring import some_scored
from prunus.pruner.wishes import Wishes
from prunus.repair import RepairReport, find_constants, fold_constants, frozen, may_have_constants
from prunus.samples import Samples
from prunus.selection import Policy, Scores
from prunus.speed import Timing, spend_time
from prunus.spending import Measure, Wish, spend
from prunus.surgery import Change, Receipt
from prunus.tracing import ForwardFn, Inputs, call_model

T = TypeVar("T")


@dataclass(frozen=True)
class Order:
    """What the caller of :func:`prunus.prune` asks for.

    ``allocation`` None: that which suits the scores. ``heads`` are whether whole heads, and positions inside heads, may
    go; ``folds`` whether channels that are constant are to be folded into what reads them.
    """

    target: Target
    importance: Criterion | None
    wishes: Wishes
    allocation: str | Allocation | None
    global_pruning: bool
    isomorphic: bool
    search: int
    metric: Callable[[Any], float] | None
    round_to: int | None
    heads: tuple[bool, bool]
    inputs: Inputs
    forward_fn: ForwardFn | None
    table: LatencyTable | None
    rounds: int
    folds: bool

    def __post_init__(self) -> None:
        if self.allocation is not None:
            check_allocation(self.allocation)
            if self.isomorphic:
                raise InputError(
                    f"allocation={self.allocation!r}: isomorphic=True is an allocation of its own; leave one out"
                )

    def spread(self, criterion: Criterion) -> str | Allocation:
        """How a budget is spread over the groups."""
        if self.allocation is not None:
            return self.allocation
        if self.global_pruning:
            return "global"
        return "greedy" if getattr(criterion, "comparable", False) and not self.isomorphic else "uniform"

    def in_round(self, k: int, dense: Mapping[str, float]) -> Order:
        """Round ``k`` with its target in numbers: every round takes the same share of what the one before it left."""
        if self.rounds == 1 or self.target.ratio is not None:  # shares are for the policy to say
            return self
        limits = self.target.limits(dense)
        most = {name: int(dense[name] * (end / dense[name]) ** (k / self.rounds)) for name, end in limits.items()}
        return replace(self, target=Target(**most))


@dataclass(frozen=True)
class Done:
    """What was removed, and what became of it."""

    plan: Plan
    receipt: Receipt
    budget: Budget | None
    report: RepairReport | None
    note: str


def carry_out(graph: DependencyGraph, order: Order, samples: Samples | None, optimizer: Any) -> Done:
    """Cut the model of a graph as ordered; all or nothing.

    Raises:
        InputError: an argument cannot be used.
        TargetError: the target cannot be met.
        NothingToPruneError: nothing may be removed.
    """
    started, gone = graph.alive, np.empty(0, dtype=np.int64)
    dense = _dense(graph, order)
    done: list[Done] = []
    try:
        for k in range(1, order.rounds + 1):
            job = _Round(graph, order.in_round(k, dense), k, samples, partial(_plan_of, graph, started, gone))
            units, budget, note = job.chosen()
            if samples is not None:
                units = gathered(units, "the choice of what goes")[0]
            if not units.size and k < order.rounds:
                continue
            if not units.size and not done:
                raise NothingToPruneError(f"{order.target} removes nothing: {_why_nothing(budget)}")
            done.append(job.cut(units, budget, note, optimizer))
            gone = np.concatenate((gone, units))
    except BaseException:
        for one in reversed(done):
            one.receipt.undo()
        raise
    last = done[-1]
    if len(done) == 1:
        return last
    plan = _plan_of(graph, started, gone[:0], gone)
    receipt = Receipt(plan, [Change(_nothing, one.receipt.undo) for one in done])
    budget = last.budget
    if budget is not None:
        budget = replace(budget, target=order.target, dense={name: dense[name] for name in budget.limits})
    return Done(plan, receipt, budget, last.report, last.note)


def _why_nothing(budget: Budget | None) -> str:
    if budget is None:
        return "the groups are too small for it; ask for more"
    now = ", ".join(f"{name} {budget.dense[name]:,.0f} of at most {most:,.0f}" for name, most in budget.limits.items())
    return f"the model costs no more than that as it is ({now}); ask for less"


def _nothing() -> None:
    """The change is made already."""


def _plan_of(graph: DependencyGraph, alive: Any, before: Ids, units: Ids) -> Plan:
    return make_plan(graph.coupling, alive, np.concatenate((before, units)), graph.facts)[0]


def _dense(graph: DependencyGraph, order: Order) -> dict[str, float]:
    """What the model costs now, where rounds need to know it."""
    if order.rounds == 1:
        return {}
    if order.target.latency is not None:
        raise InputError(f"{order.target} in {order.rounds} rounds: a latency is met in one round; leave rounds= out")
    cost = footprint(graph.coupling, graph.alive)
    memory = MemoryModel(graph.coupling)(graph.alive) if order.target.memory is not None else 0.0
    return {"macs": float(cost.macs), "params": float(cost.params), "memory": memory}


@dataclass(frozen=True)
class _Round:
    """Round ``number``. ``plan_of`` gives the plan from the dense model to the present one without some units."""

    graph: DependencyGraph
    order: Order
    number: int
    samples: Samples | None
    plan_of: Callable[[Ids], Plan]

    def chosen(self) -> tuple[Ids, Budget | None, str]:
        """The units to remove, how the budget was spent, and what there is to say of the choice."""
        graph, order = self.graph, self.order
        found = something(graph, offer(graph.coupling, *order.heads))
        criterion, note = self._criterion()
        scored = some_scored(score_offer(graph, found, criterion))
        rules = order.wishes.rules(graph, scored[0])
        policy = order.wishes.policy(rules, self.number)
        allocation = order.spread(criterion)
        if order.target.ratio is not None:
            return choose_offered(scored[0], scored[1:], graph.alive, policy), None, note
        if order.isomorphic:
            allocation = within(lambda family: rules[id(family)].scope)
        spent = self._spend(Wish(allocation, order.search), _choices(graph, scored, policy))
        return spent.units, spent.budget, note

    def _criterion(self) -> tuple[Criterion, str]:
        if self.order.importance is not None:
            return self.order.importance, ""
        return (MagnitudeImportance(), "") if self.samples is None else self.samples.importance(self.graph.model)

    def cut(self, units: Ids, budget: Budget | None, note: str, optimizer: Any) -> Done:
        """Remove units, and let the kept weights make up for them: constants exactly, the rest as the data tell."""
        graph, order = self.graph, self.order
        plan, after = graph._plan(units)
        run = order.forward_fn or call_model
        suspected = order.folds and may_have_constants(graph.coupling.trace, plan)
        constants = find_constants(graph.model, order.inputs, run) if suspected else None
        whole = plan if self.samples is None or self.number == 1 else self.plan_of(units)
        receipt = graph._apply(plan, after, optimizer=optimizer)
        report = None
        try:
            if constants is not None:
                for change in fold_constants(constants, graph.model, plan, order.inputs, run):
                    change.do()
                    receipt.changes.append(change)
            if self.samples is not None:
                report = self.samples.repair(graph.model, whole)
                receipt.changes += report.receipt.changes
        except BaseException:
            receipt.undo()
            raise
        return Done(receipt.plan, receipt, budget, report, note)

    def _spend(self, wish: Wish, choices: Callable[[int | None], Offered]) -> Found:
        """The units to remove so that budgets are met."""
        graph, target = self.graph, self.order.target
        special: dict[str, Measure] = {"memory": MemoryModel(graph.coupling)} if target.memory is not None else {}
        if target.latency is None:
            offer = choices(self.order.round_to)
            return spend(graph.coupling, graph.alive, offer, target, wish, special, self._judge)
        device = next((p.device for p in graph.model.parameters()), torch.device("cpu"))
        if device.type == "meta":
            raise InputError(f"{target}: a model on the meta device does not run; put it on the device to be timed")
        table = LatencyTable(device) if self.order.table is None else self.order.table
        model = LatencyModel(graph.coupling, self.order.inputs, table, self.order.forward_fn)
        without = partial(graph.coupling.without, graph.alive)
        timing = Timing(model, partial(self._race, model), choices, without)
        try:
            return spend_time(graph.alive, timing, target, wish, special, self.order.round_to, self._judge)
        finally:
            table.save()

    def _race(self, times: LatencyModel, units: Ids) -> tuple[float, float]:
        """The milliseconds of the model and of the one without some units: in turns, if it can be copied."""
        model = self.graph.model
        try:
            whole = frozen(model)
        except InputError:
            (before,) = times.race(model)
            return before, self._with(units, lambda cut: times.race(cut)[0])
        before, after = self._with(units, lambda cut: times.race(whole, cut))
        return before, after

    def _judge(self, units: Ids) -> float:
        """How good the model is without some units: by the caller's metric, or by its outputs after repair."""
        samples = self.samples
        if self.order.metric is not None or samples is None:
            return self._with(units, self.order.metric or (lambda m: 0.0))
        plan = self.plan_of(units)
        return self._with(units, lambda model: samples.nearness(model, plan))

    def _with(self, units: Ids, measure: Callable[[nn.Module], T]) -> T:
        """A measure of the model without some units; the model is as it was afterwards."""
        receipt = self.graph._prune(units, record_history=False)
        try:
            return measure(self.graph.model)
        finally:
            receipt.undo()


def _choices(
    graph: DependencyGraph, scored: tuple[Offer, Scores, Scores], policy: Policy
) -> Callable[[int | None], Offered]:
    """What may be removed under a budget, when the widths that stay are multiples of a number."""
    found, *scores = scored
    return lambda step: offered(found, scores, graph.alive, replace(policy, round_to=step))
