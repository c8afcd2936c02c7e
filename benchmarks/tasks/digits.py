"""A ResNet-20 on the handwritten digits of scikit-learn, at 16 x 16 and disturbed: trained in about a minute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.task import Task, fit, right_answers, trained

TRAINING, TEST, SAMPLES, EPOCHS = 1_097, 700, 400, 28


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        plain = stride == 1 and before == width
        self.shortcut = nn.Identity() if plain else _projection(before, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Images in, images out."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def _projection(before: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class ResNet20(nn.Module):
    """Three stages of three blocks, 0.27 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1)]
        widths += [(32, 64, 2), (64, 64, 1), (64, 64, 1)]
        self.blocks = nn.Sequential(*(Block(*w) for w in widths))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits."""
        return self.head(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


def disturbed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turned, stretched, moved, with other contrast and noise."""
    n = len(images)

    def draw(size: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * size

    angle, scale, shear = draw(math.radians(25)), 1 + draw(0.2), draw(0.3)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack((torch.stack((cos, shear - sin, draw(0.15)), 1), torch.stack((sin, cos, draw(0.15)), 1)), 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False) * (1 + draw(0.3)).view(-1, 1, 1, 1)
    return moved + 0.35 * torch.randn(images.shape, generator=generator)


@dataclass(frozen=True)
class Digits:
    """Training images and labels, test images and labels, and an order that goes with the seed."""

    images: Tensor
    labels: Tensor
    test: Tensor
    truth: Tensor
    seed: int

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Disturbed training images with labels, 128 at a time, without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for part in torch.randperm(len(self.images), generator=generator).split(128):
                yield disturbed(self.images[part], generator), self.labels[part]


STEPS = -(-TRAINING // 128)  # of an epoch


def read(seed: int) -> Digits:
    """The data set, enlarged to 16 x 16."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=16, mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAINING], order[TRAINING : TRAINING + TEST].repeat(2)
    fixed = disturbed(images[test], torch.Generator().manual_seed(1_000))
    return Digits(images[train], labels[train], fixed, labels[test], seed)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of images and labels."""
    return F.cross_entropy(model(batch[0]), batch[1])


def on_digits(name: str, model: nn.Module, data: Digits, rates: tuple[float, ...], adam: bool, **others: Any) -> Task:
    """A task of a trained network: 400 disturbed images to calibrate on, 4 epochs to fine-tune."""
    generator = torch.Generator().manual_seed(2_000 + data.seed)
    picked = torch.randperm(TRAINING, generator=generator)
    calibration = list(disturbed(data.images[picked[:SAMPLES]], generator).split(50))
    labelled = disturbed(data.images[picked], generator), data.labels[picked]
    test = [((x,), y) for x, y in zip(data.test.split(350), data.truth.split(350), strict=True)]

    def tune(network: nn.Module, rate: float) -> None:
        fit(network, cross_entropy, data.batches(3_000 + data.seed), 4 * STEPS, rate, adam)

    def loss(network: nn.Module) -> Tensor:
        return cross_entropy(network, labelled)

    return Task(name, model, data.test[:1], calibration, loss, right_answers(test), tune, rates, **others)


def digits(seed: int, cache: Path) -> Task:
    """The ResNet-20; all streams may be cut."""
    data = read(seed)
    torch.manual_seed(seed)

    def train(network: nn.Module) -> None:
        fit(network, cross_entropy, data.batches(seed), EPOCHS * STEPS, 0.1, adam=False)

    model = trained(cache / f"digits-{seed}.pt", ResNet20(), train)
    return on_digits("digits ResNet-20", model, data, (0.01, 0.05), False, keep=lambda m: [m.get_submodule("head")])
