"""Transforms and complex numbers: a transformed dim stays, the parts of a complex number are one more dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prunus.labels import Dims, Labelled
from prunus.rules.joins import fix
from prunus.rules.table import Op, rule

aten = torch.ops.aten


@rule(aten._fft_r2c, aten._fft_c2c, aten._fft_c2r)
def fourier(op: Op, x: Labelled, dim: Sequence[int], *args: Any) -> Dims:
    """A Fourier transform mixes every position of ``dim``; the other dims pass."""
    return fix(op, x, dim, "a Fourier transform mixes its positions").dims


@rule(aten.view_as_real)
def view_as_real(op: Op, x: Labelled) -> Dims:
    """A last dim for the real and the imaginary part."""
    return (*x.dims, None)


@rule(aten.view_as_complex)
def view_as_complex(op: Op, x: Labelled) -> Dims:
    """The last dim holds the real and the imaginary part, side by side in memory, from an even place on."""
    pairs = x.dims[-2] if x.ndim > 1 else None
    if pairs is not None:
        op.ledger.keep_even(pairs.ids, f"{op.name} reads pairs of numbers in the memory of a wider tensor")
    return fix(op, x, (x.ndim - 1,), "it is the real and the imaginary part of one number").dims[:-1]
