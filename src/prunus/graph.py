"""The dependency graph as users of structured pruning know it: groups by hand, all groups, pruning a group.

A thin face over the engine: the graph holds what tracing and coupling found and which atoms are still there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.conv import _ConvNd

from prunus.coupling import Coupling, Family, couple
from prunus.coupling.explain import explain, why_not
from prunus.coupling.pieces import runs_of
from prunus.errors import InputError, SurgeryError
from prunus.familiar import Familiar, joined
from prunus.functions import (
    PruningFn,
    functions_for,
    is_in_channel_fn,
    is_out_channel_fn,
    prune_parameter_in_channels,
    prune_parameter_out_channels,
)
from prunus.group import Dependency, Group, GroupItem, Node, Side, Sides, find_sides
from prunus.hints import apply_hints, chosen_layers
from prunus.history import replay
from prunus.importance import current_positions
from prunus.labels import Ids
from prunus.plan import Alive, Plan, everything_alive, make_plan
from prunus.sizes import Fact
from prunus.surgery import Receipt, apply
from prunus.tracing import ForwardFn, Inputs, trace


def _lacking(family: Family, living: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> list[Ids]:
    """What each lane of a family must lose besides what is ``chosen``, so that all lose the same share, by position."""
    lanes, quotas = family.left(living)
    need = max((-(-int(np.count_nonzero(chosen[v])) // q) for v, q in zip(lanes, quotas, strict=True)), default=0)
    if all(need * q >= len(lane) for lane, q in zip(lanes, quotas, strict=True)):
        return [lane[~chosen[lane]] for lane in lanes]
    begun = np.unique(np.concatenate([np.flatnonzero(chosen[v]) // q for v, q in zip(lanes, quotas, strict=True)]))
    found = []
    for lane, quota in zip(lanes, quotas, strict=True):
        near = (begun[:, None] * quota + np.arange(quota)).reshape(-1)
        order = np.concatenate((np.flatnonzero(chosen[lane]), near[near < len(lane)], np.arange(len(lane))))
        _, first = np.unique(order, return_index=True)
        picked = lane[order[np.sort(first)]][: need * quota]
        found.append(picked[~chosen[picked]])
    return found


P = ParamSpec("P")
T = TypeVar("T")


def collecting_seldom(function: Callable[P, T]) -> Callable[P, T]:
    """What the function finds is many small tuples that stay: Python's collector would look at them again and again."""

    @wraps(function)
    def seldom(*args: P.args, **kwargs: P.kwargs) -> T:
        before = gc.get_threshold()
        gc.set_threshold(max(SELDOM, before[0]) if before[0] else 0, *before[1:])
        try:
            return function(*args, **kwargs)
        finally:
            gc.set_threshold(*before)

    return seldom


SELDOM = 50_000  # new objects between two looks of Python's collector meanwhile
ROOT_TYPES: tuple[type, ...] = (_ConvNd, nn.Linear)


class DependencyGraph(Familiar):
    """Finds, for any network, which slices of which layers must be removed together.

    Example:
        >>> import torch, prunus as tp
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> DG = tp.DependencyGraph().build_dependency(model, example_inputs=torch.randn(1, 3, 8, 8))
        >>> group = DG.get_pruning_group(model[0], tp.prune_conv_out_channels, idxs=[2, 6])
        >>> DG.check_pruning_group(group)
        True
        >>> receipt = group.prune()
        >>> model[0].out_channels, model[3].in_channels
        (6, 6)
    """

    def __init__(self) -> None:
        self._coupling: Coupling | None = None
        self._sides: Sides | None = None
        self._alive: Alive | None = None
        self.dense: Alive | None = None  # the atoms as long as nothing is cut
        self._history: list[Plan] = []
        self._pruners: dict[Any, Any] = {}
        self._only: dict[int, int] = {}
        self.facts: tuple[Fact, ...] = ()

    @collecting_seldom
    def build_dependency(  # noqa: PLR0913, PLR0917 - the signature that users know
        self,
        model: nn.Module,
        example_inputs: Inputs,
        forward_fn: ForwardFn | None = None,
        output_transform: Callable[[Any], Any] | None = None,
        unwrapped_parameters: Any = None,
        customized_pruners: Any = None,
        ignored_layers: Sequence[Any] = (),
        ignored_params: Sequence[Any] = (),
        verbose: bool = True,
        *,
        device: str | torch.device | None = None,
    ) -> DependencyGraph:
        """Trace the model and find all its groups.

        Args:
            model: any module; gradients are not needed, and it is left as it came.
            example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
            forward_fn: ``forward_fn(model, example_inputs)`` to use instead of calling the model.
            output_transform: picks from the output what must keep its sizes.
            unwrapped_parameters: pairs (parameter, dim), or a dict: of such a parameter only that dim may shrink. Bare
                parameters are found by themselves without it.
            customized_pruners: a dict from modules, names or types to a :class:`~prunus.BasePruningFunc` each; these
                layers are not looked into. See also :meth:`register_customized_layer`.
            ignored_layers: modules whose output widths must stay, also as names, name patterns ("backbone.*") or types;
                parameters and :func:`prunus.freeze` hints too.
            ignored_params: parameters (or names of some, or hints) that must stay as they are.
            verbose: accepted for old scripts.
            device: "meta" to trace without data or copies, for models too big to run (models on meta always are).

        Raises:
            InputError: the model cannot run on the inputs, or an ignored layer is not part of it.
        """
        self._customized = pruners = joined(self._pruners, customized_pruners)
        self.ignored_params, self.verbose = tuple(ignored_params or ()), verbose
        whole = getattr(model, "_orig_mod", model)
        found = trace(whole, example_inputs, forward_fn, output_transform, device, pruners)
        self._only = apply_hints(found, tuple(ignored_layers or ()), tuple(ignored_params or ()), unwrapped_parameters)
        self._coupling, self._sides = couple(found), None
        self._alive = self.dense = everything_alive(self._coupling)
        self._history = []
        return self

    def register_customized_layer(self, layer_type_or_instance: Any, layer_pruner: Any) -> None:
        """Say how a layer that tracing cannot or should not look into is pruned; call it before build_dependency.

        Args:
            layer_type_or_instance: a module of the model, its name or name pattern, or a type of modules.
            layer_pruner: an instance of a :class:`~prunus.BasePruningFunc` with the four methods.
        """
        self._pruners[layer_type_or_instance] = layer_pruner

    def get_pruner_of_module(self, module: nn.Module) -> Any:
        """The customised pruner of a layer, or the pair of functions that prune its outputs and its inputs."""
        paths = [path for path, m in self.coupling.trace.modules.items() if m is module]
        found = next((p for path, p in self.coupling.trace.pruners.items() if path in paths), None)
        return functions_for(module) if found is None else found

    @property
    def coupling(self) -> Coupling:
        """What the engine found."""
        if self._coupling is None:
            raise InputError("the graph is empty: call build_dependency(model, example_inputs) first")
        return self._coupling

    @property
    def alive(self) -> Alive:
        """Which atoms were not cut yet."""
        if self._alive is None:
            raise InputError("the graph is empty: call build_dependency(model, example_inputs) first")
        return self._alive

    @property
    def model(self) -> nn.Module:
        """The traced model."""
        return self.coupling.trace.model

    @property
    def unsupported(self) -> dict[str, tuple[str, ...]]:
        """Ops without a rule (what flows into them is frozen), and the modules in which they ran."""
        return dict(self.coupling.trace.unsupported)

    # -- sides of layers ------------------------------------------------------------------------------------------

    @property
    def sides(self) -> Sides:
        """The layers as the graph sees them."""
        if self._sides is None:
            self._sides = find_sides(self.coupling, self._only)
        return self._sides

    @property
    def module2node(self) -> dict[Any, Node]:
        """The layers that the graph sees, each with its node."""
        return {side.node.module: side.node for side in self.sides.ordered}

    def sides_of(self, units: Ids, coupling: Coupling | None = None) -> list[Side]:
        """The sides of layers that ``units`` cut, in the order in which the model uses them."""
        coupling = coupling or self.coupling
        by_dim = self.sides.by_dim
        slices = (s for _, group in coupling.groups_of(units) for s in group.slices)
        return [side for s in slices if (side := by_dim.get((s.held, s.dim))) is not None]

    def _side(self, module: Any, fn: Callable[..., Any]) -> Side:
        """The side of ``module`` that ``fn`` cuts."""
        module = module.module if isinstance(module, Node) else module
        reads = is_in_channel_fn(fn)
        if not reads and not is_out_channel_fn(fn):
            raise InputError(f"{fn!r} is no pruning function; pass one of prunus.prune_*_out_channels / _in_channels")
        by_layer = self.sides.by_layer
        side = by_layer.get((id(module), reads)) or by_layer.get((id(module), False))
        if side is None:
            inside = any(m is module for m in self.model.modules())
            why = "was not used while tracing" if inside else "is not part of the model that the graph was built for"
            raise InputError(f"{type(module).__name__} {why}; pass a layer that runs on the example inputs")
        return side

    # -- groups ---------------------------------------------------------------------------------------------------

    def _living(self, side: Side) -> tuple[Ids, Ids]:
        """Atoms along a side that were not cut, and their units (positions are as the layer is now)."""
        held, dim = side.dims[0]
        start = self.coupling.trace.held[held].starts[dim]
        atoms = start + np.arange(self.coupling.trace.held[held].shape[dim])
        atoms = atoms[self.alive[atoms]]
        return atoms, self.coupling.unit_of_atom[atoms]

    def get_pruning_group(self, module: Any, pruning_fn: PruningFn, idxs: Sequence[int] | torch.Tensor) -> Group:
        """Everything that must go when positions ``idxs`` of a layer go.

        Args:
            module: a layer of the model (or a bare parameter).
            pruning_fn: which side of it, as one of the ``prune_*_out_channels`` or ``prune_*_in_channels`` functions.
            idxs: positions, as the layer is now.

        Raises:
            InputError: the layer is not part of the traced model, or an index is out of range.
        """
        side = self._side(module, pruning_fn)
        return Group(self, self.units_at(side, idxs), side)

    def units_at(self, side: Side, idxs: Sequence[int] | torch.Tensor) -> Ids:
        """The units that go when positions ``idxs`` of a side go."""
        wanted: list[Any] = idxs.tolist() if isinstance(idxs, torch.Tensor) else list(idxs)
        _, units = self._living(side)
        outside = [i for i in wanted if not isinstance(i, (int, np.integer)) or not 0 <= i < len(units)]
        if outside:
            raise InputError(f"{side.node.name} has {len(units)} positions there; {outside[:8]} do not exist")
        if not wanted:
            raise InputError(f"no positions of {side.node.name} were given")
        return self._balanced(units[wanted])

    def _balanced(self, units: Ids) -> Ids:
        """``units`` and their partners: every lane of a family loses the same share, by position."""
        coupling = self.coupling
        if not (units[1:] > units[:-1]).all():
            _, first = np.unique(units, return_index=True)
            units = units[np.sort(first)]
        touched = set(coupling.family_of_unit[units].tolist())
        chosen = np.zeros(coupling.units.total, dtype=bool)
        chosen[units] = True
        families = [f for k in sorted(touched) if k >= 0 and len((f := coupling.families[k]).lanes) > 1]
        families = [f for f in families if not chosen[f.units].all()]
        if not families:
            return units
        living = coupling.alive_units(self.alive)
        return np.concatenate([units, *(extra for family in families for extra in _lacking(family, living, chosen))])

    def get_all_groups(
        self, ignored_layers: Sequence[Any] = (), root_module_types: Sequence[type] = ROOT_TYPES
    ) -> Iterator[Group]:
        """Each group that may be pruned, once, with its full index list, in the order in which the model runs.

        The groups may be pruned while iterating.

        Args:
            ignored_layers: modules (or names, patterns, types, parameters) whose outputs must stay; groups that would
                cut them are left out.
            root_module_types: layers that may be the root of a group.
        """
        ignored, others = chosen_layers(self.model, tuple(ignored_layers or ()), "ignored_layers")
        ignored |= {id(tensor) for tensor in others}
        visited = np.zeros(self.coupling.units.total, dtype=bool)
        movable = self.coupling.movable
        for side in self.sides.ordered:
            if is_in_channel_fn(side.handler):
                continue
            if not isinstance(side.node.module, tuple(root_module_types)) or id(side.node.module) in ignored:
                continue
            _, units = self._living(side)
            units = units[movable[units] & ~visited[units]]
            if units.size == 0:
                continue
            group = Group(self, self._balanced(units), side)
            visited[group.units] = True
            if ignored and any(id(d.target.module) in ignored and is_out_channel_fn(d.handler) for d, _ in group):
                continue
            yield group

    def check_pruning_group(self, group: Group) -> bool:
        """False if a layer would lose its last position, or if a part of the group may not go."""
        try:
            self._plan(group.units)
        except SurgeryError:
            return False
        return True

    def _items(self, units: Ids, root: Side, alive: Alive) -> list[GroupItem]:
        coupling = self.coupling
        gone = coupling.atoms_of(units)
        gone = gone[alive[gone]]
        ranks = np.argsort(units, kind="stable")
        by_dim = self.sides.by_dim
        order: dict[int, tuple[Side, list[int], list[int]]] = {}
        axis = np.searchsorted(coupling.axis_start, gone, side="right") - 1
        for k, atoms in runs_of(axis[axis >= 0], gone[axis >= 0]):
            held, dim = int(coupling.axis_held[k]), int(coupling.axis_dim[k])
            side = by_dim.get((held, dim))
            here = atoms - coupling.axis_start[k]
            here = here[here < coupling.trace.held[held].shape[dim]]
            if side is None or here.size == 0 or (id(side) in order and order[id(side)][0] is side):
                continue
            cut = coupling.unit_of_atom[here + coupling.axis_start[k]]
            spot = ranks[np.searchsorted(units, cut, sorter=ranks).clip(max=units.size - 1)]
            roots = np.where(units[spot] == cut, spot, 0).tolist()
            now = current_positions(coupling.trace.held[held], dim, alive, here).tolist()
            order[id(side)] = (side, now, roots)
        first = order.pop(id(root), None)
        found = [first] if first is not None else []
        found += order.values()
        return [
            GroupItem(Dependency(root.handler, side.handler, root.node, side.node), now, roots)
            for side, now, roots in found
        ]

    # -- pruning --------------------------------------------------------------------------------------------------

    def _plan(self, units: Ids) -> tuple[Plan, Alive]:
        stuck = ~self.coupling.movable[units]
        if stuck.any() and not self.coupling.by_rows.movable[units[stuck]].all():
            raise SurgeryError(f"a part of this group may not go: {why_not(self.coupling, int(units[stuck][0]))}")
        return make_plan(self.coupling, self.alive, units, self.facts)

    def _prune(self, units: Ids, record_history: bool = True, optimizer: Any = None) -> Receipt:
        return self._apply(*self._plan(units), record_history, optimizer)

    def _apply(self, plan: Plan, after: Alive, record_history: bool = True, optimizer: Any = None) -> Receipt:
        before = self.alive
        receipt = apply(self.model, plan, optimizer)
        self._alive = after
        if record_history:
            self._history.append(plan)
        receipt.on_undo = lambda: self._restore(before, plan)
        return receipt

    def _restore(self, alive: Alive, plan: Plan) -> None:
        self._alive = alive
        self._history = [p for p in self._history if p is not plan]

    def pruning_history(self) -> list[Plan]:
        """The plans that were applied, in order."""
        return list(self._history)

    def load_pruning_history(self, pruning_history: Iterable[Any]) -> None:
        """Cut as before, all or nothing.

        Args:
            pruning_history: what :meth:`pruning_history` gave, JSON texts of it, or triples ``[layer, is output,
                positions]``.

        Raises:
            InputError: an entry cannot be read; nothing was changed.
            SurgeryError: an entry does not fit; the model is as it was.
        """
        replay(self, pruning_history)

    def get_out_channels(self, module_or_node: Any) -> int:
        """The present width of what a layer makes (hidden units of a recurrent layer, not its gates)."""
        layer = getattr(module_or_node, "module", module_or_node)
        if isinstance(layer, nn.RNNBase):
            return layer.hidden_size
        return len(self._living(self._side(module_or_node, prune_parameter_out_channels))[0])

    def get_in_channels(self, module_or_node: Any) -> int:
        """The present width of what a layer reads."""
        return len(self._living(self._side(module_or_node, prune_parameter_in_channels))[0])

    def explain(self, layer: nn.Module | str) -> str:
        """For every dim of a layer: which group it is in and through which ops, or why it has to stay."""
        return explain(self.coupling, layer)
