"""Histories: what was cut once is cut again, on a graph that goes on from there; all or nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import prunus as tp

IMAGE = torch.zeros(1, 3, 32, 32)


def vit() -> Any:
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 96, num_classes=10)


def resnet() -> Any:
    torch.manual_seed(0)
    return torchvision.models.resnet18()


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "channels": (resnet, {"pruning_ratio": 0.4}),
    "heads and their dims": (vit, {"pruning_ratio": 0.4, "prune_num_heads": True, "ignored_layers": ["heads"]}),
    "whole heads": (vit, {"pruning_ratio": 0.4, "prune_num_heads": True, "prune_head_dims": False}),
}


@pytest.mark.parametrize("text", [False, True], ids=["plans", "JSON"])
@pytest.mark.parametrize("name", CASES)
def test_a_history_replays_and_the_graph_goes_on_from_there(name: str, text: bool) -> None:
    build, options = CASES[name]
    model, other = build(), build()
    pruner, replayed = (tp.pruner.BasePruner(m, IMAGE, iterative_steps=3, **options) for m in (model, other))
    pruner.step()
    pruner.step()
    history = pruner.pruning_history()
    replayed.load_pruning_history([plan.to_json() for plan in history] if text else history)
    assert np.array_equal(replayed.DG.alive, pruner.DG.alive)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert len(replayed.pruning_history()) == 2
    replayed.current_step = 2
    for one in (pruner, replayed):
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert torch.equal(model.eval()(IMAGE), other.eval()(IMAGE))


class Recurrent(nn.Module):
    """Its first state is made by the code at the width of the cell: no tensor of the model has that dim."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.out = nn.LSTM(6, 16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cell(x)[0])


def test_states_that_no_tensor_knows_stay_in_step() -> None:
    model, other, x = Recurrent(), Recurrent(), torch.randn(2, 5, 6)
    pruner, replayed = (tp.pruner.BasePruner(m, x, iterative_steps=2) for m in (model, other))
    pruner.step()
    replayed.load_pruning_history(pruner.pruning_history())
    assert np.array_equal(replayed.DG.alive, pruner.DG.alive)
    replayed.current_step = 1
    replayed.step()
    assert other.cell.hidden_size == 8
    assert other(x).shape == (2, 5, 3)


def test_the_triples_of_others() -> None:
    model = resnet()
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    graph.load_pruning_history([["conv1", True, [0, 1]], ("layer2.0.conv1", True, [3]), ["layer4.0.conv1", False, [0]]])
    assert (model.conv1.out_channels, model.layer2[0].conv1.out_channels, model.layer4[0].conv1.in_channels) == (
        62,
        127,
        255,
    )
    assert len(graph.pruning_history()) == 3
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 1000)


def linear(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 6), nn.Linear(6, 2))


def good() -> tp.Plan:
    pruner = tp.pruner.BasePruner(linear(), torch.zeros(1, 4))
    pruner.step()
    return pruner.pruning_history()[0]


def foreign() -> tp.Plan:
    pruner = tp.pruner.BasePruner(linear(10), torch.zeros(1, 4))
    pruner.step()
    return pruner.pruning_history()[0]


def half() -> tp.Plan:
    """Of what must go together, one tensor only."""
    from dataclasses import replace

    return replace(good(), removals=good().removals[:1])


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a plan, not a list": (good, tp.InputError, "a history is a list"),
    "a text, not a list": (lambda: "[]", tp.InputError, "a history is a list"),
    "an entry that is none": (lambda: [good(), 3], tp.InputError, "the history holds '3'"),
    "no plan": (lambda: ["{}"], tp.InputError, "not a plan"),
    "another layer": (lambda: [["9", True, [0]]], tp.InputError, "not in the model"),
    "positions that are not there": (lambda: [["0", True, [99]]], tp.InputError, "do not exist"),
    "no positions": (lambda: [["0", True, []]], tp.InputError, "no positions"),
    "a plan for another model": (lambda: [foreign()], tp.SurgeryError, "the plan needs 10"),
    "twice the same": (lambda: [good(), good()], tp.SurgeryError, "the plan needs 8"),
    "a part": (lambda: [half()], tp.SurgeryError, "must go together"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_history_that_does_not_fit_changes_nothing(name: str) -> None:
    history, error, words = BAD[name]
    model = linear()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    graph = tp.DependencyGraph().build_dependency(model, torch.zeros(1, 4))
    with pytest.raises(error, match=words):
        graph.load_pruning_history(history())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert graph.alive.all() and graph.pruning_history() == []
