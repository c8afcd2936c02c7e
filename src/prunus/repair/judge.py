"""How far outputs are from the dense model's, on what is held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunus.distributed import gathered
from prunus.repair.samples import Batch, held_share
from prunus.tracing import tensors_in


def judged(batch: Batch, output: Any) -> list[Tensor]:
    """The parts of an output that a model is judged by: floats, of samples that are held out, without padding."""
    return [_part(batch, t) for t in _floats(output)]


def distance(dense: Mapping[int, Sequence[Tensor]], other: Mapping[int, Sequence[Tensor]]) -> float | None:
    """The mean over the outputs, of all ranks, of squared distance by variance; None where they cannot be compared.

    Args:
        dense: for each batch that is judged, what :func:`judged` gives for the dense model.
        other: the same for another model.
    """
    shares: dict[int, list[float]] = {}
    for one in gathered(_shares(dense, other), "the error of the outputs"):
        if one is None:
            return None
        for j, found in one.items():
            known = shares.get(j, [0.0, 0.0])
            shares[j] = [known[0] + found[0], known[1] + found[1]]
    if not shares:
        return None
    return sum(gap / max(all_, 1e-30) for gap, all_ in shares.values()) / len(shares)


def _shares(dense: Mapping[int, Sequence[Tensor]], other: Mapping[int, Sequence[Tensor]]) -> Any:
    """For each output, its squared distance and its variance, as sums."""
    shares: dict[int, list[float]] = {}
    for k, ones in dense.items():
        others = other[k]
        if len(ones) != len(others) or any(a.shape != b.shape for a, b in zip(ones, others, strict=True)):
            return None
        for j, (one, two) in enumerate(zip(ones, others, strict=True)):
            total, a = shares.setdefault(j, [0.0, 0.0]), one.double()
            total[0] += float((a - two.double()).square().sum())
            total[1] += float((a - a.mean()).square().sum()) if a.numel() else 0.0
    return shares


def _part(batch: Batch, t: Tensor) -> Tensor:
    """Copied, so that the rest may go."""
    mask = batch.mask
    out = held_share(t.shape[0]) if batch.held is None and t.dim() and t.shape[0] == batch.count else 0
    if mask is not None and t.shape[: mask.dim()] == mask.shape:
        return t[-out:][mask[-out:]]
    return t[-out:].clone() if out else t


def _floats(output: Any) -> Iterator[Tensor]:
    for t in tensors_in(output):
        if t.is_complex():
            yield torch.view_as_real(t)
        elif t.is_floating_point():
            yield t
