"""Sparse training: each penalty against its formula, what combines, mixed precision and accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prunus as tp
from prunus.regularize import GroupLasso, GrowingL2, ScaleL1, unit_norms

IMAGE = torch.zeros(1, 3, 12, 12)


def net() -> nn.Sequential:
    """Two groups: 6 channels in conv, norm, conv, and 5 in conv, conv."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)
    )
    nn.init.uniform_(model[1].weight, -1, 1)
    return model


def added(pruner: tp.pruner.BasePruner, model: nn.Module, **options: Any) -> dict[str, torch.Tensor]:
    """What regularize adds to gradients of zero."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pruner.update_regularizer()
    pruner.regularize(model, **options)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def norms_of(model: nn.Sequential) -> tuple[torch.Tensor, torch.Tensor]:
    """The 2-norms of everything that goes with each unit of the two groups, by hand."""
    w = {name: p.detach().square() for name, p in model.named_parameters()}
    first = w["0.weight"].sum((1, 2, 3)) + w["1.weight"] + w["3.weight"].sum((0, 2, 3))
    second = w["3.weight"].sum((1, 2, 3)) + w["5.weight"].sum((0, 2, 3))
    return first.sqrt(), second.sqrt()


def weakness(norms: torch.Tensor) -> torch.Tensor:
    return (norms.max() - norms) / (norms.max() - norms.min())


def test_group_lasso_is_the_formula_of_the_paper() -> None:
    model = net()
    got = added(tp.pruner.GroupNormPruner(model, IMAGE, reg=1e-2, alpha=3), model)
    first, second = (1e-2 * 2 ** (3 * weakness(n)) for n in norms_of(model))
    weight = {name: p.detach() for name, p in model.named_parameters()}
    assert torch.allclose(got["0.weight"], first[:, None, None, None] * weight["0.weight"])
    assert torch.allclose(got["1.weight"], first * weight["1.weight"])
    assert torch.allclose(got["3.weight"], (first[None, :] + second[:, None])[..., None, None] * weight["3.weight"])
    assert torch.allclose(got["5.weight"], second[None, :, None, None] * weight["5.weight"])
    assert all(got[f"{k}.bias"].abs().max() == 0 for k in (0, 1, 3, 5))


def test_biases_and_the_base_of_the_power_by_request() -> None:
    model = net()
    pruner = tp.pruner.GroupNormPruner(model, IMAGE, reg=1e-2)
    assert torch.equal(added(pruner, model)["0.weight"], added(pruner, model, alpha=2**4)["0.weight"])
    assert not torch.equal(added(pruner, model)["0.weight"], added(pruner, model, alpha=2)["0.weight"])
    with_bias = added(pruner, model, bias=True)
    assert with_bias["0.bias"].abs().min() > 0
    assert with_bias["5.bias"].abs().max() == 0  # the model's output: no unit of any group


def test_scales_by_their_sign() -> None:
    model = net()
    pruner = tp.pruner.BNScalePruner(model, IMAGE, reg=1e-2)
    got = added(pruner, model)
    assert torch.allclose(got["1.weight"], 1e-2 * model[1].weight.detach().sign())
    assert sum(float(g.abs().sum()) for name, g in got.items() if name != "1.weight") == 0
    assert torch.allclose(added(pruner, model, reg=0.5)["1.weight"], 0.5 * model[1].weight.detach().sign())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x) + self.b(x))


def test_scales_of_coupled_norms_together() -> None:
    model = Residual()
    for part in (model.a, model.b):
        nn.init.uniform_(part[1].weight, 0.5, 2)
    got = added(tp.pruner.BNScalePruner(model, IMAGE, reg=1e-2, group_lasso=True), model)
    a, b = model.a[1].weight.detach(), model.b[1].weight.detach()
    assert torch.allclose(got["a.1.weight"], 1e-2 * a / (a**2 + b**2).sqrt())
    assert torch.allclose(got["b.1.weight"], 1e-2 * b / (a**2 + b**2).sqrt())


def test_growing_decay() -> None:
    model = net()
    pruner = tp.pruner.GrowingRegPruner(model, IMAGE, reg=1e-3, delta_reg=1e-2)
    got = added(pruner, model)
    assert torch.allclose(got["5.weight"], 1e-3 * model[5].weight.detach())
    pruner.update_reg()
    pruner.update_reg()
    got = added(pruner, model)
    strength = 1e-3 + 2e-2 * weakness(norms_of(model)[1])
    assert torch.allclose(got["5.weight"], strength[None, :, None, None] * model[5].weight.detach())


def test_strengths_stay_with_their_units_when_the_model_is_cut() -> None:
    model = net()
    pruner = tp.pruner.GrowingRegPruner(model, IMAGE, reg=1e-3, delta_reg=1e-2, pruning_ratio=0.4)
    pruner.update_regularizer()
    pruner.update_reg()
    before = added(pruner, model)["5.weight"] / model[5].weight.detach()
    positions = model[5].weight.detach().clone()
    pruner.step()
    after = added(pruner, model)["5.weight"] / model[5].weight.detach()
    left = [k for k in range(5) if any(torch.equal(positions[:, k], model[5].weight.detach()[:, j]) for j in range(3))]
    assert len(left) == 3
    assert torch.allclose(after, before[:, left])


def test_penalties_add_up_on_any_pruner() -> None:
    model = net()
    both = tp.pruner.BasePruner(model, IMAGE, regularizer=[GroupLasso(1e-2), ScaleL1(1e-1)])
    one, other = (tp.pruner.BasePruner(model, IMAGE, regularizer=r) for r in (GroupLasso(1e-2), ScaleL1(1e-1)))
    got, first, second = added(both, model), added(one, model), added(other, model)
    assert all(torch.allclose(got[name], first[name] + second[name]) for name in got)
    named = tp.pruner.BNScalePruner(model, IMAGE, reg=1e-1, regularizer=GroupLasso(1e-2))
    assert all(torch.allclose(g, got[name]) for name, g in added(named, model).items())
    none = added(tp.pruner.BasePruner(model, IMAGE), model)
    assert all(g.abs().max() == 0 for g in none.values())


@pytest.mark.parametrize("name", ["GroupNormPruner", "BNScalePruner", "GrowingRegPruner"])
def test_a_part_for_each_of_several_backward_passes(name: str) -> None:
    model = net()
    pruner = getattr(tp.pruner, name)(model, IMAGE, reg=1e-2)
    whole = added(pruner, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(4):
        pruner.regularize(model, weight=1 / 4)
    assert all(torch.allclose(p.grad, whole[name]) for name, p in model.named_parameters() if p.grad is not None)


def test_scaled_gradients_get_scaled_penalties() -> None:
    """With the scaler before unscaling, or without it after: the optimiser sees the same gradients."""
    found = []
    for unscale_first in (False, True):
        model = net()
        pruner = tp.pruner.GroupNormPruner(model, IMAGE, reg=1e-2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(model(torch.randn(2, 3, 12, 12, generator=torch.manual_seed(1))).square().mean()).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
            pruner.regularize(model)
        else:
            pruner.regularize(model, scaler=scaler)
        scaler.step(optimizer)
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


def test_a_data_parallel_wrapper(tmp_path: Path) -> None:
    """The pruner is made of the model itself; the wrapper trains it, and its gradients get the penalty."""
    model = net()
    pruner = tp.pruner.GroupNormPruner(model, IMAGE, reg=1e-2)
    alone = added(pruner, model)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        model.zero_grad()
        (wrapped(torch.randn(2, 3, 12, 12)).sum() * 0).backward()
        pruner.regularize(wrapped)
        assert torch.allclose(model[0].weight.grad, alone["0.weight"])
    finally:
        torch.distributed.destroy_process_group()


def test_half_precision_weights_get_small_penalties_too() -> None:
    model = net()
    exact = added(tp.pruner.GroupNormPruner(model, IMAGE, reg=1e-5), model)["0.weight"]
    pruner = tp.pruner.GroupNormPruner(model, IMAGE, reg=1e-5)
    model.bfloat16()
    got = added(pruner, model, weight=1024.0)["0.weight"]
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float() / 1024, exact, rtol=0.05)


def test_frozen_parameters_and_those_without_gradient() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    pruner = tp.pruner.GroupNormPruner(model, IMAGE)
    pruner.regularize(model)
    assert model[0].weight.grad is None
    assert model[3].weight.grad is not None and model[3].weight.grad.abs().sum() > 0
    assert model[5].bias.grad is None


def test_training_with_the_penalty_spreads_the_norms_of_units() -> None:
    """The weak units fade faster than the strong ones, in a loop as users write it."""
    model = net()
    pruner = tp.pruner.GroupNormPruner(model, IMAGE, reg=5e-2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner.update_regularizer()
    (group,) = [g for g in pruner.DG.get_all_groups() if g.size == 5]
    before = unit_norms(group)
    for _ in range(20):
        optimizer.zero_grad()
        (model(torch.randn(2, 3, 12, 12)).mean() * 1e-3).backward()
        pruner.regularize(model)
        optimizer.step()
    after = unit_norms(group)
    assert after.min() / after.max() < 0.5 * before.min() / before.max()
    assert (pruner.regularize(model, weight=0.0), len(pruner.pruning_history())) == (None, 0)


def test_units_that_are_all_alike_are_pulled_alike() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    pruner = tp.pruner.BasePruner(model, torch.zeros(1, 3), regularizer=[GroupLasso(1e-2), GrowingL2(1e-2, 1.0)])
    pruner.regularize()
    assert torch.allclose(model[0].weight.grad, torch.full((4, 3), 2e-2))


def test_base_gives_the_loss_back() -> None:
    model = net()
    assert tp.pruner.BasePruner(model, IMAGE).regularize(model, 3.5) == 3.5
