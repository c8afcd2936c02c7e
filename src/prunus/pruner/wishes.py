"""What a user wants of a pruner or of `prune`, checked before anything is traced, and what it means for families."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunus.coupling import Coupling, Family
from prunus.graph import DependencyGraph
from prunus.heads import Offer, positions_of
from prunus.pruner.schedules import Schedule, linear_scheduler, shares_of
from prunus.pruner.scopes import ByLayer, HeadShares, by_layer, called, check_count, check_share, form, makers
from prunus.selection import Policy


@dataclass(frozen=True)
class Rule:
    """What holds for one family: its share, its cap (None: that of all), how many bundles stay, what it competes in.

    A share of None is for a budget to say.
    """

    ratio: float | None
    cap: float | None
    least: int
    scope: Hashable


class Wishes:
    """Shares, caps, widths and scopes, for all layers and for some.

    Raises:
        InputError: a value is out of range, or a key means nothing in the model.
    """

    def __init__(  # noqa: PLR0913 - each is one of the pruner's arguments
        self,
        model: nn.Module,
        *,
        ratio: float | None,
        ratios: Mapping[Any, float] | None,
        cap: float,
        caps: Mapping[Any, float] | None,
        min_width: int | Mapping[Any, int],
        heads: HeadShares,
        global_pruning: bool,
        isomorphic: bool,
        round_to: int | None,
        schedule: Schedule = linear_scheduler,
        steps: int = 1,
    ) -> None:
        if ratio is not None:
            check_share("pruning_ratio", ratio)
        check_share("max_pruning_ratio", cap, "at most 1")
        ratios, caps = by_layer("pruning_ratio_dict", ratios), by_layer("max_pruning_ratio_dict", caps)
        for key, share in ratios.items():
            check_share(called("pruning_ratio_dict", key), share)
        for key, share in caps.items():
            check_share(called("max_pruning_ratio_dict", key), share, "at most 1")
        check_count("iterative_steps", steps)
        if round_to is not None:
            check_count("round_to", round_to)
        widths = min_width if isinstance(min_width, Mapping) else {}
        for key, width in widths.items():
            check_count(called("min_width", key), width)
        self._width: Any = 1 if isinstance(min_width, Mapping) else min_width
        check_count("min_width", self._width)
        self._ratio, self._cap, self._round_to, self._heads = ratio, cap, round_to, heads
        self._global, self._isomorphic = global_pruning, isomorphic
        self._schedule, self._steps = schedule, steps
        self._ratios = ByLayer(model, ratios, "pruning_ratio_dict")
        self._caps = ByLayer(model, caps, "max_pruning_ratio_dict")
        self._widths = ByLayer(model, widths, "min_width")
        heads.of_layers(model, ())
        self.shares = shares_of(schedule, ratio or 0.0, steps)

    def ratio_of(self, layers: Iterable[Any]) -> float | None:
        """The share that goes from the first of ``layers`` that was named, or that of all (None: a budget says)."""
        own = self._ratios.of(layers)
        return self._ratio if own is None else own.value

    def cap_of(self, layers: Iterable[Any]) -> float:
        """The same for caps."""
        own = self._caps.of(layers)
        return self._cap if own is None else own.value

    def now(self, ratio: float, step: int) -> float:
        """What the schedule makes of a share after some steps."""
        return self.shares_of(ratio)[min(step, self._steps)]

    def shares_of(self, ratio: float) -> list[float]:
        """What the schedule makes of a share, after 0, 1, ... steps."""
        return shares_of(self._schedule, ratio, self._steps)

    def rules(self, graph: DependencyGraph, found: Offer) -> dict[int, Rule]:
        """The rule of each family on offer, by identity."""
        rules = {}
        named = self._ratios or self._caps or self._widths
        for rows, families, coupling in ((True, found.rows, found.by_rows), (False, found.families, found.coupling)):
            for family in families:
                made_by = makers(graph, family.units, coupling) if named else ()
                heads = self._heads.of(graph, family, coupling) if rows else None
                rules[id(family)] = Rule(
                    self.ratio_of(made_by) if heads is None else heads,
                    self.cap_of(made_by),
                    1 if rows else self._least(graph, family, made_by),
                    self._scope(family, coupling, made_by),
                )
        return rules

    def _scope(self, family: Family, coupling: Coupling, made_by: Sequence[Any]) -> Hashable:
        own = self._ratios.of(made_by)
        key = None if own is None else own.key
        if self._isomorphic:
            return key, form(coupling, family)
        return (key, None) if self._global else id(family)

    def _least(self, graph: DependencyGraph, family: Family, made_by: Sequence[Any]) -> int:
        """How many bundles keep the narrowest output of the family's layers at its minimum."""
        own = self._widths.of(made_by)
        least = self._width if own is None else own.value
        if least == 1:
            return 1
        sizes = positions_of(graph.coupling, family.units)
        sides = [s for s in graph.sides_of(family.units) if graph.is_out_channel_pruning_fn(s.handler)]
        each = min((sizes[dim] for s in sides for dim in s.dims if dim in sizes), default=len(family.units))
        return int(-(-least * family.count // each))

    def policy(self, rules: Mapping[int, Rule], step: int) -> Policy:
        """How far selection may go in a step."""
        known = {rule.ratio for rule in rules.values()}
        share = {ratio: None if ratio is None else self.now(ratio, step) for ratio in known}
        return Policy(
            lambda family: share[rules[id(family)].ratio],
            self._cap,
            self._round_to,
            scope_of=lambda family: rules[id(family)].scope,
            cap_of=lambda family: rules[id(family)].cap,
            least_of=lambda family: rules[id(family)].least,
        )


__all__ = ["Rule", "Wishes"]
