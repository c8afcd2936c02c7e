"""Pruners: a score, a scope and a schedule, in steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from prunus.coupling import Family, UnitGroup
from prunus.errors import InputError, NothingToPruneError
from prunus.graph import ROOT_TYPES, DependencyGraph
from prunus.group import Group
from prunus.importance import MagnitudeImportance
from prunus.plan import Plan
from prunus.report import frozen_text
from prunus.selection import Policy, choose, default_families, rank, score_units
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


def score_with(graph: DependencyGraph, importance: Criterion) -> Callable[[UnitGroup], torch.Tensor | None]:
    """The criterion as a function of the engine's groups."""
    living = graph.coupling.alive_units(graph.alive)

    def score(group: UnitGroup) -> torch.Tensor | None:
        left = group.units[living[group.units]]
        scores = torch.full((len(group.units),), float("inf"), dtype=torch.float32)
        if left.size == 0:
            return scores
        sides = graph.sides_of(group.units)
        if not sides:
            return None
        try:
            found = importance(Group(graph, left, sides[0]))
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
        self._families = [f for f in default_families(self.DG.coupling) if self._has_root(f)]
        self._ratios = [self._ratio(f) for f in self._families]
        if not self._families:
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

    def _makers(self, family: Family) -> list[Any]:
        """The layers that make the family's units."""
        sides = self.DG.sides_of(family.units)
        return [s.node.module for s in sides if self.DG.is_out_channel_pruning_fn(s.handler)]

    def _has_root(self, family: Family) -> bool:
        return any(isinstance(m, (*self.root_module_types, torch.Tensor)) for m in self._makers(family))

    def _ratio(self, family: Family) -> float:
        makers = {id(m) for m in self._makers(family)}
        for key, share in self._shares.items():
            for module in key if isinstance(key, (tuple, list)) else (key,):
                inside = module.modules() if isinstance(module, nn.Module) else [module]
                if makers & {id(m) for m in inside}:
                    return share
        return self.pruning_ratio

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
        graph = self.DG
        coupling = graph.coupling
        scores = score_units(coupling, self._families, score_with(graph, self.importance))
        living = coupling.alive_units(graph.alive)
        rankings = [rank(f, scores, living) for f in self._families]
        share = {id(f): self._share(r) for f, r in zip(self._families, self._ratios, strict=True)}
        policy = Policy(lambda f: share[id(f)], self.max_pruning_ratio, self.round_to, self.global_pruning)
        chosen = choose(rankings, policy)
        for family in self._families:
            units = chosen[np.isin(chosen, family.units)]
            if units.size:
                yield Group(graph, units, graph.sides_of(units)[0])

    def _share(self, ratio: float) -> float:
        steps = self._schedule(ratio, self.iterative_steps)
        return steps[min(self.current_step, self.iterative_steps)]

    def pruning_history(self) -> list[Plan]:
        """The plans that were applied, in order."""
        return self.DG.pruning_history()


class MagnitudePruner(BasePruner):
    """The pruner under the name that most scripts use."""


MetaPruner = BasePruner
