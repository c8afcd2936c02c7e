"""A recurrent network that names two tones, one after the other, in noise: drawn, and trained in about a minute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.task import Task, fit, right_answers, trained

LENGTH, TONES, STEPS, NOISE = 32, 5, 900, 0.6


class Listener(nn.Module):
    """Two recurrent layers over frames, and a classifier with one hidden layer."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.frames, self.lstm = nn.Linear(2, 32), nn.LSTM(32, width, num_layers=2, batch_first=True)
        self.hidden, self.head = nn.Linear(width, 64), nn.Linear(64, TONES**2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 2) to logits of the pair of tones."""
        states, _ = self.lstm(F.relu(self.frames(x)))
        return self.head(F.relu(self.hidden(states[:, -1])))


def sounds(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Signals of shape (count, time, 2) and the pairs of tones in them."""
    first, second = torch.randint(TONES, (2, count, 1), generator=generator)
    time = torch.arange(LENGTH)
    change = torch.randint(LENGTH // 3, 2 * LENGTH // 3, (count, 1), generator=generator)
    speed = 0.25 + 0.25 * torch.where(time < change, first, second)
    phase = torch.rand(count, 1, generator=generator) * 2 * math.pi + speed.cumsum(1)
    clean = torch.stack((phase.cos(), phase.sin()), 2)
    return clean + NOISE * torch.randn(clean.shape, generator=generator), (TONES * first + second).flatten()


def _batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield sounds(64, generator)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def lstm(seed: int, cache: Path) -> Task:
    """400 signals to calibrate on, 2,000 others to judge by, 60 steps to fine-tune."""
    torch.manual_seed(seed)
    batches = _batches(seed)
    model = trained(cache / f"lstm-{seed}.pt", Listener(), lambda m: fit(m, _loss, batches, STEPS, 4e-3))
    calibration = list(sounds(400, torch.Generator().manual_seed(2_000 + seed))[0].split(50))
    labelled = sounds(1_000, torch.Generator().manual_seed(3_000 + seed))
    x, y = sounds(2_000, torch.Generator().manual_seed(1_000))
    test = [((a,), b) for a, b in zip(x.split(500), y.split(500), strict=True)]

    return Task(
        *("two tones, LSTM", model, x[:1], calibration),
        loss=lambda m: _loss(m, labelled),
        score=right_answers(test),
        tune=lambda m, rate: fit(m, _loss, _batches(4_000 + seed), 60, rate),
        rates=(1e-3, 4e-3),
        keep=lambda m: [m.get_submodule("head")],
    )
