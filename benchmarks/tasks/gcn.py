"""A graph network of torch_geometric that sorts nodes into communities: drawn graphs, trained in seconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.task import Task, fit, right_answers, trained

NODES, KINDS, FEATURES, STEPS = 240, 6, 16, 400
Graph = tuple[tuple[Tensor, Tensor], Tensor]


class Sorter(nn.Module):
    """Three graph convolutions and a classifier with one hidden layer."""

    def __init__(self, width: int = 64) -> None:
        from torch_geometric.nn import GCNConv

        super().__init__()
        widths = (FEATURES, width, width, width)
        self.convs = nn.ModuleList(GCNConv(a, b) for a, b in itertools.pairwise(widths))
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, KINDS)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Features (nodes, 16) and edges (2, count) to logits of each node."""
        for conv in self.convs:
            x = F.relu(conv(x, edges))
        return self.head(F.relu(self.hidden(x)))


def plain(model: Any) -> nn.Module:
    """The linear layers inside the graph convolutions made those of torch: Torch-Pruning does not know the others."""
    for conv in model.convs:
        lin = conv.lin
        conv.lin = nn.Linear(lin.in_channels, lin.out_channels, bias=False)
        conv.lin.weight = lin.weight
    return model


def graph(generator: torch.Generator) -> Graph:
    """Nodes of six kinds: more edges within a kind than between kinds, and features that say little of it."""
    kinds = torch.randint(KINDS, (NODES,), generator=generator)
    chance = torch.where(kinds[:, None] == kinds, 0.12, 0.018).triu(1)
    edges = (torch.rand(NODES, NODES, generator=generator) < chance).nonzero().T
    centres = torch.randn(KINDS, FEATURES, generator=torch.Generator().manual_seed(0))
    x = 0.45 * centres[kinds] + torch.randn(NODES, FEATURES, generator=generator)
    return (x, torch.cat((edges, edges.flip(0)), 1)), kinds


def _graphs(seed: int) -> Iterator[Graph]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield graph(generator)


def _some(count: int, seed: int) -> list[Graph]:
    return [found for _, found in zip(range(count), _graphs(seed), strict=False)]


def _loss(model: nn.Module, batch: Graph) -> Tensor:
    return F.cross_entropy(model(*batch[0]), batch[1])


def gcn(seed: int, cache: Path) -> Task:
    """10 graphs to calibrate on, 12 others to judge by, 40 steps to fine-tune."""
    torch.manual_seed(seed)
    graphs = _graphs(seed)
    model = trained(cache / f"gcn-{seed}.pt", Sorter(), lambda m: fit(m, _loss, graphs, STEPS, 4e-3))
    calibration = [inputs for inputs, _ in _some(10, 2_000 + seed)]
    labelled, test = _some(4, 3_000 + seed), _some(12, 1_000)

    return Task(
        *("communities, GCN", model, test[0][0], calibration),
        loss=lambda m: sum((_loss(m, g) for g in labelled), torch.zeros(())),
        score=right_answers(test),
        tune=lambda m, rate: fit(m, _loss, _graphs(4_000 + seed), 40, rate),
        rates=(1e-3, 4e-3),
        keep=lambda m: [m.get_submodule("head")],
        prepare=plain,
    )
