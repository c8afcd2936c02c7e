"""A quick part of the zoo: every network is ok, or says why less of it can go. `make zoo` runs all of it."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

QUICK = {
    "handwritten": (
        "channel_shuffle",
        "squeeze_excite",
        "dense_block",
        "searched_cell",
        "gates",
        "frozen_norm",
        "norm_by_hand",
        "pixel_shuffle",
        "unet",
        "fpn",
        "experts",
        "state_space",
        "cross_by_hand",
        "attention_grouped_queries",
        "attention_llama",
        "bilinear",
        "temporal_shift",
        "cached_attention",
        "grouped_output",
    ),
    "recurrent": ("lstm_projected_bidirectional", "gru_packed", "cells_with_zeros", "conv_lstm", "seq2seq_attention"),
    "torchvision": ("squeezenet1_1", "mnasnet0_5", "swin_v1", "lraspp_mobilenet_v3_large"),
    "ultralytics": ("yolov8n", "yolo11n-seg"),
}
NETWORKS = [(family, name) for family, names in QUICK.items() for name in names]


@pytest.fixture(scope="module")
def seen() -> Iterator[Counter[str]]:
    """How many networks came to which end; printed at the end."""
    found: Counter[str] = Counter()
    yield found
    print(f"\nzoo: {', '.join(f'{count} {status}' for status, count in found.most_common())}")


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The folder at the top of the repository, which is not part of the package."""
    monkeypatch.syspath_prepend(str(ROOT))
    if sys.platform == "win32":
        pytest.skip("the zoo measures memory, which this system does not tell")
    return importlib.import_module("zoo.check")


@pytest.mark.parametrize(("family", "name"), NETWORKS, ids=[f"{family}-{name}" for family, name in NETWORKS])
def test_network_is_pruned_or_says_why_not(family: str, name: str, zoo: Any, seen: Counter[str]) -> None:
    networks = importlib.import_module("zoo.networks")
    for package in networks.PACKAGES[family]:
        pytest.importorskip(package)
    row = zoo.check(name, family, networks.builders(family)[name], lambda found: None)
    seen[row.status] += 1
    assert row.status in {"ok", "frozen"}, "\n".join([*row.problems, row.traceback])
    assert row.status == "ok" or row.frozen, "less than a quarter went, and no reason is given"


def test_each_network_has_a_name_of_its_own(zoo: Any) -> None:
    """Every table can be read without its library, and files of findings do not overwrite each other."""
    networks, run = importlib.import_module("zoo.networks"), importlib.import_module("zoo.run")
    names = [(family, name) for family in networks.FAMILIES for name in networks.builders(family)]
    files = {run.file_of(Path(), family, name) for family, name in names}
    assert len(files) == len(names) >= 230


def test_the_runner_judges_what_is_promised(zoo: Any) -> None:
    run = importlib.import_module("zoo.run")
    rows = [{"status": "ok", "removed": 0.7, "in_forward_passes": 2.0} for _ in range(50)]
    frozen, failed = {**rows[0], "status": "frozen"}, {**rows[0], "status": "failed"}
    assert run.good(run.totals(rows))
    assert run.good(run.totals([*rows, frozen]))
    assert not run.good(run.totals([*rows, frozen, frozen]))
    assert not run.good(run.totals([*rows, failed]))
    assert not run.good(run.totals([]))
