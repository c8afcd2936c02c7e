"""A parameter that got other sizes trains on, whatever losses of earlier are still held."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import prunus as tp

X = torch.randn(2, 8)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def by_hand(model: nn.Sequential) -> None:
    tp.prune_linear_out_channels(model[0], [0, 3])
    tp.prune_linear_in_channels(model[2], [0, 3])


def undone(model: nn.Sequential) -> None:
    result = tp.prune(model, X, tp.Target(macs=0.5))
    loss = model(X).sum()
    loss.backward()
    result.undo()
    model(X).sum().backward()
    del loss


def from_a_file(model: nn.Sequential) -> None:
    other = network()
    tp.prune(other, X, tp.Target(macs=0.5))
    tp.load_state_dict(model, tp.state_dict(other))


WAYS: dict[str, Callable[[nn.Sequential], object]] = {
    "plan": lambda model: tp.prune(model, X, tp.Target(macs=0.5)),
    "undo": undone,
    "step": lambda model: tp.pruner.MagnitudePruner(model, X).step(),
    "group": lambda model: (
        tp.DependencyGraph().build_dependency(model, X).get_pruning_group(model[0], tp.prune_linear_out_channels, [1])()
    ),
    "by hand": by_hand,
    "from a file": from_a_file,
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on_while_a_loss_of_earlier_is_held(way: str, dtype: torch.dtype, frozen: bool) -> None:
    """``loss`` of the last iteration is alive in every training loop; torch keeps sizes with it."""
    model = network()
    model[0].bias.requires_grad_(not frozen)
    loss = model(X).sum()
    loss.backward()
    WAYS[way](model)
    model.zero_grad()
    if dtype != torch.float32:
        model.to(dtype)
    model(X.to(dtype)).sum().backward()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.shape == model[0].weight.shape
    assert (model[0].bias.grad is None) is frozen
    del loss


def test_what_hangs_on_a_parameter_stays() -> None:
    """Hooks on parameters are called after the cut too."""
    model, called = network(), []
    model[0].weight.register_hook(lambda grad: called.append(grad.shape))
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: called.append(parameter.grad.shape))
    loss = model(X).sum()
    loss.backward()
    tp.pruner.MagnitudePruner(model, X).step()
    model.zero_grad()
    model(X).sum().backward()
    assert called == [(16, 8), (16, 8), (8, 8), (8, 8)]
    del loss


def test_scores_of_gradients_in_several_steps() -> None:
    """The loop of Taylor pruning: loss, backward, step, and again."""
    model = network()
    pruner = tp.pruner.MagnitudePruner(model, X, importance=tp.importance.GroupTaylorImportance(), iterative_steps=2)
    for _ in range(2):
        loss = model(X).square().sum()
        loss.backward()
        pruner.step()
    assert model[0].out_features == 8
    assert model[0].weight.grad.shape == (8, 8)
