"""What the ranks of ``torch.distributed`` have found, each on its own samples, as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunus.calibration.statistics import Reading
from prunus.distributed import gathered, summed
from prunus.errors import InputError


@dataclass(frozen=True)
class _Form:
    """What all ranks must agree on of what one weight reads."""

    dim: int
    blocks: int
    kernel: int
    stack: bool
    positions: int
    energy: int | None
    columns: int | None

    @staticmethod
    def of(reading: Reading) -> _Form:
        energy = None if reading.energy is None else len(reading.energy)
        columns = None if reading.gram is None else reading.gram.shape[-1]
        own = reading.dim, reading.blocks, reading.kernel, reading.stack, reading.first.shape[-1]
        return _Form(*own, energy, columns)


def sum_readings(readings: dict[str, Reading], device: torch.device) -> dict[str, Reading]:
    """The readings of all ranks, added up; what one rank alone has seen is there too.

    Args:
        readings: those of this rank, by weight.
        device: where to put what this rank has not seen.

    Raises:
        InputError: the ranks read a weight in different ways.
    """
    forms: dict[str, _Form] = {}
    for own in gathered({name: _Form.of(r) for name, r in readings.items()}, "the weights that are read"):
        for name, form in own.items():
            if forms.setdefault(name, form) != form:
                raise InputError(
                    f"calibrate: the ranks of torch.distributed read {name} in different ways; give all of them the "
                    "same model, and samples on which it runs in the same way"
                )
    return {name: _summed(readings.get(name), forms[name], name, device) for name in sorted(forms)}


def _summed(own: Reading | None, form: _Form, name: str, device: torch.device) -> Reading:
    own = _blank(form, device) if own is None else own
    counts = torch.tensor([own.rows, own.samples, own.gram_rows], dtype=torch.float64, device=own.first.device)
    here = float(own.gram_rows)
    tensors = [counts, own.first, own.second, own.means, *([] if own.energy is None else [own.energy])]
    shift, gram, first = own.shift, own.gram, own.gram_first
    if shift is not None:
        shift = shift.double() * here
        tensors.append(shift)
    summed(tensors, f"what {name} reads")
    rows, samples, gram_rows = (int(n) for n in counts.tolist())
    own = replace(own, rows=rows, samples=samples, gram_rows=gram_rows)
    if shift is None or gram is None or first is None or own.shift is None:
        return own
    shift /= max(gram_rows, 1)
    gap = own.shift.double() - shift  # all rows are now counted from the mean of what each rank counted from
    across = first.unsqueeze(2) * gap.unsqueeze(1)
    moved = gram.double() + across + across.mT + here * gap.unsqueeze(2) * gap.unsqueeze(1)
    first = first + here * gap
    summed([moved, first], f"the second moments of what {name} reads")
    return replace(own, shift=shift.to(own.shift.dtype), gram=moved.to(gram.dtype), gram_first=first)


def _blank(form: _Form, device: torch.device) -> Reading:
    def zeros(*sizes: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device)

    first, second, means = (zeros(form.blocks, form.positions) for _ in range(3))
    found = Reading(form.dim, form.blocks, 0, 0, first, second, means, kernel=form.kernel, stack=form.stack)
    if form.energy is not None:
        found.energy = zeros(form.energy)
    if form.columns is not None:
        found.gram = zeros(form.blocks, form.columns, form.columns, dtype=torch.float32)
        found.gram_first = zeros(form.blocks, form.columns)
        found.shift = zeros(form.blocks, form.columns, dtype=torch.float32)
    return found


def placed(rows: Tensor, offset: int, seed: int) -> Tensor:
    """Rows of samples at the places that they have among the samples of all ranks; the first ones with their sign.

    Args:
        rows: (places, size): those of this rank, from the first place on.
        offset: how many samples the ranks before this one have.
        seed: of the signs with which further samples share a place.
    """
    keep = len(rows)
    index = torch.arange(offset, offset + keep, device=rows.device)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + offset)
    signs = (torch.randint(0, 2, (keep,), generator=generator) * 2 - 1).to(rows)
    signs = torch.where(index < keep, 1, signs)
    return torch.zeros_like(rows).index_add_(0, index % keep, rows * signs.unsqueeze(1))


def sum_rows(tensors: Sequence[Any], offset: int, seed: int, place: str) -> list[Any]:
    """Sums for one parameter over all ranks: its mean, its square, then rows of masks (or None)."""
    mean, square, *masks = tensors
    found = [mean, square, *(None if m is None else placed(m, offset, seed) for m in masks)]
    summed([t for t in found if t is not None], place)
    return found
