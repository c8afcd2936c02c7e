"""What stands in the way of a budget: the layers that keep most of the cost, and why they stay."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from prunus.allocation import Offered
from prunus.coupling import Coupling
from prunus.coupling.explain import frozen
from prunus.plan import Alive, macs_by_step

MOST = 3  # layers that are named


def obstacles(coupling: Coupling, alive: Alive, choices: Offered, budget: str) -> str:
    """Clauses that follow "so much is left": which layers hold it and why, and what the caps and steps keep.

    Args:
        coupling: the traced model.
        alive: the atoms that are there now.
        choices: what may be removed.
        budget: the name of the budget that is not met; parameters are looked at for ``params`` and ``memory``, and
            multiply-adds for the others.
    """
    lost = choices.fixed.copy()
    for one in choices.ladders:
        lost[one.number] = max(int(one.stops[-1]) if one.stops.size else 0, int(lost[one.number]))
    left = coupling.without(alive, choices.choose(lost))
    measure = _params_by_layer if budget in ("params", "memory") else _macs_by_layer
    dense, now = measure(coupling, alive), measure(coupling, left)
    total = max(sum(dense.values()), 1)
    reasons: dict[str, list[str]] = {}
    for tensor, dim, reason, count in frozen(coupling):
        layer, _, own = tensor.rpartition(".")
        if dim > 1:  # a kernel's dims never go
            continue
        reasons.setdefault(layer, []).append(f"{count} positions of {own} dim {dim} stay: {reason}")
    named = []
    for layer, amount in sorted(now.items(), key=lambda pair: -pair[1])[:MOST]:
        why = f" ({reasons[layer][0]})" if layer in reasons else ""
        named.append(f"{layer or 'the model itself'} keeps {amount / total:.1%}{why}")
    clauses = [f"the largest parts are {', '.join(named)}"] if named else []
    held = _held_back(choices)
    if held:
        clauses.append(held)
    return "".join(f"; {clause}" for clause in clauses)


def _held_back(choices: Offered) -> str:
    """What caps, roundings and sizes of the model's code keep, of what could go."""
    capped = [
        one
        for one in choices.ladders
        if len(one.ranking.bundles) - (one.stops[-1] if one.stops.size else 0) > max(one.family.least, 1)
    ]
    if not capped:
        return ""
    kept = sum(len(one.ranking.bundles) - (int(one.stops[-1]) if one.stops.size else 0) for one in capped)
    there = sum(len(one.ranking.bundles) for one in capped)
    return (
        f"max_pruning_ratio, min_width, round_to or a share of its own keeps {kept / there:.0%} of {len(capped)} "
        f"group{'s' if len(capped) > 1 else ''} that could lose more"
    )


def _macs_by_layer(coupling: Coupling, alive: Alive) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for step, count in macs_by_step(coupling, alive):
        module = coupling.trace.events[step].module
        found[module] = found.get(module, 0) + count
    return found


def _params_by_layer(coupling: Coupling, alive: Alive) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for held in coupling.trace.held:
        if held.places[0].kind == "parameter":
            module = held.places[0].module
            found[module] = found.get(module, 0) + int(prod(held.left(alive)))
    return found


__all__ = ["obstacles"]
