"""One linear layer, embedding, PReLU or bare parameter at a time."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from prunus.errors import InputError
from prunus.functions._edit import Edit, Indices, keep_positions
from prunus.swapping import put

__all__ = [
    "prune_embedding_in_channels",
    "prune_embedding_out_channels",
    "prune_linear_in_channels",
    "prune_linear_out_channels",
    "prune_parameter_in_channels",
    "prune_parameter_out_channels",
    "prune_prelu_in_channels",
    "prune_prelu_out_channels",
]

TensorT = TypeVar("TensorT", bound=Tensor)


def prune_linear_out_channels(layer: nn.Linear, idxs: Indices, inplace: bool = True) -> nn.Linear:
    """Remove output features of one linear layer, in place; whatever reads them is the caller's to prune.

    Args:
        layer: A linear layer.
        idxs: Output features to remove, each in `[0, layer.out_features)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, or no feature left; nothing was changed.

    Example:
        >>> prune_linear_out_channels(nn.Linear(4, 6), [0, 1])
        Linear(in_features=4, out_features=4, bias=True)
    """
    edit = Edit(layer, nn.Linear, "prune_linear_out_channels", inplace)
    keep = edit.keep(idxs, edit.layer.out_features, "output feature")
    edit.cut("weight", (0, keep))
    edit.cut("bias", (0, keep))
    edit.set(out_features=len(keep))
    return edit.commit()


def prune_linear_in_channels(layer: nn.Linear, idxs: Indices, inplace: bool = True) -> nn.Linear:
    """Remove input features of one linear layer, in place; whatever produces them is the caller's to prune.

    Args:
        layer: A linear layer.
        idxs: Input features to remove, each in `[0, layer.in_features)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, or no feature left; nothing was changed.
    """
    edit = Edit(layer, nn.Linear, "prune_linear_in_channels", inplace)
    keep = edit.keep(idxs, edit.layer.in_features, "input feature")
    edit.cut("weight", (1, keep))
    edit.set(in_features=len(keep))
    return edit.commit()


def prune_embedding_out_channels(
    layer: nn.Embedding | nn.EmbeddingBag, idxs: Indices, inplace: bool = True
) -> nn.Embedding | nn.EmbeddingBag:
    """Remove embedding dimensions of one embedding, in place; whatever reads them is the caller's to prune.

    The vocabulary stays: its rows are chosen by the tokens.

    Args:
        layer: An embedding or embedding bag.
        idxs: Dimensions to remove, each in `[0, layer.embedding_dim)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, or no dimension left; nothing was changed.

    Example:
        >>> prune_embedding_out_channels(nn.Embedding(100, 16), range(4))
        Embedding(100, 12)
    """
    edit = Edit(layer, (nn.Embedding, nn.EmbeddingBag), "prune_embedding_out_channels", inplace)
    return _prune_embedding(edit, idxs)


def prune_embedding_in_channels(
    layer: nn.Embedding | nn.EmbeddingBag, idxs: Indices, inplace: bool = True
) -> nn.Embedding | nn.EmbeddingBag:
    """Remove embedding dimensions of one embedding, in place: the same as `prune_embedding_out_channels`."""
    edit = Edit(layer, (nn.Embedding, nn.EmbeddingBag), "prune_embedding_in_channels", inplace)
    return _prune_embedding(edit, idxs)


def _prune_embedding(edit: Edit[nn.Embedding | nn.EmbeddingBag], idxs: Indices) -> nn.Embedding | nn.EmbeddingBag:
    keep = edit.keep(idxs, edit.layer.embedding_dim, "embedding dimension")
    edit.cut("weight", (1, keep))
    edit.set(embedding_dim=len(keep))
    return edit.commit()


def prune_prelu_out_channels(layer: nn.PReLU, idxs: Indices, inplace: bool = True) -> nn.PReLU:
    """Remove channels of one PReLU, in place; dependencies are the caller's.

    A PReLU with a single slope shares it between all channels, so it stays as it is, whatever channels go.

    Args:
        layer: A PReLU.
        idxs: Channels to remove, each in `[0, layer.num_parameters)` where there is more than one slope.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, or no channel left; nothing was changed.
    """
    edit = Edit(layer, nn.PReLU, "prune_prelu_out_channels", inplace)
    return _prune_prelu(edit, idxs)


def prune_prelu_in_channels(layer: nn.PReLU, idxs: Indices, inplace: bool = True) -> nn.PReLU:
    """Remove channels of one PReLU, in place: the same as `prune_prelu_out_channels`."""
    edit = Edit(layer, nn.PReLU, "prune_prelu_in_channels", inplace)
    return _prune_prelu(edit, idxs)


def _prune_prelu(edit: Edit[nn.PReLU], idxs: Indices) -> nn.PReLU:
    if edit.layer.num_parameters == 1:
        return edit.layer
    keep = edit.keep(idxs, edit.layer.num_parameters, "channel")
    edit.cut("weight", (0, keep))
    edit.set(num_parameters=len(keep))
    return edit.commit()


def prune_parameter_out_channels(tensor: TensorT, idxs: Indices, inplace: bool = True, *, dim: int = -1) -> TensorT:
    """Remove positions of one dimension of a bare parameter, in place; dependencies are the caller's.

    Args:
        tensor: An `nn.Parameter`, or any tensor that is a leaf.
        idxs: Positions to remove, each in `[0, parameter.shape[dim])`.
        inplace: Change `parameter` itself (default), which keeps its identity, or a copy of it.
        dim: The dimension to cut; the last by default.

    Returns:
        The pruned parameter.

    Raises:
        InputError: Not a tensor, no such dimension, bad index, or no position left; nothing was changed.

    Example:
        >>> prune_parameter_out_channels(nn.Parameter(torch.zeros(1, 5, 8)), [0, 7]).shape
        torch.Size([1, 5, 6])
    """
    return _prune_parameter(tensor, idxs, inplace, dim, "prune_parameter_out_channels")


def prune_parameter_in_channels(tensor: TensorT, idxs: Indices, inplace: bool = True, *, dim: int = -1) -> TensorT:
    """Remove positions of a bare parameter, in place: the same as `prune_parameter_out_channels`."""
    return _prune_parameter(tensor, idxs, inplace, dim, "prune_parameter_in_channels")


def _prune_parameter(parameter: TensorT, idxs: Indices, inplace: bool, dim: int, caller: str) -> TensorT:
    if not isinstance(parameter, Tensor):
        raise InputError(
            f"{caller} takes a parameter, not {type(parameter).__name__}; prune a layer by its own function"
        )
    if not -parameter.ndim <= dim < parameter.ndim:
        raise InputError(f"{caller}: a parameter of shape {tuple(parameter.shape)} has no dimension {dim}")
    if not parameter.is_leaf or parameter.is_inference():
        raise InputError(f"{caller}: the tensor is the result of a computation, not a parameter")
    place = f"{caller} on a parameter of shape {tuple(parameter.shape)}, dimension {dim}"
    at = torch.tensor(keep_positions(idxs, parameter.shape[dim], place), device=parameter.device)
    target = parameter if inplace else copy.deepcopy(parameter)
    grad = None if target.grad is None else target.grad.index_select(dim, at)
    value = target.detach().index_select(dim, at)
    put(target, value, grad)
    return target
