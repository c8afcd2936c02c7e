"""Joins and cuts: concatenation, stacking, splitting, slicing, selecting, repeating, padding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from prunus.labels import Dims, Ids, Label, Labelled, settle
from prunus.ledger import Cut
from prunus.rules.table import Op, rule
from prunus.rules.views import move, sized

aten = torch.ops.aten


def take(x: Labelled, dim: int, index: slice | Ids) -> Dims:
    """The labels of ``x`` with positions ``index`` of ``dim`` only."""

    def cut(d: int, label: Label | None) -> Label | None:
        if label is None:
            return None
        if d == dim:
            return Label(label.ids[..., index], label.context)
        if dim in label.context:
            axis = label.context.index(dim)
            return settle(Label(label.ids[(slice(None),) * axis + (index,)], label.context))
        return label

    return tuple(cut(d, label) for d, label in enumerate(x.dims))


def select_one(x: Labelled, dim: int, position: int) -> Dims:
    """The labels of ``x`` at one position of ``dim``, which is dropped."""
    kept = Labelled(x.shape, take(x, dim, slice(position, position + 1)))
    dims = tuple(
        Label(
            d.ids.take([0], axis=d.context.index(dim)).squeeze(d.context.index(dim)),
            tuple(c for c in d.context if c != dim),
        )
        if d is not None and dim in d.context
        else d
        for d in kept.dims
    )
    return move(Labelled(x.shape, dims), [d for d in range(x.ndim) if d != dim])


@rule(aten.select)
def select(op: Op, x: Labelled, dim: int, index: int) -> Dims:
    """One position of a dim, read by its number: the dim's positions may not move."""
    dim %= x.ndim
    if x.ndim == 1 and x.dims[0] is not None and op.call.pointwise():  # vectorised, for the type of one number
        return ()
    _counted(op, x.dims[dim], f"{op.name} reads it by position")
    return select_one(x, dim, index % x.shape[dim])


@rule(aten.unbind)
def unbind(op: Op, x: Labelled, dim: int = 0) -> list[Dims | None]:
    """Every position of a dim by itself: their number may not change."""
    dim %= x.ndim
    _counted(op, x.dims[dim], f"{op.name} unpacks it into a fixed number of parts")
    return [select_one(x, dim, k) for k in range(x.shape[dim])]


def _counted(op: Op, label: Label | None, reason: str) -> None:
    """The positions of a dim stay where they are; rows of them (those of a head) may go as a whole."""
    if label is not None and label.context:
        op.ledger.pin(label.ids, reason)
        op.ledger.limit(label.ids, reason, least=label.size)
    else:
        op.freeze([label], reason)


@rule(aten.slice, aten.narrow)
def slice_(
    op: Op, x: Labelled, dim: int = 0, start: int | Labelled | None = None, end: int | None = None, step: int = 1
) -> Dims:
    """A stretch of a dim; the bounds must move with the dim."""
    dim %= x.ndim
    size = x.shape[dim]
    if isinstance(start, Labelled):
        op.freeze([*x.dims, *start.dims], f"{op.name} begins at a computed position")
        return tuple(None for _ in x.dims)
    if op.name.startswith("narrow"):
        start, end = start or 0, (start or 0) + (end or 0)
    first, last, step = slice(start, end, step).indices(size)
    label = x.dims[dim]
    if label is None and step == 1 and last - first < size:
        for bound in op.call.bounds(first, last, size) or ():
            op.require_same(bound if bound is None or bound > 0 else -bound)
    if label is None or (first == 0 and last >= size and step == 1):
        return take(x, dim, slice(first, last, step)) if x.labelled else x.dims
    if 1 < step < size and size % step == 0 and first < step and last > size - step:
        _live_in_runs(op, label, step)
        return take(x, dim, slice(first, last, step))
    bounds = op.call.bounds(first, last, size) if step == 1 else None
    if bounds is None:
        op.freeze([label], f"{op.name} cuts it at fixed positions")
    else:
        _require_bounds(op, label, first, last, bounds)
        op.ledger.parts.append(label.ids[..., first:last])
        op.ledger.cuts.append(Cut(label.ids, first, last))
    return take(x, dim, slice(first, last, step))


def _live_in_runs(op: Op, label: Label, step: int) -> None:
    """Where every ``step``-th position is taken, each run of so many lives together."""
    runs = label.ids.reshape(*label.ids.shape[:-1], -1, step)
    op.ledger.tie(runs[..., :-1], runs[..., 1:])


def _require_bounds(op: Op, label: Label, first: int, last: int, bounds: tuple[Any, Any]) -> None:
    """The numbers of positions before and after each bound that the code wrote."""
    ids, size = label.ids, label.size
    for position, bound in ((first, bounds[0]), (last, bounds[1])):
        if bound is None:
            continue
        if bound < 0:
            op.require(-bound, ids[..., position:])
        elif 0 < position < size or (bound == size and position == size):
            op.require(bound, ids[..., :position])


@rule(aten.split, aten.split_with_sizes, aten.tensor_split, aten.unsafe_split, aten.unsafe_split_with_sizes)
def split(op: Op, x: Labelled, sizes: int | Sequence[int] | Labelled, dim: int = 0) -> list[Dims | None]:
    """Parts of sizes that the code names."""
    dim %= x.ndim
    ends = np.cumsum([s[dim] for s in op.shapes])
    parts = [slice(int(e) - s[dim], int(e)) for e, s in zip(ends, op.shapes, strict=True)]
    label = x.dims[dim]
    if label is not None and len(parts) > 1:
        op.ledger.cuts.extend([Cut(label.ids, part.start, part.stop) for part in parts])
        _require_parts(op, label, parts, sizes)
    elif label is None and not isinstance(sizes, Labelled):
        for asked in op.call.sizes([sizes] if isinstance(sizes, int) else list(sizes)) or ():
            op.require_same(asked)
    return [take(x, dim, part) for part in parts]


def _require_parts(op: Op, label: Label, parts: list[slice], sizes: int | Sequence[int] | Labelled) -> None:
    if isinstance(sizes, Labelled):
        op.freeze([label], f"{op.name} cuts it at computed positions")
        return
    single = isinstance(sizes, int)
    asked = op.call.sizes([sizes] if isinstance(sizes, int) else list(sizes))
    equal = len({p.stop - p.start for p in parts}) == 1
    if op.name == "tensor_split" or asked is None or (single and not equal):
        if equal:
            _balance_parts(op, label, len(parts))
        else:
            op.freeze([label], f"{op.name} cuts it into unequal parts at fixed positions")
        return
    for part, wanted in zip(parts, [asked[0]] * len(parts) if single else asked, strict=True):
        if part.stop > part.start:
            op.require(wanted, label.ids[..., part])


def _balance_parts(op: Op, label: Label, count: int) -> None:
    if label.size == count:
        op.freeze([label], f"{op.name} unpacks it into a fixed number of parts")
        return
    op.ledger.balance(label.ids.reshape(*label.ids.shape[:-1], count, -1), f"{op.name} cuts it into equal parts")


@rule(aten.chunk, aten.unsafe_chunk)
def chunk(op: Op, x: Labelled, chunks: int, dim: int = 0) -> list[Dims | None]:
    """Equal parts, whatever the size: they must stay equal."""
    dim %= x.ndim
    label = x.dims[dim]
    sizes = [s[dim] for s in op.shapes]
    if label is not None and len(sizes) > 1:
        if len(set(sizes)) == 1 and len(sizes) == chunks:
            _balance_parts(op, label, len(sizes))
        else:
            op.freeze([label], f"{op.name} cuts it into unequal parts")
    ends = np.cumsum(sizes)
    if label is not None:
        op.ledger.cuts.extend([Cut(label.ids, int(e) - n, int(e)) for e, n in zip(ends, sizes, strict=True)])
    return [take(x, dim, slice(int(e) - n, int(e))) for e, n in zip(ends, sizes, strict=True)]


@rule(aten.cat, aten.concat, aten.concatenate)
def cat(op: Op, tensors: Sequence[Labelled], dim: int = 0) -> Dims:
    """Ids are concatenated along the dim; the other dims are tied."""
    parts = [t for t in tensors if t.shape != (0,)]
    dim %= len(op.shape)
    out: list[Label | None] = []
    for d in range(len(op.shape)):
        if op.shape[d] == 1 or not any(t.dims[d] is not None for t in parts):
            out.append(None)
        elif d == dim:
            out.append(_concatenated(op, parts, dim))
        else:
            out.append(_tied(op, parts, d, dim))
    return tuple(out)


def _tied(op: Op, parts: Sequence[Labelled], d: int, dim: int) -> Label | None:
    """One dim of all parts, none of which may depend on ``dim``."""
    merged = [without_context(op, t, dim)[d] for t in parts]
    label = merged[0]
    for other in merged[1:]:
        label = op.couple(label, other, f"{op.name} joins it with a tensor whose size is fixed")
    return label


def without_context(op: Op, x: Labelled, dim: int) -> Dims:
    """The labels of ``x`` after tying, over ``dim``, those that depend on it."""

    def merge(label: Label | None) -> Label | None:
        if label is None or dim not in label.context:
            return label
        one = op.ledger.unite(label.ids, label.context.index(dim), fixed=x.dims[dim] is None)
        return Label(one, tuple(c for c in label.context if c != dim))

    return tuple(merge(label) for label in x.dims)


def fix(op: Op, x: Labelled, dims: Iterable[int], reason: str) -> Labelled:
    """``x`` with ``dims`` frozen and without labels there; labels that depended on them are tied along them."""
    if not x.labelled:
        return x
    for d in dims:
        op.freeze([x.dims[d]], reason)
        kept = list(without_context(op, x, d % x.ndim))
        kept[d] = None
        x = Labelled(x.shape, tuple(kept), x.source)
    return x


def _concatenated(op: Op, parts: Sequence[Labelled], dim: int) -> Label:
    labels = [t.dims[dim] or _stays(op, t.shape[dim]) for t in parts]
    context = tuple(dict.fromkeys(c for label in labels for c in label.context))
    if not context:
        return Label(np.concatenate([label.ids for label in labels]))
    sizes = [max(t.shape[c] for t in parts) for c in context]
    wide = [np.broadcast_to(label.over(context), (*sizes, label.size)) for label in labels]
    return Label(np.concatenate(wide, axis=-1), context)


def _stays(op: Op, size: int) -> Label:
    ids = op.ledger.fresh(size)
    op.ledger.freeze(ids, f"{op.name} takes it from a tensor of fixed size")
    return Label(ids)


@rule(aten.stack)
def stack(op: Op, tensors: Sequence[Labelled], dim: int = 0) -> Dims:
    """A new dim; where the parts' labels differ they depend on it, and their counts must stay equal."""
    dim %= len(op.shape)
    order: list[int | None] = list(range(tensors[0].ndim))
    order.insert(dim, None)
    parts = [move(t, order) for t in tensors]
    return tuple(_stacked(op, [p[d] for p in parts], d, dim) for d in range(len(op.shape)))


def _stacked(op: Op, labels: list[Label | None], d: int, dim: int) -> Label | None:
    known = [label for label in labels if label is not None]
    if not known:
        return None
    if len(known) < len(labels):
        op.freeze(known, f"{op.name} joins it with a tensor whose size is fixed")
        return known[0]
    if all(label.ids is known[0].ids for label in known):
        return known[0]
    context = tuple(dict.fromkeys(c for label in known for c in label.context))
    wide = np.stack(np.broadcast_arrays(*[label.over(context) for label in known]))
    op.ledger.balance(wide, f"{op.name} needs parts of one size")
    return settle(Label(wide, (dim, *context)))


@rule(aten.glu)
def glu(op: Op, x: Labelled, dim: int = -1) -> Dims:
    """The two halves of the dim are paired: position k lives with position k + n/2."""
    dim %= x.ndim
    label = x.dims[dim]
    if label is None:
        return without_context(op, x, dim)
    half = label.size // 2
    op.ledger.tie(label.ids[..., :half], label.ids[..., half:])
    return take(x, dim, slice(0, half))


@rule(aten.flip)
def flip(op: Op, x: Labelled, dims: Sequence[int]) -> Dims:
    """Positions in reverse order."""
    for d in dims:
        x = Labelled(x.shape, take(x, d % x.ndim, slice(None, None, -1)))
    return x.dims


@rule(aten.roll)
def roll(op: Op, x: Labelled, shifts: Sequence[int], dims: Sequence[int] = ()) -> Dims:
    """Passes along dims without label; a labelled dim that is rolled has to stay."""
    for d in dims or range(x.ndim):
        op.freeze([x.dims[d]], f"{op.name} shifts it by a fixed number of positions")
        x = Labelled(x.shape, without_context(op, x, d % x.ndim))
    return x.dims


@rule(
    aten.constant_pad_nd,
    aten.pad,
    aten.reflection_pad1d,
    aten.reflection_pad2d,
    aten.reflection_pad3d,
    aten.replication_pad1d,
    aten.replication_pad2d,
    aten.replication_pad3d,
)
def pad(op: Op, x: Labelled, padding: Sequence[int], *args: Any, **kwargs: Any) -> Dims:
    """Passes along the dims that are not padded; a padded labelled dim has to stay."""
    for k in range(len(padding) // 2):
        d = x.ndim - 1 - k
        if padding[2 * k] or padding[2 * k + 1]:
            op.freeze([x.dims[d]], f"{op.name} adds a fixed number of positions to it")
            kept = without_context(op, x, d)
            x = Labelled(x.shape, (*kept[:d], None, *kept[d + 1 :]))
    return x.dims


@rule(aten.repeat, aten.tile)
def repeat(op: Op, x: Labelled, repeats: Sequence[int]) -> Dims:
    """The tensor tiled: the ids are tiled with it; a dim of size 1 repeated a derived number of times gets atoms."""
    ndim = len(op.shape)
    times = (1,) * (ndim - len(repeats)) + tuple(repeats)
    offset = ndim - x.ndim
    dims = list(move(x, [None] * offset + list(range(x.ndim))))
    before = (1,) * offset + x.shape
    for d in range(ndim):
        if times[d] > 1:
            index = np.tile(np.arange(before[d]), times[d])
            dims = list(take(Labelled(before, tuple(dims)), d, index))
    for asked in op.call.sizes(repeats) or () if x.labelled else ():
        op.require_same(asked)
    grown = [d for d in range(ndim) if before[d] == 1 and times[d] > 1]
    if not grown or len(repeats) != ndim:
        return tuple(dims)
    labels = sized(op, [n if d in grown else -1 for d, n in enumerate(times)], dims, grown)
    op.ledger.uniform.update(id(label.ids) for d in grown if (label := labels[d]) is not None)
    return labels


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(
    op: Op, x: Labelled, repeats: int, dim: int | None = None, *, output_size: int | None = None
) -> Dims:
    """Each position several times in a row."""
    if dim is None:
        op.freeze(x.dims, f"{op.name} flattens it")
        return (None,)
    dim %= x.ndim
    op.require_same(op.call.argument(repeats, "repeats", 1))
    return take(x, dim, np.repeat(np.arange(x.shape[dim]), repeats))


@rule(aten.select_scatter, aten.slice_scatter)
def scatter_view(op: Op, x: Labelled, src: Labelled, dim: int = 0, *args: Any, **kwargs: Any) -> Dims:
    """One position or a stretch of ``dim`` overwritten: ``dim`` stays, the other dims line up."""
    dim %= x.ndim
    if src.ndim < x.ndim:
        src = Labelled((*src.shape[:dim], 1, *src.shape[dim:]), move(src, [*range(dim), None, *range(dim, src.ndim)]))
    fixed = [fix(op, t, (dim,), f"{op.name} writes at fixed positions of it") for t in (x, src)]
    pairs = enumerate(zip(fixed[0].dims, fixed[1].dims, strict=True))
    return tuple(op.couple(a, b) if d != dim and op.shape[d] > 1 and (a or b) else None for d, (a, b) in pairs)
