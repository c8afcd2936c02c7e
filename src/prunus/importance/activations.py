"""Criteria that look at activations: no gradients, no labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from prunus.calibration import Calibration, Reading
from prunus.calibration.watching import recording
from prunus.errors import InputError
from prunus.importance.criteria import (
    Importance,
    Normalizer,
    ScoredGroup,
    along,
    by_parts,
    normalizer_of,
    to_units,
)
from prunus.importance.members import Member


class ReadersImportance(Importance):
    """Sums over all weights that read a unit; a criterion of this kind says in :meth:`worth` what each entry is worth.

    Weights whose inputs were not seen (layers inside recurrent kernels) do not count. In groups that no seen weight
    reads (queries against keys), the rows that make a unit count instead, by what they read; where nothing was seen,
    weights count as if all inputs were alike.

    Args:
        calibration: what :func:`prunus.calibrate` returned.
        normalizer: see :class:`LayerwiseImportance`.

    Raises:
        InputError: the calibration has no activations, or is of another model.
    """

    def __init__(self, calibration: Calibration | None, normalizer: Normalizer) -> None:
        normalizer_of(normalizer)
        if calibration is not None:
            calibration.need("activations")
        self.calibration = calibration
        self.normalizer = normalizer

    def worth(self, weight: torch.Tensor, reading: Reading | None) -> torch.Tensor:
        """What each entry of a weight is worth, in the weight's shape (or one that broadcasts to it)."""
        raise NotImplementedError(f"{type(self).__name__} does not implement worth(weight, reading)")

    def finish(self, scores: torch.Tensor) -> torch.Tensor:
        """What becomes of the sums over a unit's entries of one weight."""
        return scores

    @torch.no_grad()
    def __call__(self, group: ScoredGroup) -> torch.Tensor | None:
        """One score for each unit, or None if the group has no weights."""
        return by_parts(group, self._part, self.normalizer)

    def _part(self, members: Sequence[Member]) -> torch.Tensor | None:
        weights = [m for m in members if isinstance(m.tensor, nn.Parameter) and m.tensor.dim() > 1]
        seen = [(m, r) for m in weights if (r := self._reading(m)) is not None]
        chosen: Sequence[tuple[Member, Reading | None]] = [(m, r) for m, r in seen if m.dim == r.dim]
        chosen = chosen or seen or [(m, None) for m in weights if m.reads] or [(m, None) for m in weights]
        return torch.stack([self._sum(m, r) for m, r in chosen]).sum(dim=0) if chosen else None

    def _reading(self, member: Member) -> Reading | None:
        if self.calibration is None:
            raise InputError(f"{type(self).__name__} knows no activations: pass calibration=prunus.calibrate(...)")
        return self.calibration.reading(member.name, member.tensor)

    def _sum(self, member: Member, reading: Reading | None) -> torch.Tensor:
        weight = member.tensor.detach()
        worth = self.worth(weight.float(), reading).expand_as(weight)
        return self.finish(to_units(along(worth, member.dim), member.index))


class WandaImportance(ReadersImportance):
    """The sum of ``|W[o, j]|`` times the root mean square of input ``j``, over all weights that read a unit.

    Invariant under rescaling that leaves the network's function as it is, but for rows of the readers themselves.

    Args:
        calibration: what :func:`prunus.calibrate` returned.
        normalizer: see :class:`LayerwiseImportance`.

    Source: Sun et al. 2024 (Wanda, arXiv 2306.11695), in the structured form of An et al. 2024 (arXiv 2312.11983).

    Example:
        >>> import torch, prunus as tp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> calibration = tp.calibrate(model, torch.randn(8, 4), collect=["activations"])
        >>> DG = tp.DependencyGraph().build_dependency(model, torch.randn(1, 4))
        >>> tp.importance.WandaImportance(calibration)(next(DG.get_all_groups())).shape
        torch.Size([3])
    """

    def __init__(self, calibration: Calibration, normalizer: Normalizer = "mean") -> None:
        super().__init__(calibration, normalizer)

    def worth(self, weight: torch.Tensor, reading: Reading | None) -> torch.Tensor:
        """``|W| * rms(x)``."""
        return weight.abs() if reading is None else weight.abs() * reading.spread(reading.moment.sqrt().float(), weight)


class FLAPImportance(ReadersImportance):
    """The variance of input ``j`` times ``|W[:, j]|^2``: what is lost when the bias makes up for the mean.

    Args:
        calibration: what :func:`prunus.calibrate` returned.
        normalizer: see :class:`LayerwiseImportance`.

    Source: An et al. 2024 (FLAP, arXiv 2312.11983), the metric WIFV, standardised within each group.
    """

    def __init__(self, calibration: Calibration, normalizer: Normalizer = "gaussian") -> None:
        super().__init__(calibration, normalizer)

    def worth(self, weight: torch.Tensor, reading: Reading | None) -> torch.Tensor:
        """``W^2 * var(x)``."""
        return (
            weight.square() if reading is None else weight.square() * reading.spread(reading.variance.float(), weight)
        )


class ActivationImportance(ReadersImportance):
    """The norm over samples of the mean absolute activation of a unit, over all weights that read it.

    Pass a calibration, or run the model inside ``with importance.compute_importance(model):``. It changes when a norm's
    output and the columns that read it are rescaled against each other.

    Args:
        p: accepted for old scripts.
        group_reduction: accepted for old scripts: readers are summed.
        normalizer: see :class:`LayerwiseImportance`.
        bias: accepted for old scripts.
        target_types: accepted for old scripts.
        calibration: what :func:`prunus.calibrate` returned.

    Source: Muralidharan et al. 2024 (Minitron, arXiv 2407.14679).
    """

    def __init__(
        self,
        p: int = 2,
        group_reduction: str | None = "sum",
        normalizer: Normalizer = "mean",
        bias: bool = False,
        target_types: Sequence[type] = (nn.Module,),
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__(calibration, normalizer)
        self.p, self.group_reduction, self.bias, self.target_types = p, group_reduction, bias, tuple(target_types)

    @contextmanager
    def compute_importance(self, model: nn.Module) -> Iterator[None]:
        """Collect activations while the caller runs the model inside the context."""
        with recording(model) as recorder:
            yield
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
        by_id = {id(p): n for n, p in model.named_parameters()}
        names = [(n, by_id[id(p)]) for n, p in model.named_parameters(remove_duplicate=False)]
        readings = {n: recorder.readings[own] for n, own in names if own in recorder.readings}
        if not readings:
            raise InputError("compute_importance: the model was not run inside the context")
        samples = max(r.samples for r in readings.values())
        self.calibration = Calibration(samples, None, frozenset({"activations"}), {}, readings, shapes)

    def worth(self, weight: torch.Tensor, reading: Reading | None) -> torch.Tensor:
        """Squared means of activations for readers, squared weights where nothing was seen."""
        return weight.square() if reading is None else weight.square() * reading.spread(reading.moment.float(), weight)

    def finish(self, scores: torch.Tensor) -> torch.Tensor:
        """The root of sums of squares."""
        return scores.sqrt()

    def _sum(self, member: Member, reading: Reading | None) -> torch.Tensor:
        if reading is None or member.dim != reading.dim:
            return super()._sum(member, reading)
        return self.finish(to_units(reading.means.sum(dim=0) / max(reading.samples, 1), member.index))
