"""Latency: calls are recorded and replayed at other widths, tables are kept, predictions and targets follow them.

Time is faked: a call takes what the fake says for its shapes, so that nothing here depends on the machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import prunus
from prunus import InputError, Target, TargetError
from prunus.cost import LatencyModel, LatencyTable
from prunus.cost.recorded import record_calls
from prunus.cost.table import cache_folder, stopwatch
from prunus.graph import DependencyGraph

X = torch.randn(2, 3, 12, 12)
PER_CALL = 0.01


class Clock(TorchDispatchMode):
    """Milliseconds of what runs: a constant for each op, and a millisecond for a million multiply-adds.

    Widths count as if they were padded to a multiple of ``block``.
    """

    def __init__(self, block: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block, self.ms, self.calls = block, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        self.ms += PER_CALL
        if func.overloadpacket.__name__ in ("conv2d", "linear"):
            wide = [-(-n // self.block) * self.block for n in args[1].shape[:2]]
            place = out[:, 0].numel() if out.dim() == 4 else out[..., 0].numel()
            self.ms += place * wide[0] * wide[1] * prod(args[1].shape[2:]) / 1e6
        return out


def faked(block: int = 1) -> Callable[[Callable[[], Any], torch.device], float]:
    def timer(thunk: Callable[[], Any], device: torch.device) -> float:
        with torch.inference_mode(), Clock(block) as clock:
            thunk()
        return clock.ms

    return timer


class Network(nn.Module):
    """A skip, a grouped convolution that follows its width, a norm, a flattened end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.deep = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.wide = nn.Conv2d(64, 96, 3, padding=1)
        self.narrow = nn.Conv2d(96, 64, 1)
        self.norm = nn.BatchNorm2d(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.deep(self.stem(x)).relu()
        x = x + self.norm(self.narrow(self.wide(x).relu()))
        return self.head(x.mean((2, 3)))


def table(block: int = 1) -> LatencyTable:
    timer = faked(block)
    return LatencyTable("cpu", False, timer, lambda calls, device: [timer(call, device) for call in calls])


def vit() -> tuple[nn.Module, torch.Tensor]:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10), torch.randn(1, 3, 32, 32)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {"convolutions": lambda: (Network(), X), "vit": vit}


@pytest.mark.parametrize(("network", "off"), [("convolutions", 0.001), ("vit", 0.2)])
def test_predictions_are_what_the_cut_model_takes(network: str, off: float) -> None:
    """Views, of which a ViT has many, are not timed alone: until a plan is measured, their time is shared out."""
    model, inputs = NETWORKS[network]()
    graph = DependencyGraph().build_dependency(model.eval(), inputs)
    predicted = LatencyModel(graph.coupling, inputs, table())
    dense = faked()(lambda: model(inputs), torch.device("cpu"))
    assert predicted.dense == pytest.approx(dense)
    assert predicted(graph.alive) == pytest.approx(dense)
    cut = copy.deepcopy(model)
    result = prunus.prune(cut, inputs, Target(macs=0.4))
    left = faked()(lambda: cut(inputs), torch.device("cpu"))
    alive = result.graph.alive
    assert predicted.exact(alive) == pytest.approx(left, rel=off)
    assert predicted(alive) == pytest.approx(left, rel=off + 0.15)


def test_between_measured_widths_few_calls_are_timed() -> None:
    model = Network().eval()
    graph = DependencyGraph().build_dependency(model, X)
    measured = table()
    predicted = LatencyModel(graph.coupling, X, measured)
    first = len(measured)
    alive = prunus.prune(copy.deepcopy(model), X, Target(ratio=0.5)).graph.alive
    values = [predicted(alive)]
    after_one = len(measured)
    assert first < after_one <= first + 4 * 12
    values.append(predicted(alive))
    assert len(measured) == after_one
    assert values[0] == values[1]


def test_a_call_runs_again_at_other_widths() -> None:
    model = Network().eval()
    calls, modules = record_calls(model, X)
    assert modules == 1 + len(list(model.children()))
    deep = next(c for c in calls if c.name == "conv2d" and c.shapes[1] == (64, 1, 3, 3))
    shapes = [(2, 40, 12, 12), (40, 1, 3, 3), (40,)]
    assert deep.thunk(shapes, torch.device("cpu"))().shape == (2, 40, 12, 12)
    assert deep.at(shapes)[0][6] == 40
    assert deep.specs[1].weight
    assert not deep.specs[0].weight
    copies = {deep.thunk(shapes, torch.device("cpu"), 5000)() is not None for _ in range(3)}
    assert copies == {True}


def test_layouts_are_kept() -> None:
    model = nn.Conv2d(3, 8, 3).eval()
    calls, _ = record_calls(model, X.to(memory_format=torch.channels_last))
    built = calls[0].specs[0].build((2, 5, 12, 12), torch.device("cpu"))
    assert built.is_contiguous(memory_format=torch.channels_last)
    assert not built.is_contiguous()
    spread = record_calls(nn.Identity(), X)[0]
    assert spread == []


def test_views_are_free_and_copies_are_not() -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(1, 2).reshape(2, -1).relu()

    calls, _ = record_calls(Views(), torch.randn(2, 3, 4))
    assert [(c.name, c.free) for c in calls] == [("transpose", True), ("reshape", False), ("relu", False)]


@pytest.mark.parametrize(("network", "off"), [("convolutions", 1e-6), ("vit", 0.03)])
@pytest.mark.parametrize("in_ms", [False, True])
def test_a_latency_is_met(network: str, off: float, in_ms: bool) -> None:
    """As a share and in milliseconds; where calls alone do not add up to the model, after plans were measured."""
    model, inputs = NETWORKS[network]()
    model.eval()
    dense = faked()(lambda: model(inputs), torch.device("cpu"))
    asked = Target(latency=0.6 * dense * 1000) if in_ms else Target(latency=0.6)
    slower = 1000 if in_ms else 1

    def timer(thunk: Callable[[], Any], device: torch.device) -> float:
        return slower * faked()(thunk, device)

    own = LatencyTable("cpu", False, timer, lambda calls, device: [timer(call, device) for call in calls])
    result = prunus.prune(model, inputs, asked, latency_table=own)
    now = faked()(lambda: model(inputs), torch.device("cpu"))
    assert result.budget is not None
    assert result.budget.measured == (pytest.approx(slower * dense), pytest.approx(slower * now))
    assert result.budget.reached["latency"] == pytest.approx(slower * now, rel=off)
    assert 0.95 * 0.6 <= now / dense <= 0.6 * (1 + off)
    assert "latency measured" in str(result)


def test_widths_are_rounded_when_that_is_faster() -> None:
    """Where odd widths cost as much as the next multiple of 16, the plan has multiples of 16; else it need not."""
    rounded = Network().eval()
    prunus.prune(rounded, X, Target(latency=0.5), latency_table=table(16))
    assert {rounded.stem.out_channels % 16, rounded.wide.out_channels % 16} == {0}
    free = Network().eval()
    prunus.prune(free, X, Target(latency=0.5), latency_table=table(1))
    assert {free.stem.out_channels % 16, free.wide.out_channels % 16} != {0}


def half_the_gain(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """A race in which cut models gain only half of what their calls alone would."""
    whole, *others = (faked()(call, device) for call in calls)
    return [whole, *(whole - (whole - ms) / 2 for ms in others)]


def test_predictions_learn_from_what_is_measured() -> None:
    model = Network().eval()
    own = LatencyTable("cpu", False, faked(), half_the_gain)
    result = prunus.prune(model, X, Target(latency=0.7), latency_table=own)
    assert result.budget is not None
    assert result.budget.measured is not None
    whole, cut = result.budget.measured
    assert cut / whole == pytest.approx(result.budget.reached["latency"] / whole, rel=0.03)
    assert 0.65 <= cut / whole <= 0.7 * 1.03
    with pytest.raises(TargetError, match="cannot be met"):  # half of the gain of nothing left is half of the time
        prunus.prune(Network().eval(), X, Target(latency=0.45), latency_table=own)


def test_a_model_that_cannot_be_copied_is_timed_before_and_after_the_cut() -> None:
    class Single(Network):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("there is one only")

    model = Single().eval()
    dense = faked()(lambda: model(X), torch.device("cpu"))
    result = prunus.prune(model, X, Target(latency=0.6), latency_table=table())
    now = faked()(lambda: model(X), torch.device("cpu"))
    assert result.budget is not None
    assert result.budget.measured == (pytest.approx(dense), pytest.approx(now))
    assert now <= 0.6 * dense


def test_the_callers_rounding_stands() -> None:
    model = Network().eval()
    prunus.prune(model, X, Target(latency=0.5), round_to=8, latency_table=table(16))
    assert {model.stem.out_channels % 8, model.wide.out_channels % 8} == {0}


def test_what_cannot_be_met_or_is_met_already_is_refused(model_state: Any, states_equal: Any) -> None:
    model = Network().eval()
    before = model_state(model)
    with pytest.raises(TargetError, match="latency"):
        prunus.prune(model, X, Target(latency=0.001), latency_table=table())
    with pytest.raises(InputError, match="within the budget already"):
        prunus.prune(model, X, Target(latency=1000), latency_table=table())
    assert states_equal(before, model_state(model))
    with pytest.raises(InputError, match="meta"):
        prunus.prune(
            Network().to("meta"), X.to("meta"), Target(latency=0.5), importance=prunus.importance.RandomImportance()
        )


def test_a_table_is_kept_on_disk_and_merged(tmp_path: Path) -> None:
    calls, _ = record_calls(nn.Linear(4, 4), torch.randn(1, 4))
    counted: list[int] = []

    def timer(thunk: Callable[[], Any], device: torch.device) -> float:
        thunk()
        counted.append(1)
        return 1.5

    one, other = (LatencyTable("cpu", tmp_path, timer) for _ in range(2))
    assert one.time(calls[0], calls[0].shapes) == 1.5
    assert other.time(calls[0], [(1, 2), (4, 2), (4,)]) == 1.5
    one.save()
    other.save()
    again = LatencyTable("cpu", tmp_path, timer)
    assert len(again) == 2
    again.time(calls[0], calls[0].shapes)
    assert len(counted) == 2
    assert one.path is not None
    one.path.write_text("{", encoding="utf-8")
    assert len(LatencyTable("cpu", tmp_path, timer)) == 0


def test_a_call_that_cannot_run_alone_costs_by_its_size() -> None:
    calls, _ = record_calls(nn.Linear(4, 4), torch.randn(1, 4))
    broken = LatencyTable("cpu", False, lambda thunk, device: float(thunk().shape[-1]))
    assert broken.time(calls[0], calls[0].shapes) == 4.0
    assert broken.time(calls[0], [(1, 3), (4, 2), (4,)]) == 4.0 * 15 / 24


def test_the_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("PRUNUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "prunus"


def test_the_stopwatch_takes_turns_and_is_positive() -> None:
    ran: list[bool] = []
    taken = stopwatch(lambda: ran.append(torch.is_inference_mode_enabled()), torch.device("cpu"))
    assert taken > 0
    assert len(ran) >= 4
    assert all(ran)
