"""What a task is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
        options: further arguments of ``prunus.prune``.
        theirs: further arguments of Torch-Pruning's pruner for a model.
        finish: what a user of Torch-Pruning has to set by hand after a cut: called with model and pruner.
    """

    name: str
    model: nn.Module
    example: Any
    calibration: Sequence[Any]
    loss: Callable[[nn.Module], Tensor]
    score: Callable[[nn.Module], float]
    keep: Callable[[nn.Module], list[nn.Module]]
    options: dict[str, Any] = field(default_factory=dict)
    theirs: Callable[[nn.Module, float], dict[str, Any]] = lambda model, ratio: {}
    finish: Callable[[nn.Module, Any], None] = lambda model, pruner: None
