"""New tensors: a dim whose size the code derived from a model's size gets atoms of its own."""

from __future__ import annotations

from typing import Any

import torch

from prunus.labels import Dims
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
)
def factory(op: Op, *args: Any, **kwargs: Any) -> Dims:
    """A tensor of a size that the code names; the values of some are all equal."""
    dims = sized(op, op.shape, [None] * len(op.shape), range(len(op.shape)))
    if op.name.removeprefix("new_") in ("zeros", "ones", "full"):
        op.ledger.uniform.update(id(d.ids) for d in dims if d is not None)
    return dims
