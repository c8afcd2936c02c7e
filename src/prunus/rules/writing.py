"""Writes by number: the dim that is written to stays, what runs along with it is tied, the rest passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from prunus.labels import Dims, Labelled, Numbered
from prunus.rules.indexing import Picked, line_up, look_up, open_up, own_dims, pick
from prunus.rules.joins import without_context
from prunus.rules.pointwise import combine
from prunus.rules.table import Op, rule
from prunus.rules.views import move

aten = torch.ops.aten


def _values_only(op: Op, *tensors: Labelled) -> None:
    """Numbers of positions that are written as values are lost."""
    op.freeze((t.numbers for t in tensors), f"{op.name} writes the numbers of its positions")


@rule(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def scatter(op: Op, x: Labelled, dim: int, index: Labelled, source: Any = None, *args: Any, **kwargs: Any) -> Dims:
    """One position of a dim is written for each entry of the index, which runs along the other dims."""
    if x.ndim == 0 or index.ndim == 0:
        return x.dims
    dim %= x.ndim
    source = kwargs.get("src", source)
    written = [source] if isinstance(source, Labelled) and source.ndim == x.ndim else []
    _values_only(op, x, *written)
    x = look_up(op, x, dim, index.numbers)
    line_up(op, dim, index.shape[dim], (index, *written))
    parts = [x, *(Labelled(t.shape, without_context(op, t, dim)) for t in (index, *written))]
    along = {d: line_up(op, d, index.shape[d], parts) for d in range(x.ndim) if d != dim}
    return tuple(along[d] if d != dim and x.shape[d] == index.shape[d] else x.dims[d] for d in range(x.ndim))


@rule(aten.index_add, aten.index_copy, aten.index_reduce)
def index_add(op: Op, x: Labelled, dim: int, index: Labelled, source: Labelled, *args: Any, **kwargs: Any) -> Dims:
    """Positions of one dim are written by number; the other dims run along."""
    if x.ndim == 0 or source.ndim != x.ndim:
        op.freeze((*x.dims, *source.dims), f"{op.name} writes it by position")
        return x.dims
    dim %= x.ndim
    _values_only(op, x, source)
    x = look_up(op, x, dim, index.numbers)
    own = source.dims[dim]
    if own is not None and (own.context or index.ndim == 0):
        op.freeze([own], f"{op.name} pairs it with the numbers by position")
    elif index.ndim:
        line_up(op, 0, index.shape[0], (index, Labelled(index.shape, (own,))))
    source = Labelled(source.shape, without_context(op, source, dim))
    return tuple(x.dims[d] if d == dim else line_up(op, d, x.shape[d], (x, source)) for d in range(x.ndim))


@rule(aten.index_fill)
def index_fill(op: Op, x: Labelled, dim: int, index: Labelled, value: Any) -> Dims:
    """Positions of one dim are overwritten with one value."""
    _values_only(op, x)
    return look_up(op, x, dim % x.ndim, index.numbers).dims if x.ndim else x.dims


@rule(aten.index_put, aten._index_put_impl_)
def index_put(
    op: Op, x: Labelled, indices: Sequence[Labelled | None], values: Labelled, accumulate: bool = False, *args: Any
) -> Dims:
    """Advanced indexing on the left of an assignment."""
    picked = pick(x, indices, [t == torch.bool for t in op.dtypes[1:-1]])
    order = _inverted(op, x, picked, values)
    if order is not None:
        return order
    _values_only(op, x, values)
    if len(picked.consumed) == 1 and picked.consumed[0][1] and max(values.shape, default=1) == 1:
        return _filled(op, x, picked)
    x = open_up(op, x, picked)
    for index, mask, dims in picked.consumed:
        if mask:
            op.freeze((*(x.dims[d] for d in dims), *index.dims), f"{op.name} writes to it by a mask")
            for d in dims:
                x = Labelled(x.shape, without_context(op, x, d))
    shape, labels = _target(op, x, picked, values)
    combine(op, [Labelled(shape, labels), values], shape)
    return tuple(x.dims)


def _filled(op: Op, x: Labelled, picked: Picked) -> Dims:
    """One value under one mask: the mask runs along the dims that it covers."""
    index, _, dims = picked.consumed[0]
    shape = tuple(n if d in dims else 1 for d, n in enumerate(x.shape))
    labels = iter(index.dims)
    wide = tuple(next(labels) if d in dims else None for d in range(x.ndim))
    wide = tuple(label.rename(dims) if label is not None else None for label in wide)
    return tuple(combine(op, [x, Labelled(shape, wide)], x.shape))


def _target(op: Op, x: Labelled, picked: Picked, values: Labelled) -> tuple[tuple[int, ...], Dims]:
    """Shape and labels of what is written to; how many positions a mask picks is read from the values."""
    masked = any(mask for _, mask, _ in picked.consumed)
    fresh = (1,) if masked else np.broadcast_shapes(*(i.shape for i, _, _ in picked.consumed))
    ndim = len(picked.rest) + len(fresh)
    if masked and values.ndim >= ndim - picked.place:
        fresh = (values.shape[values.ndim - ndim + picked.place],)
    own = own_dims(op, picked, tuple(fresh))
    order: list[int | None] = [None] * ndim
    shape = [*fresh] * ndim if ndim else []
    for k, d in zip(picked.places(), picked.rest, strict=True):
        order[k], shape[k] = d, x.shape[d]
    out = list(move(x, order))
    where = range(picked.place, ndim)
    for k, label in enumerate(own):
        shape[picked.place + k] = fresh[k]
        out[picked.place + k] = label.rename(where) if label is not None else None
    return tuple(shape), tuple(out)


def _inverted(op: Op, x: Labelled, picked: Picked, values: Labelled) -> Dims | None:
    """``inverse[order] = arange(n)``: for each position its number in the order."""
    if values.numbers is None or len(picked.consumed) != 1 or x.ndim != 1 or values.ndim != 1:
        return None
    order = picked.consumed[0][0]
    label, own = order.dims[0] if order.ndim == 1 else None, values.dims[0]
    if label is None or own is None or own.ids is not values.numbers.ids or x.dims[0] is not None:
        return None
    if order.numbers is None or order.numbers.ids.size or x.shape != order.shape:
        return None
    op.couple(label, own)
    return Numbered((None,), label)


@rule(aten.masked_scatter)
def masked_scatter(op: Op, x: Labelled, mask: Labelled, source: Labelled) -> Dims:
    """Values are put under a mask one after another; a mask that only repeats along the last dim leaves it in step."""
    last = mask.dims[-1] if mask.ndim else None
    even = mask.ndim > 0 and (mask.shape[-1] == 1 or (last is not None and id(last.ids) in op.ledger.uniform))
    reason = f"{op.name} fills it position by position"
    if not even or source.ndim == 0 or x.ndim == 0 or source.shape[-1] != x.shape[-1]:
        for t in op.inputs:
            op.freeze(t.dims, reason)
        return x.dims
    for t in op.inputs:
        op.freeze(t.dims[:-1], reason)
    x, source = (_plain(op, t) for t in (x, source))
    label = x.dims[-1] if mask.shape[-1] == 1 else op.couple(x.dims[-1], last)
    return (*x.dims[:-1], op.couple(label, source.dims[-1]))


def _plain(op: Op, x: Labelled) -> Labelled:
    """``x`` whose last label depends on no other dim."""
    for d in range(x.ndim - 1):
        x = Labelled(x.shape, without_context(op, x, d))
    return x
