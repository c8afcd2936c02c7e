"""What prunes each kind of layer, under the name that scripts look it up by: `PrunerBox[OPTYPE.CONV]`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from prunus.errors import InputError
from prunus.functions import attention, convolution, dense, norms, recurrent
from prunus.functions._edit import keep_positions
from prunus.ops import OPTYPE

__all__ = ["LayerFunctions", "PrunerBox"]

_OUT = ("out_channels", "out_features", "num_features", "num_channels", "embedding_dim", "embed_dim", "hidden_size")
_IN = ("in_channels", "in_features", "num_features", "num_channels", "embedding_dim", "embed_dim", "input_size")


class LayerFunctions(NamedTuple):
    """The function for a layer's outputs and the one for its inputs, with what counts them.

    Example:
        >>> found = PrunerBox[OPTYPE.LINEAR]
        >>> found.get_out_channels(found(nn.Linear(8, 6), [0, 5]))
        4
    """

    prune_out_channels: Callable[..., Any]
    prune_in_channels: Callable[..., Any]

    def get_out_channels(self, layer: Any) -> int | None:
        """Count the output channels of `layer`; None where it has none of its own."""
        return _width(layer, _OUT)

    def get_in_channels(self, layer: Any) -> int | None:
        """Count the input channels of `layer`; None where it has none of its own."""
        return _width(layer, _IN)

    def get_out_channel_groups(self, layer: Any) -> int:
        """Count the groups that the output channels are divided in."""
        return int(getattr(layer, "groups", getattr(layer, "num_groups", 1)))

    def get_in_channel_groups(self, layer: Any) -> int:
        """Count the groups that the input channels are divided in."""
        return self.get_out_channel_groups(layer)

    def __call__(
        self, layer: Any, idxs: Sequence[int], to_output: bool = True, inplace: bool = True, dry_run: bool = False
    ) -> Any:
        """Prune one layer; see :meth:`BasePruningFunc.__call__`.

        Raises:
            InputError: an index is out of range or given twice, or no channel is left.
        """
        size = self.get_out_channels(layer) if to_output else self.get_in_channels(layer)
        if size is None:
            raise InputError(f"{type(layer).__name__} has no channels of its own")
        keep_positions(idxs, size, f"{type(layer).__name__}, {'output' if to_output else 'input'} channels")
        if dry_run:
            return layer
        target = layer if inplace else copy.deepcopy(layer)
        return (self.prune_out_channels if to_output else self.prune_in_channels)(target, list(idxs))


def _width(layer: Any, names: Sequence[str]) -> int | None:
    """The number of channels that a layer keeps as an attribute."""
    if isinstance(layer, nn.PReLU):
        return layer.num_parameters if layer.num_parameters > 1 else None
    if isinstance(layer, nn.Parameter):
        return int(layer.shape[-1])
    if hasattr(layer, "normalized_shape"):
        return int(layer.normalized_shape[-1])
    return next((int(getattr(layer, name)) for name in names if hasattr(layer, name)), None)


PrunerBox: Mapping[OPTYPE, LayerFunctions] = MappingProxyType(
    {
        OPTYPE.CONV: LayerFunctions(convolution.prune_conv_out_channels, convolution.prune_conv_in_channels),
        OPTYPE.LINEAR: LayerFunctions(dense.prune_linear_out_channels, dense.prune_linear_in_channels),
        OPTYPE.BN: LayerFunctions(norms.prune_batchnorm_out_channels, norms.prune_batchnorm_in_channels),
        OPTYPE.DEPTHWISE_CONV: LayerFunctions(
            convolution.prune_depthwise_conv_out_channels, convolution.prune_depthwise_conv_in_channels
        ),
        OPTYPE.PRELU: LayerFunctions(dense.prune_prelu_out_channels, dense.prune_prelu_in_channels),
        OPTYPE.LN: LayerFunctions(norms.prune_layernorm_out_channels, norms.prune_layernorm_in_channels),
        OPTYPE.EMBED: LayerFunctions(dense.prune_embedding_out_channels, dense.prune_embedding_in_channels),
        OPTYPE.PARAMETER: LayerFunctions(dense.prune_parameter_out_channels, dense.prune_parameter_in_channels),
        OPTYPE.MHA: LayerFunctions(
            attention.prune_multihead_attention_out_channels, attention.prune_multihead_attention_in_channels
        ),
        OPTYPE.LSTM: LayerFunctions(recurrent.prune_lstm_out_channels, recurrent.prune_lstm_in_channels),
        OPTYPE.GN: LayerFunctions(norms.prune_groupnorm_out_channels, norms.prune_groupnorm_in_channels),
        OPTYPE.IN: LayerFunctions(norms.prune_instancenorm_out_channels, norms.prune_instancenorm_in_channels),
    }
)
"""For each kind of layer what prunes it."""
