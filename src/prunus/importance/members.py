"""What a criterion sees of a group: the tensors it cuts, and which positions of each belong to which unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prunus.coupling import Coupling, UnitGroup
from prunus.held import Held
from prunus.labels import Ids


@dataclass(frozen=True)
class Member:
    """One dim of one tensor that a group cuts.

    ``index`` has one row for each unit: the positions of that unit along ``dim`` of ``tensor``, as it is now.
    ``reads`` tells a layer's input columns from what it makes.
    """

    name: str
    tensor: torch.Tensor
    owner: nn.Module
    dim: int
    index: torch.Tensor
    reads: bool

    @property
    def is_bias(self) -> bool:
        """Whether the tensor is a vector next to a weight, or a buffer."""
        own = self.name.rpartition(".")[2]
        return own.startswith("bias") or not isinstance(self.tensor, nn.Parameter)


def members_of(coupling: Coupling, alive: NDArray[np.bool_] | None, group: UnitGroup, units: Ids) -> list[Member]:
    """The members of ``units`` (all of ``group``), with positions as the tensors are now.

    ``alive``: the atoms that earlier cuts left (None: nothing was cut).
    """
    trace, consumers = coupling.trace, coupling.consumers
    same = units is group.units or np.array_equal(units, group.units)
    rows = None if same else np.searchsorted(group.units, units)
    found = []
    for part in group.slices:
        held = trace.held[part.held]
        place = held.places[0]
        index = part.positions if rows is None else part.positions[rows]
        if alive is not None:
            index = current_positions(held, part.dim, alive, index)
        owner = trace.modules[place.module]
        tensor = held.tensor if place.kind == "channels" else getattr(owner, place.name)
        reads = (part.held, part.dim) in consumers
        found.append(Member(place.full, tensor, owner, part.dim, torch.from_numpy(index), reads))
    return found


def current_positions(held: Held, dim: int, alive: NDArray[np.bool_], positions: Ids | Sequence[int]) -> Ids:
    """Where positions of the traced tensor are now."""
    start = held.starts[dim]
    living = alive[start : start + held.shape[dim]]
    if living.all():
        return np.asarray(positions)
    rank: Ids = np.cumsum(living) - 1
    return rank[np.asarray(positions)]
