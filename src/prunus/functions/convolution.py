"""One convolution at a time: plain, transposed, grouped and depthwise, in one, two or three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from prunus.errors import InputError
from prunus.functions._edit import Edit, Indices

__all__ = [
    "prune_conv_in_channels",
    "prune_conv_out_channels",
    "prune_depthwise_conv_in_channels",
    "prune_depthwise_conv_out_channels",
]


def prune_conv_out_channels(layer: _ConvNd, idxs: Indices, inplace: bool = True) -> _ConvNd:
    """Remove output channels of one convolution, in place; whatever reads them is the caller's to prune.

    In a grouped convolution the groups that are left must keep equally many. A group that loses all its output
    channels goes, and its input channels with it.

    Args:
        layer: Any convolution or transposed convolution of `torch.nn`.
        idxs: Output channels to remove, each in `[0, layer.out_channels)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, unequal groups, or no channel left; nothing was changed.

    Example:
        >>> from torch import nn
        >>> prune_conv_out_channels(nn.Conv2d(3, 8, 3), [0, 5])
        Conv2d(3, 6, kernel_size=(3, 3), stride=(1, 1))
        >>> prune_conv_out_channels(nn.Conv2d(4, 8, 1, groups=2), [0, 1, 2, 3])
        Conv2d(2, 4, kernel_size=(1, 1), stride=(1, 1))
    """
    edit = Edit(layer, _ConvNd, "prune_conv_out_channels", inplace)
    return _prune_out(edit, idxs)


def prune_conv_in_channels(layer: _ConvNd, idxs: Indices, inplace: bool = True) -> _ConvNd:
    """Remove input channels of one convolution, in place; whatever produces them is the caller's to prune.

    In a grouped convolution the groups that are left must keep equally many. A group that loses all its input
    channels goes, and its output channels with it.

    Args:
        layer: Any convolution or transposed convolution of `torch.nn`.
        idxs: Input channels to remove, each in `[0, layer.in_channels)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, unequal groups, or no channel left; nothing was changed.
    """
    edit = Edit(layer, _ConvNd, "prune_conv_in_channels", inplace)
    return _prune_in(edit, idxs)


def prune_depthwise_conv_out_channels(layer: _ConvNd, idxs: Indices, inplace: bool = True) -> _ConvNd:
    """Remove output channels of one depthwise convolution, in place, with the input channels that only they read.

    With a channel multiplier (`out_channels = k * in_channels`) remove all `k` outputs of an input channel, or
    equally many outputs of every input channel. Dependencies on other layers are the caller's.

    Args:
        layer: A convolution with `groups == in_channels`.
        idxs: Output channels to remove, each in `[0, layer.out_channels)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: The layer is not depthwise, or as for `prune_conv_out_channels`; nothing was changed.

    Example:
        >>> from torch import nn
        >>> prune_depthwise_conv_out_channels(nn.Conv2d(8, 8, 3, groups=8), [0, 5])
        Conv2d(6, 6, kernel_size=(3, 3), stride=(1, 1), groups=6)
    """
    edit = Edit(layer, _ConvNd, "prune_depthwise_conv_out_channels", inplace)
    _check_depthwise(layer, "out")
    return _prune_out(edit, idxs)


def prune_depthwise_conv_in_channels(layer: _ConvNd, idxs: Indices, inplace: bool = True) -> _ConvNd:
    """Remove input channels of one depthwise convolution, in place, with the output channels made from them.

    Dependencies on other layers are the caller's.

    Args:
        layer: A convolution with `groups == in_channels`.
        idxs: Input channels to remove, each in `[0, layer.in_channels)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: The layer is not depthwise, or as for `prune_conv_in_channels`; nothing was changed.
    """
    edit = Edit(layer, _ConvNd, "prune_depthwise_conv_in_channels", inplace)
    _check_depthwise(layer, "in")
    return _prune_in(edit, idxs)


def _check_depthwise(layer: _ConvNd, side: str) -> None:
    if layer.groups != layer.in_channels:
        raise InputError(
            f"prune_depthwise_conv_{side}_channels: {type(layer).__name__} has {layer.groups} groups for "
            f"{layer.in_channels} input channels, so it is not depthwise; use prune_conv_{side}_channels"
        )


def _prune_out(edit: Edit[_ConvNd], idxs: Indices) -> _ConvNd:
    layer = edit.layer
    keep = edit.keep(idxs, layer.out_channels, "output channel")
    alive = edit.groups(keep, layer.out_channels, layer.groups, "output channel")
    return _cut(edit, keep, _of_groups(alive, layer.in_channels // layer.groups), alive)


def _prune_in(edit: Edit[_ConvNd], idxs: Indices) -> _ConvNd:
    layer = edit.layer
    keep = edit.keep(idxs, layer.in_channels, "input channel")
    alive = edit.groups(keep, layer.in_channels, layer.groups, "input channel")
    return _cut(edit, _of_groups(alive, layer.out_channels // layer.groups), keep, alive)


def _of_groups(groups: Sequence[int], width: int) -> list[int]:
    return [group * width + offset for group in groups for offset in range(width)]


def _cut(edit: Edit[_ConvNd], keep_out: Sequence[int], keep_in: Sequence[int], alive: Sequence[int]) -> _ConvNd:
    """Cut weight, bias and sizes down to the given channels; `keep_out` and `keep_in` lie in the groups `alive`.

    The weight has one side whole in dimension 0 and the other, counted within its group, in dimension 1: a row
    reads (or, transposed, writes) only columns of its own group, so every row names its own columns.
    """
    layer = edit.layer
    rows, columns = (keep_in, keep_out) if layer.transposed else (keep_out, keep_in)
    width = (layer.out_channels if layer.transposed else layer.in_channels) // layer.groups
    per_group = torch.tensor(columns).reshape(len(alive), -1) % width
    columns_of_row = per_group.repeat_interleave(len(rows) // len(alive), dim=0)

    def select(weight: Tensor) -> Tensor:
        at = torch.tensor(rows, device=weight.device)
        if columns_of_row.shape[1] == width:
            return weight.index_select(0, at)
        return weight[at.unsqueeze(1), columns_of_row.to(weight.device)]

    edit.change("weight", select)
    edit.cut("bias", (0, keep_out))
    edit.set(out_channels=len(keep_out), in_channels=len(keep_in), groups=len(alive))
    return edit.commit()
