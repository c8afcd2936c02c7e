"""What a task is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """A trained network and what to measure it by.

    Args:
        name: for tables.
        model: trained, in eval mode.
        example: inputs of one call.
        calibration: batches of inputs without labels, none of them of the test set.
        loss: a loss of the model on labelled training samples, for scores that need gradients.
        score: the figure that counts, in percent, higher is better.
        keep: layers whose outputs must stay.
    """

    name: str
    model: nn.Module
    example: Tensor
    calibration: Sequence[Any]
    loss: Callable[[nn.Module], Tensor]
    score: Callable[[nn.Module], float]
    keep: Callable[[nn.Module], list[nn.Module]]
