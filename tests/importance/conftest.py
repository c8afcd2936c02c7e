"""Small networks and the groups in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus as tp


class Stream(nn.Module):
    """A residual stream that several layers read, a grouped convolution, norms, and a flattened head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv1, self.norm1 = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.grouped, self.norm3 = nn.Conv2d(8, 6, 1, groups=2), nn.BatchNorm2d(6)
        self.side = nn.Conv2d(6, 3, 1)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.deep(y)))
        x = F.relu(x + self.norm3(self.grouped(y)))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1)) + self.side(x).mean(dim=(2, 3))


def groups_of(net: nn.Module, inputs: Any) -> dict[str, tp.Group]:
    """The groups of a network by the name of their root."""
    types = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase, nn.MultiheadAttention)
    graph = tp.DependencyGraph().build_dependency(net, inputs)
    return {g[0][0].target.name: g for g in graph.get_all_groups(root_module_types=types)}


@pytest.fixture
def groups() -> Callable[[nn.Module, Any], dict[str, tp.Group]]:
    """``groups(net, inputs)``: the groups of a network by the name of their root."""
    return groups_of


@pytest.fixture
def stream() -> nn.Module:
    """A network with all kinds of readers, and norms as training leaves them."""
    net = Stream().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(0, 1)
    return net


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images with classes."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 2, 6, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(3)
    ]


class Attention(nn.Module):
    """Two heads, with queries and keys that only meet each other."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.fixture
def attention() -> nn.Module:
    """Attention written by hand."""
    return Attention().eval()
