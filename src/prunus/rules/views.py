"""Views: dims are moved, merged, split and cut; no number is computed.

A reshape is matched by products into independent blocks of dims. A block that *merges* dims lays their ids out in
row-major order (a dim without label repeats or tiles them); a block that *splits* makes one coarse atom for each row
and asks that the rows stay equally long. Merging dims in another order than that in which they were split (channel
shuffle) ties the rows position by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from prunus.labels import Dims, Ids, Label, Labelled, distinct, settle, varies
from prunus.ledger import Ledger
from prunus.rules.table import Op, rule
from prunus.ties import LEFT_IS_ONE, ONE_TO_ONE, RIGHT_IS_ONE

aten = torch.ops.aten
LARGEST_GRID = 2**18  # positions of a product of dims that are followed one by one


def move(x: Labelled, order: Sequence[int | None]) -> Dims:
    """Output dim ``k`` is input dim ``order[k]`` (None: a new dim of size 1)."""
    where = {d: k for k, d in enumerate(order) if d is not None}
    dims = (x.dims[d] if d is not None else None for d in order)
    return tuple(d.rename(where) if d is not None else None for d in dims)


@rule(aten.permute)
def permute(op: Op, x: Labelled, dims: Sequence[int]) -> Dims:
    """Dims in another order."""
    return move(x, [d % x.ndim for d in dims])


@rule(aten.transpose, aten.transpose_, aten.swapaxes, aten.swapdims)
def transpose(op: Op, x: Labelled, dim0: int, dim1: int) -> Dims:
    """Two dims exchanged."""
    order = list(range(x.ndim))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return move(x, order)


@rule(aten.t, aten.numpy_T, aten.mT, aten.adjoint, aten.matrix_H)
def reverse(op: Op, x: Labelled) -> Dims:
    """The last two dims exchanged."""
    order = list(range(x.ndim))
    if x.ndim > 1:
        order[-1], order[-2] = order[-2], order[-1]
    return move(x, order)


@rule(aten.movedim)
def movedim(op: Op, x: Labelled, source: int | Sequence[int], destination: int | Sequence[int]) -> Dims:
    """Dims moved to other places."""
    sources = [s % x.ndim for s in ([source] if isinstance(source, int) else source)]
    places = [p % x.ndim for p in ([destination] if isinstance(destination, int) else destination)]
    order: list[int | None] = [None] * x.ndim
    for s, p in zip(sources, places, strict=True):
        order[p] = s
    rest = iter(d for d in range(x.ndim) if d not in sources)
    return move(x, [next(rest) if d is None else d for d in order])


@rule(aten.unsqueeze, aten.unsqueeze_)
def unsqueeze(op: Op, x: Labelled, dim: int) -> Dims:
    """A new dim of size 1."""
    order: list[int | None] = list(range(x.ndim))
    order.insert(dim % (x.ndim + 1), None)
    return move(x, order)


@rule(aten.squeeze, aten.squeeze_)
def squeeze(op: Op, x: Labelled, dim: int | Sequence[int] | None = None) -> Dims:
    """Dims of size 1 dropped."""
    chosen = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % x.ndim for d in chosen if x.ndim and x.shape[d] == 1}
    return move(x, [d for d in range(x.ndim) if d not in gone])


@rule(aten.expand, aten.expand_as, aten.broadcast_to)
def expand(op: Op, x: Labelled, size: Sequence[int] | Labelled, *, implicit: bool = False) -> Dims:
    """Dims of size 1 repeated; a dim that grows to a size which the code derived gets atoms of its own."""
    shape = op.shape
    offset = len(shape) - x.ndim
    order: list[int | None] = [None] * offset + list(range(x.ndim))
    dims = list(move(x, order))
    grown = [k for k in range(len(shape)) if shape[k] > 1 and (k < offset or x.shape[k - offset] == 1)]
    for k in grown:
        dims[k] = None  # a single position, repeated
    if isinstance(size, Labelled):
        for k in grown:
            model = size.dims[k]
            dims[k] = _repeated(op, model) if model is not None else None
        return as_wide_as(op, tuple(dims), size, skip=grown)
    mapped = op.call.mapped() if len(grown) == 1 else None
    if isinstance(mapped, int) and type(mapped) is not int and mapped == shape[grown[0]]:
        label = dims[grown[0]] = Label(op.ledger.fresh(shape[grown[0]]))
        op.require(mapped, label.ids)
        labels: Dims = tuple(dims)
    else:
        asked = op.call.sizes(shape) or ()
        for k in grown if asked else ():
            rows = _in_rows(op, asked[k], dims)
            dims[k] = _repeated(op, rows) if rows is not None else None
        labels = sized(op, shape, dims, [k for k in grown if dims[k] is None])
    op.ledger.uniform.update(id(d.ids) for k in grown if (d := labels[k]) is not None)
    return labels


def _in_rows(op: Op, asked: Any, dims: Sequence[Label | None]) -> Label | None:
    """The label of the dim whose size was read for ``asked``, if it is cut into rows that are one of ``dims``."""
    ids: Any = getattr(getattr(asked, "expression", None), "ids", None)
    rows = op.ledger.known_rows(ids) if ids is not None and ids.ndim == 2 else None
    if rows is None:
        return None
    homes = (d for d, label in enumerate(dims) if label is not None and np.array_equal(label.ids, rows))
    return next((Label(ids, (d,)) for d in homes), None)


def _repeated(op: Op, model: Label) -> Label:
    """A dim as long as another one, along which all values are equal."""
    ids = op.ledger.fresh(model.ids.size)
    ids = ids.reshape(model.ids.shape) if model.context else ids
    op.ledger.tie(ids, model.ids)
    op.ledger.uniform.add(id(ids))
    return Label(ids, model.context)


def as_wide_as(op: Op, dims: Dims, model: Labelled, skip: Sequence[int] = ()) -> Dims:
    """``dims``, which follow the sizes of another tensor: what lines up shrinks together, the rest stays."""
    reason = f"{op.name} gives another tensor its size"
    found = (
        op.couple(a, b, reason) if k not in skip else a for k, (a, b) in enumerate(zip(dims, model.dims, strict=True))
    )
    return tuple(found)


def sized(op: Op, shape: Sequence[int], dims: Sequence[Label | None], new: Sequence[int]) -> Dims:
    """``dims``, with fresh atoms for each dim in ``new`` whose size the code did not write as a plain number."""
    asked = op.call.sizes(shape)
    if asked is None:
        return tuple(dims)
    out = list(dims)
    for k in new:
        if shape[k] > 1 and type(asked[k]) is not int:
            out[k] = Label(op.ledger.fresh(shape[k]))
    op.require_sizes(shape, out)
    return tuple(out)


@rule(aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.view_as, aten.reshape_as)
def view(op: Op, x: Labelled, size: Sequence[int] | Labelled | torch.dtype, *args: Any) -> Dims | None:
    """A reshape to sizes that the code names."""
    if isinstance(size, torch.dtype):
        op.freeze(x.dims, "its memory is viewed as another dtype")
        return None
    dims = reshape(op, x, op.shape)
    if isinstance(size, Labelled):
        return as_wide_as(op, dims, size)
    op.require_sizes(size, dims)
    return dims


@rule(aten.flatten)
def flatten(op: Op, x: Labelled, start_dim: int = 0, end_dim: int = -1) -> Dims:
    """Dims merged; the size adapts by itself."""
    return reshape(op, x, op.shape)


@rule(aten.unflatten)
def unflatten(op: Op, x: Labelled, dim: int, sizes: Sequence[int]) -> Dims:
    """A dim split into sizes that the code names."""
    dims = reshape(op, x, op.shape)
    dim %= x.ndim
    op.require_sizes(sizes, dims[dim : dim + len(sizes)])
    return dims


class Block(NamedTuple):
    """Input dims and output dims (none of size 1) that hold the same elements in a reshape."""

    ins: tuple[int, ...]
    outs: tuple[int, ...]


def blocks(before: Sequence[int], after: Sequence[int]) -> list[Block]:
    """The smallest blocks of a reshape, matched by products."""
    ins = [d for d, n in enumerate(before) if n != 1]
    outs = [d for d, n in enumerate(after) if n != 1]
    found: list[Block] = []
    i = j = 0
    while i < len(ins) and j < len(outs):
        first_in, first_out, have, want = i, j, before[ins[i]], after[outs[j]]
        while have != want:
            if have < want:
                i += 1
                have *= before[ins[i]]
            else:
                j += 1
                want *= after[outs[j]]
        i, j = i + 1, j + 1
        found.append(Block(tuple(ins[first_in:i]), tuple(outs[first_out:j])))
    return found


def reshape(op: Op, x: Labelled, shape: Sequence[int]) -> Dims:
    """The labels of ``x`` viewed as ``shape``."""
    out: list[Label | None] = [None] * len(shape)
    if not x.labelled:
        return tuple(out)
    if 0 in x.shape:
        op.freeze(x.dims, "it is a size of an empty tensor")
        return tuple(out)
    parts = blocks(x.shape, shape)
    home = {d: b for b in parts for d in b.ins}
    moved = {b.ins[0]: b.outs[0] for b in parts if len(b.ins) == 1 and len(b.outs) == 1}
    for block in parts:
        labelled = [d for d in block.ins if x.dims[d] is not None]
        if not labelled:
            continue
        label = x.dims[block.ins[0]]
        if label is not None and moved.keys() >= {*block.ins, *label.context}:
            out[block.outs[0]] = label.rename(moved)
            continue
        leaf = _merged(op, x, block, labelled)
        _split(op, x, shape, block, leaf, home, out)
    return tuple(out)


class _Leaf(NamedTuple):
    ids: Ids
    context: tuple[int, ...]  # dims of the input, the block's own among them
    dim: int


def _merged(op: Op, x: Labelled, block: Block, labelled: list[int]) -> _Leaf:
    """The label that describes the positions of the merged dims of a block."""
    for dim in reversed(labelled):
        label = x.dims[dim]
        if label is not None and all(d == dim or d in label.context for d in labelled):
            _tie_foreign_order(op, x, label, dim, block)
            return _Leaf(label.ids, label.context, dim)
    first = x.dims[labelled[0]]
    if len(block.outs) > 1 and first is not None and _apart(x, labelled):
        op.freeze([first], f"{op.name} merges it with a part of another dimension")
        return _merged(op, x, block, labelled[1:])
    return _product(op, x, labelled)


def _apart(x: Labelled, labelled: Sequence[int]) -> bool:
    """Whether the first of some dims is independent of all others, which one label describes together."""
    labels = {d: label for d in labelled if (label := x.dims[d]) is not None}
    first, *rest = labelled
    together = any(set(rest) <= {d, *labels[d].context} for d in rest)
    return together and not labels[first].context and all(first not in labels[d].context for d in rest)


def _tie_foreign_order(op: Op, x: Labelled, label: Label, dim: int, block: Block) -> None:
    """Rows along a context that is laid out inside the dim live together, position by position."""
    for axis, c in enumerate(label.context):
        if c in block.ins and c > dim:
            op.ledger.unite(label.ids, axis, fixed=x.dims[c] is None)


def _product(op: Op, x: Labelled, labelled: list[int]) -> _Leaf:
    """Independent dims merged: each takes its rows of the product; a dim that only repeats the others has to stay."""
    reason = f"{op.name} merges it with another dimension"
    labels = {d: label for d in labelled if (label := x.dims[d]) is not None}
    deciding = {c for label in labels.values() for c in label.context}
    loose = [d for d in labelled if d in deciding or not _stays(op.ledger, labels[d].ids)]
    if loose:  # what stays for ever merges like a dim without a label
        labelled, labels = loose, {d: labels[d] for d in loose}
    repeats = [d for d, label in labels.items() if id(label.ids) in op.ledger.uniform]
    op.freeze([labels.pop(d) for d in repeats], reason)
    if len(labels) == 1:
        ((dim, label),) = labels.items()
        return _Leaf(label.ids, label.context, dim)
    shape = tuple(x.shape[d] for d in labelled)
    atoms = op.ledger.fresh(int(np.prod(shape)))
    grid = atoms.reshape(shape)
    if repeats or len(atoms) > LARGEST_GRID or any(c not in labels for label in labels.values() for c in label.context):
        op.freeze(labels.values(), reason)
        op.ledger.freeze(atoms, reason)
    else:
        op.ledger.pin(atoms, f"{op.name} merges two dimensions in it, and it goes with either")
        factors = np.empty((*shape, len(labels)), dtype=np.int64)
        for k, (d, label) in enumerate(labels.items()):
            known = [labelled.index(c) for c in (*label.context, d)]
            rest = [c for c in range(len(labelled)) if c not in known]
            op.ledger.belong(label.ids, grid.transpose(*known, *rest))
            factors[..., k].transpose(*known, *rest)[...] = label.ids.reshape(*label.ids.shape, *[1] * len(rest))
        op.ledger.multiply(atoms, factors.reshape(len(atoms), -1), f"{reason}, of which it would take a part")
    return _Leaf(grid, tuple(labelled[:-1]), labelled[-1])


def _stays(ledger: Ledger, ids: Ids) -> bool:
    """Whether rules have frozen all of a dim: itself, a part of each of its rows, or what is tied to all of it."""
    frozen = ledger.frozen()
    own = distinct(ids.reshape(-1))
    first, size, ties = own.item(0), own.size, ledger.ties
    if own.item(-1) - first != size - 1:
        return bool(frozen[own].all())
    ways = [(ties.left, ties.right, LEFT_IS_ONE), (ties.right, ties.left, RIGHT_IS_ONE)]
    found = [first]
    for start in found:
        if frozen[start : start + size].all():
            return True
        for one, other, kind in ways:  # what is tied to many stays if one of these does, and not the other way round
            covers = (
                ((ties.kind == ONE_TO_ONE) | (ties.kind == kind)) & (one <= start) & (one + ties.length >= start + size)
            )
            found += set((other + start - one)[covers].tolist()).difference(found)
    return False


def _split(
    op: Op,
    x: Labelled,
    shape: Sequence[int],
    block: Block,
    leaf: _Leaf,
    home: dict[int, Block],
    out: list[Label | None],
) -> None:
    """Lay the leaf's ids out over the output dims of its block and label them."""
    others: list[Block] = []
    for c in leaf.context:
        if c not in block.ins and home[c] not in others:
            others.append(home[c])
    ids, axes = _layout(x, shape, [*others, block], leaf)
    own = [k for k, d in enumerate(axes) if d in block.outs]
    for axis in reversed(own):
        if len(block.outs) > 1 and not varies(ids, axis):
            ids, axes = ids.take([0], axis=axis).squeeze(axis), axes[:axis] + axes[axis + 1 :]
    inner = [d for d in axes if d in block.outs]
    outside = tuple(d for d in axes if d not in block.outs)
    while len(inner) > 1:
        out[inner[-1]] = settle(Label(ids, (*outside, *inner[:-1])))
        op.ledger.balance(ids, f"{op.name} splits it into equal rows")
        ids = op.ledger.rows(ids)
        inner.pop()
    if inner:
        out[inner[0]] = settle(Label(ids, outside))


def _layout(x: Labelled, shape: Sequence[int], parts: list[Block], leaf: _Leaf) -> tuple[Ids, list[int]]:
    """The leaf's ids with one axis for each output dim of ``parts``."""
    known = [*leaf.context, leaf.dim]
    wide = [d for b in parts for d in b.ins]
    ids = leaf.ids
    if known != wide:
        order = [known.index(d) for d in wide if d in known]
        ids = ids.transpose(order)[tuple(slice(None) if d in known else None for d in wide)]
        sizes = tuple(x.shape[d] for d in wide)
        ids = ids if ids.shape == sizes else np.broadcast_to(ids, sizes)
    axes = [d for b in parts for d in b.outs]
    return ids.reshape(tuple(shape[d] for d in axes)), axes
