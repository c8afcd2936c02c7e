"""Copies of a model that share its tensors, so that several runs can be under way at once and none touches it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import InputError
from prunus.surgery import Change, data_swap


def twin(model: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a model whose modules are its own, and whose tensors are what ``tensor`` makes of each (once).

    Raises:
        InputError: the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for fields in (module._parameters, module._buffers, module.__dict__):
            for value in fields.values():
                if isinstance(value, Tensor) and id(value) not in memo:
                    memo[id(value)] = tensor(value)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"repair works on copies of the model, and copy.deepcopy cannot make one ({type(error).__name__}: {error})"
            "; give what it cannot copy a __deepcopy__, or prune without data"
        ) from error


def sharing(model: nn.Module) -> nn.Module:
    """A copy that shares every tensor."""
    return twin(model, lambda tensor: tensor)


def frozen(model: nn.Module) -> nn.Module:
    """A copy that keeps the present values for as long as nobody writes into them; surgery never does.

    It takes no memory of its own. Buffers, which a run may write to, are copied.
    """
    return twin(model, lambda t: nn.Parameter(t.data, t.requires_grad) if isinstance(t, nn.Parameter) else _own(t))


def separate(model: nn.Module) -> nn.Module:
    """A copy with values of its own; tensors over the same memory stay so."""
    known: dict[Any, Tensor] = {}

    def own(tensor: Tensor) -> Tensor:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        data = known.setdefault(key, _own(tensor)) if tensor.numel() else _own(tensor)
        return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data

    return twin(model, own)


def takeover(model: nn.Module, copy: nn.Module, names: Collection[str] | None = None) -> list[Change]:
    """What lets every tensor that differs have the copy's values; the old ones are kept for undo.

    What shares memory in the copy, as it did in the model, shares the new memory too.

    Args:
        model: what is to be changed.
        copy: a copy of it.
        names: which parameters and buffers; None for all.
    """
    changes = []
    made: dict[tuple[int, torch.Size], Tensor] = {}
    theirs: dict[str, Tensor] = dict((*copy.named_parameters(), *copy.named_buffers()))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        value = theirs[name]
        if (names is not None and name not in names) or torch.equal(tensor, value):
            continue
        new = made.setdefault((value.data_ptr(), value.shape), value.detach().clone())
        changes.append(data_swap(tensor, new))
    return changes


def _own(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.detach().clone()
