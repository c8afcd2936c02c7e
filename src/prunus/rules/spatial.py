"""Ops over space (pooling, resampling): the dims before the spatial ones pass."""

from __future__ import annotations

import re
from typing import Any

import torch

from prunus.labels import Dims, Labelled
from prunus.rules.joins import fix
from prunus.rules.table import Op, rule

aten = torch.ops.aten

_FAMILIES = (
    "max_pool{n}d",
    "fractional_max_pool{n}d",
    "max_unpool{n}d",
    "max_pool{n}d_with_indices",
    "avg_pool{n}d",
    "adaptive_avg_pool{n}d",
    "_adaptive_avg_pool{n}d",
    "adaptive_max_pool{n}d",
    "upsample_nearest{n}d",
    "_upsample_nearest_exact{n}d",
    "upsample_linear{n}d",
    "upsample_bilinear{n}d",
    "_upsample_bilinear{n}d_aa",
    "upsample_bicubic{n}d",
    "_upsample_bicubic{n}d_aa",
    "upsample_trilinear{n}d",
)
_OPS = [getattr(aten, f.format(n=n)) for f in _FAMILIES for n in (1, 2, 3) if hasattr(aten, f.format(n=n))]


@rule(*_OPS)
def spatial(op: Op, x: Labelled, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """Each channel is resampled by itself; a labelled spatial dim has to stay."""
    found = re.search(r"(\d)d", op.name)
    lead = x.ndim - (int(found.group(1)) if found else 2)
    reason = f"{op.name} works over it"
    for places in op.inputs[1:]:  # of maxima, or where to look for them
        x = _lined_up(op, x, places, lead)
    x = fix(op, x, range(lead, x.ndim), reason)
    dims = (*x.dims[:lead], *[None] * (len(op.shape) - lead))
    return dims if len(op.shapes) == 1 else [dims for _ in op.shapes]


def _lined_up(op: Op, x: Labelled, other: Labelled, lead: int) -> Labelled:
    """``x`` after tying the dims before the spatial ones to those of a tensor that says something of each position."""
    dims = list(x.dims)
    for d, label in enumerate(other.dims):
        if d < lead and other.shape[d] == x.shape[d]:
            dims[d] = op.couple(dims[d], label) if dims[d] or label else None
        else:
            op.freeze([label], f"{op.name} reads it by position")
    return Labelled(x.shape, tuple(dims))
