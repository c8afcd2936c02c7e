"""Pointwise ops and broadcasting: dims that line up are tied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from prunus.labels import Dims, Label, Labelled
from prunus.rules.table import Op, rule

aten = torch.ops.aten


@rule(
    aten.clone,
    aten.alias,
    aten.detach,
    aten.contiguous,
    aten.to,
    aten._to_copy,
    aten.lift_fresh,
    aten.lift_fresh_copy,
    aten.type_as,
    aten.dropout,
    aten.dropout_,
    aten.native_dropout,
    aten.feature_dropout,
    aten.alpha_dropout,
    aten.feature_alpha_dropout,
    aten.copy_,
    aten.fill_,
    aten.zero_,
    aten.bernoulli,
    aten.bernoulli_,
    aten.normal_,
    aten.uniform_,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.empty_like,
    aten.rand_like,
    aten.randn_like,
    aten.hardswish,
    aten.hardsigmoid,
    aten.hardtanh,
    aten.relu6,
    aten.prelu,
    aten._prelu_kernel,
    aten.rrelu,
    aten.rrelu_with_noise,
    aten.rsub,
    aten.masked_fill,
    aten.floor_divide,
    aten.fake_quantize_per_tensor_affine,
    aten.fake_quantize_per_tensor_affine_cachemask,
    aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams,
    aten._conj,
    aten._conj_physical,
    aten._neg_view,
    aten.resolve_conj,
    aten.resolve_neg,
    aten.complex,
    aten.polar,
    aten.log_sigmoid_forward,
    aten.normal.Tensor_float,
    aten.normal.Tensor_Tensor,
    aten.normal.float_Tensor,
    aten.exponential,
    aten.exponential_,
    aten.cauchy_,
    aten.geometric_,
    aten.log_normal_,
    aten.random_,
    aten.randint_like,
    aten.fill,
    aten.copy,
    aten._assert_async,
    aten._linalg_check_errors,
)
def pointwise(op: Op, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """Every dim of the output stems from the same dim of each input that is not broadcast along it."""
    if op.name in ("prelu", "_prelu_kernel") and op.inputs[1].ndim == 1 and op.inputs[0].ndim > 1:
        return _prelu(op, *op.inputs)
    if op.ledger.guards and op.name.endswith("_like"):
        return _like(op, op.inputs[0])
    dims = [combine(op, op.inputs, shape) for shape in op.shapes]
    return dims[0] if len(dims) == 1 else list(dims)


def _prelu(op: Op, x: Labelled, weight: Labelled) -> Dims:
    if weight.shape[0] == 1:
        return x.dims
    channel = op.couple(x.dims[1], weight.dims[0])
    return (x.dims[0], channel, *x.dims[2:])


def _like(op: Op, x: Labelled) -> Dims:
    """A new tensor has no part in the order of an arranged dim, which has a fixed size."""
    arranged = {id(g.effect) for g in op.ledger.guards}
    return tuple(None if d is not None and id(d.ids) in arranged else d for d in x.dims)


def combine(op: Op, tensors: list[Labelled], shape: tuple[int, ...]) -> Dims:
    """The labels of the broadcast of ``tensors``, after tying what lines up."""
    if len(tensors) == 1 and tensors[0].shape == shape:
        return tensors[0].dims
    aligned = [_shifted(t, len(shape)) for t in tensors if t.shape]
    return tuple(
        _combine_dim(op, size, [(t, d + len(t.shape) - len(shape)) for t in aligned]) if size > 1 else None
        for d, size in enumerate(shape)
    )


def _shifted(tensor: Labelled, ndim: int) -> Labelled:
    """The tensor's labels with their contexts counted in the output's dims."""
    offset = ndim - tensor.ndim
    if offset == 0 or not tensor.labelled:
        return tensor
    where = range(offset, ndim)
    return Labelled(tensor.shape, tuple(d.rename(where) if d is not None else None for d in tensor.dims))


def _combine_dim(op: Op, size: int, parts: list[tuple[Labelled, int]]) -> Label | None:
    found: Label | None = None
    blank = False
    for tensor, dim in parts:
        if dim < 0 or tensor.shape[dim] != size:
            continue
        label = tensor.dims[dim]
        if label is None:
            blank = True
        else:
            found = label if found is None else op.couple(found, label)
    if blank and found is not None:
        op.ledger.freeze(found.ids, f"{op.name} combines it with a dimension of fixed size")
    return found


WHOLE_NUMBERS = "each channel has a zero point that stands beside no scales; prune before preparing quantisation"


def _quantized(op: Op, x: Labelled, axis: int, vectors: Iterable[Labelled]) -> Dims | list[Dims | None]:
    """``x``, whose channels each have a number of every vector."""
    label = x.dims[axis]
    for vector in vectors:
        if vector.ndim == 1 and vector.shape[0] > 1:
            label = op.couple(label, vector.dims[0], WHOLE_NUMBERS)
    axis %= x.ndim
    dims = (*x.dims[:axis], label, *x.dims[axis + 1 :])
    return dims if len(op.shapes) == 1 else [dims, dims]


@rule(aten.fake_quantize_per_channel_affine, aten.fake_quantize_per_channel_affine_cachemask)
def quantize_channels(
    op: Op, x: Labelled, scale: Labelled, zero_point: Labelled, axis: int, *args: Any
) -> Dims | list[Dims | None]:
    """Each channel has a scale and a zero point of its own."""
    return _quantized(op, x, axis, (scale, zero_point))


@rule(aten._fused_moving_avg_obs_fq_helper, aten.fused_moving_avg_obs_fake_quant)
def observe_and_quantize(
    op: Op, x: Labelled, on: Labelled, quantizes: Labelled, *args: Any, **kwargs: Any
) -> Dims | list[Dims | None]:
    """Quantisation with ranges that the op itself observes: of the whole tensor, or of each channel."""
    return _quantized(op, x, args[7], args[:4])
