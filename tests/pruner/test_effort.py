"""Effort of the pruners: no Python loop over channels, and a bench that judges what is promised."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import prunus

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = str(ROOT / "src" / "prunus")


def lines_of(run: Callable[[], Any]) -> int:
    """How many lines of Prunus a call executes."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2 * width, 3), nn.ReLU(),
        nn.Conv2d(2 * width, width, 3), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 4),
    )  # fmt: skip


def transformer(width: int) -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 8, 2, 4, width, 2 * width, num_classes=3).eval()


X = torch.randn(1, 3, 16, 16)


def looks(model: nn.Module, steps: int = 1, **options: Any) -> int:
    """The lines that it takes to score all groups and to choose, in each step."""
    pruner = prunus.pruner.BasePruner(model, X, pruning_ratio=0.5, iterative_steps=steps, **options)
    count = 0
    for _ in range(steps):
        found: list[Any] = []
        count += lines_of(lambda into=found: into.extend(pruner.step(interactive=True)))  # type: ignore[misc]
        for group in found:
            group.prune()
    return count


def cuts(model: nn.Module) -> int:
    """The lines that a whole step takes."""
    return lines_of(prunus.pruner.BasePruner(model, X, pruning_ratio=0.5).step)


JOBS: dict[str, Callable[[nn.Module], int]] = {
    "one step": looks,
    "several steps": partial(looks, steps=2),
    "one threshold for all": partial(looks, global_pruning=True, max_pruning_ratio=0.75),
    "within forms": partial(looks, isomorphic=True, round_to=4),
    "LAMP": partial(looks, importance=prunus.importance.LAMPImportance()),
}


@pytest.mark.parametrize("make", [network, transformer])
@pytest.mark.parametrize("job", JOBS)
def test_scores_and_choice_do_not_loop_over_channels(job: str, make: Callable[[int], nn.Module]) -> None:
    """Eight times the channels take as many lines of Python."""
    torch.manual_seed(0)
    narrow, wide = (JOBS[job](make(width)) for width in (32, 256))
    assert narrow > 1000
    assert wide < 1.02 * narrow


def test_a_cut_does_not_loop_over_channels() -> None:
    narrow, wide = (cuts(network(width)) for width in (32, 256))
    assert wide < 1.02 * narrow


@pytest.fixture(name="bench")
def _bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("scoring_benchmark", ROOT / "benchmarks" / "scoring.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, found)  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


def test_the_bench_judges_what_is_promised(bench: Any) -> None:
    good = bench.Row("good", 10, forward=2.0, look=3.0, steps={1: 1.0, 2: 1.5, 4: 3.2}, torch_pruning=2.0)
    costly = bench.Row("costly", 10, forward=1.0, look=2.0, steps={1: 1.0}, torch_pruning_error="no end in 60 s")
    bent = bench.Row("bent", 10, forward=2.0, look=1.0, steps={1: 1.0, 2: 4.0})
    verdict = bench.judge([good])
    assert verdict["kept"]
    assert verdict["slower_than_torch_pruning"] == ["good"]
    assert bench.sentence(verdict).startswith("KEPT: scores and choice cost at most 1.50 forward passes")
    assert bench.judge([good, costly])["too_costly"] == ["costly"]
    assert bench.judge([good, bent])["growing"] == ["bent"]
    assert not any(bench.judge(rows)["kept"] for rows in ([costly], [good, bent], []))
    assert bench.sentence(bench.judge([])) == "NOT KEPT: no model was measured"
