"""What a calibration knows: for each parameter its gradients, for each weight what it reads and what that is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from prunus.errors import InputError


@dataclass(frozen=True)
class Gradient:
    """Gradients of one parameter over all samples.

    ``mean`` is that of the mean loss, ``square`` the mean of squares over samples (the Fisher diagonal). ``masks[dim]``
    (rows, size) is, for each sample, the sum of ``w * dL/dw`` over all other dims: the gradient of a mask along that
    dim. Beyond as many samples as calibrate keeps apart, a row holds several, with random signs, so that sums of
    squares stay right on average. None: a kernel's dim.
    """

    mean: torch.Tensor
    square: torch.Tensor
    masks: tuple[torch.Tensor | None, ...]


@dataclass
class Reading:
    """Sums over what one weight reads, per position of the weight's input, as ``(blocks, positions)``.

    ``dim`` is the dim of the weight that reads; ``blocks`` are the groups of a convolution or the matrices of a stack.
    A row is one vector that the weight multiplies: one for each sample and place (token, pixel).
    """

    dim: int
    blocks: int
    rows: int = 0
    samples: int = 0
    first: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # the sum of x over rows
    second: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # the sum of x^2 over rows
    means: torch.Tensor = field(default_factory=lambda: torch.zeros(()))  # the sum over samples of (mean |x|)^2
    energy: torch.Tensor | None = None  # per output: the sum over samples and places of (dL/dy)^2
    gram: torch.Tensor | None = None  # (blocks, columns, columns): the sum of (x - shift) (x - shift)'
    gram_first: torch.Tensor | None = None  # the sum of x - shift; columns are positions x kernel
    gram_rows: int = 0
    shift: torch.Tensor | None = None  # the mean of the first rows, so that nothing cancels
    kernel: int = 1  # columns for each position in ``gram``
    stack: bool = False  # the weight is a stack of matrices (blocks, ...), not the groups of a convolution

    @property
    def mean(self) -> torch.Tensor:
        """The mean of each input."""
        return self.first / max(self.rows, 1)

    @property
    def moment(self) -> torch.Tensor:
        """The mean square of each input."""
        return self.second / max(self.rows, 1)

    @property
    def variance(self) -> torch.Tensor:
        """The variance of each input."""
        return (self.moment - self.mean.square()).clamp_min(0)

    def spread(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``values`` (blocks, positions) so that they broadcast over the weight."""
        shape = [1] * weight.dim()
        shape[self.dim] = weight.shape[self.dim]
        if self.stack:
            shape[0] = self.blocks
        elif self.blocks > 1:  # outputs stand group after group
            values = values.repeat_interleave(weight.shape[0] // self.blocks, dim=0)
            shape[0] = weight.shape[0]
        return values.reshape(shape)

    def matrices(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as (blocks, outputs, columns), with the columns of ``gram``; further kernel dims are outputs."""
        if self.stack:
            return weight.movedim(self.dim, -1)
        if self.dim == 0:
            return weight.flatten(1).T.unsqueeze(0)
        grouped = weight.reshape(self.blocks, -1, weight.shape[1], weight[0, 0].numel())
        return grouped.flatten(2) if self.kernel > 1 else grouped.transpose(2, 3).flatten(1, 2)

    def energies(self, weight: torch.Tensor, samples: int) -> torch.Tensor | None:
        """The mean energy of the gradient of each output of :meth:`matrices`, (blocks, outputs)."""
        if self.energy is None or self.stack:
            return None
        outputs = self.matrices(weight).shape[:2]
        return (
            (self.energy / samples)
            .reshape(self.blocks, -1)
            .repeat_interleave(outputs[1] * self.blocks // len(self.energy), dim=1)
        )

    def columns(self, index: torch.Tensor) -> torch.Tensor:
        """The columns of ``gram`` that belong to positions: (units, per unit) gives (units, per unit x kernel)."""
        return (index[..., None] * self.kernel + torch.arange(self.kernel)).flatten(1)

    def covariance(self) -> torch.Tensor | None:
        """The covariance of what is read, (blocks, columns, columns), in float64: the bias may follow the mean."""
        if self.gram is None or self.gram_first is None:
            return None
        mean = self.gram_first.double() / self.gram_rows
        return self.gram.double() / self.gram_rows - mean[:, :, None] * mean[:, None, :]

    def second_moments(self) -> torch.Tensor | None:
        """The mean of ``x x'``, (blocks, columns, columns), in float64."""
        found = self.covariance()
        if found is None or self.gram_first is None or self.shift is None:
            return None
        mean = self.gram_first.double() / self.gram_rows + self.shift.double()
        return found + mean[:, :, None] * mean[:, None, :]


@dataclass(frozen=True)
class Calibration:
    """What :func:`prunus.calibrate` collected; criteria take it as ``calibration=``.

    Statistics go by the names of parameters, so they serve copies of the model too, and are refused where shapes differ
    (after pruning, calibrate again).
    """

    samples: int
    loss: float | None
    collected: frozenset[str]
    gradients: Mapping[str, Gradient]
    readings: Mapping[str, Reading]
    shapes: Mapping[str, tuple[int, ...]]
    keep: int = 0

    @property
    def has_loss(self) -> bool:
        """Whether gradients are those of a loss (else: of random projections of the outputs)."""
        return self.loss is not None

    @property
    def rows_are_samples(self) -> bool:
        """Whether mask gradients hold each sample in a row of its own."""
        return self.samples <= self.keep

    def need(self, what: str) -> None:
        """Refuse if something was not collected.

        Raises:
            InputError: it was not.
        """
        if what not in self.collected:
            raise InputError(
                f"this calibration has no {what}: call calibrate(..., collect=) with {what!r} among what is collected"
            )

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a parameter that the calibrated model does not have in this shape.

        Raises:
            InputError: it does not.
        """
        shape = self.shapes.get(name)
        if shape is None:
            raise InputError(
                f"the calibration is of another model: it knows no parameter {name!r}; call calibrate on this model"
            )
        if shape != tuple(tensor.shape):
            raise InputError(
                f"{name} had shape {shape} when the model was calibrated and has {tuple(tensor.shape)} now: the model "
                "was pruned since, or it is another one; call calibrate again"
            )

    def gradient(self, name: str, tensor: torch.Tensor) -> Gradient:
        """The gradients of a parameter.

        Raises:
            InputError: none were collected, or the calibration is of another model.
        """
        self.need("gradients")
        self.check(name, tensor)
        found = self.gradients.get(name)
        if found is None:
            raise InputError(f"{name} is no floating-point parameter and has no gradients")
        return found

    def reading(self, name: str, tensor: torch.Tensor) -> Reading | None:
        """What a weight reads, or None if no op that is understood read it.

        Raises:
            InputError: the calibration is of another model.
        """
        self.check(name, tensor)
        return self.readings.get(name)

    def __repr__(self) -> str:
        loss = "random projections" if self.loss is None else f"loss {self.loss:.4g}"
        if "gradients" not in self.collected:
            loss = "no gradients"
        grams = sum(r.gram is not None for r in self.readings.values())
        return f"Calibration({self.samples} samples, {loss}, {len(self.readings)} weights read, {grams} Gram matrices)"
