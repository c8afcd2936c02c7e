"""The one verb: trace, score, choose, cut, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunus.allocation import Allocation
from prunus.budget import Budget, Target
from prunus.cost import LatencyTable
from prunus.cutting import Order, carry_out
from prunus.distributed import together
from prunus.errors import InputError, TargetError
from prunus.graph import DependencyGraph, collecting_seldom
from prunus.heads import offer
from prunus.plan import Alive, Footprint, Plan
from prunus.pruner import Criterion, HeadShares
from prunus.pruner.beginning import graph_of, model_in, something
from prunus.pruner.schedules import exponential_scheduler
from prunus.pruner.scopes import check_count
from prunus.pruner.scoring import criterion_of
from prunus.pruner.wishes import Wishes
from prunus.repair import RepairReport
from prunus.report import frozen_text, layer_table, render, share_left
from prunus.samples import Samples
from prunus.sizes import Fact
from prunus.spending import check_search
from prunus.surgery import Receipt
from prunus.tracing import ForwardFn, Inputs


@dataclass(frozen=True)
class PruneResult:
    """What :func:`prune` did: ``print`` it for a table per layer, ``undo()`` it, save its ``plan``."""

    plan: Plan
    receipt: Receipt
    graph: DependencyGraph
    _alive: tuple[Alive, Alive]
    budget: Budget | None = None
    repair: RepairReport | None = None
    note: str = ""

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
        spent = () if self.budget is None else (str(self.budget),)
        repaired = () if self.repair is None else (str(self.repair),)
        return "\n".join(
            (render(table), share_left(before, after), *spent, *self.plan.notes, *repaired, *filter(None, [self.note]))
        )


@collecting_seldom
def prune(  # noqa: PLR0913 - each keyword is a choice of the user
    model: nn.Module,
    example_inputs: Inputs,
    target: Target | None = None,
    *,
    ignored_layers: Sequence[Any] = (),
    importance: Criterion | None = None,
    round_to: int | None = None,
    max_pruning_ratio: float = 1.0,
    max_pruning_ratio_dict: Mapping[Any, float] | None = None,
    min_width: int | Mapping[Any, int] = 1,
    pruning_ratio_dict: Mapping[Any, float] | None = None,
    global_pruning: bool = False,
    isomorphic: bool = False,
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
    mask_fn: Callable[[Any], torch.Tensor] | None = None,
    samples: int = 256,
    rounds: int = 1,
) -> PruneResult:
    """Cut ``model`` in place to a target: the least important channels, head dims and neurons go.

    Args:
        model: any module on any device; it need not require gradients.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        target: what must hold afterwards; default half of the MACs.
        ignored_layers: modules whose output widths must stay.
        importance: a criterion, default :class:`~prunus.importance.MagnitudeImportance`, or what ``data`` say.
        round_to: widths that stay are multiples of it, where a group allows it.
        max_pruning_ratio: the largest share of any group.
        max_pruning_ratio_dict: other caps for some layers. This and the next two dictionaries have as keys modules
            (with all that is inside them), names or name patterns, types of modules, or tuples of those.
        min_width: how many output channels a layer keeps at least, or a dictionary from layers to that.
        pruning_ratio_dict: the share that goes from some layers, whatever the target asks of all others. With
            ``global_pruning``, what one key means is a scope of its own, whose groups compete with each other only.
        global_pruning: rank all groups together instead of taking the same share of each.
        isomorphic: only groups of the same form (the same kinds of layers, sizes aside) are ranked together; every form
            loses the same share.
        allocation: how a budget is spread over the groups: "uniform" (the same share of each, the default), "global"
            (one threshold over all scores, the default with ``global_pruning``), "greedy" (the lowest score for each
            bit of cost saved first, the default for scores that say they are ``comparable`` across layers), or a
            :data:`~prunus.allocation.Allocation`.
        search: how many allocations to judge (0: none, take ``allocation`` as it is).
        metric: ``metric(model) -> float`` of the cut model, higher is better; for ``search``. Default with ``data``:
            how near the outputs come to the dense model's on held-out samples, after repair.
        latency_table: measured times of calls, for a target with a latency; default those of the model's device, kept
            under ``~/.cache/prunus``.
        prune_num_heads: whole heads go (rows over which a contraction is batched: heads of attention with the query
            heads they serve, experts, groups of a convolution); without it, only where nothing inside them can go.
        prune_head_dims: positions inside heads go (after whole heads, in the same plan); without it they stay, and so
            does a stream whose width the code makes of them.
        head_pruning_ratio: the share of heads that goes; 0 means the share of all others.
        head_pruning_ratio_dict: other shares of heads for some modules (or tuples of modules), with all inside them.
        forward_fn: ``forward_fn(model, example_inputs)`` to use instead of calling the model.
        output_transform: picks from the output what must keep its sizes, and what counts where ``data`` choose
            (default: every tensor in it).
        facts: attributes that equal a width by construction and that no traced op reads.
        optimizer: an optimiser whose state is cut too.
        unwrapped_parameters: see :meth:`DependencyGraph.build_dependency`.
        customized_pruners: see :meth:`DependencyGraph.build_dependency`.
        device: see :meth:`DependencyGraph.build_dependency`.
        data: yields batches of inputs, without labels. What goes is chosen by what it does to the outputs of the layers
            that read it (:class:`~prunus.importance.OutputErrorImportance`, spread over the groups "greedily", unless
            ``importance`` or ``allocation`` say otherwise), and these layers are refitted, without training (see
            :func:`prunus.repair`).
        input_fn: makes the model's inputs of a batch, such as ``lambda batch: batch[0]``.
        mask_fn: ``mask_fn(batch)``: a bool tensor (samples, places) of the tokens that count (no padding).
        samples: batches of ``data`` are read until there are so many samples.
        rounds: in so many rounds, each of which scores anew, cuts and repairs; more may help where much goes (to a
            third or less). Needs ``data``.

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
    check_count("rounds", rounds)
    check_count("samples", samples)
    if rounds > 1 and data is None:
        raise InputError(f"rounds={rounds}: only repair makes rounds worth it; pass data=, or use a pruner's steps")
    check_search(search, metric, data is not None)
    order = Order(
        target,
        None if importance is None else criterion_of(importance),
        Wishes(
            model_in(model),
            ratio=target.ratio,
            ratios=pruning_ratio_dict,
            cap=max_pruning_ratio,
            caps=max_pruning_ratio_dict,
            min_width=min_width,
            heads=HeadShares(head_pruning_ratio, head_pruning_ratio_dict),
            global_pruning=global_pruning,
            isomorphic=isomorphic,
            round_to=round_to,
            schedule=exponential_scheduler,
            steps=rounds,
        ),
        allocation,
        global_pruning,
        isomorphic,
        search,
        metric,
        round_to,
        (prune_num_heads, prune_head_dims),
        example_inputs,
        forward_fn,
        latency_table,
        rounds,
        device is None,
    )
    if target.ratio is not None:
        _check_ratio(target.ratio, max_pruning_ratio, search)
    graph = graph_of(
        model,
        example_inputs,
        ignored_layers,
        forward_fn=forward_fn,
        output_transform=output_transform,
        unwrapped_parameters=unwrapped_parameters,
        customized_pruners=customized_pruners,
        facts=facts,
        device=device,
    )
    before, done = graph.alive, None
    if data is None:
        done = carry_out(graph, order, None, optimizer)
    else:
        something(graph, offer(graph.coupling, prune_num_heads, prune_head_dims))
        try:
            with together("prunus.prune"):
                given = Samples.of(graph.model, data, samples, input_fn, mask_fn, forward_fn, output_transform)
                done = carry_out(graph, order, given, optimizer)
        except BaseException:
            if done is not None:
                done.receipt.undo()
            raise
    return PruneResult(done.plan, done.receipt, graph, (before, graph.alive), done.budget, done.report, done.note)


def _check_ratio(ratio: float, cap: float, search: int) -> None:
    """Refuse a share that the cap does not allow, and a search, which is for budgets."""
    if ratio > cap:
        raise TargetError(
            f"Target(ratio={ratio}) cannot be met: max_pruning_ratio={cap} keeps more of every group; raise it, or ask "
            "for a smaller share"
        )
    if search:
        raise InputError(f"search={search}: with Target(ratio=) there is nothing to search; ask for macs= or params=")
