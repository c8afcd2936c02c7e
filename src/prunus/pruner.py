"""Pruners: a score, a scope and a schedule, in steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from prunus.coupling import Coupling, Family, UnitGroup
from prunus.errors import InputError, NothingToPruneError
from prunus.graph import ROOT_TYPES, DependencyGraph
from prunus.group import Group
from prunus.heads import Offer, choose_positions, choose_rows, count_rows, offer
from prunus.importance import MagnitudeImportance
from prunus.labels import Ids
from prunus.plan import Plan
from prunus.report import frozen_text
from prunus.selection import Policy, Scores, score_units
from prunus.tracing import ForwardFn, Inputs

Criterion = Callable[[Any], "torch.Tensor | None"]
Schedule = Callable[[float, int], Sequence[float]]


def linear_scheduler(ratio: float, steps: int) -> list[float]:
    """The share removed after each step, growing linearly: ``[0, ratio / steps, ..., ratio]``.

    Example:
        >>> linear_scheduler(0.5, 5)
        [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    """
    return [ratio * k / steps for k in range(steps + 1)]


def score_with(
    graph: DependencyGraph, importance: Criterion, coupling: Coupling | None = None
) -> Callable[[UnitGroup], torch.Tensor | None]:
    """The criterion as a function of the engine's groups (those of ``coupling``, default the graph's own)."""
    coupling = coupling or graph.coupling
    living = coupling.alive_units(graph.alive)

    def score(group: UnitGroup) -> torch.Tensor | None:
        left = group.units[living[group.units]]
        scores = torch.full((len(group.units),), float("inf"), dtype=torch.float32)
        if left.size == 0:
            return scores
        sides = graph.sides_of(group.units, coupling)
        if not sides:
            return None
        try:
            found = importance(Group(graph, left, sides[0], coupling))
        except NotImplementedError as error:
            if any(p.is_meta for p in graph.model.parameters()):
                raise InputError(
                    "the model is on the meta device and its weights have no values to score; score a real copy and "
                    "apply the plan here, or pass importance=prunus.importance.RandomImportance()"
                ) from error
            raise
        if found is None:
            return None
        if found.shape != (len(left),):
            raise InputError(f"the importance returned shape {tuple(found.shape)} for a group of {len(left)} units")
        scores[torch.from_numpy(living[group.units])] = found.float().cpu()
        return scores

    return score


def score_offer(graph: DependencyGraph, found: Offer, importance: Criterion) -> tuple[Scores, Scores]:
    """The criterion's scores of the whole rows on offer, and of everything else."""
    empty = np.full(graph.coupling.units.total, np.nan)
    rows = score_units(found.by_rows, found.rows, score_with(graph, importance, found.by_rows)) if found.rows else empty
    return rows, score_units(graph.coupling, found.families, score_with(graph, importance)) if found.families else empty


def makers(graph: DependencyGraph, units: Ids, coupling: Coupling | None = None) -> list[Any]:
    """The layers that make ``units``."""
    sides = graph.sides_of(units, coupling)
    return [s.node.module for s in sides if graph.is_out_channel_pruning_fn(s.handler)]


def share_for(shares: Mapping[Any, float], modules: Sequence[Any]) -> float | None:
    """The share that a user's dictionary (module or tuple of modules -> share) gives to one of ``modules``."""
    wanted = {id(m) for m in modules}
    for key, share in shares.items():
        for module in key if isinstance(key, (tuple, list)) else (key,):
            inside = module.modules() if isinstance(module, nn.Module) else [module]
            if wanted & {id(m) for m in inside}:
                return share
    return None


class HeadShares:
    """The share of whole heads that goes: one for all (0: that of everything else), and others for some modules.

    Raises:
        InputError: a share is out of range.
    """

    def __init__(self, ratio: float, by_module: Mapping[Any, float] | None) -> None:
        self.ratio, self.by_module = ratio, dict(by_module or {})
        for name, value in (("head_pruning_ratio", ratio), *((str(k)[:40], v) for k, v in self.by_module.items())):
            if not 0 <= value < 1:
                raise InputError(f"{name}={value!r}: the share of heads to remove must be at least 0 and below 1")

    def of(self, graph: DependencyGraph, family: Family, by_rows: Coupling) -> float | None:
        """The share of a family's heads that goes; None: the share of everything else."""
        own = share_for(self.by_module, makers(graph, family.units, by_rows)) if self.by_module else None
        return own if own is not None else self.ratio or None


class BasePruner:
    """Removes a growing share of every group, in steps, the least important units first.

    Args:
        model: the model; it is cut in place by :meth:`step`.
        example_inputs: a tensor, a tuple of arguments or a dict.
        importance: a criterion; default :class:`~prunus.importance.MagnitudeImportance`.
        global_pruning: rank all groups together instead of taking the same share of each.
        pruning_ratio: the share of every group's units that is gone after the last step, in (0, 1).
        pruning_ratio_dict: other shares for some modules (or tuples of modules), with all that is inside them.
        max_pruning_ratio: the largest share of any group.
        iterative_steps: how many calls of :meth:`step` reach the share.
        iterative_pruning_ratio_scheduler: ``(ratio, steps) -> shares after 0, 1, ... steps``.
        ignored_layers: modules whose output widths must stay.
        round_to: widths that stay are multiples of it, where a group allows it.
        num_heads: layers that make heads, and how many: only those lose whole heads (None: any layer). The pruner's own
            copy, ``pruner.num_heads``, always holds the present counts.
        prune_num_heads: whole heads go, before anything else does; see :func:`prunus.prune`.
        prune_head_dims: positions inside heads go.
        head_pruning_ratio: the share of heads that is gone after the last step; 0 means ``pruning_ratio``.
        head_pruning_ratio_dict: other shares of heads for some modules (or tuples of modules).
        root_module_types: layers whose outputs may be pruned.
        forward_fn: ``forward_fn(model, example_inputs)`` to use instead of calling the model.
        output_transform: picks from the output what must keep its sizes.
        unwrapped_parameters: see :meth:`DependencyGraph.build_dependency`.
        customized_pruners: see :meth:`DependencyGraph.build_dependency`.

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
        ignored_layers: Sequence[Any] | None = None,
        round_to: int | None = None,
        *,
        root_module_types: Sequence[type] = (*ROOT_TYPES, nn.RNNBase, nn.MultiheadAttention, nn.Embedding),
        forward_fn: ForwardFn | None = None,
        output_transform: Callable[[Any], Any] | None = None,
        ch_sparsity: float | None = None,
        unwrapped_parameters: Any = None,
        customized_pruners: Mapping[Any, Any] | None = None,
        num_heads: Mapping[Any, int] | None = None,
        prune_num_heads: bool = False,
        prune_head_dims: bool = True,
        head_pruning_ratio: float = 0.0,
        head_pruning_ratio_dict: Mapping[Any, float] | None = None,
    ) -> None:
        self.model = model
        self.importance = importance or MagnitudeImportance()
        self.global_pruning = global_pruning
        self.pruning_ratio = pruning_ratio if ch_sparsity is None else ch_sparsity
        self.max_pruning_ratio = max_pruning_ratio
        self.iterative_steps = iterative_steps
        self.round_to = round_to
        self.root_module_types = tuple(root_module_types)
        self.ignored_layers = list(ignored_layers or ())
        self.current_step = 0
        self._shares = dict(pruning_ratio_dict or {})
        self._schedule = iterative_pruning_ratio_scheduler
        self._check()
        self.DG = DependencyGraph().build_dependency(
            model,
            example_inputs,
            forward_fn,
            output_transform,
            unwrapped_parameters,
            customized_pruners,
            self.ignored_layers,
        )
        self.num_heads = dict(num_heads or {})
        heads = HeadShares(head_pruning_ratio, head_pruning_ratio_dict)
        self._offer = self._rooted(offer(self.DG.coupling, prune_num_heads, prune_head_dims))
        self._heads_at_first = dict(self.num_heads)
        by_rows = self._offer.by_rows
        self._ratios = {id(f): self._ratio(makers(self.DG, f.units)) for f in self._offer.families}
        for family in self._offer.rows:
            own = heads.of(self.DG, family, by_rows)
            self._ratios[id(family)] = self._ratio(makers(self.DG, family.units, by_rows)) if own is None else own
        if not self._offer:
            raise NothingToPruneError(f"nothing in this model may be removed:\n{frozen_text(self.DG.coupling)}")

    def _check(self) -> None:
        for name, value in (
            ("pruning_ratio", self.pruning_ratio),
            *((str(k)[:40], v) for k, v in self._shares.items()),
        ):
            if not 0 <= value < 1:
                raise InputError(f"{name}={value!r}: the share to remove must be at least 0 and below 1")
        if not 0 < self.max_pruning_ratio <= 1:
            raise InputError(f"max_pruning_ratio={self.max_pruning_ratio!r}: must be above 0 and at most 1")
        if self.iterative_steps < 1:
            raise InputError(f"iterative_steps={self.iterative_steps!r}: must be at least 1")
        if self.round_to is not None and self.round_to < 1:
            raise InputError(f"round_to={self.round_to!r}: must be at least 1")

    def _rooted(self, found: Offer) -> Offer:
        """What is on offer in layers of the root types; whole heads only of the layers that the caller named."""

        def rooted(family: Family, coupling: Coupling) -> bool:
            made_by = makers(self.DG, family.units, coupling)
            return any(isinstance(m, (*self.root_module_types, torch.Tensor)) for m in made_by)

        named = {id(m) for key in self.num_heads for m in (key.modules() if isinstance(key, nn.Module) else [key])}
        rows = [f for f in found.rows if rooted(f, found.by_rows)]
        if named:
            rows = [f for f in rows if named & {id(m) for m in makers(self.DG, f.units, found.by_rows)}]
        families = tuple(f for f in found.families if rooted(f, found.coupling))
        return replace(found, rows=tuple(rows), families=families)

    def _ratio(self, made_by: Sequence[Any]) -> float:
        own = share_for(self._shares, made_by)
        return self.pruning_ratio if own is None else own

    def step(self, interactive: bool = False) -> Iterator[Group] | None:
        """Prune up to the schedule's next share.

        Args:
            interactive: yield the groups one by one instead of cutting; call ``group.prune()`` on those that shall go.
        """
        self.current_step += 1
        groups = self._next_groups()
        if interactive:
            return groups
        for group in groups:
            group.prune()
        return None

    def _next_groups(self) -> Iterator[Group]:
        """Whole heads first; then what goes from those that are left once the caller has dealt with them."""
        graph, found = self.DG, self._offer
        of_rows, scores = score_offer(graph, found, self.importance)
        share = {key: self._share(ratio) for key, ratio in self._ratios.items()}
        policy = Policy(lambda f: share[id(f)], self.max_pruning_ratio, self.round_to, self.global_pruning)
        chosen = choose_rows(found, of_rows, graph.alive, policy)
        for family in found.rows:
            yield from self._group(chosen, family, found.by_rows)
        chosen = choose_positions(found, scores, graph.alive, policy, chosen[:0])
        for family in found.families:
            yield from self._group(chosen, family, found.coupling)
        self._count_heads()

    def _group(self, chosen: Ids, family: Family, coupling: Coupling) -> Iterator[Group]:
        units = chosen[np.isin(chosen, family.units)]
        if units.size:
            yield Group(self.DG, units, self.DG.sides_of(units, coupling)[0], coupling)
            self._count_heads()

    def _count_heads(self) -> None:
        """Bring ``num_heads`` up to date."""
        coupling = self.DG.coupling
        for key, number in self._heads_at_first.items():
            inside = {id(t) for t in (key.parameters() if isinstance(key, nn.Module) else [key])}
            held = [h for h in coupling.trace.held if id(h.tensor) in inside]
            axes = [s + np.arange(n) for h in held for s, n in zip(h.starts, h.shape, strict=True) if s >= 0]
            if axes:
                there, left = count_rows(coupling, self.DG.alive, np.concatenate(axes))
                self.num_heads[key] = number * left // there if there else number

    def _share(self, ratio: float) -> float:
        steps = self._schedule(ratio, self.iterative_steps)
        return steps[min(self.current_step, self.iterative_steps)]

    def pruning_history(self) -> list[Plan]:
        """The plans that were applied, in order."""
        return self.DG.pruning_history()


class MagnitudePruner(BasePruner):
    """The pruner under the name that most scripts use."""


MetaPruner = BasePruner
