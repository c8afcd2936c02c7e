"""The attributes of ``torch.nn`` modules that repeat a width of their tensors, which modules check and users read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def mirrored(module: nn.Module) -> dict[str, Any]:
    """What the size attributes of a ``torch.nn`` module must be, given its tensors (nothing for other modules)."""
    sizes = next((_MIRRORED[kind] for kind in type(module).__mro__ if kind in _MIRRORED), None)
    return {} if sizes is None else sizes(module)


def _conv(m: Any) -> dict[str, Any]:
    first, second = m.weight.shape[:2]
    if isinstance(m, _ConvTransposeNd):
        return {"in_channels": first, "out_channels": second * m.groups}
    return {"out_channels": first, "in_channels": second * m.groups}


def _norm(m: Any) -> dict[str, Any]:
    found = next((t for t in (m.weight, m.running_mean) if t is not None), None)
    return {} if found is None else {"num_features": found.shape[0]}


def _recurrent(m: Any) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3}.get(m.mode, 1)
    found = {"input_size": m.weight_ih_l0.shape[1], "hidden_size": m.weight_ih_l0.shape[0] // gates}
    if m.proj_size:
        found["proj_size"] = m.weight_hr_l0.shape[0]
    return found


def _cell(m: Any) -> dict[str, Any]:
    return {"input_size": m.weight_ih.shape[1], "hidden_size": m.weight_hh.shape[1]}


def _attention(m: Any) -> dict[str, Any]:
    width = m.in_proj_weight.shape[1] if m._qkv_same_embed_dim else m.q_proj_weight.shape[1]  # of the queries
    found = {"embed_dim": width, "kdim": width, "vdim": width, "head_dim": width // m.num_heads}
    if not m._qkv_same_embed_dim:
        found.update(kdim=m.k_proj_weight.shape[1], vdim=m.v_proj_weight.shape[1])
    return found


_MIRRORED: dict[type, Callable[[Any], dict[str, Any]]] = {
    _ConvNd: _conv,
    nn.Linear: lambda m: dict(zip(("out_features", "in_features"), m.weight.shape, strict=True)),
    nn.Bilinear: lambda m: dict(zip(("out_features", "in1_features", "in2_features"), m.weight.shape, strict=True)),
    nn.Embedding: lambda m: dict(zip(("num_embeddings", "embedding_dim"), m.weight.shape, strict=True)),
    _NormBase: _norm,
    nn.LayerNorm: lambda m: {} if m.weight is None else {"normalized_shape": tuple(m.weight.shape)},
    nn.RMSNorm: lambda m: {} if m.weight is None else {"normalized_shape": tuple(m.weight.shape)},
    nn.GroupNorm: lambda m: {} if m.weight is None else {"num_channels": m.weight.shape[0]},
    nn.PReLU: lambda m: {"num_parameters": m.weight.shape[0]},
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _cell,
    nn.MultiheadAttention: _attention,
}
