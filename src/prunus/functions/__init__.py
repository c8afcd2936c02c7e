"""Prune one layer at a time, and only that layer: `prune_linear_out_channels(layer, [0, 5])`.

Every function takes `(layer, idxs, inplace=True)`: the positions to remove, not the ones to keep. It edits weights,
bias, running statistics, gradients and the size attributes, or raises `InputError` and changes nothing. Parameters
keep their identity, so optimisers and tied weights still point at them. Nothing else in the network is touched:
dependencies are the caller's, or the graph's, which uses these same functions as names for "which side of which layer".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from prunus.functions.attention import (
    prune_multihead_attention_in_channels,
    prune_multihead_attention_out_channels,
)
from prunus.functions.box import LayerFunctions, PrunerBox
from prunus.functions.convolution import (
    prune_conv_in_channels,
    prune_conv_out_channels,
    prune_depthwise_conv_in_channels,
    prune_depthwise_conv_out_channels,
)
from prunus.functions.custom import BasePruningFunc
from prunus.functions.dense import (
    prune_embedding_in_channels,
    prune_embedding_out_channels,
    prune_linear_in_channels,
    prune_linear_out_channels,
    prune_parameter_in_channels,
    prune_parameter_out_channels,
    prune_prelu_in_channels,
    prune_prelu_out_channels,
)
from prunus.functions.norms import (
    prune_batchnorm_in_channels,
    prune_batchnorm_out_channels,
    prune_groupnorm_in_channels,
    prune_groupnorm_out_channels,
    prune_instancenorm_in_channels,
    prune_instancenorm_out_channels,
    prune_layernorm_in_channels,
    prune_layernorm_out_channels,
)
from prunus.functions.recurrent import (
    prune_gru_in_channels,
    prune_gru_out_channels,
    prune_lstm_in_channels,
    prune_lstm_out_channels,
    prune_rnn_in_channels,
    prune_rnn_out_channels,
)

__all__ = [
    "PRUNERS",
    "BasePruningFunc",
    "LayerFunctions",
    "PrunerBox",
    "PruningFn",
    "functions_for",
    "is_in_channel_fn",
    "is_out_channel_fn",
    "prune_batchnorm_in_channels",
    "prune_batchnorm_out_channels",
    "prune_conv_in_channels",
    "prune_conv_out_channels",
    "prune_depthwise_conv_in_channels",
    "prune_depthwise_conv_out_channels",
    "prune_embedding_in_channels",
    "prune_embedding_out_channels",
    "prune_groupnorm_in_channels",
    "prune_groupnorm_out_channels",
    "prune_gru_in_channels",
    "prune_gru_out_channels",
    "prune_instancenorm_in_channels",
    "prune_instancenorm_out_channels",
    "prune_layernorm_in_channels",
    "prune_layernorm_out_channels",
    "prune_linear_in_channels",
    "prune_linear_out_channels",
    "prune_lstm_in_channels",
    "prune_lstm_out_channels",
    "prune_multihead_attention_in_channels",
    "prune_multihead_attention_out_channels",
    "prune_parameter_in_channels",
    "prune_parameter_out_channels",
    "prune_prelu_in_channels",
    "prune_prelu_out_channels",
    "prune_rnn_in_channels",
    "prune_rnn_out_channels",
]

PruningFn = Callable[..., Any]
"""Removes channels of one layer: `(layer, idxs, inplace=True) -> layer`."""

_DEPTHWISE = (prune_depthwise_conv_out_channels, prune_depthwise_conv_in_channels)

PRUNERS: Mapping[type, tuple[PruningFn, PruningFn]] = MappingProxyType(
    {
        _ConvNd: (prune_conv_out_channels, prune_conv_in_channels),
        nn.Linear: (prune_linear_out_channels, prune_linear_in_channels),
        _BatchNorm: (prune_batchnorm_out_channels, prune_batchnorm_in_channels),
        _InstanceNorm: (prune_instancenorm_out_channels, prune_instancenorm_in_channels),
        nn.LayerNorm: (prune_layernorm_out_channels, prune_layernorm_in_channels),
        nn.RMSNorm: (prune_layernorm_out_channels, prune_layernorm_in_channels),
        nn.GroupNorm: (prune_groupnorm_out_channels, prune_groupnorm_in_channels),
        nn.PReLU: (prune_prelu_out_channels, prune_prelu_in_channels),
        nn.Embedding: (prune_embedding_out_channels, prune_embedding_in_channels),
        nn.EmbeddingBag: (prune_embedding_out_channels, prune_embedding_in_channels),
        nn.MultiheadAttention: (prune_multihead_attention_out_channels, prune_multihead_attention_in_channels),
        nn.LSTM: (prune_lstm_out_channels, prune_lstm_in_channels),
        nn.GRU: (prune_gru_out_channels, prune_gru_in_channels),
        nn.RNN: (prune_rnn_out_channels, prune_rnn_in_channels),
        nn.Parameter: (prune_parameter_out_channels, prune_parameter_in_channels),
    }
)
"""For each layer type (its subclasses included) the function for its outputs and the one for its inputs."""

_OUT = frozenset({_DEPTHWISE[0], *(out for out, _ in PRUNERS.values())})
_IN = frozenset({_DEPTHWISE[1], *(into for _, into in PRUNERS.values())})


def functions_for(module: nn.Module | nn.Parameter) -> LayerFunctions | None:
    """Give the function for a layer's outputs and the one for its inputs; None for a layer without one.

    Example:
        >>> functions_for(nn.Linear(2, 2)) == (prune_linear_out_channels, prune_linear_in_channels)
        True
        >>> functions_for(nn.Conv2d(8, 8, 3, groups=8))[0].__name__
        'prune_depthwise_conv_out_channels'
        >>> functions_for(nn.ReLU()) is None
        True
    """
    if not isinstance(module, nn.Module):  # parameters, subclasses that `__mro__` does not show included
        return LayerFunctions(*PRUNERS[nn.Parameter])
    if isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.in_channels == module.out_channels:
        return LayerFunctions(*_DEPTHWISE)
    return next((LayerFunctions(*PRUNERS[kind]) for kind in type(module).__mro__ if kind in PRUNERS), None)


def is_out_channel_fn(fn: PruningFn) -> bool:
    """Say whether `fn` removes output channels: a function of this module, or a method of a `BasePruningFunc`."""
    owner = getattr(fn, "__self__", None)
    if isinstance(owner, BasePruningFunc):
        return fn == owner.prune_out_channels
    return fn in _OUT


def is_in_channel_fn(fn: PruningFn) -> bool:
    """Say whether `fn` removes input channels: a function of this module, or a method of a `BasePruningFunc`."""
    owner = getattr(fn, "__self__", None)
    if isinstance(owner, BasePruningFunc):
        return fn == owner.prune_in_channels
    return fn in _IN
