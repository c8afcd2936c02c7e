"""Reductions drop a dim; ops that compare positions along a dim (softmax, sort) freeze it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prunus.labels import Dims, Label, Labelled
from prunus.rules.joins import without_context
from prunus.rules.pointwise import pointwise
from prunus.rules.table import Op, rule
from prunus.rules.views import move

aten = torch.ops.aten


@rule(
    aten.sum,
    aten.mean,
    aten.amax,
    aten.amin,
    aten.max,
    aten.min,
    aten.prod,
    aten.var,
    aten.std,
    aten.var_mean,
    aten.std_mean,
    aten.logsumexp,
    aten.linalg_vector_norm,
    aten.norm,
    aten.all,
    aten.any,
    aten.aminmax,
)
def reduce(op: Op, x: Labelled, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """The reduced dims are dropped; labels that depend on them are tied along them."""
    if args and isinstance(args[0], Labelled):  # max(x, y)
        return pointwise(op, x, *args, **kwargs)
    gone = _reduced(op, x, args, kwargs)
    labels = x
    if op.name in ("max", "min") and len(op.shapes) > 1:
        op.freeze([x.dims[d] for d in gone], f"{op.name} returns numbers of its positions")
    for d in gone:
        label = labels.dims[d]
        if label is not None and op.name == "mean":
            op.ledger.scale(x, label.ids, -1.0)
        else:
            op.averages(label)
        labels = Labelled(x.shape, without_context(op, labels, d))
    keep = bool(x.ndim) and len(op.shape) == x.ndim
    order = (
        [d if d not in gone else None for d in range(x.ndim)] if keep else [d for d in range(x.ndim) if d not in gone]
    )
    dims = move(labels, order)
    return dims if len(op.shapes) == 1 else [dims for _ in op.shapes]


def _reduced(op: Op, x: Labelled, args: Sequence[Any], kwargs: dict[str, Any]) -> set[int]:
    """The dims that the call reduces."""
    chosen = kwargs.get("dim")
    position = 1 if op.name in ("linalg_vector_norm", "norm") else 0
    if chosen is None and len(args) > position and not isinstance(args[position], (bool, float, Labelled)):
        chosen = args[position]
    if chosen is None or chosen == []:
        return set(range(x.ndim))
    dims = [chosen] if isinstance(chosen, int) else chosen
    return {d % x.ndim for d in dims}


@rule(
    aten.softmax,
    aten._softmax,
    aten._safe_softmax,
    aten.log_softmax,
    aten._log_softmax,
    aten.cumsum,
    aten.cumprod,
    aten.logcumsumexp,
    aten.sort,
    aten.argsort,
    aten.argmax,
    aten.argmin,
    aten.cummax,
    aten.cummin,
)
def along(op: Op, x: Labelled, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """Compares the positions of a dim: it is frozen; the other dims pass."""
    default = None if op.name in ("argmax", "argmin") else -1
    dim = kwargs.get("dim", next((a for a in args if isinstance(a, int) and not isinstance(a, bool)), default))
    dims = range(x.ndim) if dim is None else [dim % x.ndim] if x.ndim else []
    for d in dims:
        op.freeze([x.dims[d]], f"{op.name} compares its positions")
        kept = without_context(op, x, d)
        x = Labelled(x.shape, (*kept[:d], None, *kept[d + 1 :]))
    return [_kept(x, shape, dims) for shape in op.shapes] if len(op.shapes) > 1 else _kept(x, op.shape, dims)


@rule(aten.topk, aten.kthvalue, aten.median, aten.nanmedian, aten.mode, aten.quantile)
def choose(op: Op, x: Labelled, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """Picks positions of a dim by value: it is frozen and loses its label."""
    ints = [a for a in args if isinstance(a, int) and not isinstance(a, bool)]
    if op.name in ("topk", "kthvalue"):
        ints = ints[1:] or [-1]
    dim = kwargs.get("dim", ints[0] if ints else None)
    dims = range(x.ndim) if dim is None else [dim % x.ndim] if x.ndim else []
    for d in dims:
        op.freeze([x.dims[d]], f"{op.name} compares its positions")
        kept = without_context(op, x, d)
        x = Labelled(x.shape, (*kept[:d], None, *kept[d + 1 :]))
    return [_kept(x, shape, dims) for shape in op.shapes] if len(op.shapes) > 1 else _kept(x, op.shape, dims)


def _kept(x: Labelled, shape: Sequence[int], dims: Sequence[int]) -> Dims:
    """The labels for an output that may have dropped ``dims``."""
    if len(shape) == x.ndim:
        return x.dims
    labels: Dims = move(x, [d for d in range(x.ndim) if d not in dims])
    blank: list[Label | None] = [None] * len(shape)
    return labels if len(labels) == len(shape) else tuple(blank)
