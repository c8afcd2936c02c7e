"""Cuts that a user's own functions make, inside the transaction of surgery: all or nothing, and undone bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from prunus.errors import InputError, SurgeryError
from prunus.held import CHANNELS, submodule
from prunus.opaque import find_customized
from prunus.plan import Plan, Removal
from prunus.swapping import put


def tensor_removals(plan: Plan) -> list[Removal]:
    """The removals that surgery makes itself."""
    return [r for r in plan.removals if not r.tensor.endswith(CHANNELS)]


def layer_cuts(
    model: nn.Module, plan: Plan, pruners: Mapping[Any, Any], optimizer: torch.optim.Optimizer | None
) -> list[LayerCut]:
    """The cuts of customised layers, checked but not made.

    Raises:
        SurgeryError: nobody knows how such a layer is pruned, or it is not as the plan needs it.
    """
    by_layer: dict[str, list[Removal]] = {}
    for removal in plan.removals:
        if removal.tensor.endswith(CHANNELS):
            by_layer.setdefault(removal.tensor.rpartition(".")[0], []).append(removal)
    if not by_layer:
        return []
    given = {layer.path: layer.pruner for layer in find_customized(model, pruners)}
    found = []
    for path, removals in by_layer.items():
        pruner = given.get(path, plan.pruners.get(path))
        if pruner is None:
            raise SurgeryError(
                f"the plan cuts the customised layer {path}, and a plan read from a file does not know how: "
                "pass plan.apply(model, customized_pruners={...})"
            )
        try:
            layer = submodule(model, path)
        except AttributeError as error:
            raise SurgeryError(f"the model has no layer {path}: the plan was made for another model") from error
        found.append(LayerCut(path, layer, pruner, removals, optimizer))
    return found


class LayerCut:
    """The cut of one customised layer: both of its sides at once."""

    def __init__(
        self,
        path: str,
        layer: nn.Module,
        pruner: Any,
        removals: Sequence[Removal],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self.path, self.layer, self.pruner, self.removals, self.optimizer = path, layer, pruner, removals, optimizer
        self._before: _Snapshot | None = None
        for removal in removals:
            self._check(removal, removal.size)

    def _check(self, removal: Removal, size: int) -> None:
        side = ("out", "in")[removal.dim]
        now = getattr(self.pruner, f"get_{side}_channels")(self.layer)
        if now is not None and now != size:
            raise SurgeryError(
                f"{self.path} ({type(self.layer).__name__}): get_{side}_channels says {now} where {size} are expected"
            )

    def do(self) -> None:
        """Let the user's functions cut; whatever they raise, the layer is as it was."""
        self._before = _Snapshot(self.layer, self.optimizer)
        try:
            for removal in self.removals:
                self._cut(removal)
            self._before.follow()
        except BaseException:
            self.undo()
            raise

    def _cut(self, removal: Removal) -> None:
        positions, out = sorted(removal.positions), removal.dim == 0
        if hasattr(self.pruner, "check"):
            try:
                self.pruner.check(self.layer, positions, out)
            except InputError as error:
                raise SurgeryError(str(error)) from error
        with torch.no_grad():
            prune = self.pruner.prune_out_channels if out else self.pruner.prune_in_channels
            returned = prune(self.layer, positions)
        if isinstance(returned, nn.Module) and returned is not self.layer:
            raise SurgeryError(
                f"{type(self.pruner).__name__} made a new layer for {self.path}; it must cut it in place"
            )
        self._check(removal, removal.size - len(positions))

    def undo(self) -> None:
        """Put the layer back."""
        if self._before is not None:
            self._before.restore()
            self._before = None


class _Snapshot:
    """All that a module and its submodules are, values included, and their parameters' part in an optimiser."""

    def __init__(self, layer: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self._layer = layer
        self._fields = [(vars(m), dict(vars(m))) for m in layer.modules()]
        held = [value for _, fields in self._fields for value in fields.values()]
        self._containers = [(v, v.copy()) for v in held if isinstance(v, (dict, list, set))]
        inside = [v for c, _ in self._containers for v in (c.values() if isinstance(c, dict) else c)]
        tensors = {id(t): t for t in (*held, *inside) if isinstance(t, torch.Tensor)}.values()
        self._tensors = [(t, t.data, t.data.clone(), t.grad) for t in tensors]
        self._parameters = dict(layer.named_parameters())
        self._shapes = {name: p.shape for name, p in self._parameters.items()}
        self._optimizer = optimizer
        self._state: list[tuple[nn.Parameter, Any]] = []
        self._groups: list[tuple[dict[str, Any], list[Any]]] = []

    def follow(self) -> None:
        """Let the optimiser hold the parameters that are there now; the state of those that changed starts anew."""
        if self._optimizer is None:
            return
        now = dict(self._layer.named_parameters())
        changed = {
            id(old): now.get(name)
            for name, old in self._parameters.items()
            if now.get(name) is not old or old.shape != self._shapes[name]
        }
        for parameter in self._parameters.values():
            if id(parameter) in changed and parameter in self._optimizer.state:
                self._state.append((parameter, self._optimizer.state.pop(parameter)))
        for group in self._optimizer.param_groups:
            self._groups.append((group, group["params"]))
            renewed = [changed.get(id(p), p) for p in group["params"]]
            group["params"] = [p for p in renewed if p is not None]

    def restore(self) -> None:
        """Put every bit back."""
        for fields, before in self._fields:
            fields.clear()
            fields.update(before)
        for container, contents in self._containers:
            container.clear()
            container.extend(contents) if isinstance(container, list) else container.update(contents)
        for tensor, data, values, grad in self._tensors:
            data.copy_(values)
            put(tensor, data, grad)
        for group, params in self._groups:
            group["params"] = params
        if self._optimizer is not None:
            self._optimizer.state.update(self._state)
