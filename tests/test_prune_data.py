"""`prune(data=)`: what the data choose, in one round or in several, and that nothing stays when something fails."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus import InputError, Target, TargetError
from prunus.importance import MagnitudeImportance, OutputErrorImportance
from prunus.plan import Plan
from prunus.repair import read


class Net(nn.Module):
    """A residual block between two convolutions, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.back = nn.Conv2d(24, 16, 1)
        self.head = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(self.inner(x))
        return self.head(x.mean((2, 3)))


def net() -> Net:
    """With weights of differing sizes, so that scores differ."""
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand(len(parameter), *[1] * (parameter.dim() - 1)) + 0.5)
    return model


def batches(count: int = 6, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(count)]


EXAMPLE = torch.zeros(1, 3, 8, 8)


def error(model: nn.Module, dense: nn.Module) -> float:
    x = torch.randn(128, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return float((model(x) - dense(x)).square().mean() / dense(x).var())


def test_output_errors_choose_greedily() -> None:
    model, dense = net(), net()
    result = prunus.prune(model, EXAMPLE, Target(macs=0.4), data=batches())
    seen = [b.inputs for b in read(batches(), None, 1000, dense)]
    calibration = prunus.calibrate(dense, seen, per_sample=False, collect=("grams", "gradients"))
    importance = OutputErrorImportance(calibration)
    assert importance.comparable
    by_hand = prunus.prune(net(), EXAMPLE, Target(macs=0.4), importance=importance, allocation="greedy")
    uniform = prunus.prune(net(), EXAMPLE, Target(macs=0.4), importance=importance, allocation="uniform")
    assert result.plan.removals == by_hand.plan.removals
    assert result.plan.removals != uniform.plan.removals
    assert result.repair is not None
    assert not result.note


def test_a_caller_s_own_criterion_and_allocation_stand() -> None:
    own = prunus.prune(net(), EXAMPLE, Target(macs=0.4), data=batches(), importance=MagnitudeImportance())
    plain = prunus.prune(net(), EXAMPLE, Target(macs=0.4))
    assert own.plan.removals == plain.plan.removals
    spread = prunus.prune(net(), EXAMPLE, Target(macs=0.4), data=batches(), allocation="uniform")
    assert spread.plan.removals != prunus.prune(net(), EXAMPLE, Target(macs=0.4), data=batches()).plan.removals


def test_it_comes_nearer_than_magnitudes() -> None:
    errors = []
    for importance in (None, MagnitudeImportance()):
        model = net()
        prunus.prune(model, EXAMPLE, Target(macs=0.3), data=batches(), importance=importance)
        errors.append(error(model, net()))
    assert errors[0] < errors[1]


class Whole(nn.Module):
    """Its outputs have no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(dim=1)


def test_outputs_without_gradients_are_said() -> None:
    result = prunus.prune(Whole(), EXAMPLE, Target(macs=0.5), data=batches())
    assert "no gradient" in result.note
    assert result.note in str(result)


@pytest.mark.parametrize(
    "target", [Target(macs=0.4), Target(params=0.4, macs=0.5), Target(ratio=0.6), Target(memory=0.7)]
)
def test_rounds_reach_the_target_and_are_one_plan(target: Target, model_state: Any, states_equal: Any) -> None:
    model, before = net(), model_state(net())
    result = prunus.prune(model, EXAMPLE, target, data=batches(), rounds=3)
    assert len(result.graph.pruning_history()) == 3
    if result.budget is not None:
        assert result.budget.target == target
        for name, most in result.budget.limits.items():
            assert result.budget.reached[name] <= most
            assert most <= result.budget.dense[name]
    assert sum(p.numel() for p in model.parameters()) == result.after.params < result.before.params
    bare = net()
    Plan.from_json(result.plan.to_json()).apply(bare)
    assert [p.shape for p in bare.parameters()] == [p.shape for p in model.parameters()]
    assert error(model, net()) < error(bare, net())
    result.undo()
    assert states_equal(before, model_state(model))
    assert result.graph.pruning_history() == []


def test_a_search_without_a_metric_judges_repaired_outputs() -> None:
    model = net()
    result = prunus.prune(model, EXAMPLE, Target(macs=0.3), data=batches(), search=4)
    plain = prunus.prune(net(), EXAMPLE, Target(macs=0.3), data=batches())
    assert result.repair is not None
    assert plain.repair is not None
    assert result.repair.after is not None
    assert plain.repair.after is not None
    assert result.repair.after <= plain.repair.after
    assert sum(p.numel() for p in model.parameters()) == result.after.params


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 2}, "pass data="),
        ({"rounds": 0, "data": batches()}, "rounds=0"),
        ({"samples": 0, "data": batches()}, "samples=0"),
        ({"search": 2}, "pass metric=, or data="),
        ({"rounds": 2, "data": batches(), "target": Target(latency=0.5)}, "in one round"),
        ({"data": []}, "no sample"),
        ({"data": batches(), "rounds": 2, "target": Target(macs=0.001)}, "cannot be met"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str, model_state: Any, states_equal: Any) -> None:
    model = net()
    before = model_state(model)
    with pytest.raises((InputError, TargetError), match=message):
        prunus.prune(model, EXAMPLE, options.pop("target", Target(macs=0.5)), **options)
    assert states_equal(before, model_state(model))


def test_a_failure_in_a_later_round_takes_all_rounds_back(model_state: Any, states_equal: Any) -> None:
    calls = iter(range(100))

    def criterion(group: Any) -> Tensor:
        if next(calls) > 4:
            raise RuntimeError("the second round")
        return torch.rand(group.size)

    model = net()
    before = model_state(model)
    with pytest.raises(RuntimeError, match="second round"):
        prunus.prune(model, EXAMPLE, Target(macs=0.3), importance=criterion, data=batches(), rounds=3)
    assert states_equal(before, model_state(model))


def test_padded_tokens_do_not_count() -> None:
    tokens, mask = torch.randint(1, 50, (64, 12)), torch.ones(64, 12, dtype=torch.bool)
    mask[:, 7:] = False
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    plans = []
    for padding in (0, 49):
        padded = torch.where(mask, tokens, padding)
        options = {"data": padded.split(16), "mask_fn": lambda batch: torch.arange(12).expand(len(batch), 12) < 7}
        cut = copy.deepcopy(model)
        result = prunus.prune(cut, tokens[:1], Target(ratio=0.5), ignored_layers=[cut[0]], **options)
        assert result.repair is not None
        plans.append(result.plan.removals)
    assert plans[0] == plans[1]


def test_a_loader_is_gone_through_once() -> None:
    def loader() -> Iterator[Tensor]:
        yield from batches()

    once = loader()
    result = prunus.prune(copy.deepcopy(net()), EXAMPLE, Target(macs=0.5), data=once, samples=1000)
    assert result.repair is not None
    assert result.repair.samples[0] == sum(b.count for b in read(batches(), None, 1000, net()))
    assert next(once, None) is None
