"""The output error: what removing units does to the layers that read them, after the best compensation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunus.calibration import Calibration, Reading
from prunus.errors import InputError
from prunus.importance.criteria import (
    Importance,
    Normalizer,
    ScoredGroup,
    along,
    check_not_empty,
    normalize,
    normalizer_of,
    to_units,
)
from prunus.importance.elimination import Consumer, eliminate, inverse_of
from prunus.importance.gradients import mask_gradients
from prunus.importance.members import Member


@dataclass(frozen=True)
class ErrorCurve:
    """The units of a group in the order of removal, and the error once the first 1, 2, ... of them are gone."""

    order: torch.Tensor
    errors: torch.Tensor


class OutputErrorImportance(Importance):
    """How much the outputs of all weights that read a unit change when it goes and the kept columns make up for it.

    The block form of Optimal Brain Surgeon on the second moments of what weights read, with a bias that follows the
    mean. Units are removed in order, cheapest first, and each removal changes what the next ones cost, so of two units
    that can stand in for each other only one is cheap. With ``weighted``, outputs count by the energy of their
    gradient, which puts all groups in units of the loss (OBS-F); random projections (calibrate without ``loss_fn``)
    tend to do better there than a loss that is nearly zero on most samples. A weight without second moments counts by
    its mask gradient (weighted), or by the energy of its columns.

    Invariant under rescaling that leaves the network's function as it is, if ``weighted``.

    Args:
        calibration: what :func:`prunus.calibrate` returned, with "grams" (and "gradients", if weighted).
        weighted: whether outputs count by the energy of their gradients (default: if there are gradients).
        steps: units go in at most so many portions; more is more exact and slower. 0: each unit is scored alone.
        ridge: a share of each input's variance that is added to it.
        normalizer: see :class:`LayerwiseImportance` (default None: errors compare as they are).

    Source: Hassibi & Stork 1993; for blocks, Kurtic et al. 2023 (ZipLM, arXiv 2302.04089).

    Raises:
        InputError: the calibration lacks statistics, or is of another model.

    Example:
        >>> import torch, prunus as tp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> calibration = tp.calibrate(model, torch.randn(32, 4))
        >>> DG = tp.DependencyGraph().build_dependency(model, torch.randn(1, 4))
        >>> importance = tp.importance.OutputErrorImportance(calibration)
        >>> curve = importance.curve(next(DG.get_all_groups()))
        >>> len(curve.order), bool((curve.errors.diff() >= 0).all())
        (3, True)
    """

    def __init__(
        self,
        calibration: Calibration,
        weighted: bool | None = None,
        steps: int = 64,
        ridge: float = 1e-3,
        normalizer: Normalizer = None,
    ) -> None:
        normalizer_of(normalizer)
        calibration.need("grams")
        self.weighted = "gradients" in calibration.collected if weighted is None else weighted
        if self.weighted:
            calibration.need("gradients")
        if steps < 0 or ridge < 0:
            raise InputError(f"OutputErrorImportance: steps={steps!r} and ridge={ridge!r} must be at least 0")
        self.calibration, self.steps, self.ridge, self.normalizer = calibration, steps, ridge, normalizer
        self.comparable = self.weighted and normalizer is None

    @torch.no_grad()
    def __call__(self, group: ScoredGroup) -> torch.Tensor | None:
        """One score for each unit: what its removal adds to the error, never less than what went before it.

        Raises:
            InputError: the group is empty, or the calibration is of another model.
        """
        added = self._added(group)
        if added is None:
            return None
        scores, order = added
        if order is not None:
            ranks = torch.arange(len(order), dtype=torch.float64)
            scores[order] = scores[order].cummax(dim=0).values * (1 + 1e-6 * ranks)
        return normalize(scores.float(), self.normalizer)

    @torch.no_grad()
    def curve(self, group: ScoredGroup) -> ErrorCurve:
        """The whole curve of the error over the number of removed units.

        Raises:
            InputError: the group is empty or has no weights.
        """
        added = self._added(group)
        if added is None:
            raise InputError("the group has no weights of which an error could be told")
        scores, order = added
        order = scores.argsort(stable=True) if order is None else order
        return ErrorCurve(order, scores[order].cumsum(dim=0))

    def _added(self, group: ScoredGroup) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """What each unit's removal adds, and the order of removal (None: each alone)."""
        check_not_empty(group)
        scores = torch.zeros(group.size, dtype=torch.float64)
        orders: list[torch.Tensor] = []
        levels: list[torch.Tensor] = []
        counted = False
        for places, members in group.parts:
            weights = [m for m in members if isinstance(m.tensor, nn.Parameter)]
            if not weights:
                continue
            counted = True
            consumers, extra = self._consumers(weights, len(places))
            if not self.steps:
                alone = sum((c.costs(torch.arange(len(places))) for c in consumers), extra)
                scores[places] = alone.cpu()
                continue
            order, added = (found.cpu() for found in eliminate(consumers, extra, self.steps))
            scores[places[order]] = added
            orders.append(places[order])
            levels.append(added.cummax(dim=0).values)
        if not counted:
            return None
        if not orders:
            return scores, None
        merged = torch.cat(levels).argsort(stable=True)
        return scores, torch.cat(orders)[merged]

    def _consumers(self, weights: Sequence[Member], units: int) -> tuple[list[Consumer], torch.Tensor]:
        """The weights that read the units, and what those cost of which there are no second moments."""
        extra = torch.zeros(units, dtype=torch.float64)
        consumers: list[Consumer] = []
        others = []
        for member in (m for m in weights if m.reads):
            reading = self.calibration.reading(member.name, member.tensor)
            consumer = None if reading is None or reading.dim != member.dim else self._consumer(member, reading)
            if consumer is None:
                others.append(member)
            else:
                consumers.append(consumer)
        if not consumers and not others:
            others = list(weights)
        if others:
            extra = extra + self._uncompensated(others)
        return consumers, extra.to(consumers[0].weight.device) if consumers else extra

    def _consumer(self, member: Member, reading: Reading) -> Consumer | None:
        covariance = reading.covariance()
        if covariance is None:
            return None
        weight = reading.matrices(member.tensor.detach()).double()
        if self.weighted:
            energies = reading.energies(member.tensor, self.calibration.samples)
            if energies is None:
                return None
            weight = weight * energies.sqrt()[:, :, None]
        columns = reading.columns(member.index).to(weight.device)
        return Consumer(weight, inverse_of(covariance, self.ridge), columns)

    def _uncompensated(self, members: Sequence[Member]) -> torch.Tensor:
        if self.weighted:
            gradients = mask_gradients(self.calibration, members)
            if gradients is not None:
                return gradients.double().square().sum(dim=0) / (2 * self.calibration.samples)
            return torch.zeros(len(members[0].index), dtype=torch.float64)
        found = torch.zeros(len(members[0].index), dtype=torch.float64)
        for member in members:
            weight = member.tensor.detach().float().square()
            reading = self.calibration.reading(member.name, member.tensor)
            if reading is not None:
                weight = weight * reading.spread(reading.moment.float(), weight)
            found += to_units(along(weight, member.dim), member.index).double() / 2
        return found
