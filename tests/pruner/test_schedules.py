"""Schedules: from 0 to the whole share, never falling; one clear error for those that do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import prunus as tp
from prunus.pruner.schedules import (
    Schedule,
    cosine_scheduler,
    cubic_scheduler,
    exponential_scheduler,
    linear_scheduler,
    shares_of,
)

ALL = [linear_scheduler, cosine_scheduler, exponential_scheduler, cubic_scheduler]


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.9])
def test_from_nothing_to_the_whole_share(schedule: Schedule, steps: int, ratio: float) -> None:
    shares = shares_of(schedule, ratio, steps)
    assert (len(shares), shares[0], shares[-1]) == (steps + 1, 0.0, pytest.approx(ratio))
    assert shares == sorted(shares)


def test_shapes() -> None:
    assert cosine_scheduler(0.6, 2)[1] == pytest.approx(0.3)
    assert exponential_scheduler(0.75, 2)[1] == pytest.approx(0.5)  # half of what is left, twice
    first, second, third = (b - a for a, b in zip(*(cubic_scheduler(0.6, 3)[k:] for k in (0, 1)), strict=False))
    assert first > second > third


BAD: dict[str, Any] = {
    "too few": lambda ratio, steps: [0.0],
    "falls": lambda ratio, steps: [0.0, 0.4, 0.2],
    "all at once": lambda ratio, steps: [0.0, 0.5, 1.0],
    "no numbers": lambda ratio, steps: ["a", "b", "c"],
    "no list": lambda ratio, steps: 0.5,
    "nan": lambda ratio, steps: [0.0, float("nan"), 0.5],
}


@pytest.mark.parametrize("name", BAD)
def test_schedules_that_cannot_be_are_refused_before_anything(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with pytest.raises(tp.InputError, match="iterative_pruning_ratio_scheduler"):
        tp.pruner.BasePruner(model, torch.zeros(1, 4), iterative_steps=2, iterative_pruning_ratio_scheduler=BAD[name])
    assert model[0].out_features == 8


@pytest.mark.parametrize("schedule", ALL)
def test_widths_follow_the_schedule(schedule: Schedule) -> None:
    model = nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 2))
    pruner = tp.pruner.BasePruner(
        model, torch.zeros(1, 4), pruning_ratio=0.8, iterative_steps=4, iterative_pruning_ratio_scheduler=schedule
    )
    assert pruner.per_step_pruning_ratio == shares_of(schedule, 0.8, 4)
    for k, share in enumerate(pruner.per_step_pruning_ratio[1:], 1):
        pruner.step()
        assert model[0].out_features == int(100 * (1 - share) + 1e-9)
        assert pruner.current_step == k
        assert pruner.get_target_pruning_ratio(model[0]) == share
