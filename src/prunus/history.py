"""What was cut before, as data: plans, or the triples (layer, whether outputs, positions) that others write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from prunus import plan as plans
from prunus.coupling import Coupling, Family
from prunus.errors import InputError, SurgeryError
from prunus.functions import functions_for, prune_parameter_in_channels, prune_parameter_out_channels
from prunus.held import Held
from prunus.plan import Alive, Plan
from prunus.surgery import Receipt

if TYPE_CHECKING:
    from prunus.graph import DependencyGraph

Cut = tuple[str, bool, list[int]]

# plans are plain data: a history that was saved with torch.save loads with torch.load as it is
torch.serialization.add_safe_globals(
    [kind for kind in vars(plans).values() if isinstance(kind, type) and is_dataclass(kind)]
)


def read_history(history: Iterable[Any]) -> list[Plan | Cut]:
    """The entries of a history: plans, their JSON, or triples ``[layer name, is output, positions]``.

    Raises:
        InputError: an entry is none of these.
    """
    if isinstance(history, (Plan, str, Mapping)) or not isinstance(history, Iterable):
        raise InputError(f"a history is a list, as pruning_history() gives it, not a {type(history).__name__}")
    return [_entry(entry) for entry in history]


def _entry(entry: Any) -> Plan | Cut:
    if isinstance(entry, Plan):
        return entry
    if isinstance(entry, str):
        return Plan.from_json(entry)
    if isinstance(entry, Sequence) and len(entry) == 3 and isinstance(entry[0], str):
        return entry[0], bool(entry[1]), [int(i) for i in entry[2]]
    raise InputError(
        f"the history holds {str(entry)[:60]!r}; it may hold plans, their JSON, or [layer name, is output, positions]"
    )


def replay(graph: DependencyGraph, history: Iterable[Any]) -> None:
    """Cut the model of a graph as a history says, all or nothing.

    Raises:
        InputError: an entry cannot be read; nothing was changed.
        SurgeryError: an entry does not fit; the model is as it was.
    """
    receipts: list[Receipt] = []
    try:
        for entry in read_history(history):
            if isinstance(entry, Plan):
                receipts.append(graph._apply(entry, alive_after(graph.coupling, graph.alive, entry)))
            else:
                receipts.append(_replay(graph, *entry))
    except BaseException:
        for receipt in reversed(receipts):
            receipt.undo()
        raise


def _replay(graph: DependencyGraph, name: str, out: bool, positions: list[int]) -> Receipt:
    layers = dict((*graph.model.named_parameters(remove_duplicate=False), *graph.model.named_modules()))
    if name not in layers:
        raise InputError(f"the history cuts {name}, which is not in the model")
    pair = functions_for(layers[name]) or (prune_parameter_out_channels, prune_parameter_in_channels)
    return graph.get_pruning_group(layers[name], pair[0 if out else 1], positions).prune()


def alive_after(coupling: Coupling, alive: Alive, plan: Plan) -> Alive:
    """The atoms that are left when a plan, which was applied to the model, is taken into account.

    Raises:
        SurgeryError: the plan does not fit the graph.
    """
    named: dict[str, Held] = {place.full: held for held in coupling.trace.held for place in held.places}
    after = alive.copy()
    for removal in plan.removals:
        held = named.get(removal.tensor)
        if held is None or removal.dim >= len(held.shape):
            raise SurgeryError(f"the graph has no {removal.tensor} dim {removal.dim}: the plan is for another model")
        start = held.starts[removal.dim]
        here = start + np.flatnonzero(alive[start : start + held.shape[removal.dim]]) if start >= 0 else _NONE
        if len(here) != removal.size:
            raise SurgeryError(
                f"{removal.tensor} dim {removal.dim} has {len(here)} positions in the graph, the plan needs "
                f"{removal.size}: build the graph on the model that the history begins with"
            )
        after[here[list(removal.positions)]] = False
    return _follow(coupling, alive, after)


def _follow(coupling: Coupling, alive: Alive, after: Alive) -> Alive:
    """Units that have no position left in any tensor are gone, with all their atoms; rows (heads) first."""
    kept = np.zeros(coupling.trace.ledger.size, dtype=bool)
    for held in coupling.trace.held:
        for start, size in zip(held.starts, held.shape, strict=True):
            if start >= 0:
                kept[start : start + size] = True
    units, pieces = coupling.units, coupling.pieces
    before = coupling.alive_units(alive)
    gone = []
    own = np.zeros(units.total, dtype=bool)
    own[coupling.unit_of_atom[kept]] = True
    for fine, taken in units.takes.items():
        atoms = np.concatenate([pieces.start[p] + np.arange(pieces.length[p]) for p in taken.tolist()])
        unit = int(units.base[fine])
        own[unit] |= bool(kept[atoms].any())
        atoms = atoms[kept[atoms] & alive[atoms]]
        if before[unit] and atoms.size and not after[atoms].any():
            gone.append(unit)
    real = np.flatnonzero(kept & alive)
    now = np.zeros(units.total, dtype=bool)
    now[coupling.unit_of_atom[real]] = True
    left = np.zeros(units.total, dtype=bool)
    left[coupling.unit_of_atom[real[after[real]]]] = True
    dead = np.union1d(np.flatnonzero(now & ~left & before), np.array(gone, dtype=np.int64))
    final = coupling.without(alive, dead)
    if not np.array_equal(final & kept, after & kept):
        raise SurgeryError(
            "the plan takes a part of what must go together in this graph: it was made for another model, or the model "
            "runs otherwise from time to time; plan.apply(model) cuts without a graph"
        )
    for families in (coupling.families, coupling.by_rows.families):
        for family in families:
            _keep_in_step(coupling, final, family, own)
    return final


def _keep_in_step(coupling: Coupling, alive: Alive, family: Family, own: NDArray[np.bool_]) -> None:
    """Lanes of which no tensor knows (states that the code makes) lose the share of the others, first units first."""
    real = [lane for lane in family.lanes if own[lane].any()]
    if len(real) in (0, len(family.lanes)):
        return
    living = coupling.alive_units(alive)
    share = min(np.count_nonzero(living[lane]) / len(lane) for lane in real)
    for lane in family.lanes:
        left = lane[living[lane]]
        excess = len(left) - round(len(lane) * share)
        if excess > 0 and not own[lane].any():
            alive[coupling.atoms_of(left[:excess])] = False


_NONE = np.empty(0, dtype=np.int64)

__all__ = ["Cut", "alive_after", "read_history", "replay"]
