"""Normalisation: the normalised dims are tied to weights, biases and running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prunus.labels import Dims, Label, Labelled
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
    dims = (*x.dims[:channel], label, *x.dims[channel + 1 :])
    if len(op.shapes) == 1:
        return dims
    return [dims, *[None] * (len(op.shapes) - 1)]


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
    if len(op.shapes) == 1:
        return tuple(dims)
    return [tuple(dims), *[None] * (len(op.shapes) - 1)]


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
    return [_group_norm(op, x, group, weight, bias), None, None]


def _group_norm(op: Op, x: Labelled, groups: int, weight: Labelled | None, bias: Labelled | None) -> Dims:
    label = _with_vectors(op, x.dims[1], [weight, bias])
    if label is None:
        return x.dims
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
