"""Soft pruning: the forward is that of the cut model, nothing is changed, and lifting restores every bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import prunus as tp


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(6, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.out(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.cell, self.out = nn.Linear(6, 16), nn.LSTM(16, 24, 2, batch_first=True), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cell(self.into(x))[0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        return self.head(x + self.outer(torch.relu(self.inner(x))))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, 3),
        nn.Flatten(),
        nn.Linear(12 * 4, 3),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "residual": (torchvision.models.resnet18, lambda: torch.randn(2, 3, 32, 32)),
    "attention": (Attention, lambda: torch.randn(2, 5, 6)),
    "recurrent": (Recurrent, lambda: torch.randn(2, 5, 6)),
    "tied weights": (Tied, lambda: torch.randint(0, 20, (2, 5))),
    "norms, groups, parametrisations": (convolutions, lambda: torch.randn(2, 3, 8, 8)),
}


def pruner_of(model: nn.Module, inputs: Tensor, **options: Any) -> tp.pruner.BasePruner:
    return tp.pruner.BasePruner(model, inputs, pruning_ratio=0.5, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_soft_equals_hard_and_lifting_restores(
    name: str, model_state: Callable[[nn.Module], Any], states_equal: Callable[[Any, Any], bool]
) -> None:
    build, inputs = NETWORKS[name]
    model, x = build().eval(), inputs()
    pruner = pruner_of(model, x)
    before = model_state(model)
    dense = model(x)
    mask = pruner.soft_step()
    soft = model(x)
    assert states_equal(before, model_state(model)), "the weights were edited"
    assert not torch.allclose(soft, dense, atol=1e-4)
    mask.lift()
    mask.lift()
    assert mask.lifted
    assert torch.equal(model(x), dense)
    pruner.step()
    assert torch.allclose(model(x), soft, atol=1e-6)


def test_whole_heads_too() -> None:
    model, x = Attention().eval(), torch.randn(2, 5, 6)
    pruner = pruner_of(model, x, prune_num_heads=True, prune_head_dims=False)
    mask = pruner.soft_step()
    soft = model(x)
    assert model.attention.num_heads == 4
    with mask.cut():
        assert model.attention.num_heads == 2
    mask.lift()
    pruner.step()
    assert torch.allclose(model(x), soft, atol=1e-6)


def test_gradients_are_those_of_the_cut_model_and_zero_elsewhere() -> None:
    model, x = Attention(), torch.randn(2, 5, 6)
    pruner = pruner_of(model, x)
    cut = copy.deepcopy(model)
    mask = pruner.soft_step()
    mask.plan.apply(cut)
    model(x).square().mean().backward()
    cut(x).square().mean().backward()
    weights = dict(cut.named_parameters())
    for name, parameter in model.named_parameters():
        removals = [r for r in mask.plan.removals if r.tensor == name]
        grad = parameter.grad
        assert grad is not None and grad.shape == parameter.shape
        for removal in removals:
            gone = torch.tensor(removal.positions)
            assert grad.index_select(removal.dim, gone).abs().max() == 0
        kept = grad
        for removal in removals:
            stays = [k for k in range(removal.size) if k not in removal.positions]
            kept = kept.index_select(removal.dim, torch.tensor(stays))
        scaled = [s for s in mask.plan.scalings if s.tensor == name]
        if not scaled:  # there the gradient has the factor of the scale besides
            assert torch.allclose(kept, weights[name].grad, atol=1e-6)


def test_training_goes_on_under_the_mask() -> None:
    """Statistics of norms are kept up for what stays; what is left out keeps its values and may come back."""
    model, x = torchvision.models.resnet18(), torch.randn(4, 3, 32, 32)
    pruner = pruner_of(model, x[:1])
    mask = pruner.soft_step()
    removal = next(r for r in mask.plan.removals if r.tensor == "bn1.running_mean")
    weight = next(r for r in mask.plan.removals if r.tensor == "conv1.weight" and r.dim == 0)
    gone = list(removal.positions)
    assert gone == list(weight.positions)
    statistics, weights = model.bn1.running_mean.clone(), model.conv1.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    mask.lift()
    stays = [k for k in range(64) if k not in gone]
    assert torch.equal(model.bn1.running_mean[gone], statistics[gone])
    assert not torch.isclose(model.bn1.running_mean[stays], statistics[stays]).any()
    assert torch.equal(model.conv1.weight[gone], weights[gone])
    assert not torch.equal(model.conv1.weight[stays], weights[stays])
    assert int(model.bn1.num_batches_tracked) == 2


def test_a_copy_is_masked_by_itself() -> None:
    model, x = Recurrent().eval(), torch.randn(2, 5, 6)
    dense = model(x)
    mask = pruner_of(model, x).soft_step()
    soft, twin = model(x), copy.deepcopy(model)
    mask.lift()
    assert torch.equal(model(x), dense)
    assert torch.equal(twin(x), soft)


def test_a_forward_that_fails_leaves_the_model_whole() -> None:
    model, x = Attention().eval(), torch.randn(2, 5, 6)
    dense = model(x)
    mask = pruner_of(model, x).soft_step()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 7))
    assert model.into.weight.shape == (32, 6)
    soft = model(x)
    mask.lift()
    assert torch.equal(model(x), dense) and not torch.allclose(soft, dense)


def test_parts_by_hand() -> None:
    model, x = Attention().eval(), torch.randn(2, 5, 6)
    mask = pruner_of(model, x).soft_step()
    assert model.into(x).shape == (2, 5, 32)
    with mask.cut() as narrow:
        assert narrow.into(x).shape == (2, 5, 16)
        assert isinstance(narrow(x), Tensor)
        assert narrow.into(x).shape == (2, 5, 16)
    assert model.into(x).shape == (2, 5, 32)


def test_one_mask_at_a_time_and_none_over_a_cut() -> None:
    model, x = Attention().eval(), torch.randn(2, 5, 6)
    pruner = pruner_of(model, x)
    mask = pruner.soft_step()
    with pytest.raises(tp.InputError, match="lift that mask first"):
        pruner.soft_step()
    with pytest.raises(tp.InputError, match="soft-pruned"):
        pruner_of(model, x)
    with pytest.raises(tp.InputError, match="soft-pruned"):
        tp.prune(model, x)
    pruner.step()
    with pytest.raises(tp.SurgeryError, match="lift the mask"):
        model(x)
    mask.lift()
    assert model(x).shape == (2, 5, 3)


def test_a_single_group_and_a_plan_from_a_file() -> None:
    model, x = Attention().eval(), torch.randn(2, 5, 6)
    graph = tp.DependencyGraph().build_dependency(model, x)
    group = graph.get_pruning_group(model.into, tp.prune_linear_out_channels, [0, 1, 2, 3])
    mask = tp.soft_prune(model, tp.Plan.from_json(group.plan().to_json()))
    soft = model(x)
    mask.lift()
    group.prune()
    assert torch.allclose(model(x), soft, atol=1e-6)
    with pytest.raises(tp.SurgeryError):
        tp.soft_prune(Recurrent(), mask.plan)


def test_customised_layers_are_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    class ScalePruner(tp.BasePruningFunc):
        def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
            tp.prune_parameter_out_channels(layer.weight, idxs)
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return layer.weight.numel()

        prune_in_channels = prune_out_channels
        get_in_channels = get_out_channels

    model = nn.Sequential(nn.Linear(4, 8), Scale(), nn.Linear(8, 2))
    pruner = pruner_of(model, torch.zeros(1, 4), customized_pruners={Scale: ScalePruner()})
    with pytest.raises(tp.InputError, match="customised"):
        pruner.soft_step()
    pruner.step()
    assert model[1].weight.shape == (4,)
