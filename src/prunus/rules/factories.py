"""New tensors: a dim whose size the code derived from a model's size gets atoms of its own."""

from __future__ import annotations

from typing import Any

import torch

from prunus.labels import Dims, Numbered
from prunus.rules.table import Op, rule
from prunus.rules.views import sized

aten = torch.ops.aten


@rule(
    aten.zeros,
    aten.ones,
    aten.full,
    aten.empty,
    aten.rand,
    aten.randn,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
    aten.new_empty_strided,
    aten.empty_strided,
)
def factory(op: Op, *args: Any, **kwargs: Any) -> Dims:
    """A tensor of a size that the code names; the values of some are all equal."""
    dims = sized(op, op.shape, [None] * len(op.shape), range(len(op.shape)))
    if op.name.removeprefix("new_") in ("zeros", "ones", "full"):
        op.ledger.uniform.update(id(d.ids) for d in dims if d is not None)
    return dims


@rule(aten.arange)
def arange(op: Op, first: Any, *rest: Any, **kwargs: Any) -> Dims:
    """The numbers of the positions of a dim whose size the code derived."""
    n = op.shape[0]
    if n < 2 or rest[:1] not in ((), (n,)) or rest[1:2] not in ((), (1,)) or first != (0 if rest else n):
        return (None,)
    (label,) = sized(op, op.shape, [None], [0])
    return Numbered((label,), label) if label is not None else (None,)


@rule(aten.eye)
def eye(op: Op, n: int, m: int | None = None, **kwargs: Any) -> Dims:
    """The identity: position k of one dim belongs to position k of the other."""
    if m is not None and m != n:
        return (None, None)
    (label,) = sized(op, [n], [None], [0])
    return (label, label) if label is not None else (None, None)
