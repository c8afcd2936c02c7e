"""The pruner: a score, a scope, a schedule and regularisers, in steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from prunus.coupling import Coupling, Family
from prunus.errors import InputError
from prunus.functions import PruningFn
from prunus.graph import ROOT_TYPES
from prunus.group import Group, root_of
from prunus.heads import (
    Offer,
    choose_offered,
    count_rows,
    offer,
    positions_to_go,
    rows_to_go,
)
from prunus.labels import Ids
from prunus.plan import Plan
from prunus.pruner import scopes
from prunus.pruner.beginning import graph_of, listed, model_in, something, types_of
from prunus.pruner.schedules import Schedule, linear_scheduler
from prunus.pruner.scopes import ByLayer, HeadShares, by_layer, check_share, counts_of, makers
from prunus.pruner.scoring import Criterion, by_unit, criterion_of, score_offer
from prunus.pruner.training import Penalties
from prunus.pruner.wishes import Wishes
from prunus.regularize import Regularizer
from prunus.soft import SoftPruning
from prunus.tracing import ForwardFn, Inputs

_ROOTS: tuple[type, ...] = (*ROOT_TYPES, nn.RNNBase, nn.MultiheadAttention, nn.Embedding)


class BasePruner:
    """Removes a growing share of every group, in steps, the least important units first.

    The parts are independent: a criterion scores, a scope says what competes with what (``global_pruning``,
    ``isomorphic``, ``pruning_ratio_dict``), a schedule says how much goes when, regularisers prepare for it.
    Dictionaries have as keys modules (with all that is inside them), names or name patterns, types of modules, or
    tuples of those.

    Args:
        model: the model; it is cut in place by :meth:`step`.
        example_inputs: a tensor, a tuple of arguments or a dict.
        importance: a criterion ``group -> scores`` (None leaves a group alone); default
            :class:`~prunus.importance.MagnitudeImportance`.
        global_pruning: rank all groups together instead of taking the same share of each.
        pruning_ratio: the share of every group's units that is gone after the last step, in [0, 1).
        pruning_ratio_dict: other shares for some layers. With ``global_pruning``, what one key means is a scope of its
            own, whose groups compete with each other only.
        max_pruning_ratio: the largest share of any group, in (0, 1]; it holds after every step. Heads and the dims
            inside them are two groups.
        iterative_steps: how many calls of :meth:`step` reach the share.
        iterative_pruning_ratio_scheduler: ``(ratio, steps) -> shares after 0, 1, ... steps``, such as
            :func:`~prunus.pruner.linear_scheduler`.
        ignored_layers: modules whose output widths must stay, also as names, patterns or types.
        round_to: widths that stay are multiples of it, where a group allows it.
        isomorphic: only groups of the same form (the same kinds of layers, sizes aside) compete.
        in_channel_groups: layers whose inputs are so many groups of channels that must stay equally wide. Groups that
            the model's operations imply are found without it.
        out_channel_groups: the same for outputs.
        num_heads: layers that make heads, and how many: only those lose whole heads (None: any layer). The pruner's own
            copy, ``pruner.num_heads``, always holds the present counts.
        prune_num_heads: whole heads go, before anything else does; see :func:`prunus.prune`.
        prune_head_dims: positions inside heads go.
        head_pruning_ratio: the share of heads that is gone after the last step; 0 means ``pruning_ratio``.
        head_pruning_ratio_dict: other shares of heads for some layers.
        customized_pruners: see :meth:`DependencyGraph.build_dependency`.
        unwrapped_parameters: see :meth:`DependencyGraph.build_dependency`.
        root_module_types: layers whose outputs may be pruned.
        forward_fn: ``forward_fn(model, example_inputs)`` to use instead of calling the model.
        output_transform: picks from the output what must keep its sizes.
        channel_groups: the old name of ``out_channel_groups``.
        ch_sparsity: the old name of ``pruning_ratio``.
        ch_sparsity_dict: the old name of ``pruning_ratio_dict``.
        max_pruning_ratio_dict: other caps for some layers.
        min_width: how many output channels a layer keeps at least, or a dictionary from layers to that.
        regularizer: one or several penalties for sparse training; see :mod:`prunus.regularize`.

    Raises:
        InputError: an argument is out of range or the model cannot run.
        NothingToPruneError: nothing in the model may be removed.

    Example:
        >>> import torch, prunus as tp
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> pruner = tp.pruner.MagnitudePruner(model, torch.randn(1, 8), pruning_ratio=0.5)
        >>> pruner.step()
        >>> model[0]
        Linear(in_features=8, out_features=8, bias=True)
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the signature that users know
        self,
        model: nn.Module,
        example_inputs: Inputs,
        importance: Criterion | None = None,
        global_pruning: bool = False,
        pruning_ratio: float = 0.5,
        pruning_ratio_dict: Mapping[Any, float] | None = None,
        max_pruning_ratio: float = 1.0,
        iterative_steps: int = 1,
        iterative_pruning_ratio_scheduler: Schedule = linear_scheduler,
        ignored_layers: Iterable[Any] | None = None,
        round_to: int | None = None,
        isomorphic: bool = False,
        in_channel_groups: Mapping[Any, int] | None = None,
        out_channel_groups: Mapping[Any, int] | None = None,
        num_heads: Mapping[Any, int] | None = None,
        prune_num_heads: bool = False,
        prune_head_dims: bool = True,
        head_pruning_ratio: float = 0.0,
        head_pruning_ratio_dict: Mapping[Any, float] | None = None,
        customized_pruners: Mapping[Any, Any] | None = None,
        unwrapped_parameters: Any = None,
        root_module_types: Sequence[type] = _ROOTS,
        forward_fn: ForwardFn | None = None,
        output_transform: Callable[[Any], Any] | None = None,
        channel_groups: Mapping[Any, int] | None = None,
        ch_sparsity: float | None = None,
        ch_sparsity_dict: Mapping[Any, float] | None = None,
        *,
        max_pruning_ratio_dict: Mapping[Any, float] | None = None,
        min_width: int | Mapping[Any, int] = 1,
        regularizer: Regularizer | Sequence[Regularizer] | None = None,
    ) -> None:
        self.model = model
        self.importance = criterion_of(importance)
        self.global_pruning, self.isomorphic = global_pruning, isomorphic
        self.pruning_ratio = pruning_ratio if ch_sparsity is None else ch_sparsity
        self.max_pruning_ratio, self.round_to = max_pruning_ratio, round_to
        self.iterative_steps, self.current_step = iterative_steps, 0
        self.root_module_types = types_of(root_module_types)
        self.ignored_layers = list(listed(ignored_layers))
        self.num_heads = by_layer("num_heads", num_heads)
        self.prune_num_heads, self.prune_head_dims = prune_num_heads, prune_head_dims
        self.in_channel_groups = by_layer("in_channel_groups", in_channel_groups)
        self.out_channel_groups = {
            **by_layer("channel_groups", channel_groups),
            **by_layer("out_channel_groups", out_channel_groups),
        }
        self.head_pruning_ratio, self.head_pruning_ratio_dict = head_pruning_ratio, dict(head_pruning_ratio_dict or {})
        self.pruning_ratio_dict = {
            **by_layer("ch_sparsity_dict", ch_sparsity_dict),
            **by_layer("pruning_ratio_dict", pruning_ratio_dict),
        }
        check_share("pruning_ratio", self.pruning_ratio)
        self.iterative_pruning_ratio_scheduler = iterative_pruning_ratio_scheduler
        self._heads = HeadShares(head_pruning_ratio, head_pruning_ratio_dict)
        whole = model_in(model)
        self._wishes = Wishes(
            whole,
            ratio=self.pruning_ratio,
            ratios=self.pruning_ratio_dict,
            cap=max_pruning_ratio,
            caps=max_pruning_ratio_dict,
            min_width=min_width,
            heads=self._heads,
            global_pruning=global_pruning,
            isomorphic=isomorphic,
            schedule=iterative_pruning_ratio_scheduler,
            steps=iterative_steps,
            round_to=round_to,
        )
        self.per_step_pruning_ratio = self._wishes.shares
        named = counts_of(whole, self.num_heads, "num_heads")
        made = counts_of(whole, self.out_channel_groups, "out_channel_groups")
        read = counts_of(whole, self.in_channel_groups, "in_channel_groups")
        self.DG = graph_of(
            model,
            example_inputs,
            self.ignored_layers,
            forward_fn=forward_fn,
            output_transform=output_transform,
            unwrapped_parameters=unwrapped_parameters,
            customized_pruners=customized_pruners,
        )
        found = self._rooted(offer(self.DG.coupling, prune_num_heads, prune_head_dims), named)
        found = replace(found, families=tuple(scopes.in_groups(self.DG, found.families, made, read)))
        self._offer = something(self.DG, found)
        self.init_num_heads = dict(self.num_heads)
        self._rules = self._wishes.rules(self.DG, self._offer)
        self._penalties = Penalties(self.DG, self._offer, regularizer)

    def _rooted(self, found: Offer, named: ByLayer[int]) -> Offer:
        """What is on offer in layers of the root types; whole heads only of the layers that the caller named."""
        kinds = (*self.root_module_types, torch.Tensor)

        def rooted(family: Family, coupling: Coupling) -> bool:
            made_by = makers(self.DG, family.units, coupling)
            return any(isinstance(m, kinds) for m in made_by)

        rows = [f for f in found.rows if rooted(f, found.by_rows)]
        if named:
            rows = [f for f in rows if named.of(makers(self.DG, f.units, found.by_rows)) is not None]
        families = [f for f in found.families if rooted(f, found.coupling)]
        return replace(found, rows=tuple(rows), families=tuple(families))

    # -- steps ----------------------------------------------------------------------------------------------------

    def step(self, interactive: bool = False, *, optimizer: Any = None) -> Iterator[Group] | None:
        """Prune up to the schedule's next share, with one plan.

        Args:
            interactive: yield the groups one by one instead of cutting: call ``group.prune()``, or
                ``group.prune(idxs)`` with other positions of its root layer, on those that shall go. What is yielded
                later takes into account what was cut before.
            optimizer: an optimiser over the model's parameters, whose state is cut too.
        """
        if interactive:
            self.current_step += 1
            return self._next_groups()
        units = self._units(self.current_step + 1)
        if units.size:
            self.DG._prune(units, optimizer=optimizer)
            self._count_heads()
        self.current_step += 1
        if self.current_step == self.iterative_steps and not self.DG._history:
            warnings.warn(
                "no step removed anything: every share is smaller than what can go at once, or the criterion left all "
                "groups alone",
                stacklevel=2,
            )
        return None

    def soft_step(self) -> SoftPruning:
        """What the next :meth:`step` would remove, as a mask that can be lifted; see :func:`prunus.soft_prune`."""
        units = self._units(self.current_step + 1)
        return SoftPruning(self.DG.model, self.DG._plan(units)[0])

    def reset(self) -> None:
        """Begin the schedule again; shares stay those of the widths at first."""
        self.current_step = 0

    def _units(self, step: int) -> Ids:
        """The units that go in a step: whole rows, and then positions of what is left."""
        found, *scores = score_offer(self.DG, self._offer, self.importance)
        return choose_offered(found, scores, self.DG.alive, self._wishes.policy(self._rules, step))

    def _next_groups(self) -> Iterator[Group]:
        """Whole heads first; then what goes from those that are left once the caller has dealt with them."""
        graph, policy = self.DG, self._wishes.policy(self._rules, self.current_step)
        found, of_rows, scores = score_offer(self.DG, self._offer, self.importance)
        for units in rows_to_go(found, of_rows, graph.alive, policy):
            yield from self._group(units, found.by_rows)
        for units in positions_to_go(found, scores, graph.alive, policy, np.empty(0, dtype=np.int64)):
            yield from self._group(units, found.coupling)
        self._count_heads()

    def _group(self, units: Ids, coupling: Coupling) -> Iterator[Group]:
        root = root_of(self.DG, units, coupling) if units.size else None
        if root is not None:
            yield Group(self.DG, units, root, coupling)
            self._count_heads()

    def _count_heads(self) -> None:
        """Bring ``num_heads`` up to date."""
        coupling = self.DG.coupling
        for key, number in self.init_num_heads.items():
            inside = {id(t) for t in (key.parameters() if isinstance(key, nn.Module) else [key])}
            held = [h for h in coupling.trace.held if id(h.tensor) in inside]
            axes = [s + np.arange(n) for h in held for s, n in zip(h.starts, h.shape, strict=True) if s >= 0]
            if axes:
                there, left = count_rows(coupling, self.DG.alive, np.concatenate(axes))
                self.num_heads[key] = number * left // there if there else number

    # -- what users ask and do by hand ------------------------------------------------------------------------------

    def get_target_pruning_ratio(self, module: Any, step: int = -1) -> float:
        """The share of a layer's outputs that is to be gone after ``step`` steps (-1: after those made so far)."""
        now = self._wishes.now(self._wishes.ratio_of([module]) or 0.0, self.current_step if step < 0 else step)
        return min(now, self._wishes.cap_of([module]))

    def get_target_head_pruning_ratio(self, module: Any) -> float:
        """The share of a layer's heads that is to be gone after the steps made so far."""
        own = self._heads.of_layers(self.DG.model, [module])
        share = own if own is not None else self._heads.ratio
        return self._wishes.now(share, self.current_step) if share else self.get_target_pruning_ratio(module)

    def estimate_importance(self, group: Group) -> torch.Tensor | None:
        """The criterion's scores of a group."""
        return self.importance(group)

    def manual_prune_width(
        self, layer: Any, pruning_fn: PruningFn, pruning_ratios_or_idxs: float | Sequence[int]
    ) -> None:
        """Prune one layer and what is coupled to it.

        Args:
            layer: a layer of the model.
            pruning_fn: which side of it.
            pruning_ratios_or_idxs: the share that goes (the least important units), or positions.
        """
        if isinstance(pruning_ratios_or_idxs, (int, float)):
            check_share("pruning_ratios_or_idxs", pruning_ratios_or_idxs)
            graph = self.DG
            width = (graph.get_in_channels if graph.is_in_channel_pruning_fn(pruning_fn) else graph.get_out_channels)(
                layer
            )
            group = graph.get_pruning_group(layer, pruning_fn, list(range(width)))
            scores = self.importance(group)
            number = int(len(group[0].idxs) * pruning_ratios_or_idxs)  # of gates, where the layer is recurrent
            if scores is None or number == 0:
                raise InputError(f"nothing would go: {width} positions, share {pruning_ratios_or_idxs}")
            scores = by_unit(scores, group)[torch.tensor(group.root_places())]
            order = torch.argsort(scores, stable=True)[:number].tolist()
            pruning_ratios_or_idxs = [group[0].idxs[place] for place in order]
        self.DG.get_pruning_group(layer, pruning_fn, pruning_ratios_or_idxs).prune()
        self._count_heads()

    @property
    def per_step_head_pruning_ratio(self) -> list[float]:
        """The share of heads that is gone after 0, 1, ... steps."""
        return self._wishes.shares_of(self.head_pruning_ratio or self.pruning_ratio)

    @cached_property
    def layer_init_out_ch(self) -> dict[Any, int]:
        """The width of what each layer made at first."""
        return scopes.initial_widths(self.DG, reads=False)

    @cached_property
    def layer_init_in_ch(self) -> dict[Any, int]:
        """The width of what each layer read at first."""
        return scopes.initial_widths(self.DG, reads=True)

    def pruning_history(self) -> list[Plan]:
        """The plans that were applied, in order."""
        return self.DG.pruning_history()

    def load_pruning_history(self, pruning_history: Iterable[Any]) -> None:
        """Cut as before; see :meth:`DependencyGraph.load_pruning_history`."""
        self.DG.load_pruning_history(pruning_history)
        self._count_heads()

    # -- sparse training ------------------------------------------------------------------------------------------

    def update_regularizer(self) -> None:
        """Prepare the regularisers; call it before training and after each step."""
        self._penalties.update()

    def regularize(
        self, model: Any = None, loss: Any = None, *, scaler: Any = None, weight: float = 1.0, bias: bool = False
    ) -> Any:
        """Add the gradients of the penalties to ``.grad``; call it between ``backward()`` and ``optimizer.step()``.

        Mixed precision: pass the ``GradScaler`` where gradients are still scaled, and nothing after
        ``scaler.unscale_(optimizer)``. Gradient accumulation: call it once before each ``optimizer.step()``, or after
        each of k backward passes with ``weight=1 / k``. Data-parallel: every process adds the same.

        Args:
            model: accepted for old scripts (it may be wrapped); the penalties are on the pruner's model.
            loss: accepted for old scripts; given back.
            scaler: a ``torch.amp.GradScaler`` whose scale the gradients still have.
            weight: a factor for the penalties.
            bias: also of biases.
        """
        self._penalties.add(scaler, weight, bias)
        return loss


__all__ = ["BasePruner"]
