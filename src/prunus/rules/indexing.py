"""Look-ups by number: the dim that is looked up stays, unless what numbers it numbers these very positions.

An index has dims of its own. The output's position ``k`` along them stems from the index's position ``k``, so their
labels pass; an index that was only repeated along a dim (``index.view(-1, 1).expand_as(x)``) does not hold that dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from prunus.labels import Dims, Label, Labelled
from prunus.rules.joins import without_context
from prunus.rules.pointwise import combine
from prunus.rules.table import Op, rule
from prunus.rules.views import move

aten = torch.ops.aten


def look_up(op: Op, x: Labelled, dim: int, numbers: Label | None) -> Labelled:
    """``x`` is read (or written) at some positions of ``dim``, which ``numbers`` says are numbered like its own."""
    label = x.dims[dim]
    if numbers is not None and label is not None and numbers.ids.shape == label.ids.shape:
        op.ledger.couple(label, numbers)
    else:
        op.freeze([label], f"{op.name} reads it by position")
        op.freeze([numbers], f"{op.name} looks up a dimension of fixed size by the numbers of its positions")
    return Labelled(x.shape, without_context(op, x, dim))


def line_up(op: Op, dim: int, size: int, tensors: Iterable[Labelled]) -> Label | None:
    """One dim of tensors that run along it together; where one is longer, only its first positions take part."""
    found: Label | None = None
    blank = False
    for t in tensors:
        label = t.dims[dim]
        if t.shape[dim] != size:
            op.freeze([label], f"{op.name} takes only a part of it")
            continue
        blank = blank or label is None
        if label is not None:
            found = label if found is None else op.couple(found, label)
    if blank and found is not None and size > 1:
        op.freeze([found], f"{op.name} combines it with a dimension of fixed size")
    return found if size > 1 else None


@rule(aten.embedding)
def embedding(op: Op, weight: Labelled, indices: Labelled, *args: Any) -> Dims:
    """Rows of a table: the table's width passes, and so do the dims of the index."""
    weight = look_up(op, weight, 0, indices.numbers)
    op.hands_on(weight.dims[1])
    return (*indices.dims, weight.dims[1])


@rule(aten.embedding_bag, aten._embedding_bag, aten._embedding_bag_forward_only)
def embedding_bag(op: Op, weight: Labelled, indices: Labelled, *args: Any, **kwargs: Any) -> list[Dims | None]:
    """Rows of a table, summed by bags: the table's width passes."""
    weight = look_up(op, weight, 0, None)
    for t in op.inputs[1:]:
        op.freeze(t.dims, f"{op.name} reads it by position")
    op.hands_on(weight.dims[1])
    return [(None, weight.dims[1]), *[None] * (len(op.shapes) - 1)]


@rule(aten.index_select)
def index_select(op: Op, x: Labelled, dim: int, index: Labelled) -> Dims:
    """Positions of one dim by number."""
    if x.ndim == 0:
        return x.dims
    dim %= x.ndim
    dims = list(look_up(op, x, dim, index.numbers).dims)
    dims[dim] = index.dims[0].rename([dim]) if index.ndim and index.dims[0] is not None else None
    return tuple(dims)


@rule(aten.gather)
def gather(op: Op, x: Labelled, dim: int, index: Labelled, **kwargs: Any) -> Dims:
    """One position of a dim for each entry of the index, which runs along the other dims with the tensor."""
    if x.ndim == 0 or index.ndim == 0:
        return (None,) * len(op.shape)
    dim %= x.ndim
    x = look_up(op, x, dim, index.numbers)
    return tuple(
        index.dims[d] if d == dim else line_up(op, d, index.shape[d], (x, index)) for d in range(len(op.shape))
    )


@rule(aten.take_along_dim)
def take_along_dim(op: Op, x: Labelled, indices: Labelled, dim: int | None = None) -> Dims:
    """A gather in which dims of size 1 broadcast."""
    if dim is None or x.ndim != indices.ndim:
        return all_frozen(op, x, indices)
    dim %= x.ndim
    x = look_up(op, x, dim, indices.numbers)
    rest = Labelled((*x.shape[:dim], 1, *x.shape[dim + 1 :]), (*x.dims[:dim], None, *x.dims[dim + 1 :]))
    return tuple(combine(op, [rest, indices], op.shape))


class Picked(NamedTuple):
    """How an index list cuts a tensor: what each index consumes, what it leaves, and where the index's dims go."""

    consumed: list[tuple[Labelled, bool, tuple[int, ...]]]  # index, whether it is a mask, dims
    rest: list[int]
    place: int
    fresh: int

    def places(self) -> list[int]:
        """The output dim of each dim in ``rest``."""
        return [k if k < self.place else k + self.fresh for k in range(len(self.rest))]


def pick(x: Labelled, indices: Sequence[Labelled | None], masks: Sequence[bool]) -> Picked:
    """Lay an index list out over the dims of ``x``."""
    consumed: list[tuple[Labelled, bool, tuple[int, ...]]] = []
    rest: list[int] = []
    dim, kinds = 0, iter(masks)
    for index in indices:
        if index is None:
            rest.append(dim)
            dim += 1
            continue
        mask = next(kinds)
        wide = index.ndim if mask else 1
        consumed.append((index, mask, tuple(range(dim, dim + wide))))
        dim += wide
    rest += range(dim, x.ndim)
    used = [k for k, index in enumerate(indices) if index is not None]
    adjacent = used == list(range(used[0], used[-1] + 1)) if used else True
    place = sum(d < consumed[0][2][0] for d in rest) if consumed and consumed[0][2] and adjacent else 0
    return Picked(consumed, rest, place, max((1 if mask else i.ndim for i, mask, _ in consumed), default=0))


def open_up(op: Op, x: Labelled, picked: Picked) -> Labelled:
    """``x`` after each of its dims that are looked up by number was dealt with (not those under masks)."""
    for index, mask, dims in picked.consumed:
        if not mask:
            x = look_up(op, x, dims[0], index.numbers)
    return x


def own_dims(op: Op, picked: Picked, shape: tuple[int, ...]) -> Dims:
    """The labels that the index's own dims give."""
    tensors = [i for i, mask, _ in picked.consumed if not mask]
    if not tensors or any(mask for _, mask, _ in picked.consumed):
        for t in tensors:
            op.freeze(t.dims, f"{op.name} pairs it with a mask")
        return (None,) * len(shape)
    return tuple(combine(op, tensors, shape))


@rule(aten.index)
def index(op: Op, x: Labelled, indices: Sequence[Labelled | None]) -> Dims:
    """Advanced indexing: the indexed dims are replaced by the index's."""
    picked = pick(x, indices, [t == torch.bool for t in op.dtypes[1:]])
    if len(op.shape) != len(picked.rest) + picked.fresh:
        return all_frozen(op, *op.inputs)
    x = open_up(op, x, picked)
    own = own_dims(op, picked, op.shape[picked.place : picked.place + picked.fresh])
    chosen = _under_masks(op, x, picked)
    for _, mask, dims in picked.consumed:
        for d in dims if mask else ():
            x = Labelled(x.shape, without_context(op, x, d))
    order: list[int | None] = [None] * len(op.shape)
    for k, d in zip(picked.places(), picked.rest, strict=True):
        order[k] = d
    out = list(move(x, order))
    where = range(picked.place, len(op.shape))
    for k, label in enumerate(own):
        out[picked.place + k] = label.rename(where) if label is not None else None
    if chosen is not None:
        out[picked.place] = chosen
    return tuple(out)


def _under_masks(op: Op, x: Labelled, picked: Picked) -> Label | None:
    """What a mask picks comes in the order of the dims under it: nothing may depend on it, or they stay."""
    found = []
    for index, mask, dims in picked.consumed:
        for d, own in zip(dims if mask else (), index.dims, strict=False):
            label = op.couple(x.dims[d], own.rename(dims) if own is not None else None)
            if label is not None:
                found.append(label)
    size = op.shape[picked.place] if picked.fresh else 0
    return arranged(op, found, size, f"{op.name} picks positions of it by a mask")


def arranged(op: Op, causes: Sequence[Label], size: int, reason: str) -> Label | None:
    """A label for a dim whose positions come in the order of other dims."""
    if not causes:
        return None
    if size <= 1:
        op.freeze(causes, reason)
        return None
    return Label(op.ledger.arrange(np.concatenate([c.ids.reshape(-1) for c in causes]), size, reason))


def all_frozen(op: Op, *tensors: Labelled) -> Dims:
    """What is read in a way that no label can follow."""
    for t in tensors:
        op.freeze((*t.dims, t.numbers), f"{op.name} reads it by position")
    return (None,) * len(op.shape)


@rule(aten.masked_select)
def masked_select(op: Op, x: Labelled, mask: Labelled) -> Dims:
    """The positions under a mask, in row-major order."""
    shape = np.broadcast_shapes(x.shape, mask.shape)
    found = [label for label in combine(op, [x, mask], tuple(shape)) if label is not None]
    return (arranged(op, found, op.shape[0], f"{op.name} picks positions of it by a mask"),)


@rule(aten.take, aten.nonzero, aten.argwhere, aten.nonzero_static, aten.unique_consecutive, aten.unique_dim)
@rule(aten._unique, aten._unique2, aten.isin, aten.nonzero_numpy, aten.where.default)
def by_position(op: Op, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """Positions or values are listed in an order that the numbering decides."""
    for t in op.inputs:
        op.freeze((*t.dims, t.numbers), f"{op.name} lists its positions or values")
    return [None] * len(op.shapes)


@rule(aten.repeat_interleave.self_Tensor, aten.repeat_interleave.Tensor)
def repeat_interleave(op: Op, x: Labelled, repeats: Any = None, dim: int | None = None, **kwargs: Any) -> Dims:
    """Each position as often as a tensor says."""
    if dim is None:
        return all_frozen(op, *op.inputs)
    dim %= x.ndim
    dims = list(look_up(op, x, dim, None).dims)
    for t in op.inputs[1:]:
        op.freeze(t.dims, f"{op.name} reads it by position")
    dims[dim] = None
    return tuple(dims)


@rule(aten.searchsorted, aten.bucketize)
def search(op: Op, first: Labelled, second: Labelled | float, *args: Any, **kwargs: Any) -> Dims:
    """Values are looked up in a sorted list: the list stays, the dims of the values pass."""
    values, table = (second, first) if op.name == "searchsorted" else (first, second)
    if not isinstance(values, Labelled):
        return all_frozen(op, *op.inputs)
    if isinstance(table, Labelled):
        op.freeze(table.dims[-1:], f"{op.name} searches in it")
        if table.ndim > 1:
            where = (*table.shape[:-1], 1)
            return tuple(combine(op, [values, Labelled(where, (*without_context(op, table, -1)[:-1], None))], op.shape))
    return tuple(values.dims)


@rule(aten.segment_reduce)
def segment_reduce(op: Op, data: Labelled, *args: Any, axis: int = 0, **kwargs: Any) -> Dims:
    """Runs of one dim are reduced to a position each."""
    axis %= data.ndim
    dims = list(look_up(op, data, axis, None).dims)
    for t in op.inputs[1:]:
        op.freeze(t.dims, f"{op.name} reads it by position")
    dims[axis] = None
    return tuple(dims)


@rule(aten.item, aten._local_scalar_dense, aten.equal, aten.is_nonzero)
def read(op: Op, *args: Any) -> None:
    """Python reads values; no tensor comes out."""
    for x in op.inputs:
        op.freeze(x.dims, f"{op.name} hands its values to Python")


@rule(aten.diagonal)
def diagonal(op: Op, x: Labelled, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Dims:
    """Positions of two dims that are equal: they go together."""
    dim1, dim2 = dim1 % x.ndim, dim2 % x.ndim
    x = Labelled(x.shape, without_context(op, Labelled(x.shape, without_context(op, x, dim1)), dim2))
    label = x.dims[dim1]
    if offset or x.shape[dim1] != x.shape[dim2]:
        op.freeze([label, x.dims[dim2]], f"{op.name} pairs it with another dimension by position")
        label = None
    else:
        label = op.couple(label, x.dims[dim2])
    rest = [d for d in range(x.ndim) if d not in (dim1, dim2)]
    dims = move(x, rest)
    label = label.rename({d: k for k, d in enumerate(rest)}) if label is not None else None
    return (*dims, label)


@rule(aten.diag_embed)
def diag_embed(op: Op, x: Labelled, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Dims:
    """The last dim becomes the diagonal of two dims."""
    ndim = x.ndim + 1
    first, second = sorted((dim1 % ndim, dim2 % ndim))
    if offset or (first, second) != (ndim - 2, ndim - 1):
        return all_frozen(op, x)
    return (*without_context(op, x, x.ndim - 1)[:-1], x.dims[-1], x.dims[-1])


@rule(aten.tril, aten.triu)
def triangle(op: Op, x: Labelled, diagonal: int = 0) -> Dims:
    """The last two dims are compared by position."""
    op.freeze(x.dims[-2:], f"{op.name} compares its positions with those of another dimension")
    return x.dims
