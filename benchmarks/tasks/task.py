"""What a task is made of, and how its network is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]


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
        tune: a short fine-tune of a network in place, with a learning rate: the same steps on the same data each time.
        rates: the learning rates to choose from.
        keep: layers whose outputs must stay.
        options: further arguments of ``prunus.prune``.
        theirs: further arguments of Torch-Pruning's pruner for a model.
        prepare: what a user of Torch-Pruning has to rewrite in a copy of the model before.
        finish: what a user of Torch-Pruning has to set by hand after a cut: called with model and pruner.
    """

    name: str
    model: nn.Module
    example: Any
    calibration: Sequence[Any]
    loss: Callable[[nn.Module], Tensor]
    score: Callable[[nn.Module], float]
    tune: Callable[[nn.Module, float], None]
    rates: tuple[float, ...]
    keep: Callable[[nn.Module], list[nn.Module]]
    options: dict[str, Any] = field(default_factory=dict)
    theirs: Callable[[nn.Module, float], dict[str, Any]] = lambda model, ratio: {}
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model
    finish: Callable[[nn.Module, Any], None] = lambda model, pruner: None


def fit(model: nn.Module, loss: Loss, batches: Iterable[Any], steps: int, rate: float, adam: bool = True) -> None:
    """Train for so many batches, the learning rate going up to ``rate`` and down to nothing."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.01)
    if not adam:
        optimizer = torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _, batch in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    model.eval()


def trained(file: Path, model: nn.Module, train: Callable[[nn.Module], None]) -> nn.Module:
    """The model as it was trained before, or trained now and kept."""
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        train(model)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    return model.eval()


def right_answers(test: Iterable[tuple[Any, Tensor]]) -> Callable[[nn.Module], float]:
    """The score that counts right classes, in percent; each batch is (inputs of a call, classes)."""

    def score(network: nn.Module) -> float:
        network.eval()
        with torch.no_grad():
            hits = [network(*inputs).argmax(1) == truth for inputs, truth in test]
        return 100 * float(torch.cat(hits).float().mean())

    return score


def heads_left(pruner: Any, layer: nn.Module) -> int:
    """Of a layer, as Torch-Pruning's pruner says; where it says 0, it left the layer as it was.

    Raises:
        ValueError: it says 0.
    """
    heads: int = pruner.num_heads[layer]
    if not heads:
        raise ValueError("at this ratio it counts no head in a layer, and leaves all of them there")
    return heads
