"""Sensitivity: each group alone, measured on the cut model, which is put back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prunus
from prunus import InputError

X = torch.randn(16, 6)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)).eval()


def closeness(model: nn.Module) -> Any:
    dense = model(X).detach()
    return lambda m: -float((m(X) - dense).square().mean().detach())


def test_each_row_is_what_cutting_that_group_alone_gives(model_state: Any, states_equal: Any) -> None:
    model = network()
    before, metric = model_state(model), closeness(model)
    found = prunus.sensitivity(model, X, metric, shares=[0.25, 0.5])
    assert states_equal(before, model_state(model))
    assert found.dense == 0.0
    assert [(row["layer"], row["units"], row["share"]) for row in found.rows] == [
        ("0", 16, 0.25),
        ("0", 16, 0.5),
        ("2", 32, 0.25),
        ("2", 32, 0.5),
    ]
    prunus.prune(model, X, prunus.Target(ratio=0.5), ignored_layers=[model[0]])
    assert metric(model) == found.rows[3]["metric"] == -found.rows[3]["drop"]
    whole = prunus.cost.count_params(network())
    assert prunus.cost.count_params(model) == pytest.approx(found.rows[3]["params"] * whole)


def test_a_metric_that_changes_modes_and_statistics_leaves_no_trace(model_state: Any, states_equal: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    before = model_state(model)

    def metric(m: nn.Module) -> float:
        m.train()
        return float(m(X).square().mean().detach() + torch.rand(()))

    torch.manual_seed(3)
    prunus.sensitivity(model, X, metric, shares=[0.5])
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))
    assert states_equal(before, model_state(model))


def test_a_failing_metric_leaves_the_model_as_it_was(model_state: Any, states_equal: Any) -> None:
    model = network()
    before, calls = model_state(model), iter([1.0])
    with pytest.raises(StopIteration):
        prunus.sensitivity(model, X, lambda m: next(calls))
    assert states_equal(before, model_state(model))


def test_as_an_importance_it_spares_the_sensitive_group() -> None:
    """A budget goes to the group whose curve is flat, and inside a group the base criterion still decides."""
    model = network()
    narrow = {16: 0.0, 12: 5.0, 8: 9.0, 4: 20.0}
    found = prunus.sensitivity(model, X, lambda m: -narrow[m[0].out_features], shares=[0.25, 0.5, 0.75])
    importance = found.importance()
    result = prunus.prune(model, X, prunus.Target(macs=0.5), importance=importance, allocation="greedy")
    assert model[0].out_features == 16
    assert model[2].out_features == 13
    result.undo()
    base = prunus.importance.MagnitudeImportance()
    graph = prunus.DependencyGraph().build_dependency(model, X)
    first = next(iter(graph.get_all_groups()))
    scores = importance(first)
    assert scores is not None
    assert torch.equal(scores.argsort(), base(first).argsort())
    assert (scores >= 0).all()


def test_a_loss_counts_upwards() -> None:
    found = prunus.sensitivity(
        network(), X, lambda m: 17.0 - m[0].out_features, shares=[0.5], higher_is_better=False, ignored_layers=["2"]
    )
    assert [row["drop"] for row in found.rows] == [8.0]
    assert str(found) == "metric of the model as it is: 1\n0  50%: 9"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": 3}, "pass a function"),
        ({"shares": []}, "ascending"),
        ({"shares": [0.5, 0.25]}, "ascending"),
        ({"shares": [1.0]}, "below 1"),
        ({"metric": lambda m: float("nan")}, "finite"),
        ({"ignored_layers": ["nowhere"]}, "nowhere"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prunus.sensitivity(network(), X, **{"metric": lambda m: 1.0, **options})


def test_rows_as_a_frame() -> None:
    pandas = pytest.importorskip("pandas")
    found = prunus.sensitivity(network(), X, lambda m: 1.0, shares=[0.5])
    frame = found.frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.to_dict("records") == found.rows


def test_curves_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    model = network()
    found = prunus.sensitivity(model, X, closeness(model), shares=[0.5])
    figure = found.plot(tmp_path / "curves.html")
    drawn = json.loads(figure.to_json())["data"]
    assert [line["name"] for line in drawn] == ["0", "2"]
    assert (tmp_path / "curves.html").read_text(encoding="utf-8").count("share of the group removed") == 1
