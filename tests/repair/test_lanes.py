"""Runs side by side: one moves at a time, errors arrive, and a run that is not wanted ends."""

from __future__ import annotations

import pytest
import torch

from prunus.repair.lanes import Lane


def test_lanes_take_turns() -> None:
    seen: list[str] = []

    def run(name: str):
        def go(lane: Lane[int]) -> str:
            for k in range(2):
                seen.append(f"{name}{k}")
                lane.halt(k)
            return name

        return go

    lanes = [Lane(run(name)) for name in "ab"]
    stops = [lane.advance() for _ in range(3) for lane in lanes]
    assert stops == [0, 0, 1, 1, None, None]
    assert seen == ["a0", "b0", "a1", "b1"]
    assert [lane.result for lane in lanes] == ["a", "b"]


def test_what_a_lane_raises_is_raised_where_it_is_advanced() -> None:
    def run(lane: Lane[int]) -> None:
        lane.halt(1)
        raise ValueError("inside")

    lane = Lane(run)
    assert lane.advance() == 1
    with pytest.raises(ValueError, match="inside"):
        lane.advance()
    assert lane.over


def test_a_closed_lane_does_not_go_on() -> None:
    seen = []

    def run(lane: Lane[int]) -> None:
        try:
            lane.halt(1)
            seen.append("went on")
        except Exception:
            seen.append("held back")

    lane = Lane(run)
    lane.advance()
    lane.close()
    assert seen == []
    assert lane.over
    assert lane.advance() is None


def test_mixed_precision_of_the_caller_holds_in_a_lane() -> None:
    lane = Lane(lambda lane: torch.ones(2, 2) @ torch.ones(2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        inside = Lane(lambda lane: torch.ones(2, 2) @ torch.ones(2, 2))
        inside.advance()
    lane.advance()
    assert (lane.result.dtype, inside.result.dtype) == (torch.float32, torch.bfloat16)
