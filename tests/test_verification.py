"""The proof finds a graph that is wrong, also where the model's own values would hide it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus


@torch.library.custom_op("prunus_tests::turned", mutates_args=())
def turned(x: torch.Tensor) -> torch.Tensor:
    """The last dim in the opposite order, which a rule for pointwise ops does not know."""
    return x.flip(-1)


class Scaled(nn.Module):
    """A branch that is multiplied by a number, beside a stream."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.stem, self.branch, self.back = nn.Linear(8, 6), nn.Linear(6, 10), nn.Linear(10, 6)
        self.scale, self.head = nn.Parameter(torch.full((6,), scale)), nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.branch(x)
        y = turned(y) + y
        return self.head(x + self.scale * self.back(y))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_a_wrong_rule_is_found_out_however_small_the_model_makes_its_effect(scale) -> None:
    model = Scaled(scale).eval()
    prunus.rule(turned)(prunus.rules.pointwise.pointwise)
    try:
        report = prunus.verify(model, torch.randn(3, 8))
    finally:
        prunus.remove_rule(turned)
    assert not report.ok
    assert any("branch.weight dim 0" in culprit for culprit in report.culprits)
    assert model.scale.detach()[0].item() == pytest.approx(scale)
