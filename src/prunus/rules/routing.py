"""Routing: positions of a dim are chosen by value, and tensors are read by the numbers of those chosen.

A router scores experts, ``topk`` gives the numbers of the best, and rows of the experts' weights are looked up by these
numbers. Numbering the experts in another order, in the router and in the weights alike, changes nothing: what ``topk``
returns are *numbers of positions of the scores' dim*, and a dim that they look up is tied to it. Any other use of the
numbers keeps the positions (see ``_numbers`` in ``prunus.modes``).

Sorting the numbers puts the tokens in an order that depends on the numbering. Such a dim has atoms of its own which
never go; where they meet something that stays, or that the model keeps, the experts stay (``Ledger.arrange``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from prunus.labels import Dims, Label, Labelled, Numbered
from prunus.rules.indexing import by_position, look_up
from prunus.rules.joins import without_context
from prunus.rules.reductions import _frozen_along, numbered
from prunus.rules.table import Op, rule
from prunus.rules.views import move

aten = torch.ops.aten
_NOTHING = Label(np.empty(0, dtype=np.int64))  # numbers of positions of a dim without label


def _dim_of(x: Labelled, args: tuple[Any, ...], kwargs: dict[str, Any], default: int | None) -> int | None:
    dim = kwargs.get("dim", next((a for a in args if isinstance(a, int) and not isinstance(a, bool)), default))
    return dim if dim is None else dim % max(x.ndim, 1)


@rule(aten.topk)
def topk(op: Op, x: Labelled, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> list[Dims | None]:
    """The best of a dim, in the order of their values; at least so many must be left."""
    if x.ndim == 0:
        return [(), ()]
    dim %= x.ndim
    label = x.dims[dim]
    if label is not None:
        op.averages(label)
        op.ledger.limit(label.ids, f"topk picks {int(k)}", least=int(k))
    kept = without_context(op, x, dim)
    dims: Dims = (*kept[:dim], None, *kept[dim + 1 :])
    return [dims, numbered(op, x, dim, dims)]


@rule(aten.argmax, aten.argmin)
def best(op: Op, x: Labelled, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """The number of the largest position of a dim."""
    dim = _dim_of(x, args, kwargs, None)
    if dim is None or x.ndim == 0:
        return _frozen_along(op, x, range(x.ndim))
    op.averages(x.dims[dim])
    kept = Labelled(x.shape, without_context(op, x, dim))
    keep = len(op.shape) == x.ndim
    dims = move(kept, [d if d != dim else None for d in range(x.ndim) if keep or d != dim])
    return numbered(op, x, dim, dims)


@rule(aten.sort, aten.argsort)
def sort(op: Op, x: Labelled, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """Compares the positions of a dim; numbers of experts are sorted in the order in which these are numbered."""
    dim = _dim_of(x, args, kwargs, -1)
    dims: list[int] = [dim] if dim is not None and x.ndim else []
    if x.numbers is None or not x.numbers.ids.size or x.ndim != 1 or x.dims[0] is not None or x.shape[0] == 1:
        op.freeze([x.numbers], f"{op.name} compares the numbers of its positions")
        return _frozen_along(op, x, dims)
    order = Label(op.ledger.arrange(x.numbers.ids, x.shape[0], f"{op.name} orders by the numbers of its positions"))
    op.ledger.mean(order.ids, "order", x.numbers.ids)
    places = Numbered((order,), _NOTHING)
    return [Numbered((order,), x.numbers), places] if op.name == "sort" else places


@rule(aten.cumsum)
def cumsum(op: Op, x: Labelled, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """Adds up the positions before each one; counts of experts become the ends of their runs."""
    dim = _dim_of(x, args, kwargs, -1)
    label = x.dims[0] if x.ndim == 1 else None
    counted = op.ledger.means(label.ids, "counts") if label is not None else None
    if label is None or counted is None:
        return _frozen_along(op, x, [dim] if dim is not None and x.ndim else [])
    ends = op.ledger.arrange(label.ids, label.size, f"{op.name} adds up the positions before each one")
    op.ledger.mean(ends, "ends", counted)
    return (Label(ends),)


@rule(aten.one_hot)
def one_hot(op: Op, x: Labelled, num_classes: int = -1) -> Dims | list[Dims | None]:
    """Numbers of positions become a dim with these positions; positions beyond them stay."""
    if num_classes < 0 or x.numbers is None or not 0 < x.numbers.ids.size <= op.shape[-1]:
        return by_position(op, x)
    label = x.numbers
    more = op.shape[-1] - label.size
    if more:
        rest = op.ledger.fresh(more)
        op.ledger.freeze(rest, "one_hot counts more positions than there are")
        label = Label(np.concatenate((label.ids, rest)))
    op.require_argument(num_classes, "num_classes", 1, label.ids)
    if op.call.argument(num_classes, "num_classes", 1) is None:
        op.freeze([label], "one_hot reads how many positions there are from the values")
    return (*x.dims, label)


@rule(aten.bincount, aten.histc)
def count(op: Op, x: Labelled, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """How often each position is numbered: a dim with these positions."""
    label = x.numbers
    if label is None and op.name == "histc":
        return _spread(op, x)
    if label is None or label.ids.shape != op.shape or len(op.inputs) > 1 or not _counts_all(op, label, args, kwargs):
        return by_position(op, *op.inputs)
    counts = op.ledger.fresh(label.size)
    op.ledger.tie(counts, label.ids)
    op.ledger.mean(counts, "counts", label.ids)
    return (Label(counts),)


def _spread(op: Op, x: Labelled) -> Dims:
    """How many values there are in each bin: like any reduction over all dims."""
    for d in range(x.ndim):
        op.averages(x.dims[d])
        x = Labelled(x.shape, without_context(op, x, d))
    return (None,) * len(op.shape)


def _counts_all(op: Op, label: Label, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the counts run over all positions, however many are left; the sizes that the code names are required."""
    if op.name == "bincount":
        size = op.call.argument(label.size, "minlength", 2)
        if size is not None:
            op.require(size, label.ids)
        return size is not None
    bins = op.call.argument(label.size, "bins", 1)
    low, last = (*args[1:], None, None)[:2]
    low, last = kwargs.get("min", low), kwargs.get("max", last)
    last = op.call.argument(int(last), "max", 3) if isinstance(last, (int, float)) else None
    if bins is None or last is None or low != 0 or label.size - last not in (0, 1):
        return False
    op.require(bins, label.ids)
    op.require(last if last == label.size else last + 1, label.ids)
    return True


@rule(aten._grouped_mm)
def grouped_mm(op: Op, a: Labelled, b: Labelled, offs: Labelled | None = None, *args: Any, **kwargs: Any) -> Dims:
    """``s k, e k n -> s n``: each run of rows, up to its end, meets the matrix of its own group."""
    op.count(*zip(a.shape, a.dims, strict=True), (b.shape[-1], b.dims[-1]))
    if a.ndim != 2 or b.ndim != 3 or offs is None or kwargs.get("bias") is not None:
        for t in op.inputs:
            op.freeze(t.dims, "grouped_mm is followed only for rows that meet a stack of matrices")
        return (None,) * len(op.shape)
    ends = op.ledger.means(offs.dims[0].ids, "ends") if offs.dims[0] is not None else None
    order = op.ledger.means(a.dims[0].ids, "order") if a.dims[0] is not None else None
    if ends is not None and ends is order:
        b = look_up(op, b, 0, Label(ends))
    else:
        op.freeze([a.dims[0], offs.dims[0]], "grouped_mm cuts it into runs")
        b = look_up(op, b, 0, None)
    read = op.couple(a.dims[1], b.dims[1])
    op.reads(b.dims[1])
    op.hands_on(b.dims[2])
    multiple = 16 // op.dtypes[1].itemsize
    for label in (read, b.dims[2]):
        if label is not None and multiple > 1:
            op.ledger.limit(label.ids, "grouped_mm needs rows of whole 16 bytes", multiple=multiple)
    return (*without_context(op, a, 1)[:1], b.dims[2])
