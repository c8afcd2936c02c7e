"""Text for people: what triggers what in a group, what changed layer by layer, what stays and why."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from prunus.coupling import Coupling
from prunus.coupling.explain import frozen
from prunus.plan import Alive, Footprint, macs_by_step

if TYPE_CHECKING:
    from prunus.graph import DependencyGraph
    from prunus.group import Group, GroupItem


def render(table: Table, width: int = 120) -> str:
    """A rich table as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.rstrip()


def layer_table(coupling: Coupling, before: Alive, after: Alive, dense: Footprint, now: Footprint) -> Table:
    """What each layer that changed was and is: shape of its weight, parameters, MACs."""
    macs_before, macs_after = (_macs_by_module(coupling, alive) for alive in (before, after))
    table = Table(title="Pruned layers", title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("shape before", "after", "params before", "after", "MACs before", "after"):
        table.add_column(name, justify="right")
    for held in coupling.trace.held:
        place = held.places[0]
        if place.kind != "parameter":
            continue
        old, new = held.left(before), held.left(after)
        if old == new or (len(old) < 2 and "bias" in place.name):
            continue
        macs = (macs_before.get(place.module, 0), macs_after.get(place.module, 0)) if len(old) > 1 else (0, 0)
        table.add_row(held.name, _shape(old), _shape(new), _int(old), _int(new), *(f"{m:,}" if m else "" for m in macs))
    table.add_section()
    table.add_row("whole model", "", "", f"{dense.params:,}", f"{now.params:,}", f"{dense.macs:,}", f"{now.macs:,}")
    return table


def share_left(dense: Footprint, now: Footprint) -> str:
    """What is left of a model's cost, as a sentence."""
    macs, params = now.macs / max(dense.macs, 1), now.params / max(dense.params, 1)
    return f"{macs:.1%} of the MACs and {params:.1%} of the parameters are left."


def _shape(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _int(shape: list[int]) -> str:
    return f"{int(np.prod(shape)):,}"


def _macs_by_module(coupling: Coupling, alive: Alive) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for step, count in macs_by_step(coupling, alive):
        module = coupling.trace.events[step].module
        found[module] = found.get(module, 0) + count
    return found


def frozen_text(coupling: Coupling) -> str:
    """What has to stay and why: a line for each reason, with the number of positions and the first tensor."""
    by_reason: dict[str, list[tuple[str, int]]] = {}
    for tensor, dim, reason, count in frozen(coupling):
        by_reason.setdefault(reason, []).append((f"{tensor} dim {dim}", count))
    lines = []
    for reason, found in by_reason.items():
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        lines.append(f"{sum(n for _, n in found)} positions stay ({found[0][0]}{others}): {reason}")
    unread = coupling.trace.unread
    if unread:
        shown = ", ".join(unread[:4]) + (", ..." if len(unread) > 4 else "")
        lines.append(
            f"{len(unread)} parameters were not read by the example run ({shown}): what they are coupled to is not "
            "known; put the layers around them into ignored_layers if they run elsewhere"
        )
    for op, modules in coupling.trace.unsupported.items():
        lines.append(f"no rule for {op} (in {', '.join(m or 'the model' for m in modules[:4])}): its inputs stay")
    return "\n".join(lines)


def describe_group(graph: DependencyGraph, group: Group) -> str:
    """The group as lines "[k] trigger on A => handler on B", with the ops between the layers."""
    items = {id(item.dep.target.module): item for item in group.items}
    lines = ["-" * 32, "          Pruning Group", "-" * 32]
    root = group.items[0]
    lines.append(_line(0, f"{root.dep.handler.__name__} on {root.dep.source}", root) + "  (Pruning Root)")
    seen, number = {id(root)}, 1
    for trigger, item, op in _walk(graph, group, items):
        if item is None:
            lines.append(f"[-] {trigger} => {op}")
        elif id(item) not in seen:
            seen.add(id(item))
            lines.append(_line(number, trigger, item))
            number += 1
    for item in group.items:
        if id(item) not in seen:
            lines.append(_line(number, f"{root.dep.handler.__name__} on {root.dep.source}", item))
            number += 1
    return "\n".join([*lines, "-" * 32])


def _line(number: int, trigger: str, item: GroupItem) -> str:
    shown = item.idxs if len(item.idxs) <= 50 else f"[{item.idxs[0]}, {item.idxs[1]}, ..., {item.idxs[-1]}]"
    return (
        f"[{number}] {trigger} => {item.dep.handler.__name__} on {item.dep.target}, len(idxs)={len(item.idxs)}, "
        f"idxs={shown}"
    )


def _walk(graph: DependencyGraph, group: Group, items: Mapping[int, GroupItem]) -> Any:
    """Breadth first along the data flow: (trigger, item, "") for a layer, (trigger, None, op) for an op."""
    coupling = graph.coupling
    events = coupling.trace.events
    gone = np.zeros(coupling.trace.ledger.size, dtype=bool)
    gone[coupling.atoms_of(group.units)] = True
    carries = [
        any(label is not None and gone[label.ids].any() for dims in event.outputs if dims is not None for label in dims)
        for event in events
    ]
    layer_of: dict[int, list[GroupItem]] = {}
    by_dim = graph.sides.by_dim
    for step, event in enumerate(events):
        sides = {
            id(side.node.module): side
            for source in event.sources
            if source <= -2
            for d in range(len(coupling.trace.held[-2 - source].shape))
            if (side := by_dim.get((-2 - source, d))) is not None
        }
        layer_of[step] = [items[k] for k in sides if k in items]
    links: dict[int, list[int]] = {}
    for step, event in enumerate(events):
        for source in event.sources:
            if source >= 0 and carries[source] and (carries[step] or layer_of[step]):
                links.setdefault(source, []).append(step)
                links.setdefault(step, []).append(source)
    start = next((s for s in range(len(events)) if group.items[0] in layer_of[s]), None)
    return _breadth_first(events, links, layer_of, start)


def _breadth_first(events: Any, links: Mapping[int, list[int]], layer_of: Any, start: int | None) -> Any:
    if start is None:
        return
    seen, todo = {start}, deque([start])
    while todo:
        step = todo.popleft()
        trigger = _name(events, layer_of, step)
        for other in links.get(step, ()):
            if other in seen:
                continue
            seen.add(other)
            if layer_of[other]:
                for item in layer_of[other]:
                    yield trigger, item, ""
                if not _goes_on(layer_of[other]):
                    continue
            else:
                yield trigger, None, _op(events[other])
            todo.append(other)


def _goes_on(items: list[GroupItem]) -> bool:
    """Whether the layer's output carries the group too (a layer that only reads it ends the path)."""
    return any("_out_" in item.dep.handler.__name__ for item in items)


def _name(events: Any, layer_of: Any, step: int) -> str:
    if layer_of[step]:
        item = layer_of[step][0]
        return f"{item.dep.handler.__name__} on {item.dep.target}"
    return _op(events[step])


def _op(event: Any) -> str:
    return f"{event.name} in {event.module}" if event.module else event.name


def percent(value: float | None) -> str:
    """A share for a cell of a table; empty where there is none."""
    return "" if value is None else f"{value:.2%}"
