"""What a model is made of, for people: its groups, what each layer costs, and what has to stay and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from rich.table import Table

from prunus.allocation import offered
from prunus.coupling.explain import frozen
from prunus.graph import DependencyGraph
from prunus.heads import offer
from prunus.plan import footprint, macs_by_step


@dataclass(frozen=True)
class GroupCost:
    """What may be removed together: ``count`` bundles of ``width`` units; ``macs`` and ``params`` that one saves.

    ``layer`` is the first layer that is cut, ``layers`` all of them; ``heads``: whether a unit is a whole row.
    """

    layer: str
    layers: tuple[str, ...]
    count: int
    width: int
    heads: bool
    macs: int
    params: int


@dataclass(frozen=True)
class LayerCost:
    """One tensor of parameters: its layer, shape, what it costs, and the share of it that may be removed at most."""

    name: str
    kind: str
    shape: tuple[int, ...]
    params: int
    macs: int
    free: float


def groups_of(graph: DependencyGraph, prune_num_heads: bool = False) -> tuple[GroupCost, ...]:
    """Everything that a budget chooses from."""
    coupling = graph.coupling
    found = offer(coupling, prune_num_heads)
    empty = np.full(coupling.units.total, np.nan)
    choices = offered(found, (empty, empty), graph.alive)
    dense = footprint(coupling, graph.alive)
    rows = []
    for one in choices.ladders:
        own = found.by_rows if one.number < len(found.rows) else coupling
        names = tuple(dict.fromkeys(side.node.name for side in graph.sides_of(one.family.units, own)))
        macs = params = 0
        if one.stops.size:
            lost = choices.fixed.copy()
            lost[one.number] = one.stops[0]
            after = footprint(coupling, coupling.without(graph.alive, choices.choose(lost)))
            macs, params = dense.macs - after.macs, dense.params - after.params
        width = len(one.ranking.bundles[0]) if one.ranking.bundles else 0
        first = names[0] if names else "(no layer)"
        rows.append(GroupCost(first, names, len(one.ranking.bundles), width, one.family.coarse, macs, params))
    return tuple(rows)


def layers_of(graph: DependencyGraph) -> tuple[LayerCost, ...]:
    """What each tensor of parameters costs (biases and norms without multiply-adds)."""
    coupling = graph.coupling
    macs: dict[str, int] = {}
    for step, count in macs_by_step(coupling, graph.alive):
        module = coupling.trace.events[step].module
        macs[module] = macs.get(module, 0) + count
    stuck: dict[str, dict[int, int]] = {}
    for tensor, dim, _, number in frozen(coupling):
        stuck.setdefault(tensor, {})[dim] = stuck.get(tensor, {}).get(dim, 0) + number
    rows = []
    for held in coupling.trace.held:
        place = held.places[0]
        if place.kind != "parameter":
            continue
        shape = tuple(held.left(graph.alive))
        stay = [
            n if start < 0 else stuck.get(held.name, {}).get(d, 0)
            for d, (n, start) in enumerate(zip(held.shape, held.starts, strict=True))
        ]
        free = 1 - prod(stay) / max(prod(held.shape), 1)
        kind = type(coupling.trace.modules[place.module]).__name__
        own = macs.pop(place.module, 0) if len(shape) > 1 or "weight" in place.name else 0
        rows.append(LayerCost(held.name, kind, shape, prod(shape), own, free))
    rows += [LayerCost(module or "the model", "(no parameters)", (), 0, count, 0.0) for module, count in macs.items()]
    return tuple(rows)


def group_table(groups: tuple[GroupCost, ...], macs: int, params: int) -> Table:
    """The groups, with what one removal of each saves."""
    table = Table(title="Groups", title_justify="left")
    table.add_column("first layer", overflow="fold")
    for name in ("layers", "removals", "units each", "MACs each", "params each"):
        table.add_column(name, justify="right")
    for one in groups:
        table.add_row(
            one.layer,
            str(len(one.layers)),
            f"{one.count}{' rows' if one.heads else ''}",
            str(one.width),
            f"{one.macs:,} ({one.macs / max(macs, 1):.2%})",
            f"{one.params:,} ({one.params / max(params, 1):.2%})",
        )
    return table


def layer_costs_table(layers: tuple[LayerCost, ...], macs: int, params: int) -> Table:
    """The layers, with what they cost and how much of each may go."""
    table = Table(title="Layers", title_justify="left")
    table.add_column("tensor", overflow="fold")
    table.add_column("layer")
    for name in ("shape", "params", "MACs", "share of MACs", "may go"):
        table.add_column(name, justify="right")
    for one in layers:
        shape = "x".join(map(str, one.shape))
        share = f"{one.macs / max(macs, 1):.1%}" if one.macs else ""
        spent = f"{one.macs:,}" if one.macs else ""
        table.add_row(one.name, one.kind, shape, f"{one.params:,}", spent, share, f"{one.free:.0%}")
    table.add_section()
    table.add_row("whole model", "", "", f"{params:,}", f"{macs:,}", "", "")
    return table


def as_data(graph: DependencyGraph, groups: tuple[GroupCost, ...], layers: tuple[LayerCost, ...]) -> dict[str, Any]:
    """The same as plain values, for JSON."""
    cost = footprint(graph.coupling, graph.alive)
    return {
        "macs": cost.macs,
        "params": cost.params,
        "groups": [vars(one) for one in groups],
        "layers": [vars(one) for one in layers],
        "frozen": [dict(zip(("tensor", "dim", "reason", "positions"), row, strict=True)) for row in _stuck(graph)],
        "unsupported": {op: list(where) for op, where in graph.unsupported.items()},
    }


def _stuck(graph: DependencyGraph) -> Iterator[tuple[str, int, str, int]]:
    yield from frozen(graph.coupling)
