"""Batches join late and leave early, so that what waits holds little; fits and errors stay right."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import prunus
from prunus.repair.chains import Recorder
from prunus.repair.crowd import Alive, Place, crowds
from prunus.repair.samples import least, read
from prunus.repair.watch import Watch, Weights

places = st.lists(st.builds(Place, st.integers(0, 100), st.integers(0, 20)), min_size=1, max_size=12)


@given(places, st.integers(1, 10), st.integers(1, 3), st.integers(0, 400))
def test_memory_is_bounded_needs_are_met_and_little_runs_twice(places, total, few, room) -> None:
    found = crowds(places, total, few, room)
    highest = again = here = 0
    for place, n in zip(places, found, strict=True):
        assert min(few, total) <= n <= total
        assert n <= few or n * place.held <= 2 * room
        again += max(0, min(n, highest) - here)
        highest, here = max(highest, n), n
    assert again <= total


def test_all_wait_where_there_is_room() -> None:
    assert crowds([Place(10, 1), Place(20), Place(5, 7)], total=6, least=2, room=1_000) == [6, 6, 6]


def test_calls_of_one_layer_get_equally_many() -> None:
    assert crowds([Place(10, 1, same=7), Place(10), Place(10, 4, same=7)], 9, 1, 20) == [4, 4, 4]


def test_bytes_of_what_a_run_holds() -> None:
    alive, x = Alive(), torch.ones(256)
    first = x * 2
    assert alive.note([x], [first]) == 1024
    view = first.view(16, 16)
    assert alive.note([first], [view]) == 1024
    second = torch.relu(view)
    assert alive.note([view], [second]) == 2048
    del first, view
    assert alive.note([second], [second]) == 1024


def test_a_recorder_knows_what_is_held_at_each_step() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(inplace=True), nn.Linear(64, 2))
    recorder = Recorder()
    watch = Watch(Weights(model), after=recorder.after)
    recorder.find = watch.find
    x = torch.randn(16, 8)
    with torch.inference_mode(), watch:
        model(x)
    assert recorder.held == [4096, 4096, 4096 + 128]


def test_the_first_batches_hold_some_of_both_kinds() -> None:
    batches = read([torch.randn(8, 2) for _ in range(12)], None, 1_000, nn.Linear(2, 2))
    assert [b.held for b in batches] == [True, *[False] * 4, True, *[False] * 6]
    assert least(batches) == 5
    assert least(read([torch.randn(64, 2) for _ in range(3)], None, 1_000, nn.Linear(2, 2))) == 1
    assert least(read([torch.randn(2, 2) for _ in range(3)], None, 1_000, nn.Linear(2, 2))) == 3


class Hourglass(nn.Module):
    """Maps shrink, and grow again."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 16), (16, 24), (24, 32)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1) for a, b in ((32, 24), (24, 16), (16, 3)))
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (16, 24, 32))

    def forward(self, x):
        for conv, norm in zip(self.down, self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        for conv in self.up:
            x = torch.tanh(conv(x))
        return x


@pytest.mark.parametrize("size", [4, 16])
def test_repair_with_little_memory_is_honest_and_near_to_the_one_with_all(size) -> None:
    model = Hourglass().train()
    for _ in range(10):
        model(torch.randn(16, 3, 16, 16))
    model.eval()
    data = [torch.randn(size, 3, 16, 16) for _ in range(160 // size)]
    cut = copy.deepcopy(model)
    plan = prunus.prune(cut, torch.randn(1, 3, 16, 16), prunus.Target(ratio=0.4)).plan
    reports, models = [], []
    for memory in (1, 100_000, None):
        models.append(copy.deepcopy(model))
        reports.append(prunus.repair(models[-1], plan, data, memory=memory))
    few, some, all_ = reports
    assert few.after < 0.8 * few.before
    assert all_.after <= some.after <= few.after + 1e-3
    rows = [{layer.layer: layer.rows for layer in report.layers} for report in reports]
    assert rows[0]["up.2"] < rows[2]["up.2"]
    held = torch.cat(data[4::5]) if size == 4 else torch.cat([data[4], data[9]])
    with torch.no_grad():
        gap = (models[0](held) - model(held)).square().sum() / (model(held) - model(held).mean()).square().sum()
    assert float(gap) == pytest.approx(few.after, rel=1e-2)
