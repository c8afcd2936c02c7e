"""Soft pruning: a model computes what it will compute once it is cut, and nothing in it is changed.

While the model runs, every tensor that the plan cuts is replaced by the slices that stay, and every size that the plan
changes is set; afterwards everything is put back. So the outputs are those of the model after the cut, whatever norms
or attention it has, gradients reach the full parameters (zero for what is left out), and optimisers, checkpoints and
scores see the full model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from prunus.errors import InputError, SurgeryError
from prunus.held import CHANNELS
from prunus.labels import Ids
from prunus.plan import Plan
from prunus.sizes import attribute_home
from prunus.surgery import apply

_SIZES = (int, tuple, list)


@dataclass(frozen=True)
class Narrowing:
    """One tensor by all its names, what stays along each dim, and the factors that positions are multiplied by."""

    name: str
    places: tuple[tuple[dict[str, Any], str], ...]
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
            tensor[tuple(index)] = values.to(tensor.dtype)


class SoftPruning:
    """A mask over a model, kept in its forward until :meth:`lift`; made by :func:`soft_prune`.

    It holds while the model itself is called. To run parts of it by hand, use ``with mask.cut():``.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        if any(isinstance(_owner(hook), SoftPruning) for hook in model._forward_pre_hooks.values()):
            raise InputError("the model is soft-pruned already: lift that mask first")
        custom = [r.tensor for r in plan.removals if r.tensor.rpartition(".")[2] == CHANNELS]
        if custom:
            raise InputError(
                f"{custom[0].rpartition('.')[0]} is cut by a customised pruner, which cannot be taken back after each "
                "forward; leave it out of the plan"
            )
        self._attributes = _sizes_after(model, plan)
        self._narrowings = _narrowings(model, plan)
        self._undo: list[tuple[dict[str, Any], str, Any]] = []
        self._written: list[tuple[Narrowing, torch.Tensor, torch.Tensor, int]] = []
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
            for fields, key, value in self._attributes:
                self._set(fields, key, value)
            for module in self.model.modules():
                if isinstance(module, nn.RNNBase):  # it keeps a list of its weights
                    weights = [module._parameters[name] for name in module._flat_weights_names]
                    self._set(module.__dict__, "_flat_weights", weights)
        except BaseException:
            self._leave()
            raise

    def _narrow(self, narrowing: Narrowing) -> None:
        full = narrowing.places[0][0][narrowing.places[0][1]]
        if isinstance(full, nn.Parameter):
            cut = narrowing.cut(full)
        else:
            with torch.no_grad():
                cut = narrowing.cut(full)
            self._written.append((narrowing, full, cut, cut._version))
        for fields, key in narrowing.places:
            self._set(fields, key, cut)

    def _set(self, fields: dict[str, Any], key: str, value: Any) -> None:
        self._undo.append((fields, key, fields[key]))
        fields[key] = value

    def _leave(self) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        for narrowing, full, cut, version in self._written:
            fields, key = narrowing.places[0]
            now = fields[key]
            if now is not cut or cut._version != version:
                narrowing.write_back(full, now)
        self._written.clear()
        while self._undo:
            fields, key, value = self._undo.pop()
            fields[key] = value


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


def _sizes_after(model: nn.Module, plan: Plan) -> list[tuple[dict[str, Any], str, Any]]:
    """The attributes that the plan changes and their values then, found by applying it and taking it back."""
    homes = [m.__dict__ for m in model.modules()]
    homes += [attribute_home(model, setting.attribute)[0] for setting in plan.settings]
    own = list({id(home): home for home in homes}.values())
    before = [{k: v for k, v in home.items() if isinstance(v, _SIZES)} for home in own]
    receipt = apply(model, plan)
    try:
        after = [{k: home[k] for k in values} for home, values in zip(own, before, strict=True)]
    finally:
        receipt.undo()
    return [
        (home, key, new[key])
        for home, old, new in zip(own, before, after, strict=True)
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


def _places(model: nn.Module) -> dict[Any, list[tuple[dict[str, Any], str]]]:
    found: dict[Any, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for fields in (module._parameters, module._buffers, module.__dict__):
            for key, tensor in fields.items():
                if isinstance(tensor, torch.Tensor):
                    found.setdefault(_memory(tensor), []).append((fields, key))
    return found


def _memory(tensor: torch.Tensor) -> Any:
    """Equal for one tensor, and for parameters over the same memory."""
    if not isinstance(tensor, nn.Parameter) or tensor.is_meta or tensor.numel() == 0:
        return id(tensor)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


__all__ = ["SoftPruning", "soft_prune"]
