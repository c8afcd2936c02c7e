"""A ResNet-20 on the handwritten digits of scikit-learn, at 16 x 16 and disturbed: trained in about a minute."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.task import Task

TRAINING, TEST, EPOCHS = 1_097, 700, 28


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


def _data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=16, mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAINING], order[TRAINING : TRAINING + TEST].repeat(2)
    fixed = disturbed(images[test], torch.Generator().manual_seed(1_000))
    return images[train], labels[train], fixed, labels[test]


def _train(model: nn.Module, images: Tensor, labels: Tensor, seed: int, epochs: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * -(-len(images) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for part in order.split(128):
            loss = F.cross_entropy(model(disturbed(images[part], generator)), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def digits(seed: int, cache: Path, samples: int = 400) -> Task:
    """The trained network (kept in ``cache``) with 400 disturbed training images to calibrate on."""
    images, labels, test, truth = _data(seed)
    torch.manual_seed(seed)
    model = ResNet20()
    file = cache / f"digits-{seed}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        _train(model, images, labels, seed, EPOCHS, 0.1)
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.eval()
    generator = torch.Generator().manual_seed(2_000 + seed)
    picked = torch.randperm(TRAINING, generator=generator)
    calibration = list(disturbed(images[picked[:samples]], generator).split(50))
    labelled = disturbed(images[picked], generator), labels[picked]

    def score(network: nn.Module) -> float:
        network.eval()
        with torch.no_grad():
            answers = torch.cat([network(part).argmax(1) for part in test.split(350)])
        return 100 * float((answers == truth).float().mean())

    def loss(network: nn.Module) -> Tensor:
        return F.cross_entropy(network(labelled[0]), labelled[1])

    return Task("digits ResNet-20", model, test[:1], calibration, loss, score, lambda m: [m.get_submodule("head")])
