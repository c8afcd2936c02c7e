"""Groups as users know them: items ``(dep, idxs)``, the root first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from prunus.coupling import Coupling
from prunus.errors import InputError
from prunus.functions import (
    PruningFn,
    functions_for,
    is_out_channel_fn,
    prune_parameter_in_channels,
    prune_parameter_out_channels,
)
from prunus.importance import Member, members_of
from prunus.labels import Ids
from prunus.ops import OPTYPE, module2type
from prunus.plan import Plan
from prunus.surgery import Receipt
from prunus.tracing import Trace

if TYPE_CHECKING:
    from prunus.graph import DependencyGraph


class Node(NamedTuple):
    """A layer of the model, or one of its bare parameters."""

    name: str
    module: Any

    @property
    def module_class(self) -> type:
        """The type of the layer."""
        return type(self.module)

    @property
    def type(self) -> OPTYPE:
        """The kind of the layer."""
        return module2type(self.module)

    def details(self) -> str:
        """The name and the layer."""
        return str(self)

    def __str__(self) -> str:
        kind = f"Parameter{tuple(self.module.shape)}" if isinstance(self.module, torch.Tensor) else str(self.module)
        return (
            f"{self.name} ({kind})"
            if len(kind) <= 100 and "\n" not in kind
            else f"{self.name} ({type(self.module).__name__})"
        )


@dataclass(frozen=True)
class Dependency:
    """``trigger`` on ``source`` makes ``handler`` on ``target`` necessary."""

    trigger: PruningFn
    handler: PruningFn
    source: Node
    target: Node

    @property
    def layer(self) -> Any:
        """The layer that is cut."""
        return self.target.module

    @property
    def pruning_fn(self) -> PruningFn:
        """The function that cuts it."""
        return self.handler

    def is_triggered_by(self, pruning_fn: PruningFn) -> bool:
        """Whether a function is what makes this cut necessary."""
        return pruning_fn == self.trigger

    def __str__(self) -> str:
        return f"{self.trigger.__name__} on {self.source} => {self.handler.__name__} on {self.target}"


@dataclass(frozen=True)
class GroupItem:
    """One layer of a group: unpacks into ``(dep, idxs)``; ``root_idxs[k]`` is the place in the root of ``idxs[k]``."""

    dep: Dependency
    idxs: list[int]
    root_idxs: list[int]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dep, self.idxs))

    def __getitem__(self, k: int) -> Any:
        return (self.dep, self.idxs)[k]

    def __len__(self) -> int:
        return 2


class Side(NamedTuple):
    """One side (what it makes, or what it reads) of one layer, with the tensors' dims that belong to it."""

    node: Node
    handler: PruningFn
    dims: tuple[tuple[int, int], ...]


class Sides(NamedTuple):
    """All sides of all layers, in the order of use; by (layer, whether it reads); by tensor dim."""

    ordered: tuple[Side, ...]
    by_layer: Mapping[tuple[int, bool], Side]
    by_dim: Mapping[tuple[int, int], Side]


def _nodes(trace: Trace) -> list[tuple[Node | None, bool]]:
    """For each held tensor its layer, or the tensor itself where it is a bare parameter; and whether it is a layer."""
    layers: dict[str, Node | None] = {}
    found: list[tuple[Node | None, bool]] = []
    for held in trace.held:
        place = held.places[0]
        owner = trace.modules[place.module]
        path = place.layer
        if path not in layers:
            user = trace.modules[path]
            known = path in trace.pruners or functions_for(user) is not None
            layers[path] = Node(path, user) if known else None
        layer = layers[path]
        bare = Node(place.full, getattr(owner, place.name)) if layer is None and place.kind == "parameter" else None
        found.append((layer or bare, layer is not None))
    return found


def find_sides(coupling: Coupling, only: Mapping[int, int] | None = None) -> Sides:
    """Which tensor dims belong to which side of which layer; each dim of a bare parameter is a side of its own.

    ``only``: the one dim that counts of some held tensors.
    """
    only = only or {}
    nodes = _nodes(coupling.trace)
    consumers = coupling.consumers
    dims: dict[tuple[int, bool, int], list[tuple[int, int]]] = {}
    by_id: dict[int, Node] = {}
    reading: dict[int, int] = {}
    first_units = coupling.unit_of_atom[coupling.axis_start].tolist()
    for held, dim, unit in zip(coupling.axis_held.tolist(), coupling.axis_dim.tolist(), first_units, strict=True):
        node, is_layer = nodes[held]
        if node is None or (dim > 1 and is_layer) or only.get(held, dim) != dim:
            continue
        reads = (held, dim) in consumers
        if reads and is_layer and reading.setdefault(id(node.module), unit) != unit:
            continue  # what one part of the layer reads from another
        by_id[id(node.module)] = node
        dims.setdefault((id(node.module), reads, -1 if is_layer else dim), []).append((held, dim))
    ordered, by_layer, by_dim = [], {}, {}
    pairs = {module: _pair(coupling.trace, node) for module, node in by_id.items()}
    for (module, reads, _), found in dims.items():
        node, pair = by_id[module], pairs[module]
        side = Side(node, pair[1] if reads else pair[0], tuple(found))
        ordered.append(side)
        by_layer[module, reads] = side  # of a bare parameter: the last dim, which is the one that its functions cut
        by_dim.update(dict.fromkeys(found, side))
    return Sides(tuple(ordered), by_layer, by_dim)


def _pair(trace: Trace, node: Node) -> tuple[PruningFn, PruningFn]:
    """What cuts the outputs of a layer, and what cuts its inputs."""
    own = trace.pruners.get(node.name)
    if own is not None:
        return own.prune_out_channels, own.prune_in_channels
    return functions_for(node.module) or (prune_parameter_out_channels, prune_parameter_in_channels)


def root_of(graph: DependencyGraph, units: Ids, coupling: Coupling | None = None) -> Side | None:
    """The first layer that makes ``units``; failing that, the first that reads them."""
    sides = graph.sides_of(units, coupling)
    return next((s for s in sides if is_out_channel_fn(s.handler)), sides[0] if sides else None)


class Group:
    """Slices that must go together.

    Iterating gives items ``(dep, idxs)``, the root first; ``print(group)`` shows what triggers what; ``prune()`` cuts.
    ``root`` None: the layer that :func:`root_of` finds.
    """

    def __init__(
        self, graph: DependencyGraph, units: Ids, root: Side | None = None, coupling: Coupling | None = None
    ) -> None:
        self._graph = graph
        self._coupling = coupling or graph.coupling
        self._given_root = root
        self._alive = graph.alive
        self.units = units

    @cached_property
    def root(self) -> Side:
        """The side of a layer that comes first."""
        root = self._given_root or root_of(self._graph, self.units, self._coupling)
        if root is None:
            raise InputError("no layer makes or reads what this group cuts, so it has no items")
        return root

    @property
    def size(self) -> int:
        """The number of units."""
        return len(self.units)

    @cached_property
    def parts(self) -> Sequence[tuple[torch.Tensor, list[Member]]]:
        """Units of one signature: their places in the group, and what they cut."""
        coupling = self._coupling
        alive = None if self._alive is self._graph.dense else self._alive
        kinds = coupling.group_of_unit[self.units]
        found = []
        for k, group in coupling.groups_of(self.units):
            places = np.flatnonzero(kinds == k)
            units = self.units if len(places) == self.size else self.units[places]
            found.append((torch.from_numpy(places), members_of(coupling, alive, group, units)))
        return found

    @cached_property
    def items(self) -> list[GroupItem]:
        """The layers that are cut, the root first, then in the order in which the model uses them."""
        return self._graph._items(self.units, self.root, self._alive)

    def __iter__(self) -> Iterator[GroupItem]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, k: int) -> GroupItem:
        return self.items[k]

    def root_places(self) -> list[int]:
        """For each of ``group[0].idxs`` the place, among the group's units, of the one that it goes with."""
        if self._coupling is self._graph.coupling:
            return self[0].root_idxs
        places: dict[int, int] = {}  # of whole heads, which are few
        for k in range(self.size):
            alone = self._graph._items(self.units[k : k + 1], self.root, self._alive)
            places.update(dict.fromkeys(alone[0].idxs, k) if alone else {})
        return [places.get(position, 0) for position in self[0].idxs]

    def has_pruning_op(self, dep: Dependency, idxs: Sequence[int]) -> bool:
        """Whether the group cuts these positions of that layer."""
        return any(
            d.target.module is dep.target.module and d.handler is dep.handler and i == list(idxs) for d, i in self
        )

    def has_dep(self, dep: Dependency) -> bool:
        """Whether the group cuts that side of that layer."""
        return any(d.target.module is dep.target.module and d.handler is dep.handler for d, _ in self)

    def add_dep(self, dep: Dependency, idxs: Sequence[int]) -> None:
        """Let the group also cut these positions of a layer, with all that goes with them.

        Args:
            dep: from an item of a group; its ``handler`` and ``target`` say which side of which layer.
            idxs: positions of it.

        Raises:
            InputError: there are no such positions, or the group is one of whole heads.
        """
        if self._coupling is not self._graph.coupling:
            raise InputError("a group of whole heads takes in no single positions; prune them as a group of their own")
        more = self._graph.units_at(self._graph._side(dep.target, dep.handler), idxs)
        self.units = np.concatenate((self.units, np.setdiff1d(more, self.units)))
        self.__dict__.pop("items", None)
        self.__dict__.pop("parts", None)

    add_and_merge = add_dep

    def plan(self, idxs: Sequence[int] | None = None) -> Plan:
        """The plan that removes the group (or, of its root, only ``idxs``)."""
        return self._graph._plan(self._chosen(idxs))[0]

    def prune(self, idxs: Sequence[int] | None = None, record_history: bool = True) -> Receipt:
        """Cut every layer of the group at once.

        Args:
            idxs: positions of the root layer to remove, among those of the group (default: all of them).
            record_history: keep the plan in :meth:`DependencyGraph.pruning_history`.

        Raises:
            SurgeryError: a layer would lose its last channel, or a part of the group may not go; nothing was changed.
        """
        return self._graph._prune(self._chosen(idxs), record_history)

    __call__ = prune

    def exec(self) -> Receipt:
        """The old name of :meth:`prune`."""
        return self.prune()

    def _chosen(self, idxs: Sequence[int] | None) -> Ids:
        if idxs is None:
            return self.units
        return self._graph.units_at(self.root, idxs)

    def details(self) -> str:
        """What triggers what, one "A => B" line for each step, ops between the layers included."""
        from prunus.report import describe_group

        return describe_group(self._graph, self)

    def __str__(self) -> str:
        return self.details()
