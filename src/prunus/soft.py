"""Soft pruning: a model computes what it will compute once it is cut, and nothing in it is changed.

While the model runs, every tensor that the plan cuts is replaced by the slices that stay, and every size that the plan
changes is set; afterwards everything is put back. So the outputs are those of the model after the cut, whatever norms
or attention it has, gradients reach the full parameters (zero for what is left out), and optimisers, checkpoints and
scores see the full model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from prunus.errors import InputError, SurgeryError
from prunus.held import CHANNELS
from prunus.labels import Ids
from prunus.plan import Plan
from prunus.surgery import apply

_SIZES = (int, tuple, list)
_SHOWN = {"removals", "settings", "before", "after", "mirrors", "pruners", "scalings", "notes"}  # of a plan


class Spot(NamedTuple):
    """Where something hangs: ``owner`` (a module or its configuration), its dictionary ("" its own), and the key.

    Owners are kept rather than dictionaries, so that a deep copy of a masked model has a mask of its own.
    """

    owner: Any
    fields: str
    key: str

    @property
    def home(self) -> dict[str, Any]:
        """The dictionary."""
        own = vars(self.owner)
        return own[self.fields] if self.fields else own


@dataclass(frozen=True)
class Narrowing:
    """One tensor by all its names, what stays along each dim, and the factors that positions are multiplied by."""

    name: str
    places: tuple[Spot, ...]
    shape: tuple[int, ...]
    keep: Mapping[int, torch.Tensor]
    factors: Mapping[int, torch.Tensor]

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """The slices that stay, as a function of the tensor."""
        if tuple(tensor.shape) != self.shape:
            raise SurgeryError(
                f"{self.name} has shape {tuple(tensor.shape)}, the mask was made for {self.shape}: the model was cut "
                "since; lift the mask before you prune"
            )
        for dim, factor in self.factors.items():
            shape = [-1 if d == dim else 1 for d in range(tensor.dim())]
            tensor = tensor * factor.to(tensor.device, tensor.dtype).view(shape)
        for dim, index in self.keep.items():
            tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor

    def write_back(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Put what was computed for the slices that stay (statistics of a norm) into the full tensor."""
        index = []
        for dim, size in enumerate(tensor.shape):
            kept = self.keep.get(dim, torch.arange(size)).to(tensor.device)
            index.append(kept.view([-1 if d == dim else 1 for d in range(tensor.dim())]))
        with torch.no_grad():
            for dim, factor in self.factors.items():
                kept = factor[self.keep.get(dim, torch.arange(len(factor)))].to(values.device, values.dtype)
                values = values / kept.view([-1 if d == dim else 1 for d in range(values.dim())])
            tensor[tuple(index)] = values.to(tensor.dtype)


def masked(model: nn.Module) -> bool:
    """Whether a mask is on the model."""
    return any(isinstance(_owner(hook), SoftPruning) for hook in model._forward_pre_hooks.values())


class SoftPruning:
    """A mask over a model, kept in its forward until :meth:`lift`; made by :func:`soft_prune`.

    It holds while the model itself is called. To run parts of it by hand, use ``with mask.cut():``.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        if masked(model):
            raise InputError("the model is soft-pruned already: lift that mask first")
        custom = [r.tensor for r in plan.removals if r.tensor.rpartition(".")[2] == CHANNELS]
        if custom:
            raise InputError(
                f"{custom[0].rpartition('.')[0]} is cut by a customised pruner, which cannot be taken back after each "
                "forward; leave it out of the plan"
            )
        others = [f.name for f in fields(plan) if f.name not in _SHOWN and getattr(plan, f.name)]
        if others:
            raise InputError(f"the plan also has {', '.join(others)}: a mask can show only what goes inside layers")
        self._attributes = _sizes_after(model, plan)
        self._narrowings = _narrowings(model, plan)
        self._undo: list[tuple[Spot, Any]] = []
        self._buffers: list[tuple[Narrowing, torch.Tensor]] = []
        self._depth = 0
        self._handles = [
            model.register_forward_pre_hook(self._before, prepend=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    @property
    def lifted(self) -> bool:
        """Whether the mask was taken off."""
        return not self._handles

    def lift(self) -> None:
        """Take the mask off: the model computes with all of its units again. A second call does nothing."""
        while self._depth:
            self._leave()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @contextmanager
    def cut(self) -> Iterator[nn.Module]:
        """Within the block, the model (and every part of it) is as it will be after the cut."""
        self._enter()
        try:
            yield self.model
        finally:
            self._leave()

    def _before(self, module: nn.Module, args: Any) -> None:
        self._enter()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._leave()

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        try:
            for narrowing in self._narrowings:
                self._narrow(narrowing)
            for spot, value in self._attributes:
                self._set(spot, value)
            for module in self.model.modules():
                if isinstance(module, nn.RNNBase):  # it keeps a list of its weights
                    weights = [module._parameters[name] for name in module._flat_weights_names]
                    self._set(Spot(module, "", "_flat_weights"), weights)
        except BaseException:
            self._leave()
            raise

    def _narrow(self, narrowing: Narrowing) -> None:
        first = narrowing.places[0]
        full = first.home[first.key]
        with nullcontext() if isinstance(full, nn.Parameter) else torch.no_grad():
            cut = narrowing.cut(full)
        if not isinstance(full, nn.Parameter):
            self._buffers.append((narrowing, full))
        for spot in narrowing.places:
            self._set(spot, cut)

    def _set(self, spot: Spot, value: Any) -> None:
        home = spot.home
        self._undo.append((spot, home[spot.key]))
        home[spot.key] = value

    def _leave(self) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        for narrowing, full in self._buffers:  # kernels write statistics without a trace: take them all
            first = narrowing.places[0]
            narrowing.write_back(full, first.home[first.key])
        self._buffers.clear()
        while self._undo:
            spot, value = self._undo.pop()
            spot.home[spot.key] = value


def soft_prune(model: nn.Module, plan: Plan) -> SoftPruning:
    """Let a model compute what it will compute after a plan, without changing it.

    Source: the idea is that of He et al. 2018, "Soft Filter Pruning" (arXiv 1808.06866), where what is pruned may come
    back; there, weights are set to zero, here they keep their values.

    Args:
        model: the model that the plan was made for.
        plan: what to leave out.

    Raises:
        InputError: the model is soft-pruned already, or the plan cuts a layer with a customised pruner.
        SurgeryError: the plan does not fit the model.

    Example:
        >>> import torch, prunus
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> pruner = prunus.pruner.MagnitudePruner(model, torch.randn(1, 8), pruning_ratio=0.5)
        >>> mask = pruner.soft_step()
        >>> soft = model(torch.ones(1, 8))
        >>> mask.lift()
        >>> pruner.step()
        >>> torch.allclose(model(torch.ones(1, 8)), soft), model[0].out_features
        (True, 8)
    """
    return SoftPruning(model, plan)


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


def _sizes_after(model: nn.Module, plan: Plan) -> list[tuple[Spot, Any]]:
    """The attributes that the plan changes and their values then, found by applying it and taking it back."""
    owners: list[Any] = list(model.modules())
    for setting in plan.settings:
        try:
            owners.append(reduce(getattr, setting.name.split(".")[:-1], model.get_submodule(setting.path)))
        except AttributeError as error:
            raise SurgeryError(f"the model has no {setting.attribute}: the plan was made for another model") from error
    own = list({id(owner): owner for owner in owners}.values())
    before = [{k: v for k, v in vars(owner).items() if isinstance(v, _SIZES)} for owner in own]
    receipt = apply(model, plan)
    try:
        after = [{k: vars(owner)[k] for k in values} for owner, values in zip(own, before, strict=True)]
    finally:
        receipt.undo()
    return [
        (Spot(owner, "", key), new[key])
        for owner, old, new in zip(own, before, after, strict=True)
        for key in old
        if new[key] is not old[key] and key != "_flat_weights"
    ]


def _narrowings(model: nn.Module, plan: Plan) -> list[Narrowing]:
    """Every tensor that the plan cuts or scales; parameters over the same memory are one tensor by several names."""
    keep: dict[str, dict[int, torch.Tensor]] = {}
    factors: dict[str, dict[int, torch.Tensor]] = {}
    for removal in plan.removals:
        left: Ids = np.delete(np.arange(removal.size), removal.positions)
        keep.setdefault(removal.tensor, {})[removal.dim] = torch.from_numpy(left)
    places = _places(model)
    found = []
    names = dict.fromkeys([*keep, *(s.tensor for s in plan.scalings)])
    for name in names:
        path, _, key = name.rpartition(".")
        tensor = getattr(model.get_submodule(path), key)
        for scaling in plan.scalings:
            if scaling.tensor == name:
                ones = torch.ones(tensor.shape[scaling.dim], dtype=torch.float64)
                factor = factors.setdefault(name, {}).setdefault(scaling.dim, ones)
                factor[list(scaling.positions)] *= scaling.factor
        found.append(
            Narrowing(
                name, tuple(places[_memory(tensor)]), tuple(tensor.shape), keep.get(name, {}), factors.get(name, {})
            )
        )
    return found


def _places(model: nn.Module) -> dict[Any, list[Spot]]:
    found: dict[Any, list[Spot]] = {}
    for module in model.modules():
        for where in ("_parameters", "_buffers", ""):
            for key, tensor in (vars(module)[where] if where else vars(module)).items():
                if isinstance(tensor, torch.Tensor):
                    found.setdefault(_memory(tensor), []).append(Spot(module, where, key))
    return found


def _memory(tensor: torch.Tensor) -> Any:
    """Equal for one tensor, and for parameters over the same memory."""
    if not isinstance(tensor, nn.Parameter) or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


__all__ = ["SoftPruning", "masked", "soft_prune"]
