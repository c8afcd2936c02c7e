"""The tensors that a model keeps, and where the atoms of their dims begin."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.parameter import is_lazy

from prunus.errors import InputError
from prunus.labels import Ids

CHANNELS = "<channels>"  # the name under which the channels of a customised layer stand among the tensors


class Place(NamedTuple):
    """Where a tensor hangs: ``module`` (its path) and ``name`` in it; ``kind`` is parameter, buffer or attribute.

    A fourth kind, channels, stands for what a customised layer makes (dim 0) and reads (the last dim).
    """

    module: str
    name: str
    kind: str

    @property
    def full(self) -> str:
        """The dotted name in the model."""
        return f"{self.module}.{self.name}" if self.module else self.name

    @property
    def layer(self) -> str:
        """The path of the layer that uses the tensor: for a parametrised weight the layer, not its parametrisation."""
        return layer_of(self.module)


def layer_of(path: str) -> str:
    """The path of the layer that a parametrisation belongs to; any other module is its own.

    Example:
        >>> layer_of("conv.parametrizations.weight"), layer_of("conv")
        ('conv', 'conv')
    """
    if "parametrizations" not in path:
        return path
    before, found, _ = f".{path}".partition(".parametrizations.")
    return before[1:] if found else path


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, as :meth:`torch.nn.Module.get_submodule` finds it, in a tenth of the time.

    Raises:
        AttributeError: there is none.
    """
    found = model
    for name in path.split(".") if path else ():
        child = found._modules.get(name)
        if child is None:  # a compiled model passes on the children of the one inside
            child = found.get_submodule(name)
        found = child
    return found


class Held(NamedTuple):
    """A tensor that the model keeps, every place where it hangs, and the first atom of each of its dims (-1: none).

    A tensor of a customised layer ``follows`` channels: (its dim, the channels, their dim, positions for each of them).
    """

    tensor: torch.Tensor
    places: list[Place]
    shape: tuple[int, ...]
    starts: list[int]
    follows: tuple[tuple[int, Held, int, int], ...] | None = None

    def shrinks(self, modules: Mapping[str, nn.Module]) -> bool:
        """Whether its dims may shrink: numbers do, whole ones where they stand beside a list of others.

        A list of whole numbers is one for each channel (zero points) where its module keeps a list of numbers as long.
        """
        if self.tensor.is_floating_point() or self.tensor.is_complex():
            return True
        if len(self.shape) != 1 or self.tensor.dtype == torch.bool:
            return False
        beside = (
            t for place in self.places if place.module in modules for _, _, t in own_tensors(modules[place.module])
        )
        return any(t.is_floating_point() and t.shape == self.shape for t in beside)

    @property
    def name(self) -> str:
        """The dotted name of its first place."""
        return self.places[0].full

    def left(self, alive: NDArray[np.bool_]) -> list[int]:
        """The shape of the tensor with only the ``alive`` atoms."""
        counted = (self, *(channels for _, channels, _, _ in self.follows or ()))
        dims = ((start, n) for held in counted for start, n in zip(held.starts, held.shape, strict=True) if start >= 0)
        return self.of_widths({start: int(np.count_nonzero(alive[start : start + n])) for start, n in dims})

    def of_widths(self, widths: Mapping[int, int]) -> list[int]:
        """The shape of the tensor with so many positions left of each dim that has atoms (by the first one)."""
        sizes = [widths.get(start, n) for n, start in zip(self.shape, self.starts, strict=True)]
        for dim, channels, axis, step in self.follows or ():
            sizes[dim] -= step * (channels.shape[axis] - channels.of_widths(widths)[axis])
        return sizes


_NO_TENSOR = frozenset({bool, int, float, str, dict, list, tuple, set, OrderedDict, type(None)})
Modules = list[tuple[str, nn.Module]]  # every path of every module


def own_tensors(module: nn.Module) -> list[tuple[str, str, torch.Tensor]]:
    """The tensors that a module keeps itself: parameter, buffer or attribute, the name, the tensor."""
    return [
        (kind, name, value)
        for kind, fields in (
            ("parameter", module._parameters),
            ("buffer", module._buffers),
            ("attribute", vars(module)),
        )
        for name, value in fields.items()
        if type(value) not in _NO_TENSOR and isinstance(value, torch.Tensor)  # most types are told by a look
    ]


def held_tensors(modules: Modules) -> tuple[list[Held], dict[int, int]]:
    """Every tensor the model keeps, once, and the index of each by identity.

    Two parameters over the same memory are one tensor by two names.
    """
    held: list[Held] = []
    index: dict[int, int] = {}
    by_memory: dict[int, list[int]] = {}
    for path, module in modules:
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            raise InputError(
                f"{path or 'the model'} is compiled by TorchScript, which hides its tensors: prune the Python module, "
                "then script or trace it"
            )
        for kind, name, tensor in own_tensors(module):
            if name.startswith("__"):
                continue
            k = index.get(id(tensor))
            if k is None:
                if is_lazy(tensor):
                    raise InputError(f"{path}.{name} is not initialised yet: run the model once before pruning it")
                twins = by_memory.setdefault(address(tensor), [])
                k = next((t for t in twins if _same_view(held[t].tensor, tensor)), len(held))
                index[id(tensor)] = k
                if k == len(held):
                    twins.append(k)
                    held.append(Held(tensor, [], tuple(tensor.shape), [-1] * tensor.dim()))
            held[k].places.append(Place(path, name, kind))
    return held, index


def address(tensor: torch.Tensor) -> int:
    """Where the values are; a number of its own for a tensor that has none in memory."""
    return (tensor.layout is torch.strided and tensor.data_ptr()) or -id(tensor)


def _same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


class Axes(NamedTuple):
    """Every used dim of every held tensor, sorted by first atom: that atom, the tensor, the dim, the atom behind."""

    start: Ids
    held: Ids
    dim: Ids
    end: Ids


def axes_of(held: Sequence[Held]) -> Axes:
    """The used dims of held tensors."""
    rows = [
        (start, k, d, start + h.shape[d]) for k, h in enumerate(held) for d, start in enumerate(h.starts) if start >= 0
    ]
    return Axes(*np.array(sorted(rows), dtype=np.int64).reshape(-1, 4).T)
