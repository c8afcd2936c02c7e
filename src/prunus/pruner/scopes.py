"""What a user says about some layers: shares, caps, widths and counts, by module, name pattern or type; and scopes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Integral, Real
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from prunus.coupling import Coupling, Family
from prunus.errors import InputError
from prunus.graph import DependencyGraph
from prunus.heads import positions_of
from prunus.hints import Frozen, chosen_layers
from prunus.labels import Ids

T = TypeVar("T", float, int)


def makers(graph: DependencyGraph, units: Ids, coupling: Coupling | None = None) -> list[Any]:
    """The layers that make ``units``, in the order in which the model uses them."""
    sides = graph.sides_of(units, coupling)
    return [s.node.module for s in sides if graph.is_out_channel_pruning_fn(s.handler)]


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A value for some layers, and the place of its key in the dictionary."""

    key: int
    value: T


class ByLayer(Generic[T]):
    """A user's dictionary from layers to values.

    A key is a module (with all that is inside it), a name or name pattern, a type of modules, a bare parameter, or a
    tuple of those. Where several keys mean a layer, the one with the fewest layers counts.

    Raises:
        InputError: a key means nothing in the model.
    """

    def __init__(self, model: nn.Module, given: Mapping[Any, T] | None, what: str) -> None:
        found: list[tuple[set[int], Entry[T]]] = []
        for place, (key, value) in enumerate((given or {}).items()):
            for one in key if isinstance(key, (tuple, list, set, frozenset)) else (key,):
                found.append((_meant(model, one, what), Entry(place, value)))
        found.sort(key=lambda pair: -len(pair[0]))  # stable: the later of two equal keys counts
        self._entries: dict[int, Entry[T]] = {member: entry for members, entry in found for member in members}

    def __bool__(self) -> bool:
        return bool(self._entries)

    def of(self, layers: Iterable[Any]) -> Entry[T] | None:
        """The entry of the first of ``layers`` that has one."""
        if not self._entries:
            return None
        return next((self._entries[id(layer)] for layer in layers if id(layer) in self._entries), None)


def _meant(model: nn.Module, key: Any, what: str) -> set[int]:
    """The modules and parameters, by identity, that one key means."""
    found, others = chosen_layers(model, (key,), what)
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    for other in others:
        tensor = other.parameter if isinstance(other, Frozen) else other
        tensor = tensors.get(tensor) if isinstance(tensor, str) else tensor
        if not any(tensor is own for own in tensors.values()):
            raise InputError(f"{what} holds a parameter that is not part of the model")
        found.add(id(tensor))
    return found


def check_share(name: str, value: Any, most: str = "below 1", what: str = "the share to remove") -> None:
    """Refuse what is no share: at least 0 and below 1, or for a cap above 0 and at most 1.

    Raises:
        InputError: it is none.
    """
    number = not isinstance(value, bool) and isinstance(value, Real) and isfinite(value)
    if most == "below 1":
        if not number or not 0 <= value < 1:
            raise InputError(f"{name}={value!r}: {what} must be at least 0 and below 1")
    elif not number or not 0 < value <= 1:
        raise InputError(f"{name}={value!r}: must be above 0 and at most 1")


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number above 0.

    Raises:
        InputError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise InputError(f"{name}={value!r}: must be a whole number and at least 1")


def by_layer(name: str, given: Any) -> dict[Any, Any]:
    """A caller's dictionary from layers to values (None: nothing), as a copy.

    Raises:
        InputError: it is none.
    """
    if given is not None and not isinstance(given, Mapping):
        raise InputError(f"{name} is a {type(given).__name__}: pass a dict from layers to values")
    return dict(given or {})


def called(name: str, key: Any) -> str:
    """How errors call one entry of a dictionary."""
    return f"{name}[{type(key).__name__ if isinstance(key, nn.Module) else str(key)[:40]}]"


def counts_of(model: nn.Module, given: Mapping[Any, int], what: str) -> ByLayer[int]:
    """A dictionary from layers to numbers of heads or groups, checked."""
    for key, number in given.items():
        check_count(called(what, key), number)
    return ByLayer(model, given, what)


class HeadShares:
    """The share of whole heads that goes: one for all (0: that of everything else), and others for some modules.

    Raises:
        InputError: a share is out of range, or a key means nothing in the model.
    """

    def __init__(self, ratio: float, by_module: Mapping[Any, float] | None) -> None:
        self.ratio, self.by_module = ratio, by_layer("head_pruning_ratio_dict", by_module)
        check_share("head_pruning_ratio", ratio, what="the share of heads to remove")
        for key, value in self.by_module.items():
            check_share(called("head_pruning_ratio_dict", key), value, what="the share of heads to remove")
        self._found: tuple[int, ByLayer[float]] | None = None

    def of(self, graph: DependencyGraph, family: Family, by_rows: Coupling) -> float | None:
        """The share of a family's heads that goes; None: the share of everything else."""
        own = self.of_layers(graph.model, makers(graph, family.units, by_rows)) if self.by_module else None
        return own if own is not None else self.ratio or None

    def of_layers(self, model: nn.Module, layers: Iterable[Any]) -> float | None:
        """The share that the dictionary gives to the first of ``layers`` that is in it."""
        if self._found is None or self._found[0] != id(model):
            self._found = id(model), ByLayer(model, self.by_module, "head_pruning_ratio_dict")
        entry = self._found[1].of(layers)
        return None if entry is None else entry.value


def form(coupling: Coupling, family: Family) -> Hashable:
    """What makes families isomorphic: the kinds of layers and the dims of them that they cut, sizes aside.

    Source: Fang et al. 2024, "Isomorphic Pruning for Vision Models" (arXiv 2407.04616): scores compare within
    sub-structures of one topology.
    """
    found = []
    for held, dim in positions_of(coupling, family.units):
        place = coupling.trace.held[held].places[0]
        layer = coupling.trace.modules[place.layer]
        groups = getattr(layer, "groups", 1)
        grouped = "" if groups == 1 else "depthwise" if groups == getattr(layer, "in_channels", 0) else "grouped"
        found.append((type(layer).__name__, grouped, place.name, dim))
    return family.coarse, tuple(sorted(found))


def in_groups(
    graph: DependencyGraph, families: Sequence[Family], made: ByLayer[int], read: ByLayer[int]
) -> list[Family]:
    """The families; every lane of which some layer makes or reads groups is divided into parts that stay equally wide.

    Args:
        graph: where they are from.
        families: what is on offer.
        made: how many contiguous groups the outputs of some layers are.
        read: the same for inputs.

    Raises:
        InputError: a width is no multiple of the number of groups.
    """
    if not made and not read:
        return list(families)
    found = []
    for family in families:
        sides = graph.sides_of(family.units)
        reads = [graph.is_in_channel_pruning_fn(s.handler) for s in sides]
        entry = made.of(s.node.module for s, r in zip(sides, reads, strict=True) if not r)
        entry = entry or read.of(s.node.module for s, r in zip(sides, reads, strict=True) if r)
        number = 1 if entry is None else entry.value
        if any(len(lane) % number for lane in family.lanes):
            widths = sorted({len(lane) for lane in family.lanes})
            raise InputError(f"channel groups: {number} group(s) do not divide what shrinks together ({widths})")
        lanes = [part for lane in family.lanes for part in lane.reshape(number, -1)]
        found.append(family if number == 1 else replace(family, lanes=tuple(lanes)))
    return found


def initial_widths(graph: DependencyGraph, reads: bool) -> dict[Any, int]:
    """The width of what each layer makes (or reads) when nothing was cut."""
    found: dict[Any, int] = {}
    for side in graph.sides.ordered:
        if isinstance(side.node.module, torch.Tensor) or graph.is_in_channel_pruning_fn(side.handler) is not reads:
            continue
        held, dim = side.dims[0]
        found[side.node.module] = graph.coupling.trace.held[held].shape[dim]
    return found


__all__ = [
    "ByLayer",
    "Entry",
    "HeadShares",
    "by_layer",
    "called",
    "check_count",
    "check_share",
    "counts_of",
    "form",
    "in_groups",
    "initial_widths",
    "makers",
]
