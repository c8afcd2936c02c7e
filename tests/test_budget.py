"""Budgets: met from below, exactly as counted, or refused with what stands in the way; nothing changed on the way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import prunus
from prunus import InputError, Target, TargetError
from prunus.allocation import ALLOCATIONS, Ladder
from prunus.budget import Budget, best_of
from prunus.cost import MemoryModel, count

X = torch.randn(2, 3, 16, 16)


class Residual(nn.Module):
    """Two stages with a skip, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.one = nn.Conv2d(24, 48, 3, padding=1)
        self.two = nn.Conv2d(48, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.norm(self.two(self.one(x).relu()))
        return self.head(x.mean((2, 3)))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 48)
        self.lstm = nn.LSTM(48, 64, num_layers=2, batch_first=True)
        self.head = nn.Linear(64, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(tokens))[0][:, -1])


def mobile() -> tuple[nn.Module, Any]:
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(), torch.randn(1, 3, 32, 32)


def vit() -> tuple[nn.Module, Any]:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 3, 4, 64, 160, num_classes=10), torch.randn(1, 3, 32, 32)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "residual": lambda: (Residual(), X),
    "lstm": lambda: (Sequence(), torch.randint(0, 50, (2, 7))),
    "mobilenet": mobile,
    "vit": vit,
}


@pytest.mark.parametrize("share", [0.75, 0.25])
@pytest.mark.parametrize("budget", ["macs", "params"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_budget_is_met_within_two_percent(network: str, budget: str, share: float) -> None:
    model, inputs = NETWORKS[network]()
    result = prunus.prune(model.eval(), inputs, Target(**{budget: share}))
    counted = getattr(count(model, inputs), budget)
    assert counted == getattr(result.after, budget), "the plan's cost is not what is counted"
    assert result.budget is not None
    assert counted == result.budget.reached[budget]
    most = share * getattr(result.before, budget)
    assert counted <= most
    assert counted >= 0.98 * most or "smallest thing" in result.budget.note


@pytest.mark.parametrize("allocation", [*ALLOCATIONS, lambda ladders, costs: [one.shares**2 for one in ladders]])
def test_every_allocation_meets_the_budget(allocation: Any) -> None:
    result = prunus.prune(Residual().eval(), X, Target(macs=0.5), allocation=allocation)
    assert 0.98 * 0.5 <= result.after.macs / result.before.macs <= 0.5


def test_greedy_takes_what_costs_most_for_its_score_first() -> None:
    """With equal scores everywhere, the layer whose neurons save more for each goes first."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 2))

    def equal(group: Any) -> torch.Tensor:
        return torch.ones(group.size)

    uniform = prunus.prune(model, torch.randn(1, 4), Target(macs=0.5), importance=equal)
    assert model[2].out_features < 100
    uniform.undo()
    prunus.prune(model, torch.randn(1, 4), Target(macs=0.5), importance=equal, allocation="greedy")
    assert (model[0].out_features, model[2].out_features) == (3, 100)


def test_several_budgets_hold_at_once() -> None:
    result = prunus.prune(Residual().eval(), X, Target(macs=0.5, params=0.4))
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.after.params <= 0.4 * result.before.params
    assert result.budget is not None
    assert set(result.budget.limits) == {"macs", "params"}


def test_an_int_is_a_number_and_not_a_share() -> None:
    result = prunus.prune(Residual().eval(), X, Target(params=5000))
    assert 4900 <= result.after.params <= 5000


def test_rounding_holds_under_a_budget() -> None:
    model = Residual().eval()
    prunus.prune(model, X, Target(macs=0.6), round_to=8)
    assert (model.stem.out_channels % 8, model.one.out_channels % 8) == (0, 0)


def test_heads_and_what_is_inside_them_share_a_budget() -> None:
    model, inputs = vit()
    result = prunus.prune(model.eval(), inputs, Target(macs=0.4), prune_num_heads=True, prune_head_dims=False)
    assert 0.98 * 0.4 <= result.after.macs / result.before.macs <= 0.4
    assert count(model, inputs).macs == result.after.macs


def test_a_fixed_share_of_heads_is_kept_to() -> None:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 2, 4, 64, 160, num_classes=10).eval()
    prunus.prune(
        model,
        torch.randn(1, 3, 32, 32),
        Target(macs=0.7),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=0.5,
    )
    assert {layer.self_attention.num_heads for layer in model.encoder.layers} == {2}


def test_what_cannot_be_met_says_what_stands_in_the_way(model_state: Any, states_equal: Any) -> None:
    model = Residual().eval()
    before = model_state(model)
    with pytest.raises(TargetError) as stopped:
        prunus.prune(model, X, Target(params=0.02), ignored_layers=[model.one])
    text = str(stopped.value)
    assert "params" in text
    assert "one keeps" in text
    assert "asked to leave this layer alone" in text
    with pytest.raises(TargetError, match=r"max_pruning_ratio.* keeps \d+% of \d groups"):
        prunus.prune(model, X, Target(macs=0.2), max_pruning_ratio=0.25)
    assert states_equal(before, model_state(model))


def test_a_step_that_is_too_large_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8))
    result = prunus.prune(model, torch.randn(1, 8), Target(macs=0.5))
    assert result.budget is not None
    assert "33.3% of the budget is left" in result.budget.note
    assert "costs 66.7% of it" in str(result)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "asks for nothing"),
        ({"macs": -1}, "positive"),
        ({"macs": 1.0}, "between 0 and 1"),
        ({"memory": 2.5}, "between 0 and 1"),
        ({"latency": 0}, "positive"),
        ({"params": True}, "no number"),
        ({"params": "half"}, "no number"),
        ({"macs": float("nan")}, "no number"),
        ({"ratio": 1.0}, "between 0 and 1"),
        ({"ratio": 0.5, "latency": 0.5}, "not both"),
    ],
)
def test_bad_targets_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Target(**asked)


def test_a_latency_of_one_or_more_is_in_milliseconds() -> None:
    assert Target(latency=12.5, macs=np.int64(7)).limits({"latency": 40.0, "macs": 9.0}) == {
        "macs": 7.0,
        "latency": 12.5,
    }
    assert Target(latency=0.5).limits({"latency": 40.0}) == {"latency": 20.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "fair"}, "uniform, global, greedy"),
        ({"search": 3}, "pass metric=, or data="),
        ({"metric": len}, "say how many with search="),
        ({"search": -1, "metric": len}, "0 or more"),
        ({"allocation": lambda ladders, costs: []}, "one array for each ladder"),
    ],
)
def test_bad_wishes_are_refused(options: dict[str, Any], message: str, model_state: Any, states_equal: Any) -> None:
    model = Residual().eval()
    before = model_state(model)
    with pytest.raises(InputError, match=message):
        prunus.prune(model, X, Target(macs=0.5), **options)
    assert states_equal(before, model_state(model))


def test_a_search_takes_the_allocation_that_the_metric_likes_best() -> None:
    seen: list[int] = []

    def metric(model: nn.Module) -> float:
        seen.append(model.get_submodule("one").weight.shape[0])
        return float(seen[-1])

    model = Residual().eval()
    result = prunus.prune(model, X, Target(macs=0.5), search=8, metric=metric)
    assert len(seen) == 8
    assert model.one.out_channels == max(seen) > min(seen)
    assert 0.98 * 0.5 <= result.after.macs / result.before.macs <= 0.5
    assert len(result.graph.pruning_history()) == 1


def test_a_metric_that_fails_leaves_the_model_as_it_was(model_state: Any, states_equal: Any) -> None:
    model = Residual().eval()
    before = model_state(model)
    with pytest.raises(ZeroDivisionError):
        prunus.prune(model, X, Target(macs=0.5), search=2, metric=lambda model: 1 / 0)
    assert states_equal(before, model_state(model))


def test_a_metric_of_nan_never_wins() -> None:
    values = iter([float("nan"), 0.1, float("nan")])
    found, value = best_of([0, 1], lambda course: course, lambda found: next(values), lambda course, r: 2, 3)  # type: ignore[arg-type,return-value]
    assert value == 0.1
    assert found == 1  # type: ignore[comparison-overlap]


class Alive(TorchDispatchMode):
    """The most bytes of storages that are alive at once."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known, self.live, self.peak = known, dict[int, int](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            storage = tensor.untyped_storage()
            at = storage.data_ptr()
            if at not in self.known and at not in self.live:
                self.live[at] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, at, None)
                self.peak = max(self.peak, sum(self.live.values()))
        return out


def test_activation_memory_is_what_is_seen_to_be_alive() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten()
    ).eval()
    known = {t.untyped_storage().data_ptr() for t in (X, *model.parameters(), *model.buffers())}
    result = prunus.prune(model, X, Target(memory=0.6))
    known |= {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    memory = MemoryModel(result.graph.coupling)
    with torch.inference_mode(), Alive(known) as seen:
        model(X)
    assert memory.activations(result.graph.alive) == seen.peak
    assert result.budget is not None
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert result.budget.reached["memory"] == weights + seen.peak <= result.budget.limits["memory"]


def test_a_budget_prints_what_was_asked_and_what_was_measured() -> None:
    text = str(Budget(Target(latency=0.5), {"latency": 10.0}, {"latency": 5.0}, {"latency": 4.9}, "", (10.2, 5.4)))
    assert (
        text
        == "latency: 4.9 ms of at most 5 ms (49.0% of the dense model's)\nlatency measured: 10.2 ms -> 5.4 ms (52.9%)"
    )


def test_ladders_step_along_allowed_widths() -> None:
    seen: list[Ladder] = []

    def note(ladders: Any, costs: Any) -> Any:
        seen.extend(ladders)
        return [one.shares for one in ladders]

    prunus.prune(Residual().eval(), X, Target(macs=0.5), allocation=note, round_to=8, max_pruning_ratio=0.7)
    kept = [(one.family.count, (one.family.count - one.stops).tolist()) for one in seen]
    assert (48, [40, 32, 24, 16]) in kept
    assert (24, [16, 8]) in kept


def test_a_cap_keeps_at_least_its_share_under_every_target() -> None:
    """Half of seven is three and a half: four stay."""
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))
    result = prunus.prune(model, torch.randn(1, 4), Target(ratio=0.5), max_pruning_ratio=0.5)
    assert model[0].out_features == 4
    result.undo()
    with pytest.raises(TargetError, match="macs 57"):
        prunus.prune(model, torch.randn(1, 4), Target(macs=0.5), max_pruning_ratio=0.5)
    assert model[0].out_features == 7


def test_a_cap_keeps_at_least_its_share_of_heads_under_a_budget() -> None:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(16, 8, 1, 3, 48, 96, num_classes=10).eval()
    options: dict[str, Any] = {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.9}
    prunus.prune(model, torch.randn(1, 3, 16, 16), Target(macs=0.8), max_pruning_ratio=0.5, **options)
    assert model.encoder.layers[0].self_attention.num_heads == 2
