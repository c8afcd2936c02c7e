"""Reductions drop a dim; ops that compare positions along a dim (softmax, sort) freeze it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from prunus.labels import Dims, Label, Labelled, Numbered
from prunus.rules.joins import without_context
from prunus.rules.pointwise import combine, pointwise
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
    aten.nansum,
    aten.count_nonzero,
)
def reduce(op: Op, x: Labelled, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """The reduced dims are dropped; labels that depend on them are tied along them."""
    if args and isinstance(args[0], Labelled):  # max(x, y)
        return pointwise(op, x, *args, **kwargs)
    gone = _reduced(op, x, args, kwargs)
    labels = x
    for d in gone:
        label = labels.dims[d]
        if label is not None and op.name == "mean":
            op.ledger.scale(x, label.ids, -1.0)
        else:
            op.averages(label)
        if label is not None and op.name in _SPREADS and x.shape[d] == prod(x.shape[g] for g in gone):
            op.ledger.limit(label.ids, f"{op.name} needs more than one position", least=_correction(args, kwargs) + 1)
        labels = Labelled(x.shape, without_context(op, labels, d))
    keep = bool(x.ndim) and len(op.shape) == x.ndim
    order = (
        [d if d not in gone else None for d in range(x.ndim)] if keep else [d for d in range(x.ndim) if d not in gone]
    )
    dims = move(labels, order)
    if op.name in ("max", "min") and len(op.shapes) > 1:
        return [dims, numbered(op, x, min(gone, default=0), dims)]
    return dims if len(op.shapes) == 1 else [dims for _ in op.shapes]


_SPREADS = frozenset(["var", "std", "var_mean", "std_mean"])


def _correction(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """By how much the divisor of a variance is smaller than the number of positions: one, unless the code says else."""
    biased = kwargs.get("unbiased") is False or any(a is False for a in args[:2])
    asked = kwargs.get("correction")
    return 0 if biased else 1 if asked is None else int(asked)


def numbered(op: Op, x: Labelled, dim: int, dims: Dims) -> Dims:
    """``dims``, for a tensor whose values are numbers of positions of ``x`` along ``dim``."""
    label = x.dims[dim] if x.ndim else None
    if label is None:
        return dims
    if label.context:
        op.freeze([label], f"{op.name} returns numbers of its positions, and it depends on another dimension")
        return dims
    return Numbered(dims, label)


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


@rule(aten.softmax, aten._softmax, aten._safe_softmax, aten.log_softmax, aten._log_softmax)
def softmax(op: Op, x: Labelled, dim: int, *args: Any, **kwargs: Any) -> Dims:
    """Weighs the positions of a dim against each other: the labels pass, and the dim is averaged over."""
    if x.ndim == 0:
        return x.dims
    dim %= x.ndim
    op.averages(x.dims[dim])
    without_context(op, x, dim)  # ties the rows that it compares; each keeps its own label
    return tuple(x.dims)


@rule(aten.cumprod, aten.logcumsumexp, aten.cummax, aten.cummin)
def along(op: Op, x: Labelled, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """Compares the positions of a dim: it is frozen; the other dims pass."""
    dim = kwargs.get("dim", next((a for a in args if isinstance(a, int) and not isinstance(a, bool)), -1))
    return _frozen_along(op, x, [dim % x.ndim] if x.ndim else [])


@rule(aten.kthvalue, aten.median, aten.nanmedian, aten.mode, aten.quantile)
def choose(op: Op, x: Labelled, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """Picks positions of a dim by value: it is frozen and loses its label."""
    ints = [a for a in args if isinstance(a, int) and not isinstance(a, bool)]
    if op.name == "kthvalue":
        ints = ints[1:] or [-1]
    dim = kwargs.get("dim", ints[0] if ints else None)
    return _frozen_along(op, x, range(x.ndim) if dim is None else [dim % x.ndim] if x.ndim else [])


def _frozen_along(op: Op, x: Labelled, dims: Sequence[int]) -> Dims | list[Dims | None]:
    """The labels after the positions of ``dims`` were compared."""
    for d in dims:
        op.freeze([x.dims[d]], f"{op.name} compares its positions")
        kept = without_context(op, x, d)
        x = Labelled(x.shape, (*kept[:d], None, *kept[d + 1 :]))
    return [kept_dims(x, shape, dims) for shape in op.shapes] if len(op.shapes) > 1 else kept_dims(x, op.shape, dims)


def kept_dims(x: Labelled, shape: Sequence[int], dims: Sequence[int]) -> Dims:
    """The labels for an output that may have dropped ``dims``."""
    if len(shape) == x.ndim:
        return tuple(x.dims)
    labels: Dims = move(x, [d for d in range(x.ndim) if d not in dims])
    blank: list[Label | None] = [None] * len(shape)
    return labels if len(labels) == len(shape) else tuple(blank)


@rule(
    aten.binary_cross_entropy,
    aten.binary_cross_entropy_with_logits,
    aten.huber_loss,
    aten.mse_loss,
    aten.smooth_l1_loss,
    aten.soft_margin_loss,
)
def loss(op: Op, *args: Any, **kwargs: Any) -> Dims:
    """A loss of each position, or one number: their mean or sum."""
    if op.shape:
        return combine(op, op.inputs, op.shape)
    shape = torch.broadcast_shapes(*(t.shape for t in op.inputs))
    lined_up = Labelled(tuple(shape), combine(op, op.inputs, tuple(shape)))
    for d in range(len(shape)):
        op.averages(lined_up.dims[d])
        lined_up = Labelled(lined_up.shape, without_context(op, lined_up, d))
    return ()


@rule(
    aten._ctc_loss,
    aten.multi_margin_loss,
    aten.multilabel_margin_loss_forward,
    aten.nll_loss2d_forward,
    aten.nll_loss_forward,
)
def loss_of_classes(op: Op, *args: Any, **kwargs: Any) -> list[Dims | None]:
    """A loss that reads classes by number."""
    for tensor in op.inputs:
        op.freeze(tensor.dims, f"{op.name} reads classes by number")
    return [(None,) * len(shape) for shape in op.shapes]


@rule(aten.histogram, aten.multinomial, aten.allclose, "aten::hash_tensor")
def counting(op: Op, *args: Any, **kwargs: Any) -> list[Dims | None]:
    """Counts or picks among all positions."""
    for tensor in op.inputs:
        op.freeze(tensor.dims, f"{op.name} counts its positions")
    return [(None,) * len(shape) for shape in op.shapes]
