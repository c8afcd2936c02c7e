"""One normalisation layer at a time: batch, layer, RMS, group and instance norm.

A norm has one width, so `_in_channels` and `_out_channels` do the same; both exist so that a graph can say from which
side a removal arrives.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from prunus.functions._edit import Edit, Indices

__all__ = [
    "prune_batchnorm_in_channels",
    "prune_batchnorm_out_channels",
    "prune_groupnorm_in_channels",
    "prune_groupnorm_out_channels",
    "prune_instancenorm_in_channels",
    "prune_instancenorm_out_channels",
    "prune_layernorm_in_channels",
    "prune_layernorm_out_channels",
]

NormT = TypeVar("NormT", _BatchNorm, _InstanceNorm)


def prune_batchnorm_out_channels(layer: _BatchNorm, idxs: Indices, inplace: bool = True) -> _BatchNorm:
    """Remove channels of one batch norm (running statistics too), in place; dependencies are the caller's.

    Args:
        layer: A batch norm of any dimension, `SyncBatchNorm` included, affine or not.
        idxs: Channels to remove, each in `[0, layer.num_features)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, or no channel left; nothing was changed.

    Example:
        >>> prune_batchnorm_out_channels(nn.BatchNorm2d(8), [0, 5]).running_mean.shape
        torch.Size([6])
    """
    edit = Edit(layer, _BatchNorm, "prune_batchnorm_out_channels", inplace)
    return _prune_features(edit, idxs)


def prune_batchnorm_in_channels(layer: _BatchNorm, idxs: Indices, inplace: bool = True) -> _BatchNorm:
    """Remove channels of one batch norm, in place: the same as `prune_batchnorm_out_channels`."""
    edit = Edit(layer, _BatchNorm, "prune_batchnorm_in_channels", inplace)
    return _prune_features(edit, idxs)


def prune_instancenorm_out_channels(layer: _InstanceNorm, idxs: Indices, inplace: bool = True) -> _InstanceNorm:
    """Remove channels of one instance norm (running statistics too), in place; dependencies are the caller's.

    Args:
        layer: An instance norm of any dimension, affine or not, tracking statistics or not.
        idxs: Channels to remove, each in `[0, layer.num_features)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, or no channel left; nothing was changed.
    """
    edit = Edit(layer, _InstanceNorm, "prune_instancenorm_out_channels", inplace)
    return _prune_features(edit, idxs)


def prune_instancenorm_in_channels(layer: _InstanceNorm, idxs: Indices, inplace: bool = True) -> _InstanceNorm:
    """Remove channels of one instance norm, in place: the same as `prune_instancenorm_out_channels`."""
    edit = Edit(layer, _InstanceNorm, "prune_instancenorm_in_channels", inplace)
    return _prune_features(edit, idxs)


def prune_layernorm_out_channels(
    layer: nn.LayerNorm | nn.RMSNorm, idxs: Indices, inplace: bool = True
) -> nn.LayerNorm | nn.RMSNorm:
    """Remove positions of the last normalised dimension of one layer norm, in place; dependencies are the caller's.

    Args:
        layer: A layer norm or RMS norm, with or without weights.
        idxs: Positions to remove, each in `[0, layer.normalized_shape[-1])`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, or no position left; nothing was changed.

    Example:
        >>> prune_layernorm_out_channels(nn.LayerNorm((4, 8)), [7]).normalized_shape
        (4, 7)
    """
    edit = Edit(layer, (nn.LayerNorm, nn.RMSNorm), "prune_layernorm_out_channels", inplace)
    return _prune_last_dim(edit, idxs)


def prune_layernorm_in_channels(
    layer: nn.LayerNorm | nn.RMSNorm, idxs: Indices, inplace: bool = True
) -> nn.LayerNorm | nn.RMSNorm:
    """Remove positions of one layer norm, in place: the same as `prune_layernorm_out_channels`."""
    edit = Edit(layer, (nn.LayerNorm, nn.RMSNorm), "prune_layernorm_in_channels", inplace)
    return _prune_last_dim(edit, idxs)


def prune_groupnorm_out_channels(layer: nn.GroupNorm, idxs: Indices, inplace: bool = True) -> nn.GroupNorm:
    """Remove channels of one group norm, in place; dependencies are the caller's.

    The groups that are left must keep equally many channels; a group that loses all of them goes.

    Args:
        layer: A group norm, affine or not.
        idxs: Channels to remove, each in `[0, layer.num_channels)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, unequal groups, or no channel left; nothing was changed.

    Example:
        >>> pruned = prune_groupnorm_out_channels(nn.GroupNorm(2, 8), [0, 5])
        >>> pruned.num_groups, pruned.num_channels
        (2, 6)
        >>> pruned = prune_groupnorm_out_channels(nn.GroupNorm(2, 8), [0, 1, 2, 3])
        >>> pruned.num_groups, pruned.num_channels
        (1, 4)
    """
    edit = Edit(layer, nn.GroupNorm, "prune_groupnorm_out_channels", inplace)
    return _prune_groups(edit, idxs)


def prune_groupnorm_in_channels(layer: nn.GroupNorm, idxs: Indices, inplace: bool = True) -> nn.GroupNorm:
    """Remove channels of one group norm, in place: the same as `prune_groupnorm_out_channels`."""
    edit = Edit(layer, nn.GroupNorm, "prune_groupnorm_in_channels", inplace)
    return _prune_groups(edit, idxs)


def _prune_features(edit: Edit[NormT], idxs: Indices) -> NormT:
    keep = edit.keep(idxs, edit.layer.num_features, "channel")
    for name in ("weight", "bias", "running_mean", "running_var"):
        edit.cut(name, (0, keep))
    edit.set(num_features=len(keep))
    return edit.commit()


def _prune_last_dim(edit: Edit[nn.LayerNorm | nn.RMSNorm], idxs: Indices) -> nn.LayerNorm | nn.RMSNorm:
    shape = edit.layer.normalized_shape
    keep = edit.keep(idxs, shape[-1], "channel")
    for name in ("weight", "bias"):
        if hasattr(edit.layer, name):  # RMS norm has no bias
            edit.cut(name, (-1, keep))
    edit.set(normalized_shape=(*shape[:-1], len(keep)))
    return edit.commit()


def _prune_groups(edit: Edit[nn.GroupNorm], idxs: Indices) -> nn.GroupNorm:
    layer = edit.layer
    keep = edit.keep(idxs, layer.num_channels, "channel")
    alive = edit.groups(keep, layer.num_channels, layer.num_groups, "channel")
    for name in ("weight", "bias"):
        edit.cut(name, (0, keep))
    edit.set(num_channels=len(keep), num_groups=len(alive))
    return edit.commit()
