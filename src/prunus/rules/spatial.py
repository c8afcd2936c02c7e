"""Ops over space (pooling, resampling): the dims before the spatial ones pass."""

from __future__ import annotations

import re
from typing import Any

import torch

from prunus.labels import Dims, Labelled
from prunus.rules.table import Op, rule

aten = torch.ops.aten

_FAMILIES = (
    "max_pool{n}d",
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
    op.freeze(x.dims[lead:], f"{op.name} works over it")
    dims = (*x.dims[:lead], *[None] * (len(op.shape) - lead))
    return dims if len(op.shapes) == 1 else [dims for _ in op.shapes]
