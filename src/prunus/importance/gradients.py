"""Criteria that look at gradients of the loss: those that are in ``.grad``, or those that a calibration collected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from prunus.calibration import Calibration, ModuleWatch
from prunus.errors import InputError
from prunus.importance.criteria import (
    DEFAULT_TYPES,
    Importance,
    LayerwiseImportance,
    Normalizer,
    ScoredGroup,
    along,
    by_parts,
    normalizer_of,
    to_units,
)
from prunus.importance.members import Member


class GradientImportance(LayerwiseImportance):
    """What criteria that need gradients share: a group of which no counted parameter has any is an error."""

    def __call__(self, group: ScoredGroup) -> torch.Tensor | None:
        """One score for each unit, or None if no parameter of the group counts.

        Raises:
            InputError: no parameter of the group has a gradient, or the calibration is of another model.
        """
        found = super().__call__(group)
        if found is None:
            counted = [m.name for _, members in group.parts for m in members if self.counts(m)]
            if counted:
                raise InputError(f"{counted[0]} and the other parameters of its group have no gradients: {self.cure}")
        return found

    cure = "call loss.backward() before scoring, or pass calibration=prunus.calibrate(model, loader, loss_fn)"


class TaylorImportance(GradientImportance):
    """The first-order change of the loss when a unit's weights go: the sum of ``|w * dL/dw|``.

    Gradients are those in ``.grad`` (of as many backward passes as the caller made), or the mean over all samples of a
    calibration; without a loss the calibration gives root mean squares of random projections instead of means.
    Both forms are invariant under rescaling that leaves the network's function as it is.

    Args:
        group_reduction: see :class:`LayerwiseImportance`.
        normalizer: see :class:`LayerwiseImportance`.
        multivariable: sum before the absolute value, over each unit's slices of a tensor.
        bias: also count biases.
        target_types: count only parameters of modules of these types (default: all modules).
        calibration: what :func:`prunus.calibrate` returned.

    Source: Molchanov et al. 2019 (arXiv 1906.10771).

    Example:
        >>> import torch, prunus as tp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> DG = tp.DependencyGraph().build_dependency(model, torch.randn(1, 4))
        >>> tp.importance.TaylorImportance()(next(DG.get_all_groups())).shape
        torch.Size([3])
    """

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: Normalizer = "mean",
        multivariable: bool = False,
        bias: bool = False,
        target_types: Sequence[type] = DEFAULT_TYPES,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__(group_reduction, normalizer, bias, target_types)
        self.multivariable = multivariable
        self.calibration = calibration
        if multivariable and calibration is not None and not calibration.has_loss:
            raise InputError(
                "TaylorImportance(multivariable=True) needs the signs of gradients, which random projections do not "
                "have: give calibrate a loss_fn, or use FisherImportance"
            )

    def slices(self, member: Member) -> torch.Tensor | None:
        """The sum of ``|w * g|``, or the absolute sum of ``w * g``."""
        gradient = self._gradient(member)
        if gradient is None:
            return None
        product = member.tensor.detach().float() * gradient.float()
        if self.multivariable:
            return to_units(along(product, member.dim), member.index).abs()
        return to_units(along(product.abs(), member.dim), member.index)

    def _gradient(self, member: Member) -> torch.Tensor | None:
        if self.calibration is None:
            return member.tensor.grad
        found = self.calibration.gradient(member.name, member.tensor)
        return found.mean if self.calibration.has_loss else found.square.sqrt()


class HessianImportance(GradientImportance):
    """The second-order change of the loss: the sum of ``w^2 h / 2``, with ``h`` the mean squared gradient of samples.

    Either collect gradients by hand (``zero_grad()``, then ``accumulate_grad(model)`` after the backward pass of every
    sample), or pass a calibration. Every sample counts. Invariant under rescaling that leaves the network's function as
    it is.

    Args:
        group_reduction: see :class:`LayerwiseImportance`.
        normalizer: see :class:`LayerwiseImportance`.
        bias: also count biases.
        target_types: count only parameters of modules of these types (default: all modules).
        calibration: what :func:`prunus.calibrate` returned.

    Source: LeCun et al. 1989 (Optimal Brain Damage), with the empirical Fisher diagonal for the Hessian.

    Example:
        >>> import torch, prunus as tp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> importance = tp.importance.HessianImportance()
        >>> for loss in model(torch.randn(8, 4)).square().mean(dim=1):
        ...     model.zero_grad()
        ...     loss.backward(retain_graph=True)
        ...     importance.accumulate_grad(model)
        >>> DG = tp.DependencyGraph().build_dependency(model, torch.randn(1, 4))
        >>> importance(next(DG.get_all_groups())).shape
        torch.Size([3])
    """

    cure = "call accumulate_grad(model) after the backward pass of each sample, or pass calibration="

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: Normalizer = "mean",
        bias: bool = False,
        target_types: Sequence[type] = DEFAULT_TYPES,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__(group_reduction, normalizer, bias, target_types)
        self.calibration = calibration
        self._squares: dict[str, torch.Tensor] = {}
        self._samples = 0

    def zero_grad(self) -> None:
        """Forget what was accumulated."""
        self._squares, self._samples = {}, 0

    @torch.no_grad()
    def accumulate_grad(self, model: nn.Module) -> None:
        """Add the squares of the gradients that are in ``.grad``: those of one sample.

        Raises:
            InputError: no parameter has a gradient.
        """
        found = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
        if not found:
            raise InputError("accumulate_grad: no parameter has a gradient; call loss.backward() for one sample first")
        self._samples += 1
        for name, gradient in found.items():
            square = gradient.float().square()
            before = self._squares.get(name)
            self._squares[name] = square if before is None else before.add_(square)

    def slices(self, member: Member) -> torch.Tensor | None:
        """The sum of ``w^2 h / 2``."""
        square = self._square(member)
        if square is None:
            return None
        return to_units(along(member.tensor.detach().float().square() * square, member.dim), member.index) / 2

    def _square(self, member: Member) -> torch.Tensor | None:
        if self.calibration is not None:
            return self.calibration.gradient(member.name, member.tensor).square
        found = self._squares.get(member.name)
        if found is None:
            return None
        if found.shape != member.tensor.shape:
            raise InputError(
                f"{member.name} had shape {tuple(found.shape)} when its gradients were accumulated and has "
                f"{tuple(member.tensor.shape)} now: call zero_grad() and accumulate again after each pruning step"
            )
        return found / self._samples


class FisherImportance(Importance):
    """The change of the loss when a mask over everything that reads a unit goes from one to zero.

    All layers of a group share one mask ``m``, so ``dL/dm`` of a sample is the sum over the columns that read the unit
    (over the last rows that make it, where no weight reads it) of ``w * dL/dw``. With p=2 the score is
    ``mean((dL/dm)^2) / 2``, in units of the loss; with p=1 it is ``mean(|dL/dm|)``. Invariant under rescaling that
    leaves the network's function as it is.

    Args:
        calibration: what :func:`prunus.calibrate` returned.
        p: 2 for the Fisher form, 1 for the first-order form.
        normalizer: see :class:`LayerwiseImportance` (None: units of the loss; one threshold over these can empty whole
            groups, for what many units cost together is more than the sum).

    Source: Molchanov et al. 2017 (arXiv 1611.06440) for p=1; Liu et al. 2021 (Group Fisher, arXiv 2108.00708) for p=2.

    Raises:
        InputError: the calibration has no gradients, or p=1 with more samples than it keeps apart.
    """

    def __init__(self, calibration: Calibration, p: int = 2, normalizer: Normalizer = "mean") -> None:
        normalizer_of(normalizer)
        calibration.need("gradients")
        if p == 1 and not calibration.rows_are_samples:
            raise InputError(
                f"FisherImportance(p=1) needs the mask gradient of each sample, and of {calibration.samples} samples "
                "calibrate kept fewer apart: pass calibrate(..., keep=) at least as many, or steps= to see fewer"
            )
        self.calibration, self.p, self.normalizer = calibration, p, normalizer
        self.comparable = p == 2 and normalizer is None

    @torch.no_grad()
    def __call__(self, group: ScoredGroup) -> torch.Tensor | None:
        """One score for each unit, or None if the group has no parameter."""
        return by_parts(group, self._part, self.normalizer)

    def _part(self, members: Sequence[Member]) -> torch.Tensor | None:
        found = mask_gradients(self.calibration, members)
        if found is None:
            return None
        total = found.square().sum(dim=0) / 2 if self.p == 2 else found.abs().pow(self.p).sum(dim=0)
        return total / self.calibration.samples


def mask_gradients(calibration: Calibration, members: Sequence[Member]) -> torch.Tensor | None:
    """``dL/dm`` as (samples, units), with one mask ``m`` per unit over the readers, or over the makers if none read."""
    weights = [m for m in members if isinstance(m.tensor, nn.Parameter)]
    chosen = [m for m in weights if m.reads] or [m for m in weights if m.owner is weights[-1].owner]
    found = [
        to_units(rows, m.index)
        for m in chosen
        if (rows := calibration.gradient(m.name, m.tensor).masks[m.dim]) is not None
    ]
    return torch.stack(found).sum(dim=0) if found else None


class OBDCImportance(GradientImportance):
    """The second-order change of the loss with a Kronecker-factored Hessian: ``S[o] / 2 * w A w'`` for a row ``w``.

    ``A`` is the second moment of what a layer reads and ``S`` the energy of the gradient of what it makes; for what a
    layer reads, ``sum over outputs o of S[o] w[o, j] A[j, j] w[o, j] / 2``, with ``j`` all positions of a unit. Weights
    without second moments (in recurrent kernels, parametrised) count as in :class:`HessianImportance`.

    Pass a calibration; or as in older scripts: ``_prepare_model(model, pruner)``, then for each batch the backward pass
    of a mean loss and ``step()``, then score, then ``_rm_hooks(model)`` and ``_clear_buffer()``.

    Args:
        group_reduction: see :class:`LayerwiseImportance`.
        normalizer: see :class:`LayerwiseImportance`.
        bias: also count biases (they do not take part here).
        target_types: count only weights of modules of these types (default: all modules).
        num_classes: accepted for old scripts.
        calibration: what :func:`prunus.calibrate` returned.

    Source: Wang et al. 2019 (EigenDamage, arXiv 1905.05934), the method C-OBD.
    """

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: Normalizer = "mean",
        bias: bool = False,
        target_types: Sequence[type] = DEFAULT_TYPES,
        num_classes: int = 100,
        calibration: Calibration | None = None,
    ) -> None:
        super().__init__(group_reduction, normalizer, bias, target_types)
        self.num_classes = num_classes
        self.calibration = calibration
        self._watch: ModuleWatch | None = None

    cure = "pass calibration=prunus.calibrate(model, loader, loss_fn), or call step() after backward passes"

    def slices(self, member: Member) -> torch.Tensor | None:
        """The change of the loss for each unit's rows, or for its columns."""
        calibration = self._known()
        weight = member.tensor.detach()
        reading = calibration.reading(member.name, weight)
        moments = None if reading is None or weight.dim() < 2 else reading.second_moments()
        energies = None if reading is None else reading.energies(weight, calibration.samples)
        if reading is None or moments is None or energies is None:
            return self._diagonal(calibration, member)
        matrices = reading.matrices(weight).double()
        if member.dim == reading.dim:
            columns = reading.columns(member.index).to(moments.device)
            blocks = moments[:, columns[:, :, None], columns[:, None, :]]  # (blocks, units, own, own)
            own = matrices[:, :, columns].transpose(1, 2)  # (blocks, units, outputs, own)
            energy = ((own @ blocks) * own).sum(dim=-1)  # (blocks, units, outputs)
            return (energy * energies[:, None]).sum(dim=(0, 2)).float().cpu() / 2
        rows = ((matrices @ moments) * matrices).sum(dim=-1) * energies
        return to_units(rows.reshape(weight.shape[member.dim], -1).sum(dim=1), member.index) / 2

    @staticmethod
    def _diagonal(calibration: Calibration, member: Member) -> torch.Tensor | None:
        """The score of :class:`HessianImportance`, in the same units, for a weight without second moments."""
        if member.tensor.dim() < 2 or not calibration.gradients:
            return None
        square = calibration.gradient(member.name, member.tensor).square
        return to_units(along(member.tensor.detach().float().square() * square, member.dim), member.index) / 2

    def _known(self) -> Calibration:
        if self.calibration is not None:
            self.calibration.need("grams")
            self.calibration.need("gradients")
            return self.calibration
        if self._watch is None:
            raise InputError(f"OBDCImportance knows no statistics: {self.cure}")
        return self._watch.calibration()

    def _prepare_model(self, model: nn.Module, pruner: object = None) -> None:
        """Watch the model's layers from now on."""
        self._watch = ModuleWatch(model)

    def step(self) -> None:
        """Count the batch whose mean loss was just differentiated.

        Raises:
            InputError: the model is not watched.
        """
        if self._watch is None:
            raise InputError("OBDCImportance.step: call _prepare_model(model, pruner) before the forward passes")
        self._watch.step()

    def _rm_hooks(self, model: nn.Module) -> None:
        """Stop watching; what was collected stays."""
        if self._watch is not None:
            self._watch.close()

    def _clear_buffer(self) -> None:
        """Forget what was collected."""
        self._rm_hooks(nn.Module())
        self._watch = None
