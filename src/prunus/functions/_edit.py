"""The change to one layer as data: every new tensor is computed first, then all are swapped in.

Each public function of this package opens an `Edit`, states what it keeps, and commits. Whatever can fail (a wrong
layer type, an index out of range, groups that come out unequal, a parametrised weight) fails before the commit, so a
layer is either changed as a whole or not at all.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from prunus.errors import InputError
from prunus.swapping import put

__all__ = ["Edit", "Indices", "keep_positions", "surviving_groups"]

Indices = Iterable[int] | Tensor
LayerT = TypeVar("LayerT", bound=nn.Module)


def _as_integers(idxs: Indices, place: str) -> list[int]:
    """Give the indices as plain integers; a boolean mask or a fraction is refused, not guessed at."""
    found = idxs.tolist() if isinstance(idxs, Tensor) else idxs
    try:
        items = list(found)
        if any(isinstance(item, bool) for item in items):
            raise TypeError("a boolean is not an index; for a mask use mask.nonzero().flatten()")
        return [operator.index(item) for item in items]
    except TypeError as error:
        raise InputError(f"{place}: idxs must be integers, one for each position to remove ({error})") from error


def keep_positions(idxs: Indices, size: int, place: str) -> list[int]:
    """Give the positions of `range(size)` that stay, in order, after a check of the ones that go.

    Args:
        idxs: Positions to remove, each in `[0, size)` and named once.
        size: How many positions there are now.
        place: What is being cut, for the message of an error.

    Raises:
        InputError: An index is out of range or given twice, or none would stay.
    """
    removed = _as_integers(idxs, place)
    outside = sorted({index for index in removed if not 0 <= index < size})
    if outside:
        raise InputError(f"{place}: no such position {outside[:8]}; idxs must be in [0, {size})")
    gone = set(removed)
    if len(gone) != len(removed):
        twice = sorted({index for index in gone if removed.count(index) > 1})
        raise InputError(f"{place}: {twice[:8]} are given more than once; name each position once")
    if len(gone) == size:
        raise InputError(f"{place}: all {size} would go; at least one must stay")
    return [index for index in range(size) if index not in gone]


def surviving_groups(keep: Sequence[int], size: int, groups: int, place: str) -> list[int]:
    """Give the groups that keep something, after a check that those keep equally many.

    Args:
        keep: The positions that stay.
        size: How many positions there are now; group `g` holds `size // groups` of them, from `g * size // groups`.
        groups: How many groups there are now.
        place: What is being cut, for the message of an error.

    Raises:
        InputError: Two of the groups that are left would differ in size.
    """
    counts = [0] * groups
    for index in keep:
        counts[index * groups // size] += 1
    alive = [group for group in range(groups) if counts[group]]
    if len({counts[group] for group in alive}) > 1:
        shown = ", ".join(map(str, counts[:8])) + (", ..." if groups > 8 else "")
        raise InputError(
            f"{place}: its {groups} groups of {size // groups} would keep {shown}; "
            "remove equally many from every group, or whole groups"
        )
    return alive


class Edit(Generic[LayerT]):
    """One pending change to one layer.

    Args:
        layer: The layer to change.
        kind: The type, or types, that the calling function handles.
        caller: Name of the calling function, for the message of an error.
        inplace: Whether to change `layer` itself; otherwise a deep copy is changed (gradients are not copied).

    Raises:
        InputError: The layer is of another type, or its parameters are not yet created.
    """

    def __init__(self, layer: LayerT, kind: type | tuple[type, ...], caller: str, inplace: bool) -> None:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(layer, kinds):
            names = " or ".join(one.__name__.lstrip("_") for one in kinds)
            raise InputError(f"{caller} takes a {names} layer, not {type(layer).__name__}")
        if any(is_lazy(parameter) for parameter in layer.parameters()):
            raise InputError(f"{caller}: {type(layer).__name__} has no weights yet; run the model once, then prune")
        self.layer: LayerT = layer if inplace else copy.deepcopy(layer)
        self._place = f"{caller} on {type(layer).__name__}"
        self._tensors: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._attributes: list[tuple[nn.Module, str, object]] = []

    def keep(self, idxs: Indices, size: int, what: str) -> list[int]:
        """Give the positions that stay; `what` names one position, as in "output channel"."""
        return keep_positions(idxs, size, f"{self._place}, {what}s")

    def groups(self, keep: Sequence[int], size: int, groups: int, what: str) -> list[int]:
        """Give the groups that stay."""
        return surviving_groups(keep, size, groups, f"{self._place}, {what}s")

    def cut(self, name: str, *cuts: tuple[int, Sequence[int]], owner: nn.Module | None = None) -> None:
        """Keep some positions of some dimensions of a parameter or buffer; one that is None stays None.

        Args:
            name: Name of the parameter or buffer.
            cuts: Pairs of a dimension and the positions of it to keep.
            owner: The module that holds it, where that is a part of the layer.
        """

        def select(tensor: Tensor) -> Tensor:
            for dim, keep in cuts:
                tensor = tensor.index_select(dim, torch.tensor(keep, device=tensor.device))
            return tensor

        self.change(name, select, owner=owner)

    def change(self, name: str, function: Callable[[Tensor], Tensor], *, owner: nn.Module | None = None) -> None:
        """Let `function` make the new value of a parameter or buffer, and of its gradient."""
        tensor = self._find(self.layer if owner is None else owner, name)
        if tensor is None:
            return
        with torch.no_grad():
            grad = None if tensor.grad is None else function(tensor.grad)
            self._tensors.append((tensor, _same_memory_format(function(tensor.detach()), tensor), grad))

    def set(self, owner: nn.Module | None = None, /, **attributes: object) -> None:
        """Give attributes of the layer, or of a part of it, new values."""
        module = self.layer if owner is None else owner
        self._attributes.extend((module, name, value) for name, value in attributes.items())

    def commit(self) -> LayerT:
        """Make every change, and give the layer back. Parameters and buffers keep their identity."""
        for tensor, value, grad in self._tensors:
            put(tensor, value, grad)
        for module, name, new in self._attributes:
            setattr(module, name, new)
        return self.layer

    def _find(self, module: nn.Module, name: str) -> Tensor | None:
        if parametrize.is_parametrized(module, name):
            raise InputError(
                f"{self._place}: its {name} is computed from other parameters; "
                f"call torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) first"
            )
        tensor = getattr(module, name, None)
        if tensor is None:
            return None
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        if name not in own:
            raise InputError(
                f"{self._place}: its {name} is neither a parameter nor a buffer (masks, weight norm, spectral norm "
                "and quantisation do this); make it a plain parameter again, then prune"
            )
        if own[name].is_inference():
            raise InputError(f"{self._place}: its {name} was made under torch.inference_mode(); make it outside")
        return own[name]


def _same_memory_format(new: Tensor, old: Tensor) -> Tensor:
    """Lay `new` out as `old` is: a model in channels-last stays in channels-last."""
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if old.ndim == ndim and not old.is_contiguous() and old.is_contiguous(memory_format=layout):
            return new.contiguous(memory_format=layout)
    return new.contiguous()
