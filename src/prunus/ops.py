"""Kinds of layers under the names that scripts compare with; the engine itself knows no kinds of layers."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

TORCH_CONV = _ConvNd
TORCH_BATCHNORM = _BatchNorm
TORCH_PRELU = nn.PReLU
TORCH_LINEAR = nn.Linear
TORCH_LAYERNORM = nn.LayerNorm
TORCH_EMBED = nn.Embedding
TORCH_PARAMETER = nn.Parameter
TORCH_LSTM = nn.LSTM
TORCH_MHA = nn.MultiheadAttention
TORCH_GROUPNORM = nn.GroupNorm
TORCH_INSTANCENORM = _InstanceNorm


class OPTYPE(IntEnum):
    """Kinds of layers and ops."""

    CONV = 0
    BN = 1
    LINEAR = 2
    PRELU = 3
    DEPTHWISE_CONV = 4
    CONCAT = 5
    SPLIT = 6
    CUSTOMIZED = 7
    ELEMENTWISE = 8
    LN = 9
    EMBED = 10
    PARAMETER = 11
    MHA = 12
    LSTM = 13
    RESHAPE = 14
    GN = 15
    IN = 16
    UNBIND = 17
    EXPAND = 18
    SLICE = 19
    OUTPUT = 20


_CLASSES: tuple[tuple[Any, OPTYPE], ...] = (
    (TORCH_CONV, OPTYPE.CONV),
    (TORCH_LINEAR, OPTYPE.LINEAR),
    (TORCH_INSTANCENORM, OPTYPE.IN),
    (TORCH_BATCHNORM, OPTYPE.BN),
    (TORCH_PRELU, OPTYPE.PRELU),
    (TORCH_LAYERNORM, OPTYPE.LN),
    (TORCH_EMBED, OPTYPE.EMBED),
    (TORCH_PARAMETER, OPTYPE.PARAMETER),
    (TORCH_MHA, OPTYPE.MHA),
    (TORCH_LSTM, OPTYPE.LSTM),
    (TORCH_GROUPNORM, OPTYPE.GN),
)


def module2type(module: Any) -> OPTYPE:
    """The kind of a layer; what is none of the known ones counts as element-wise.

    Example:
        >>> module2type(nn.Conv2d(4, 4, 3, groups=4)).name, module2type(nn.ReLU()).name
        ('DEPTHWISE_CONV', 'ELEMENTWISE')
    """
    kind = next((kind for layer, kind in _CLASSES if isinstance(module, layer)), OPTYPE.ELEMENTWISE)
    if kind is OPTYPE.CONV and module.groups == module.out_channels > 1:
        return OPTYPE.DEPTHWISE_CONV
    return kind


def type2class(op_type: OPTYPE) -> Any:
    """The class of layers of a kind; ``nn.Module`` for ops that are no layers.

    Example:
        >>> type2class(OPTYPE.LINEAR).__name__
        'Linear'
    """
    if op_type is OPTYPE.DEPTHWISE_CONV:
        return TORCH_CONV
    return next((layer for layer, kind in _CLASSES if kind is op_type), nn.Module)
