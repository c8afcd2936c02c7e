"""Constants are looked for only where removed zeros are all that a reader's channels stem from, and are not zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus
from prunus.repair import may_have_constants


class Residual(nn.Module):
    """A branch whose last norm has weight 0, beside a stream or alone."""

    def __init__(self, beside: bool, bias: float = 0.5) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head, self.beside = nn.Conv2d(8, 4, 1), beside
        nn.init.zeros_(self.norm.weight)
        nn.init.constant_(self.norm.bias, bias)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.conv(x))
        return self.head((x + y if self.beside else y).relu())


class Gated(Residual):
    """What a branch that starts at zero is gated by is computed from the branch itself, before a stream is added."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__(beside=True, bias=0.0)
        self.squeeze, self.expand, self.activation = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), activation

    def forward(self, x):
        x = self.stem(x)
        y = self.activation(self.norm(self.conv(x)))
        gate = self.expand(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(x + y * gate)


class Responses(nn.Module):
    """Scale and shift of four dims that start at zero, beside a stream (the response normalisation of ConvNeXt V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.weight, self.bias = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 1, 8))

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + (x * self.weight + self.bias))


class Tokens(nn.Module):
    """Positions and an extra token that start at zero, and a scale that may, with a shift or without one."""

    def __init__(self, scale: float, shift: float | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.token, self.positions = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 4, 8))
        self.weight = nn.Parameter(torch.full((8,), scale))
        self.shift = None if shift is None else nn.Parameter(torch.full((8,), shift))

    def forward(self, x):
        x = torch.cat([self.embed(x), self.token.expand(len(x), -1, -1)], dim=1) + self.positions[:, :4]
        x = x * self.weight.view(1, 1, -1)
        return self.head(x if self.shift is None else x + self.shift)


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
        (Residual(beside=False, bias=0.0), IMAGE, False),
        (Gated(nn.ReLU()), IMAGE, False),
        (Gated(nn.Sigmoid()), IMAGE, True),
        (Responses(), SEQUENCE, False),
        (Tokens(scale=1.0), SEQUENCE, False),
        (Tokens(scale=0.0), SEQUENCE, False),
        (Tokens(scale=0.0, shift=0.5), SEQUENCE, True),
        (ClosedReader(), SEQUENCE, False),
    ],
    ids=["residual", "alone", "zero", "gate", "half", "responses", "positions", "scale", "shift", "reader"],
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
