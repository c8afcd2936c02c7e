"""Look-ups by number: the indexed dim and the index's own dims stay; the rest passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prunus.labels import Dims, Labelled
from prunus.rules.joins import without_context
from prunus.rules.table import Op, rule
from prunus.rules.views import move

aten = torch.ops.aten


@rule(aten.embedding)
def embedding(op: Op, weight: Labelled, indices: Labelled, *args: Any) -> Dims:
    """Rows of a table: the table's width passes."""
    op.freeze(weight.dims[:1], "its rows are looked up by number")
    op.freeze(indices.dims, "it indexes a table")
    op.hands_on(weight.dims[1])
    return (*[None] * indices.ndim, weight.dims[1])


@rule(aten.index_select)
def index_select(op: Op, x: Labelled, dim: int, index: Labelled) -> Dims:
    """Positions of one dim by number."""
    dims = list(_freeze_dim(op, x, dim % x.ndim).dims)
    op.freeze(index.dims, "it indexes a tensor")
    dims[dim % x.ndim] = None
    return tuple(dims)


def _freeze_dim(op: Op, x: Labelled, dim: int) -> Labelled:
    op.freeze([x.dims[dim]], f"{op.name} reads it by position")
    return Labelled(x.shape, without_context(op, x, dim))


@rule(aten.index)
def index(op: Op, x: Labelled, indices: Sequence[Labelled | None]) -> Dims:
    """Advanced indexing: the indexed dims are replaced by the index's."""
    if any(i is not None and i.ndim == 0 for i in indices) or len(op.shape) == 0:
        return _all_frozen(op, x)
    used = [d for d, i in enumerate(indices) if i is not None]
    for d in used:
        x = _freeze_dim(op, x, d)
        op.freeze(indices[d].dims if indices[d] is not None else (), "it indexes a tensor")  # type: ignore[union-attr]
    rest = [d for d in range(x.ndim) if d not in used]
    fresh = len(op.shape) - len(rest)
    if fresh < 0 or any(op.shape[k] != x.shape[d] for k, d in _places(rest, used, fresh)):
        return _all_frozen(op, x)
    order: list[int | None] = [None] * len(op.shape)
    for k, d in _places(rest, used, fresh):
        order[k] = d
    return move(x, order)


def _places(rest: Sequence[int], used: Sequence[int], fresh: int) -> list[tuple[int, int]]:
    """Output dim and input dim of each dim that is not indexed."""
    adjacent = used == list(range(used[0], used[-1] + 1)) if used else True
    first = used[0] if used and adjacent else 0
    return [(k if k < first else k + fresh, d) for k, d in enumerate(rest)]


def _all_frozen(op: Op, x: Labelled) -> Dims:
    op.freeze(x.dims, f"{op.name} reads it by position")
    return (None,) * len(op.shape)


@rule(aten.item, aten._local_scalar_dense, aten.equal, aten.is_nonzero)
def read(op: Op, *args: Any) -> None:
    """Python reads values; no tensor comes out."""
    for x in op.inputs:
        op.freeze(x.dims, f"{op.name} hands its values to Python")
