"""Sparse training: penalties that pull whole units towards zero, as gradients added to ``.grad``.

A regulariser gives, for each group, the gradient of its penalty in each parameter. Several combine by adding up. They
see weights only, so data-parallel replicas, which hold equal weights, get equal gradients without any exchange.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunus.importance import Member
from prunus.labels import Ids

TINY = 1e-12


class Coupled(Protocol):
    """What a regulariser needs of a group."""

    @property
    def parts(self) -> Sequence[tuple[torch.Tensor, list[Member]]]:
        """Units of one signature: their places in the group, and their members."""

    @property
    def size(self) -> int:
        """The number of units."""

    @property
    def units(self) -> Ids:
        """The numbers of the units, which stay the same while the model is cut."""


Gradients = Iterator[tuple[nn.Parameter, torch.Tensor]]


class Regularizer(Protocol):
    """A penalty on groups."""

    def update(self, groups: Sequence[Coupled]) -> None:
        """Prepare for these groups; called before training, and again after each cut."""

    def gradients(self, group: Coupled, bias: bool = False) -> Gradients:
        """The gradient of the penalty in each parameter of a group (biases only where they are asked for)."""


@dataclass(frozen=True)
class GroupLasso:
    """Every unit's slices shrink together, the weaker the unit the faster: ``grad += reg * gamma_k * w``.

    ``gamma_k = 2 ** (alpha * (I_max - I_k) / (I_max - I_min))``, where ``I_k`` is the 2-norm of everything that goes
    with unit k, over all coupled layers.

    Source: Fang et al. 2023, DepGraph (arXiv 2301.12900), equations 4 and 5.

    Args:
        reg: strength of the penalty.
        alpha: how much faster the weakest unit shrinks than the strongest, in powers of 2.
    """

    reg: float = 1e-4
    alpha: float = 4.0

    def update(self, groups: Sequence[Coupled]) -> None:
        """Nothing to prepare: norms are those of the moment."""

    def gradients(self, group: Coupled, bias: bool = False) -> Gradients:
        """The scaled weights of each parameter."""
        norms = unit_norms(group, bias)
        scale = self.reg * 2 ** (self.alpha * _weakness(norms))
        yield from _weighted(group, scale, bias)


@dataclass(frozen=True)
class ScaleL1:
    """The scales of batch norms shrink by the same amount each: ``grad += reg * sign(scale)``.

    Source: Liu et al. 2017, Network Slimming (arXiv 1708.06519).

    Args:
        reg: strength of the penalty.
        group_lasso: instead, the scales of coupled norms shrink together: ``grad += reg * scale / norm of the unit's``.
        types: the norms that count.
    """

    reg: float = 1e-5
    group_lasso: bool = False
    types: tuple[type, ...] = (_BatchNorm,)

    def update(self, groups: Sequence[Coupled]) -> None:
        """Nothing to prepare."""

    def gradients(self, group: Coupled, bias: bool = False) -> Gradients:
        """The signs of the scales (and shifts, with ``bias``), or the scales over the norm of their unit's."""
        chosen = [
            (places, [m for m in members if isinstance(m.owner, self.types) and _counts(m, bias)])
            for places, members in group.parts
        ]
        if self.group_lasso:
            scale = self.reg / (_norms(chosen, group.size) + TINY)
            yield from _spread(chosen, scale)
            return
        for _, members in chosen:
            for member in members:
                sign = _wide(member.tensor).sign()
                if member.index.numel() == member.tensor.shape[member.dim]:  # all of it
                    yield _parameter(member), sign.mul_(self.reg)
                else:
                    yield _parameter(member), sign * _mask(member, torch.full((len(member.index),), self.reg))


@dataclass
class GrowingL2:
    """A decay of its own for each unit, which grows the faster the weaker the unit: ``grad += strength_k * w``.

    ``grow()`` adds ``delta * (I_max - I_k) / (I_max - I_min)`` to each strength, which begins at ``reg``.

    Source: Wang et al. 2021, "Neural Pruning via Growing Regularization" (arXiv 2012.09243).

    Args:
        reg: the strength at first.
        delta: the most that it grows by at once.
    """

    reg: float = 1e-5
    delta: float = 1e-5
    strength: np.ndarray[tuple[int], np.dtype[np.float64]] = field(default_factory=lambda: np.empty(0), repr=False)

    def update(self, groups: Sequence[Coupled]) -> None:
        """Units that are new begin at ``reg``; the others keep what they have."""
        most = max((int(group.units.max()) + 1 for group in groups), default=0)
        new = max(0, most - len(self.strength))
        self.strength = np.concatenate((self.strength, np.full(new, self.reg)))

    def grow(self, groups: Sequence[Coupled]) -> None:
        """Strengthen the decay of every unit."""
        self.update(groups)
        for group in groups:
            self.strength[group.units] += self.delta * _weakness(unit_norms(group)).double().cpu().numpy()

    def gradients(self, group: Coupled, bias: bool = False) -> Gradients:
        """The weights times the strength of their unit."""
        self.update([group])
        yield from _weighted(group, torch.from_numpy(self.strength[group.units]), bias)


def add_gradients(
    groups: Iterable[Coupled], regularizers: Sequence[Regularizer], weight: float = 1.0, bias: bool = False
) -> None:
    """Add the gradients of all penalties to ``.grad`` of the parameters that are trained.

    Args:
        groups: what the penalties are about.
        regularizers: the penalties; they add up.
        weight: a factor for all of them.
        bias: also of biases.
    """
    with torch.no_grad():
        for group in groups:
            for regularizer in regularizers:
                for parameter, gradient in regularizer.gradients(group, bias):
                    if not parameter.requires_grad:
                        continue
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    parameter.grad.add_((gradient if weight == 1 else gradient * weight).to(parameter.grad.dtype))


def unit_norms(group: Coupled, bias: bool = False) -> torch.Tensor:
    """The 2-norm of everything that goes with each unit of a group."""
    chosen = [(places, [m for m in members if _counts(m, bias)]) for places, members in group.parts]
    return _norms(chosen, group.size)


Chosen = Sequence[tuple[torch.Tensor, list[Member]]]


def _norms(chosen: Chosen, size: int) -> torch.Tensor:
    devices = [member.tensor.device for _, members in chosen for member in members]
    squares = torch.zeros(size, dtype=torch.float32, device=devices[0] if devices else None)
    for places, members in chosen:
        for member in members:
            weight = _wide(member.tensor).square()
            others = [d for d in range(weight.dim()) if d != member.dim]
            along = weight.sum(dim=others) if others else weight
            squares[places] += along[member.index.to(along.device)].sum(dim=1).to(squares)
    return squares.sqrt()


def _weakness(norms: torch.Tensor) -> torch.Tensor:
    """0 for the strongest unit of a group, 1 for the weakest; 0 for all of them where all are alike."""
    if not norms.numel():
        return norms
    span = norms.max() - norms.min()
    return (norms.max() - norms) / span if span > TINY else torch.zeros_like(norms)


def _weighted(group: Coupled, scale: torch.Tensor, bias: bool) -> Gradients:
    return _spread([(p, [m for m in members if _counts(m, bias)]) for p, members in group.parts], scale)


def _spread(chosen: Chosen, scale: torch.Tensor) -> Gradients:
    """Each parameter times the scale of the unit that each position belongs to (0 elsewhere)."""
    for places, members in chosen:
        for member in members:
            yield _parameter(member), _wide(member.tensor) * _mask(member, scale[places])


def _mask(member: Member, per_unit: torch.Tensor) -> torch.Tensor:
    """A number for each position along the member's dim, to multiply its tensor with."""
    tensor = member.tensor
    along = torch.zeros(tensor.shape[member.dim], dtype=torch.float32, device=tensor.device)
    along[member.index.to(tensor.device)] = per_unit.to(along)[:, None].expand(-1, member.index.shape[1])
    return along.view([-1 if d == member.dim else 1 for d in range(tensor.dim())])


def _counts(member: Member, bias: bool) -> bool:
    return isinstance(member.tensor, nn.Parameter) and member.tensor.dim() > 0 and (bias or not member.is_bias)


def _parameter(member: Member) -> nn.Parameter:
    return cast("nn.Parameter", member.tensor)  # what is chosen are parameters


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """The values, in float32 at least: penalties are small beside what half precision can tell apart."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


__all__ = ["GroupLasso", "GrowingL2", "Regularizer", "ScaleL1", "add_gradients", "unit_norms"]
