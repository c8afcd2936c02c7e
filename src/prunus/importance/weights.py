"""Criteria that look at weights alone: no data, milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from prunus.importance.criteria import (
    DEFAULT_TYPES,
    TINY,
    Importance,
    LayerwiseImportance,
    Normalizer,
    ScoredGroup,
    along,
    by_parts,
    check_not_empty,
    normalizer_of,
    to_units,
)
from prunus.importance.members import Member


class RandomImportance(Importance):
    """Uniform random scores, from torch's generator: the control that every other criterion has to beat."""

    def __call__(self, group: ScoredGroup) -> torch.Tensor:
        """One random score for each unit."""
        check_not_empty(group)
        return torch.rand(group.size, dtype=torch.float32)


class MagnitudeImportance(LayerwiseImportance):
    """The p-norm (to the power p) of everything that goes with a unit, averaged over the layers of its group.

    It changes when a convolution before a norm is rescaled, although the network computes the same; see
    :class:`InvariantMagnitudeImportance`.

    Args:
        p: the power, 2 for squared weights, 1 for absolute ones.
        group_reduction: see :class:`LayerwiseImportance`.
        normalizer: see :class:`LayerwiseImportance`.
        bias: also count biases.
        target_types: count only parameters of modules of these types (default: all modules).

    Source: Li et al. 2017 (arXiv 1608.08710) for single layers; Fang et al. 2023 (DepGraph, arXiv 2301.12900), section
    3.3, for the sum over the coupled layers.

    Example:
        >>> import torch, prunus as tp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> DG = tp.DependencyGraph().build_dependency(model, torch.randn(1, 4))
        >>> group = next(DG.get_all_groups())
        >>> tp.importance.MagnitudeImportance(p=2)(group).shape
        torch.Size([3])
    """

    def __init__(
        self,
        p: int = 2,
        group_reduction: str | None = "mean",
        normalizer: Normalizer = "mean",
        bias: bool = False,
        target_types: Sequence[type] = DEFAULT_TYPES,
    ) -> None:
        super().__init__(group_reduction, normalizer, bias, target_types)
        self.p = p

    def slices(self, member: Member) -> torch.Tensor | None:
        """The sum of powers over each unit's slices."""
        return to_units(powers(member.tensor, member.dim, self.p), member.index)


def powers(tensor: torch.Tensor, dim: int, p: float) -> torch.Tensor:
    """For each position along ``dim`` the sum of ``|w| ** p``."""
    weight = tensor.detach().float()
    if dim == 0 and weight.dim() > 1 and p == 2:  # one pass; along other dims it would be the slower way
        return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.dim()))).square()
    sizes = weight.square() if p == 2 else weight.abs() if p == 1 else weight.abs().pow(p)
    return along(sizes, dim)


class BNScaleImportance(MagnitudeImportance):
    """The absolute scale of the batch norms that a unit goes through; groups without one get None.

    Source: Liu et al. 2017 (Network Slimming, arXiv 1708.06519). It is meant for networks that were trained with a
    penalty on these scales.

    Args:
        group_reduction: see :class:`LayerwiseImportance`.
        normalizer: see :class:`LayerwiseImportance`.
    """

    def __init__(self, group_reduction: str | None = "mean", normalizer: Normalizer = "mean") -> None:
        super().__init__(1, group_reduction, normalizer, False, (_BatchNorm,))


class LAMPImportance(MagnitudeImportance):
    """Magnitudes over the sum of those in the same group that are not smaller, so that groups compare.

    Source: Lee et al. 2021 (LAMP, arXiv 2010.07611), for groups instead of single weights.

    Args:
        p: the power of the magnitudes.
        group_reduction: see :class:`LayerwiseImportance`.
        normalizer: see :class:`LayerwiseImportance`.
        bias: also count biases.
    """

    def __init__(
        self, p: int = 2, group_reduction: str | None = "mean", normalizer: Normalizer = "lamp", bias: bool = False
    ) -> None:
        super().__init__(p, group_reduction, normalizer, bias)


class FPGMImportance(MagnitudeImportance):
    """How far a unit's slices are from those of all other units: what is near the geometric median is replaceable.

    Source: He et al. 2019 (arXiv 1811.00250). It makes sense where the removed units are made up for afterwards.

    Args:
        p: the norm in which distances are measured.
        group_reduction: see :class:`LayerwiseImportance`.
        normalizer: see :class:`LayerwiseImportance`.
        bias: also count biases.
    """

    def __init__(
        self, p: int = 2, group_reduction: str | None = "mean", normalizer: Normalizer = "mean", bias: bool = False
    ) -> None:
        super().__init__(p, group_reduction, normalizer, bias)

    def counts(self, member: Member) -> bool:
        """Whether a tensor takes part: weights with at least two dims."""
        return super().counts(member) and member.tensor.dim() > 1

    def slices(self, member: Member) -> torch.Tensor | None:
        """The sum of distances to the slices of all other units."""
        weight = member.tensor.detach().float().movedim(member.dim, 0)
        rows = weight[member.index.to(weight.device)].flatten(1)
        return torch.cdist(rows, rows, p=float(self.p)).sum(dim=1).cpu()


class InvariantMagnitudeImportance(Importance):
    """The share of the outputs' energy that comes from a unit, guessed from weights and norms alone.

    For each layer that reads the group, ``sum over its outputs o of W[o, j]^2 m[j] / sum_k W[o, k]^2 m[k]``, where
    ``m[j]`` stands for the energy of what is read: ``gamma^2 + beta^2`` of the batch norms that make it, or the squared
    norm of the rows that make it where there is none; of other norms, those of the last one. It does not change when a
    network is rescaled without changing what it computes (rows of a convolution before a norm; a norm's output and the
    columns that read it). Groups that nothing reads get the magnitudes of what makes them.

    Args:
        normalizer: see :class:`LayerwiseImportance` (None: shares add up to the number of outputs of all readers).
    """

    def __init__(self, normalizer: Normalizer = "mean") -> None:
        self.normalizer = normalizer
        normalizer_of(normalizer)

    @torch.no_grad()
    def __call__(self, group: ScoredGroup) -> torch.Tensor | None:
        """One score for each unit, or None if no parameter of the group counts."""
        return by_parts(
            group, lambda ms: _shares([m for m in ms if isinstance(m.tensor, nn.Parameter)]), self.normalizer
        )


def _shares(members: Sequence[Member]) -> torch.Tensor | None:
    """Shares of the energy of all readers' outputs; the group's own energy where nothing reads it."""
    energy = _Energy()
    shares: torch.Tensor | None = None
    for member in members:  # in the order in which the model uses them
        if not member.reads:
            energy.passes(member)
            continue
        weight = member.tensor.detach().float().movedim(member.dim, -1)
        squares = weight.reshape(-1, weight.shape[-1]).square().cpu()[:, member.index]  # (outputs, units, own)
        outputs = (squares * energy.read_by(member, len(squares))).sum(dim=-1)
        found = (outputs / (outputs.sum(dim=1, keepdim=True) + TINY)).sum(dim=0)
        shares = found if shares is None else shares + found
    if shares is not None or energy.known is None:
        return shares
    return energy.known.sum(dim=1)


class _Energy:
    """The energy of each unit's activations, (units, positions of each), along the layers that make them."""

    def __init__(self) -> None:
        self.known: torch.Tensor | None = None
        self.normed = False
        self.fresh = False  # a depthwise layer came since the last norm: the next norm replaces what was there

    def passes(self, member: Member) -> None:
        """A layer makes the units, or passes them on."""
        own = powers(member.tensor, member.dim, 2).cpu()[member.index]
        if "norm" in type(member.owner).__name__.lower():
            batch = isinstance(member.owner, _BatchNorm)
            replace = not member.is_bias and (self.fresh or not self.normed or not batch)
            self.known = own if replace else self._with(own, torch.add)
            self.normed, self.fresh = True, False
        elif _is_depthwise(member):
            self.fresh = True
            if not member.is_bias:
                self.known = self._with(own, torch.mul)
        elif not self.normed:
            self.known = self._with(own, torch.add)

    def _with(self, own: torch.Tensor, how: Callable[..., torch.Tensor]) -> torch.Tensor:
        if self.known is None:
            return own
        if self.known.shape == own.shape:
            return how(self.known, own)
        return how(self.known.sum(dim=1, keepdim=True), own.sum(dim=1, keepdim=True))

    def read_by(self, member: Member, outputs: int) -> torch.Tensor:
        """The energy of each position that a weight reads, to be multiplied with (outputs, units, own positions)."""
        if self.known is None:
            return torch.ones(1)
        units, made = self.known.shape
        read = member.index.shape[1]
        groups = member.owner.groups if isinstance(member.owner, _ConvNd) and member.dim == 1 else 1
        if groups > 1 and made == read * groups:  # each group of a convolution reads channels of its own
            return self.known.reshape(units, groups, read).movedim(1, 0).repeat_interleave(outputs // groups, dim=0)
        if read % made == 0:
            return self.known.repeat_interleave(read // made, dim=1)
        return self.known.sum(dim=1, keepdim=True)


def _is_depthwise(member: Member) -> bool:
    """Whether a layer makes each channel of the same channel."""
    owner = member.owner
    return isinstance(owner, _ConvNd) and owner.groups > 1 and owner.groups == owner.in_channels
