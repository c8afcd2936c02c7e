"""The one verb: trace, score, choose, cut, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from prunus.allocation import Allocation, Offered, offered
from prunus.budget import Budget, Found, Target
from prunus.cost import LatencyModel, LatencyTable, MemoryModel
from prunus.errors import InputError, NothingToPruneError
from prunus.graph import DependencyGraph, collecting_seldom
from prunus.heads import choose_positions, choose_rows, offer
from prunus.importance import MagnitudeImportance
from prunus.labels import Ids
from prunus.plan import Alive, Footprint, Plan
from prunus.pruner import Criterion, HeadShares, score_offer
from prunus.repair import RepairReport, fold_constants, frozen, may_have_constants, repair
from prunus.report import frozen_text, layer_table, render
from prunus.selection import Policy
from prunus.sizes import Fact
from prunus.speed import Timing, spend_time
from prunus.spending import Measure, Wish, spend
from prunus.surgery import Receipt
from prunus.tracing import ForwardFn, Inputs, call_model


@dataclass(frozen=True)
class PruneResult:
    """What :func:`prune` did: ``print`` it for a table per layer, ``undo()`` it, save its ``plan``."""

    plan: Plan
    receipt: Receipt
    graph: DependencyGraph
    _alive: tuple[Alive, Alive]
    budget: Budget | None = None
    repair: RepairReport | None = None

    @property
    def before(self) -> Footprint:
        """The dense model's cost."""
        return self.plan.before

    @property
    def after(self) -> Footprint:
        """The pruned model's cost."""
        return self.plan.after

    def undo(self) -> None:
        """Put the model back as it was, bit for bit."""
        self.receipt.undo()

    def frozen(self) -> str:
        """What had to stay, and why."""
        return frozen_text(self.graph.coupling)

    def __str__(self) -> str:
        before, after = self.before, self.after
        table = layer_table(self.graph.coupling, *self._alive, before, after)
        macs, params = after.macs / max(before.macs, 1), after.params / max(before.params, 1)
        left = f"{macs:.1%} of the MACs and {params:.1%} of the parameters are left."
        spent = () if self.budget is None else (str(self.budget),)
        repaired = () if self.repair is None else (str(self.repair),)
        return "\n".join((render(table), left, *spent, *self.plan.notes, *repaired))


@collecting_seldom()
def prune(  # noqa: PLR0913 - each keyword is a choice of the user
    model: nn.Module,
    example_inputs: Inputs,
    target: Target | None = None,
    *,
    ignored_layers: Sequence[Any] = (),
    importance: Criterion | None = None,
    round_to: int | None = None,
    max_pruning_ratio: float = 1.0,
    global_pruning: bool = False,
    allocation: str | Allocation | None = None,
    search: int = 0,
    metric: Callable[[Any], float] | None = None,
    latency_table: LatencyTable | None = None,
    prune_num_heads: bool = False,
    prune_head_dims: bool = True,
    head_pruning_ratio: float = 0.0,
    head_pruning_ratio_dict: Mapping[Any, float] | None = None,
    forward_fn: ForwardFn | None = None,
    output_transform: Callable[[Any], Any] | None = None,
    facts: Sequence[Fact] = (),
    optimizer: Any = None,
    unwrapped_parameters: Any = None,
    customized_pruners: Mapping[Any, Any] | None = None,
    device: Any = None,
    data: Iterable[Any] | None = None,
    input_fn: Callable[[Any], Any] | None = None,
) -> PruneResult:
    """Cut ``model`` in place to a target: the least important channels, head dims and neurons go.

    Args:
        model: any module on any device; it need not require gradients.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        target: what must hold afterwards; default half of the MACs.
        ignored_layers: modules whose output widths must stay.
        importance: a criterion, default :class:`~prunus.importance.MagnitudeImportance`.
        round_to: widths that stay are multiples of it, where a group allows it.
        max_pruning_ratio: the largest share of any group.
        global_pruning: rank all groups together instead of taking the same share of each.
        allocation: how a budget is spread over the groups: "uniform" (the same share of each, the default), "global"
            (one threshold over all scores, the default with ``global_pruning``), "greedy" (the lowest score for each
            bit of cost saved first, for scores that compare across layers), or a
            :data:`~prunus.allocation.Allocation`.
        search: how many allocations to judge by ``metric`` (0: none, take ``allocation`` as it is).
        metric: ``metric(model) -> float`` of the cut model on calibration data, higher is better; for ``search``.
        latency_table: measured times of calls, for a target with a latency; default those of the model's device, kept
            under ``~/.cache/prunus``.
        prune_num_heads: whole heads go (rows over which a contraction is batched: heads of attention with the query
            heads they serve, experts, groups of a convolution); without it, only where nothing inside them can go.
        prune_head_dims: positions inside heads go (after whole heads, in the same plan); without it they stay, and so
            does a stream whose width the code makes of them.
        head_pruning_ratio: the share of heads that goes; 0 means the share of all others.
        head_pruning_ratio_dict: other shares of heads for some modules (or tuples of modules), with all inside them.
        forward_fn: ``forward_fn(model, example_inputs)`` to use instead of calling the model.
        output_transform: picks from the output what must keep its sizes (default: every tensor in it).
        facts: attributes that equal a width by construction and that no traced op reads.
        optimizer: an optimiser whose state is cut too.
        unwrapped_parameters: see :meth:`DependencyGraph.build_dependency`.
        customized_pruners: see :meth:`DependencyGraph.build_dependency`.
        device: see :meth:`DependencyGraph.build_dependency`.
        data: yields batches of inputs, without labels; the layers that read what was removed are refitted on some
            hundred samples of them, without training (see :func:`prunus.repair`).
        input_fn: makes the model's inputs of a batch, such as ``lambda batch: batch[0]``.

    Raises:
        InputError: an argument cannot be used; nothing was changed.
        TargetError: the target cannot be met; nothing was changed.
        NothingToPruneError: nothing may be removed; nothing was changed.

    Example:
        >>> import torch, prunus
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> result = prunus.prune(model, torch.randn(1, 8), prunus.Target(macs=0.5))
        >>> result.after.macs / result.before.macs
        0.5
    """
    target = Target(macs=0.5) if target is None else target
    if not isinstance(target, Target):
        raise InputError(f"target={target!r}: pass a prunus.Target, such as Target(macs=0.5)")
    if not 0 < max_pruning_ratio <= 1:
        raise InputError(f"max_pruning_ratio={max_pruning_ratio!r}: must be above 0 and at most 1")
    wish = Wish(allocation or ("global" if global_pruning else "uniform"), search, metric)
    heads = HeadShares(head_pruning_ratio, head_pruning_ratio_dict)
    graph = DependencyGraph().build_dependency(
        model,
        example_inputs,
        forward_fn,
        output_transform,
        unwrapped_parameters,
        customized_pruners,
        ignored_layers,
        device=device,
    )
    graph.facts = tuple(facts)
    found = offer(graph.coupling, prune_num_heads, prune_head_dims)
    if not found:
        raise NothingToPruneError(f"nothing in this model may be removed:\n{frozen_text(graph.coupling)}")
    found, *scores = score_offer(graph, found, importance or MagnitudeImportance())
    if not found:
        raise NothingToPruneError("the importance returned None for every group: it leaves all of them alone")
    ratio_of_rows = {id(f): heads.of(graph, f, found.by_rows) for f in found.rows}
    budget = None
    if target.ratio is not None:
        share = target.ratio
        policy = Policy(lambda family: share, max_pruning_ratio, round_to, global_pruning)
        by_rows = replace(policy, ratio_of=lambda f: share if (own := ratio_of_rows[id(f)]) is None else own)
        gone = choose_rows(found, scores[0], graph.alive, by_rows)
        units = np.concatenate((gone, choose_positions(found, scores[1], graph.alive, policy, gone)))
    else:

        def choices(step: int | None) -> Offered:
            return offered(found, scores, graph.alive, max_pruning_ratio, step, lambda f: ratio_of_rows[id(f)])

        spent = _spend(graph, target, wish, choices, round_to, (example_inputs, forward_fn, latency_table))
        units, budget = spent.units, spent.budget
    if units.size == 0:
        raise NothingToPruneError(f"{target} removes nothing: the groups are too small for it; ask for more")
    plan, after = graph._plan(units)
    before, dense = graph.alive, _remembered(graph.model, plan, data, device)
    receipt = graph._apply(plan, after, optimizer=optimizer)
    repaired = None
    try:
        if dense is not None:
            repaired = _make_up(graph.model, dense, receipt, example_inputs, forward_fn, data, input_fn)
    except BaseException:
        receipt.undo()
        raise
    return PruneResult(receipt.plan, receipt, graph, (before, graph.alive), budget, repaired)


def _remembered(model: nn.Module, plan: Plan, data: Iterable[Any] | None, device: Any) -> nn.Module | None:
    """The model as it is before the cut, where something may be made up for."""
    if data is None and (device is not None or not may_have_constants(model, plan)):
        return None
    try:
        return frozen(model)
    except InputError:
        if data is None:  # it cannot be copied: its constants are lost, as anything is that was removed
            return None
        raise


def _make_up(
    model: nn.Module,
    dense: nn.Module,
    receipt: Receipt,
    example_inputs: Inputs,
    forward_fn: ForwardFn | None,
    data: Iterable[Any] | None,
    input_fn: Callable[[Any], Any] | None,
) -> RepairReport | None:
    """Let the kept weights make up for the removed ones: constants exactly, the rest as far as the data tell."""
    for change in fold_constants(dense, model, receipt.plan, example_inputs, forward_fn or call_model):
        change.do()
        receipt.changes.append(change)
    if data is None:
        return None
    report = repair(model, receipt.plan, data, input_fn=input_fn, dense=dense, forward_fn=forward_fn)
    receipt.changes += report.receipt.changes
    return report


def _spend(
    graph: DependencyGraph,
    target: Target,
    wish: Wish,
    choices: Callable[[int | None], Offered],
    round_to: int | None,
    run: tuple[Inputs, ForwardFn | None, LatencyTable | None],
) -> Found:
    """The units to remove so that budgets are met."""
    coupling, alive = graph.coupling, graph.alive
    special: dict[str, Measure] = {"memory": MemoryModel(coupling)} if target.memory is not None else {}
    judge = _cut_and(graph, wish.metric or (lambda m: 0.0))
    if target.latency is None:
        return spend(coupling, alive, choices(round_to), target, wish, special, judge)
    inputs, forward_fn, table = run
    device = next((p.device for p in graph.model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise InputError(f"{target}: a model on the meta device does not run; put it on the device to be timed")
    table = LatencyTable(device) if table is None else table
    timing = _timing(graph, LatencyModel(coupling, inputs, table, forward_fn), choices)
    try:
        return spend_time(alive, timing, target, wish, special, round_to, judge)
    finally:
        table.save()


def _cut_and(graph: DependencyGraph, measure: Callable[[nn.Module], float]) -> Callable[[Ids], float]:
    """A measure of the model without some units; the model is as it was afterwards."""

    def measured(units: Ids) -> float:
        receipt = graph._prune(units, record_history=False)
        try:
            return measure(graph.model)
        finally:
            receipt.undo()

    return measured


def _timing(graph: DependencyGraph, model: LatencyModel, choices: Callable[[int | None], Offered]) -> Timing:
    """What a search for a latency needs."""
    without = partial(graph.coupling.without, graph.alive)
    return Timing(model, _cut_and(graph, lambda m: model.measured()), choices, without)
