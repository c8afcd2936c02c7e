"""Surgery: the only code that edits a model.

*Prepare* computes every new tensor and attribute and checks them; nothing is changed yet. *Commit* swaps references
one after another; should one of them fail all the same, those already made are taken back. The receipt can undo
everything, bit for bit, because the old tensors were never written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from prunus.containers import container_swaps
from prunus.errors import SurgeryError
from prunus.handlers import layer_cuts, tensor_removals
from prunus.held import layer_of, submodule
from prunus.plan import Mirror, Plan, Removal, Scaling
from prunus.sizes import attribute_home
from prunus.untouched import untouched


@dataclass(frozen=True)
class Change:
    """One reference that is swapped: ``do`` and ``undo`` cannot fail on their own."""

    do: Callable[[], None]
    undo: Callable[[], None]


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
    receipt = Receipt(plan)
    changes = _prepare(model, plan, optimizer)
    changes += [Change(cut.do, cut.undo) for cut in layer_cuts(model, plan, customized_pruners or {}, optimizer)]
    drops = [Change(swap.do, swap.undo) for swap in container_swaps(model, plan, optimizer)]
    try:
        for change in changes:
            change.do()
            receipt.changes.append(change)
        for follow in (_recomputed, _mirror_changes):
            for change in follow(model, plan):
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


def _prepare(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None) -> list[Change]:
    """Every change, computed and checked, none made."""
    by_tensor: dict[str, list[Removal]] = {}
    for removal in tensor_removals(plan):
        by_tensor.setdefault(removal.tensor, []).append(removal)
    scalings: dict[str, list[Scaling]] = {}
    for scaling in plan.scalings:
        by_tensor.setdefault(scaling.tensor, [])
        scalings.setdefault(scaling.tensor, []).append(scaling)
    aliases = _aliases(model)
    twins: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        twins.setdefault(_memory(parameter), []).append(parameter)
    changes: list[Change] = []
    for name, removals in by_tensor.items():
        tensor = _tensor(model, name, removals)
        cut = _cutter(removals)
        with torch.no_grad():
            new = cut(_scaled(tensor, scalings.get(name, ())))
        for module, key in aliases[id(tensor)]:
            changes.append(_swap_tensor(module, key, new))
        for twin in twins.get(_memory(tensor), ()) if isinstance(tensor, nn.Parameter) else ():
            changes += _swap_data(twin, new, cut)
            if optimizer is not None:
                changes += _swap_state(optimizer, twin, cut)
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


def _aliases(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place (module, name) of every tensor that the model keeps, by the tensor's identity."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for fields in (module._parameters, module._buffers, module.__dict__):
            for key, tensor in fields.items():
                if isinstance(tensor, torch.Tensor):
                    found.setdefault(id(tensor), []).append((module, key))
    return found


def _memory(tensor: torch.Tensor) -> Any:
    """Equal for parameters over the same memory, which are one tensor by two names."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _tensor(model: nn.Module, name: str, removals: list[Removal]) -> torch.Tensor:
    """The tensor of that name, after checking that the plan fits it."""
    path, _, key = name.rpartition(".")
    try:
        module = submodule(model, path)
        tensor = getattr(module, key)
    except AttributeError as error:
        raise SurgeryError(f"the model has no tensor {name}: the plan was made for another model") from error
    if not isinstance(tensor, torch.Tensor):
        raise SurgeryError(f"{name} is no tensor in this model: the plan was made for another model")
    if parametrize.is_parametrized(module, key):
        raise SurgeryError(f"{name} is parametrised; call torch.nn.utils.parametrize.remove_parametrizations first")
    if tensor.is_quantized or tensor.layout != torch.strided:
        raise SurgeryError(f"{name} is quantised or sparse; prune the float model before you convert it")
    for removal in removals:
        if removal.dim >= tensor.dim() or tensor.shape[removal.dim] != removal.size:
            raise SurgeryError(
                f"{name} has shape {tuple(tensor.shape)}, the plan needs {removal.size} along dim {removal.dim}: "
                "the model was changed since the graph was built; build the graph again"
            )
        if removal.positions and not 0 <= min(removal.positions) <= max(removal.positions) < removal.size:
            raise SurgeryError(f"{name} dim {removal.dim}: the plan names positions that do not exist")
        if len(set(removal.positions)) >= removal.size:
            raise SurgeryError(f"{name} dim {removal.dim} would lose its last position")
    return tensor


def _scaled(tensor: torch.Tensor, scalings: Sequence[Scaling]) -> torch.Tensor:
    """The tensor with some positions multiplied, to make up for numbers that are computed from sizes."""
    for scaling in scalings:
        places = scaling.positions or (0,)
        if scaling.dim >= tensor.dim() or not 0 <= min(places) <= max(places) < tensor.shape[scaling.dim]:
            raise SurgeryError(f"{scaling.tensor} dim {scaling.dim}: the plan scales positions that do not exist")
        factor = torch.ones(tensor.shape[scaling.dim], dtype=torch.float64)
        factor[list(scaling.positions)] = scaling.factor
        shape = [-1 if d == scaling.dim else 1 for d in range(tensor.dim())]
        tensor = tensor.detach() * factor.to(tensor.device, tensor.dtype).view(shape)
    return tensor


def _cutter(removals: list[Removal]) -> Callable[[torch.Tensor], torch.Tensor]:
    """What keeps the surviving positions of a tensor of that shape."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        out = tensor.detach()
        for removal in removals:
            keep = np.ones(removal.size, dtype=bool)
            keep[np.array(removal.positions, dtype=np.int64)] = False
            out = out.index_select(removal.dim, torch.from_numpy(np.flatnonzero(keep)).to(tensor.device))
        if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
            return out.contiguous(memory_format=torch.channels_last)
        return out.contiguous()

    return cut


def _swap_tensor(module: nn.Module, key: str, new: torch.Tensor) -> Change:
    """A buffer or a plain attribute; a parameter is cut through its data."""
    fields = module._buffers if key in module._buffers else module.__dict__
    if key in module._parameters:
        return Change(lambda: None, lambda: None)
    return _swap_key(fields, key, new)


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


def _swap_data(parameter: nn.Parameter, new: torch.Tensor, cut: Callable[[torch.Tensor], torch.Tensor]) -> list[Change]:
    old, old_grad = parameter.data, parameter.grad
    grad = cut(old_grad) if old_grad is not None else None

    def put(data: torch.Tensor, gradient: torch.Tensor | None) -> None:
        parameter.grad = None
        parameter.data = data
        parameter.grad = gradient

    return [Change(lambda: put(new, grad), lambda: put(old, old_grad))]


def _swap_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, cut: Callable[[torch.Tensor], torch.Tensor]
) -> list[Change]:
    """Momenta and the like: every tensor of the parameter's shape in its state."""
    state = optimizer.state.get(parameter, {})
    fits = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == parameter.shape}
    return [_swap_key(state, key, cut(value)) for key, value in fits.items()]


def _cut_layers(model: nn.Module, plan: Plan) -> set[str]:
    """The paths of the layers that use a tensor which was cut."""
    cut = {id(_attribute(model, removal.tensor)) for removal in tensor_removals(plan)}
    return {
        layer_of(path)
        for path, module in model.named_modules()
        if any(id(t) in cut for t in (*module._parameters.values(), *module._buffers.values()))
    }


def _recomputed(model: nn.Module, plan: Plan) -> list[Change]:
    """Weights that a hook computes before each forward, of the (already cut) tensors."""
    changes = []
    for path in sorted(_cut_layers(model, plan)):
        module = submodule(model, path)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                iterate = {"do_power_iteration": False} if isinstance(hook, SpectralNorm) else {}
                with torch.no_grad():
                    changes.append(_swap_key(module.__dict__, hook.name, hook.compute_weight(module, **iterate)))
    return changes


def _mirror_changes(model: nn.Module, plan: Plan) -> list[Change]:
    """Attributes that repeat a width of the (already cut) tensors."""
    owners = _cut_layers(model, plan) | {setting.path for setting in plan.settings}
    changes = [_mirror(model, mirror) for mirror in plan.mirrors]
    for path in sorted(owners):
        module = submodule(model, path)
        with untouched(module) if parametrize.is_parametrized(module) else nullcontext():  # reading may compute
            sizes = mirrored(module)
        for key, value in sizes.items():
            if key in module.__dict__ and module.__dict__[key] != value:
                changes.append(_swap_key(module.__dict__, key, value))
        parent, _, child = path.rpartition(".")
        if child == "out_proj" and isinstance(submodule(model, parent), nn.MultiheadAttention):
            attention = submodule(model, parent)
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


def mirrored(module: nn.Module) -> dict[str, Any]:
    """What the size attributes of a ``torch.nn`` module must be, given its tensors (nothing for other modules)."""
    for kind, sizes in _MIRRORED.items():
        if isinstance(module, kind):
            return sizes(module)
    return {}


def _conv(m: Any) -> dict[str, Any]:
    first, second = m.weight.shape[:2]
    if isinstance(m, _ConvTransposeNd):
        return {"in_channels": first, "out_channels": second * m.groups}
    return {"out_channels": first, "in_channels": second * m.groups}


def _norm(m: Any) -> dict[str, Any]:
    found = next((t for t in (m.weight, m.running_mean) if t is not None), None)
    return {} if found is None else {"num_features": found.shape[0]}


def _recurrent(m: Any) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3}.get(m.mode, 1)
    found = {"input_size": m.weight_ih_l0.shape[1], "hidden_size": m.weight_ih_l0.shape[0] // gates}
    if m.proj_size:
        found["proj_size"] = m.weight_hr_l0.shape[0]
    return found


def _cell(m: Any) -> dict[str, Any]:
    return {"input_size": m.weight_ih.shape[1], "hidden_size": m.weight_hh.shape[1]}


def _attention(m: Any) -> dict[str, Any]:
    width = m.in_proj_weight.shape[1] if m._qkv_same_embed_dim else m.q_proj_weight.shape[1]  # of the queries
    found = {"embed_dim": width, "kdim": width, "vdim": width, "head_dim": width // m.num_heads}
    if not m._qkv_same_embed_dim:
        found.update(kdim=m.k_proj_weight.shape[1], vdim=m.v_proj_weight.shape[1])
    return found


_MIRRORED: dict[type, Callable[[Any], dict[str, Any]]] = {
    _ConvNd: _conv,
    nn.Linear: lambda m: {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]},
    nn.Bilinear: lambda m: dict(zip(("out_features", "in1_features", "in2_features"), m.weight.shape, strict=True)),
    nn.Embedding: lambda m: {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]},
    _NormBase: _norm,
    nn.LayerNorm: lambda m: {} if m.weight is None else {"normalized_shape": tuple(m.weight.shape)},
    nn.RMSNorm: lambda m: {} if m.weight is None else {"normalized_shape": tuple(m.weight.shape)},
    nn.GroupNorm: lambda m: {} if m.weight is None else {"num_channels": m.weight.shape[0]},
    nn.PReLU: lambda m: {"num_parameters": m.weight.shape[0]},
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _cell,
    nn.MultiheadAttention: _attention,
}


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
