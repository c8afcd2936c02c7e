"""Removed channels that are constant go into the bias of their readers, exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import prunus


def constant_first(model: nn.Sequential) -> nn.Sequential:
    """The norm's first half has weight 0, and a bias that is not."""
    norm = next(m for m in model if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        norm.weight[: len(norm.weight) // 2] = 0
        norm.bias.copy_(torch.rand(len(norm.bias)) + 0.5)
    return model.eval()


def cut_constants(model: nn.Sequential) -> prunus.PruneResult:
    return prunus.prune(model, torch.randn(1, 3, 6, 6), prunus.Target(ratio=0.5), importance=ByScale())


class ByScale(prunus.importance.Importance):
    """Units with weight 0 go first."""

    def __call__(self, group):
        return prunus.importance.MagnitudeImportance(target_types=(nn.BatchNorm2d,), bias=False)(group)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Identity])
def test_constant_channels_cost_nothing(activation, model_state, states_equal) -> None:
    model = constant_first(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation(), nn.Conv2d(8, 4, 3)))
    dense, before = copy.deepcopy(model), model_state(model)
    result = cut_constants(model)
    assert model[0].out_channels == 4
    x = torch.randn(5, 3, 6, 6)
    assert torch.allclose(model(x), dense(x), atol=1e-5)
    plain = copy.deepcopy(dense)
    result.plan.apply(plain)
    assert not torch.allclose(plain(x), dense(x), atol=1e-2)
    result.undo()
    assert states_equal(before, model_state(model))


def test_without_a_bias_the_mean_of_the_next_norm_takes_them() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4))
    )
    dense = copy.deepcopy(constant_first(model))
    result = prunus.prune(
        model, torch.randn(1, 3, 6, 6), prunus.Target(ratio=0.5), importance=ByScale(), ignored_layers=[model[3]]
    )
    x = torch.randn(5, 3, 6, 6)
    assert torch.allclose(model(x), dense(x), atol=1e-5)
    assert result.plan.removals


def test_behind_a_border_of_zeros_nothing_is_folded() -> None:
    """There a constant channel is not constant: the bias stays as the plan leaves it."""
    model = constant_first(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    )
    bias = model[3].bias.detach().clone()
    cut_constants(model)
    assert torch.equal(model[3].bias, bias)


def test_a_dead_or_saturated_channel_on_the_example_is_no_constant() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 4, 3)).eval()
    with torch.no_grad():
        model[1].bias[0] = 50.0  # 6 behind the ReLU6 for all but huge inputs
        model[1].weight[1] = 0
        model[1].bias[1] = 0
    bias = model[3].bias.detach().clone()
    plan = prunus.prune(model, torch.zeros(1, 3, 6, 6), prunus.Target(ratio=0.5), importance=ByScale()).plan
    assert plan.removals
    assert torch.equal(model[3].bias, bias)


def test_a_constant_input_says_nothing_about_states() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.rnn = nn.Linear(4, 6), nn.LSTM(6, 8, batch_first=True)
            self.head = nn.Linear(8, 2)
            with torch.no_grad():
                self.inner.weight[0], self.inner.bias[0] = 0, 0.7
                for gate in range(4):
                    self.rnn.weight_ih_l0[8 * gate] = 0

        def forward(self, x):
            return self.head(self.rnn(self.inner(x))[0])

    model = Recurrent().eval()
    plain = copy.deepcopy(model)
    result = prunus.prune(model, torch.randn(2, 3, 4), prunus.Target(ratio=0.5), ignored_layers=[model.inner])
    assert any(r.tensor == "rnn.weight_ih_l0" and 0 in r.positions for r in result.plan.removals)
    result.plan.apply(plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
