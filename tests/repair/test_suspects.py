"""Constants are looked for only where removed zeros are all that a reader's channels stem from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus
from prunus.repair import may_have_constants


class Residual(nn.Module):
    """A branch whose last norm starts at zero, beside a stream or alone."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head, self.beside = nn.Conv2d(8, 4, 1), beside
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.conv(x))
        return self.head((x + y if self.beside else y).relu())


class Tokens(nn.Module):
    """Positions and an extra token that start at zero, and a scale that may."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 4, 8))
        self.weight = nn.Parameter(torch.full((8,), scale))

    def forward(self, x):
        x = torch.cat([self.embed(x), self.token.expand(len(x), -1, -1)], dim=1) + self.positions[:, :4]
        return self.head(x * self.weight.view(1, 1, -1))


class ClosedReader(nn.Module):
    """A layer whose columns are zero reads what varies."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        nn.init.zeros_(self.second.weight)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


IMAGE, SEQUENCE = torch.randn(1, 3, 5, 5), torch.randn(2, 3, 6)


@pytest.mark.parametrize(
    ("model", "x", "expected"),
    [
        (Residual(beside=True), IMAGE, False),
        (Residual(beside=False), IMAGE, True),
        (Tokens(scale=1.0), SEQUENCE, False),
        (Tokens(scale=0.0), SEQUENCE, True),
        (ClosedReader(), SEQUENCE, False),
    ],
    ids=["residual", "alone", "positions", "scale", "reader"],
)
def test_zeros_raise_suspicion_only_where_they_decide(model, x, expected) -> None:
    model.eval()
    result = prunus.prune(model, x, prunus.Target(ratio=0.5))
    assert result.plan.removals
    result.undo()
    assert may_have_constants(result.graph.coupling.trace, result.plan) is expected


def test_a_constant_behind_a_view_of_a_sum_of_constants_is_folded() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)
            with torch.no_grad():
                for layer in (self.one, self.two):
                    layer.weight[:4] = 0
                    layer.bias[:4] = 0.5

        def forward(self, x):
            return self.head((self.one(x) + self.two(x)).relu().transpose(0, 1).contiguous())

    model = Sum().eval()
    dense = model(SEQUENCE)
    prunus.prune(model, SEQUENCE, prunus.Target(ratio=0.5))
    assert model.one.out_features == 4
    assert torch.allclose(model(SEQUENCE), dense, atol=1e-5)
