"""Normalisation: the normalised dims are tied to weights, biases and running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prunus.labels import Dims, Label, Labelled
from prunus.rules.joins import without_context
from prunus.rules.table import Op, rule

aten = torch.ops.aten


def _with_vectors(op: Op, label: Label | None, vectors: Sequence[Labelled | None]) -> Label | None:
    """A dim's label after tying one entry of each vector to each of its positions."""
    for vector in vectors:
        if vector is not None and vector.shape and vector.shape[0] > 1:
            label = op.couple(label, vector.dims[0])
    return label


@rule(
    aten.batch_norm,
    aten.instance_norm,
    aten.cudnn_batch_norm,
    aten.native_batch_norm,
    aten._native_batch_norm_legit_no_training,
    aten._native_batch_norm_legit,
    aten._batch_norm_with_update,
)
def batch_norm(op: Op, x: Labelled, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """Each channel is normalised by itself."""
    vectors = [a for a in args[:4] if isinstance(a, Labelled)]
    channel = 1 if x.ndim > 1 else 0
    label = _with_vectors(op, x.dims[channel], vectors)
    if not vectors and label is not None:
        op.require_attribute("num_features", x.shape[channel], label.ids)
    dims = (*x.dims[:channel], label, *x.dims[channel + 1 :])
    if len(args) > 4 and args[4] is True:  # by the statistics of what it sees
        for other in (*x.dims[:channel], *x.dims[channel + 1 :]):
            op.averages(other)
    if len(op.shapes) == 1:
        return dims
    statistics = (label,) if label is not None and not label.context else None
    return [dims, *(statistics if shape == (x.shape[channel],) else None for shape in op.shapes[1:])]


@rule(aten.layer_norm, aten.native_layer_norm, aten.rms_norm, aten._fused_rms_norm)
def layer_norm(
    op: Op, x: Labelled, normalized_shape: Sequence[int], weight: Labelled | None = None, bias: Any = None, *args: Any
) -> Dims | list[Dims | None]:
    """The last dims are averaged over; their entries of weight and bias go with them."""
    first = x.ndim - len(normalized_shape)
    dims = list(x.dims)
    for vector in (weight, bias):
        if isinstance(vector, Labelled):
            for k, d in enumerate(range(first, x.ndim)):
                if x.shape[d] > 1:
                    dims[d] = op.couple(dims[d], vector.dims[k])
    for d in range(first, x.ndim):
        op.averages(dims[d])
    op.require_sizes(normalized_shape, dims[first:])
    if any(d is not None and d.context for d in dims[:first]):
        for d in range(first, x.ndim):
            dims[:first] = without_context(op, Labelled(x.shape, tuple(dims)), d)[:first]
    if len(op.shapes) == 1:
        return tuple(dims)
    statistics = (*dims[:first], *[None] * (x.ndim - first))
    return [tuple(dims), *(statistics if len(shape) == x.ndim else None for shape in op.shapes[1:])]


@rule(aten.group_norm)
def group_norm(
    op: Op, x: Labelled, num_groups: int, weight: Labelled | None = None, bias: Labelled | None = None, *args: Any
) -> Dims:
    """Channels are averaged over inside groups, which stay equally wide."""
    return _group_norm(op, x, num_groups, weight, bias)


@rule(aten.native_group_norm)
def native_group_norm(
    op: Op,
    x: Labelled,
    weight: Labelled | None,
    bias: Labelled | None,
    n: int,
    c: int,
    hxw: int,
    group: int,
    eps: float,
) -> list[Dims | None]:
    """The kernel behind ``group_norm``."""
    dims = _group_norm(op, x, group, weight, bias)
    made = dims[1]
    if made is None or made.context:
        return [dims, None, None]
    by_group = (
        made if x.shape[1] == group else Label(op.ledger.rows(made.ids.reshape(group, -1))) if group > 1 else None
    )
    return [dims, *[(dims[0], by_group)] * 2]


def _group_norm(op: Op, x: Labelled, groups: int, weight: Labelled | None, bias: Labelled | None) -> Dims:
    label = _with_vectors(op, x.dims[1], [weight, bias])
    if label is None:
        return x.dims
    if weight is None and bias is None:
        op.require_attribute("num_channels", x.shape[1], label.ids)
    if x.shape[1] == groups:
        op.require_argument(groups, "num_groups", 1, label.ids)
    elif groups > 1:
        rows = label.ids.reshape(*label.ids.shape[:-1], groups, -1)
        coarse = op.ledger.rows(rows)
        op.ledger.balance(rows, "groups of a group norm are equally wide")
        op.require_argument(groups, "num_groups", 1, coarse)
    if x.shape[1] > groups:
        op.averages(label)
    return (x.dims[0], label, *x.dims[2:])


@rule(aten._weight_norm_interface)
def weight_norm(op: Op, v: Labelled, g: Labelled, dim: int = 0) -> list[Dims | None]:
    """Each slice of a weight along ``dim`` is scaled to a length of its own."""
    scaled = each_by_itself(op, v, dim % v.ndim)
    op.averages(scaled[dim])  # a slice of zeros has no direction
    label = op.couple(scaled[dim], g.dims[dim]) if g.shape[dim] > 1 else scaled[dim]
    dims = (*scaled[:dim], label, *scaled[dim + 1 :])
    return [dims, tuple(label if d == dim else None for d in range(g.ndim))]


@rule(aten.norm_except_dim)
def norm_except_dim(op: Op, v: Labelled, power: int = 2, dim: int = 0) -> Dims:
    """The length of each slice along ``dim`` (-1: of the whole)."""
    if dim == -1:
        for d in range(v.ndim):
            op.averages(v.dims[d])
            v = Labelled(v.shape, without_context(op, v, d))
        return (None,) * len(op.shape)
    label = each_by_itself(op, v, dim)[dim]
    op.averages(label)  # a slice of zeros has no direction
    return tuple(label if d == dim else None for d in range(len(op.shape)))


@rule(aten.renorm)
def renorm(op: Op, x: Labelled, p: float, dim: int, maxnorm: float) -> Dims:
    """Slices along ``dim`` that are too long are scaled down."""
    return each_by_itself(op, x, dim % x.ndim)


def each_by_itself(op: Op, x: Labelled, dim: int) -> Dims:
    """The labels of a tensor whose slices along ``dim`` are normalised over everything in them."""
    for d in range(x.ndim):
        if d != dim:
            op.averages(x.dims[d])
            kept = without_context(op, x, d)
            x = Labelled(x.shape, (*x.dims[:dim], kept[dim], *x.dims[dim + 1 :]))
    return x.dims
