"""A pruned model as plain data: tensors and sizes, without pickled classes.

``torch.save(prunus.state_dict(model), path)`` can be read with ``torch.load(path)`` (``weights_only`` is fine), and
:func:`load_state_dict` puts it into a model as the code builds it, at full width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prunus.errors import InputError, SurgeryError
from prunus.swapping import put

load, save = torch.load, torch.save


def state_dict(model: nn.Module) -> dict[str, Any]:
    """The tensors of a model, and the sizes that its modules keep as attributes.

    Example:
        >>> import torch, prunus as tp
        >>> from torch import nn
        >>> model, fresh = (nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)) for _ in range(2))
        >>> tp.pruner.MagnitudePruner(model, torch.zeros(1, 4)).step()
        >>> tp.load_state_dict(fresh, tp.state_dict(model))
        >>> fresh[0], bool((fresh[1].weight == model[1].weight).all())
        (Linear(in_features=4, out_features=4, bias=True), True)
    """
    sizes = {path: _sizes(module) for path, module in model.named_modules()}
    return {
        "tensors": {n: t.detach() for n, t in _tensors(model).items()},
        "sizes": {path: found for path, found in sizes.items() if found},
    }


def load_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Give a model the tensors and sizes of a pruned one of the same code; parameters keep their identity.

    Args:
        model: the model as its code builds it.
        state_dict: what :func:`state_dict` gave.

    Raises:
        InputError: it is something else.
        SurgeryError: the model has other tensors; nothing was changed.
    """
    if not {"tensors", "sizes"} <= dict(state_dict).keys():
        raise InputError(
            "this is not what prunus.state_dict(model) gives; for the tensors alone use model.load_state_dict"
        )
    tensors, sizes = state_dict["tensors"], state_dict["sizes"]
    own = _tensors(model)
    modules = dict(model.named_modules())
    lost = sorted((own.keys() ^ tensors.keys()) | (sizes.keys() - modules.keys()))
    if lost:
        raise SurgeryError(
            f"the model and the saved one differ in {', '.join(lost[:4])}: they are not of the same code"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            put(tensor, tensors[name].detach().clone().to(tensor.device, tensor.dtype), None)
    for path, values in sizes.items():
        modules[path].__dict__.update(values)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))


def _sizes(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if not key.startswith("_") and _is_size(value)}


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_is_size(one) for one in value)
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["load", "load_state_dict", "save", "state_dict"]
