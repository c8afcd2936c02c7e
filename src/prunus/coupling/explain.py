"""Why a dim is in the group it is in, or why it has to stay."""

from __future__ import annotations

from collections import deque

import numpy as np
from torch import nn

from prunus.coupling.groups import Coupling
from prunus.errors import InputError
from prunus.labels import Ids, distinct

MOST_PARTNERS = 40


def why_not(coupling: Coupling, unit: int) -> str:
    """Why a unit may not go."""
    fine = int(coupling.units.fine_of(np.array([unit]))[0])
    freeze = int(coupling.units.stay[fine])
    if freeze >= 0:
        record = coupling.units.freezes[freeze]
        return f"{record.reason}{_at(coupling, record.step)}"
    lane = int(coupling.bundling.lane_of[unit])
    return coupling.bundling.why.get(lane, "nothing that the model keeps goes with it")


def _at(coupling: Coupling, step: int) -> str:
    """`` (op in module)`` for a step of the trace."""
    events = coupling.trace.events
    if not 0 <= step < len(events):
        return ""
    return f" ({events[step].name} in {events[step].module or 'the model'})"


def frozen(coupling: Coupling) -> list[tuple[str, int, str, int]]:
    """Every (tensor, dim, reason, number of positions) that has to stay."""
    found = []
    for k in range(len(coupling.axis_start)):
        held = coupling.trace.held[int(coupling.axis_held[k])]
        dim = int(coupling.axis_dim[k])
        units = coupling.unit_of_atom[coupling.axis_start[k] + np.arange(held.shape[dim])]
        found += [(held.name, dim, reason, count) for reason, count in _reasons(coupling, units).items()]
    return found


def _reasons(coupling: Coupling, units: Ids) -> dict[str, int]:
    """Why units may not go, and how many for each reason (units that go with a row that may go count as free)."""
    stuck = np.unique(units[~coupling.removable[units]])
    reasons: dict[str, int] = {}
    if stuck.size == 0:
        return reasons
    keys = np.stack((coupling.units.fine_of(stuck), coupling.bundling.lane_of[stuck]), axis=1)
    changes = np.flatnonzero(np.concatenate(([True], (keys[1:] != keys[:-1]).any(axis=1))))
    counts = np.diff(np.concatenate((changes, [stuck.size]))).tolist()
    kinds = map(tuple, keys[changes].tolist())
    known: dict[tuple[int, ...], str] = {}
    for unit, key, count in zip(stuck[changes].tolist(), kinds, counts, strict=True):
        if key not in known:
            known[key] = why_not(coupling, unit)
        reasons[known[key]] = reasons.get(known[key], 0) + count
    return reasons


def explain(coupling: Coupling, layer: nn.Module | str) -> str:
    """For every dim of a layer: its group and the ops that tie it, or why it has to stay.

    Args:
        coupling: a traced and coupled model.
        layer: a module of it, or the dotted name of a module or tensor.

    Raises:
        InputError: no tensor of that layer was used while tracing.
    """
    model = coupling.trace.model
    if isinstance(layer, nn.Module):
        name = next((path for path, m in model.named_modules() if m is layer), None)
        if name is None:
            raise InputError(f"{type(layer).__name__} is not part of the model that was traced")
    else:
        name = layer
    axes = [k for k in range(len(coupling.axis_start)) if _belongs(coupling, k, name)]
    if not axes:
        raise InputError(f"{name!r} holds no tensor that was used while tracing; check the name with named_modules()")
    weights = [k for k in axes if len(coupling.trace.held[int(coupling.axis_held[k])].shape) > 1]
    lines = [line for k in weights or axes for line in _explain_axis(coupling, k)]
    return "\n".join([f"{name or 'the model'}:", *lines])


def _belongs(coupling: Coupling, axis: int, name: str) -> bool:
    """Whether a dim is one of the tensor ``name``, or of a tensor inside the module ``name``."""
    places = coupling.trace.held[int(coupling.axis_held[axis])].places
    return any(p.full == name or f"{p.module}.".startswith(f"{name}.") or not name for p in places)


def _explain_axis(coupling: Coupling, axis: int) -> list[str]:
    held = coupling.trace.held[int(coupling.axis_held[axis])]
    dim = int(coupling.axis_dim[axis])
    size = held.shape[dim]
    atoms = coupling.axis_start[axis] + np.arange(size)
    units = coupling.unit_of_atom[atoms]
    reads = (int(coupling.axis_held[axis]), dim) in coupling.consumers
    head = f"  {held.name} dim {dim} ({size} positions, {'read' if reads else 'made'} by its layer)"
    lines = [f"{head}: {n} stay: {reason}" for reason, n in _reasons(coupling, units).items()]
    free = coupling.movable[units]
    if free.any():
        first = int(atoms[free][0])
        group, count = int(coupling.group_of_unit[units[free][0]]), len(distinct(units[free]))
        each = np.count_nonzero(free) // count
        lines.append(f"{head}: group {group}, {count} units{f' of {each} positions' if each > 1 else ''}; with it go")
        partners = _partners(coupling, first)
        lines += [f"      {text}" for text in partners[:MOST_PARTNERS]]
        if len(partners) > MOST_PARTNERS:
            lines.append(f"      and {len(partners) - MOST_PARTNERS} more")
    return lines + [f"{head}: {text}" for text in _whole_rows(coupling, atoms)]


def _whole_rows(coupling: Coupling, atoms: Ids) -> list[str]:
    """The whole heads (experts, groups of a convolution) that hold positions of a dim and may go, group by group."""
    _, takers = coupling.units.takings(coupling.pieces.of(atoms))
    rows = coupling.by_rows if takers.size else coupling
    takers = takers[rows.movable[takers] & rows.batched[takers]]
    groups = rows.group_of_unit[takers]
    found = []
    for k in distinct(groups).tolist():
        held = takers[groups == k]
        heads = len(distinct(held))
        found.append(f"or with prune_num_heads, {heads} whole heads of {held.size // heads} positions (group {k})")
    return found


def _partners(coupling: Coupling, atom: int) -> list[str]:
    """The layers that are tied to an atom: their tensors' dims, and the ops along the shortest path of ties."""
    pieces = coupling.pieces
    start = int(pieces.of(np.array([atom]))[0])
    came: dict[int, tuple[int, int]] = {start: (-1, -1)}
    todo = deque([start])
    fine = pieces.fine[start]
    inside = np.flatnonzero(pieces.fine[pieces.left] == fine)
    links: dict[int, list[tuple[int, int]]] = {}
    for k in inside.tolist():
        a, b, step = int(pieces.left[k]), int(pieces.right[k]), int(pieces.step[k])
        links.setdefault(a, []).append((b, step))
        links.setdefault(b, []).append((a, step))
    found: dict[str, tuple[list[str], str]] = {}
    while todo:
        piece = todo.popleft()
        axis = int(coupling.axis_of_piece[piece])
        if axis >= 0 and piece != start:
            place = coupling.trace.held[int(coupling.axis_held[axis])].places[0]
            tensors, _ = found.setdefault(place.module, ([], _path(coupling, came, piece)))
            tensors.append(f"{place.name} dim {int(coupling.axis_dim[axis])}")
        for other, step in links.get(piece, ()):
            if other not in came:
                came[other] = (piece, step)
                todo.append(other)
    return [f"{module}: {', '.join(dict.fromkeys(names))}; through {path}" for module, (names, path) in found.items()]


def _path(coupling: Coupling, came: dict[int, tuple[int, int]], piece: int) -> str:
    steps: list[str] = []
    while came[piece][0] >= 0:
        piece, step = came[piece]
        if step >= 0:
            event = coupling.trace.events[step]
            steps.append(f"{event.name} in {event.module or 'the model'}")
        else:
            steps.append("the same rows")
    return ", ".join(dict.fromkeys(reversed(steps)))
