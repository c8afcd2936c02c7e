"""Surgery: the only code that edits a model.

*Prepare* computes every new tensor and attribute and checks them; nothing is changed yet. *Commit* swaps references
one after another; should one of them fail all the same, those already made are taken back. The receipt can undo
everything, bit for bit, because the old tensors were never written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from prunus.containers import container_swaps
from prunus.errors import InputError, SurgeryError
from prunus.handlers import layer_cuts, tensor_removals
from prunus.held import address, layer_of, own_tensors, submodule
from prunus.mirrors import mirrored
from prunus.plan import Mirror, Plan, Removal, Scaling
from prunus.sizes import attribute_home
from prunus.swapping import put
from prunus.untouched import untouched


class Change(NamedTuple):
    """One reference that is swapped: ``do`` and ``undo`` cannot fail on their own."""

    do: Callable[[], None]
    undo: Callable[[], None]


def data_swap(tensor: torch.Tensor, new: torch.Tensor) -> Change:
    """Let a tensor have other values, in memory of their own; its gradient stays."""
    old = tensor.data
    return Change(lambda: put(tensor, new, tensor.grad), lambda: put(tensor, old, tensor.grad))


@dataclass
class Receipt:
    """What was changed; ``undo()`` puts every bit back."""

    plan: Plan
    changes: list[Change] = field(default_factory=list, repr=False)
    on_undo: Callable[[], None] | None = field(default=None, repr=False)

    def undo(self) -> None:
        """Put the model (and the optimizer's state) back as it was before; a second call does nothing."""
        while self.changes:
            self.changes.pop().undo()
        if self.on_undo is not None:
            self.on_undo()
            self.on_undo = None


def apply(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None = None,
    customized_pruners: Mapping[Any, Any] | None = None,
) -> Receipt:
    """Cut ``model`` in place, all or nothing.

    Parameters keep their identity: optimisers, tied layers and your own references still point at them. Gradients and
    the state of ``optimizer`` (momenta of the parameters' shape) are cut too.

    Args:
        model: the model the plan was made for, or a copy of it.
        plan: what to remove.
        optimizer: an optimiser over the model's parameters.
        customized_pruners: what prunes customised layers (a plan read from a file does not know).

    Raises:
        SurgeryError: the plan does not fit; the model is as it was.
    """
    if optimizer is not None and not hasattr(optimizer, "state"):
        raise InputError(f"optimizer={optimizer!r}: pass a torch.optim.Optimizer over the model's parameters")
    receipt = Receipt(plan)
    places, targets = _places(model), _targets(model, plan)
    changes = _prepare(model, plan, optimizer, targets, places)
    layers = _cut_layers(model, targets, places)
    changes += [Change(cut.do, cut.undo) for cut in layer_cuts(model, plan, customized_pruners or {}, optimizer)]
    drops = [Change(swap.do, swap.undo) for swap in container_swaps(model, plan, optimizer)]
    try:
        for change in changes:
            change.do()
            receipt.changes.append(change)
        for follow in (_recomputed, _mirror_changes):
            for change in follow(model, plan, layers):
                change.do()
                receipt.changes.append(change)
        for change in drops:  # last: until then every module has the name that the plan knows
            change.do()
            receipt.changes.append(change)
    except BaseException as error:
        receipt.undo()
        if isinstance(error, Exception) and not isinstance(error, SurgeryError):
            raise SurgeryError(f"the cut failed and was taken back: {type(error).__name__}: {error}") from error
        raise
    return receipt


class _Spot(NamedTuple):
    """Where a tensor hangs: the path of the module, the module, parameter, buffer or attribute, and the name in it."""

    path: str
    module: nn.Module
    kind: str
    name: str
    tensor: torch.Tensor


_Places: TypeAlias = "dict[int, list[_Spot]]"


def _places(model: nn.Module) -> _Places:
    """Every place of every tensor that the model keeps, by the tensor's identity."""
    found: _Places = {}
    for path, module in model.named_modules():
        for kind, name, tensor in own_tensors(module):
            found.setdefault(id(tensor), []).append(_Spot(path, module, kind, name, tensor))
    return found


class _Target(NamedTuple):
    """A tensor that changes, and how."""

    tensor: torch.Tensor
    removals: list[Removal]
    scalings: list[Scaling]


def _targets(model: nn.Module, plan: Plan) -> list[_Target]:
    """The tensors that change, after checking that the plan fits them."""
    removals: dict[str, list[Removal]] = {}
    for removal in tensor_removals(plan):
        removals.setdefault(removal.tensor, []).append(removal)
    scalings: dict[str, list[Scaling]] = {}
    for scaling in plan.scalings:
        removals.setdefault(scaling.tensor, [])
        scalings.setdefault(scaling.tensor, []).append(scaling)
    modules: dict[str, nn.Module] = {}
    found = []
    for name, own in removals.items():
        path, _, key = name.rpartition(".")
        try:
            module = modules[path] if path in modules else modules.setdefault(path, submodule(model, path))
            tensor = getattr(module, key)
        except AttributeError as error:
            raise SurgeryError(f"the model has no tensor {name}: the plan was made for another model") from error
        _check(tensor, module, name, own)
        found.append(_Target(tensor, own, scalings.get(name, [])))
    return found


@torch.no_grad()
def _prepare(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None,
    targets: Sequence[_Target],
    places: _Places,
) -> list[Change]:
    """Every change, computed and checked, none made."""
    twins = _twins(places)
    kept = _Kept()
    changes: list[Change] = []
    for tensor, removals, scalings in targets:
        cut = _cutter(removals, kept)
        new = cut(_scaled(tensor, scalings))
        for spot in places[id(tensor)]:
            if spot.kind != "parameter":  # that is cut through its data
                fields = spot.module._buffers if spot.kind == "buffer" else vars(spot.module)
                changes.append(_swap_key(fields, spot.name, new))
        for twin in twins.get(address(tensor), ()) if isinstance(tensor, nn.Parameter) else ():
            if twin is tensor or (twin.shape == tensor.shape and twin.stride() == tensor.stride()):
                changes.append(_swap_data(twin, new, cut))
                if optimizer is not None:
                    changes += _swap_state(optimizer, twin, cut)
    return changes + _swap_settings(model, plan)


def _swap_settings(model: nn.Module, plan: Plan) -> list[Change]:
    """The attributes that change."""
    changes = []
    for setting in plan.settings:
        try:
            home, key = attribute_home(model, setting.attribute)
        except AttributeError as error:
            raise SurgeryError(f"the model has no {setting.attribute}: the plan was made for another model") from error
        if setting.index is None:
            changes.append(_swap_key(home, key, setting.value))
        elif isinstance(home.get(key), (list, tuple)):
            changes.append(_swap_item(home, key, setting.index, setting.value))
        else:
            raise SurgeryError(f"{setting.attribute} is no list or tuple in this model")
    return changes


def _twins(places: _Places) -> dict[int, list[nn.Parameter]]:
    """The parameters by where their memory begins: those of one shape over the same memory are one tensor."""
    found: dict[int, list[nn.Parameter]] = {}
    for first, *_ in places.values():
        if isinstance(first.tensor, nn.Parameter):
            found.setdefault(address(first.tensor), []).append(first.tensor)
    return found


def _check(tensor: Any, module: nn.Module, name: str, removals: Sequence[Removal]) -> None:
    """Refuse a tensor that the plan does not fit."""
    if not isinstance(tensor, torch.Tensor):
        raise SurgeryError(f"{name} is no tensor in this model: the plan was made for another model")
    if "parametrizations" in module._modules and parametrize.is_parametrized(module, name.rpartition(".")[2]):
        raise SurgeryError(f"{name} is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first")
    if tensor.is_quantized or tensor.layout != torch.strided:
        raise SurgeryError(f"{name} is quantised or sparse; prune the float model before you convert it")
    shape = tensor.shape
    for removal in removals:
        if removal.dim >= len(shape) or shape[removal.dim] != removal.size:
            raise SurgeryError(
                f"{name} has shape {tuple(shape)}, the plan needs {removal.size} along dim {removal.dim}: "
                "the model was changed since the graph was built; build the graph again"
            )


def _scaled(tensor: torch.Tensor, scalings: Sequence[Scaling]) -> torch.Tensor:
    """The tensor with some positions multiplied, to make up for numbers that are computed from sizes."""
    for scaling in scalings:
        places = (*scaling.positions, *scaling.onto) or (0,)
        if scaling.dim >= tensor.dim() or not 0 <= min(places) <= max(places) < tensor.shape[scaling.dim]:
            raise SurgeryError(f"{scaling.tensor} dim {scaling.dim}: the plan scales positions that do not exist")
        if scaling.onto:
            source, onto = (torch.tensor(found, device=tensor.device) for found in (scaling.positions, scaling.onto))
            read = tensor.detach().index_select(scaling.dim, source)
            tensor = tensor.detach().index_add(scaling.dim, onto, read, alpha=scaling.factor)
            continue
        factor = torch.ones(tensor.shape[scaling.dim], dtype=torch.float64)
        factor[list(scaling.positions)] = scaling.factor
        shape = [-1 if d == scaling.dim else 1 for d in range(tensor.dim())]
        tensor = tensor.detach() * factor.to(tensor.device, tensor.dtype).view(shape)
    return tensor


class _Kept:
    """The positions that stay, as an index; dims that shrink together share it."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}

    def of(self, removal: Removal) -> torch.Tensor:
        """The index of what stays along a dim."""
        key = removal.size, removal.positions
        found = self._found.get(key)
        if found is None:
            _check_positions(removal)
            found = torch.from_numpy(np.delete(np.arange(removal.size), removal.positions))
            self._found[key] = found
        return found


def _check_positions(removal: Removal) -> None:
    """Refuse positions that do not exist, and to remove all of them."""
    spot = f"{removal.tensor} dim {removal.dim}"
    if removal.positions and not 0 <= min(removal.positions) <= max(removal.positions) < removal.size:
        raise SurgeryError(f"{spot}: the plan names positions that do not exist")
    if len(set(removal.positions)) >= removal.size:
        raise SurgeryError(f"{spot} would lose its last position")


def _cutter(removals: Sequence[Removal], kept: _Kept) -> Callable[[torch.Tensor], torch.Tensor]:
    """What keeps the surviving positions of a tensor of that shape."""
    stay = [(removal.dim, kept.of(removal)) for removal in removals]

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        out = tensor.detach()
        for dim, index in stay:
            out = out.index_select(dim, index.to(tensor.device))
        if tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
            return out.contiguous(memory_format=torch.channels_last)
        return out.contiguous()

    return cut


def _swap_key(fields: dict[str, Any], key: str, new: Any) -> Change:
    missing = key not in fields
    old = fields.get(key)

    def undo() -> None:
        if missing:
            fields.pop(key, None)
        else:
            fields[key] = old

    return Change(lambda: fields.__setitem__(key, new), undo)


def _swap_item(fields: dict[str, Any], key: str, index: int, value: int) -> Change:
    """One entry of a list or tuple; the container is replaced, so several entries can change one after another."""
    before: list[Any] = []

    def do() -> None:
        old = fields[key]
        before.append(old)
        fields[key] = type(old)([*old[:index], value, *old[index + 1 :]])

    return Change(do, lambda: fields.__setitem__(key, before.pop()))


def _swap_data(parameter: nn.Parameter, new: torch.Tensor, cut: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    old, old_grad = parameter.data, parameter.grad
    grad = cut(old_grad) if old_grad is not None else None
    return Change(lambda: put(parameter, new, grad), lambda: put(parameter, old, old_grad))


def _swap_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, cut: Callable[[torch.Tensor], torch.Tensor]
) -> list[Change]:
    """Momenta and the like: every tensor of the parameter's shape in its state."""
    state = optimizer.state.get(parameter, {})
    fits = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == parameter.shape}
    return [_swap_key(state, key, cut(value)) for key, value in fits.items()]


def _cut_layers(model: nn.Module, targets: Sequence[_Target], places: _Places) -> dict[str, nn.Module]:
    """The layers that use a tensor which changes, by path."""
    found: dict[str, nn.Module] = {}
    for target in targets:
        for path, module, kind, *_ in places[id(target.tensor)]:
            if kind != "attribute" and path not in found:
                layer = layer_of(path)
                found[layer] = module if layer == path else submodule(model, layer)
    return found


def _recomputed(model: nn.Module, plan: Plan, layers: Mapping[str, nn.Module]) -> list[Change]:
    """Weights that a hook computes before each forward, of the (already cut) tensors."""
    changes = []
    for module in layers.values():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                iterate = {"do_power_iteration": False} if isinstance(hook, SpectralNorm) else {}
                with torch.no_grad():
                    changes.append(_swap_key(module.__dict__, hook.name, hook.compute_weight(module, **iterate)))
    return changes


def _mirror_changes(model: nn.Module, plan: Plan, layers: Mapping[str, nn.Module]) -> list[Change]:
    """Attributes that repeat a width of the (already cut) tensors."""
    changes = [_mirror(model, mirror) for mirror in plan.mirrors]
    others = {path: submodule(model, path) for s in plan.settings if (path := s.path) not in layers}
    for path, module in (*layers.items(), *others.items()):
        if "parametrizations" in module._modules:  # reading may change what it is computed from
            with untouched(module):
                sizes = mirrored(module)
        else:
            sizes = mirrored(module)
        fields = module.__dict__
        changes += [_swap_key(fields, key, value) for key, value in sizes.items() if fields.get(key, value) != value]
        parent, _, child = path.rpartition(".")
        if child == "out_proj" and isinstance(attention := submodule(model, parent), nn.MultiheadAttention):
            changes += [_swap_key(attention.__dict__, k, v) for k, v in mirrored(attention).items()]
    return changes


def _attribute(model: nn.Module, name: str) -> Any:
    path, _, key = name.rpartition(".")
    return getattr(submodule(model, path), key)


def _mirror(model: nn.Module, mirror: Mirror) -> Change:
    tensor = _attribute(model, mirror.tensor)
    size = int(tensor.shape[mirror.dim])
    if size % mirror.divide:
        raise SurgeryError(f"{mirror.tensor} dim {mirror.dim} has size {size}, not a multiple of {mirror.divide}")
    return _swap_key(submodule(model, mirror.path).__dict__, mirror.name, size // mirror.divide)


@contextmanager
def borrowed(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let the model run with other values (of the same shapes) in some of its tensors; then put its own back."""
    own: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for name, values in tensors.items():
            path, _, key = name.rpartition(".")
            tensor = getattr(submodule(model, path), key)
            own.append((tensor, tensor.data))
            tensor.data = values
        yield
    finally:
        for tensor, data in own:
            tensor.data = data
