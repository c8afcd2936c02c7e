"""Tables of what was measured, and whether it keeps what repair promises.

A row is a dictionary: task, seed, speedup, way, and the scores of its states; the dense network's has the way "dense".
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from tasks.cuts import OURS, THEIRS

STATES = ("as cut", "norms anew", "repaired", "fine-tuned")
CNNS = ("digits", "yolo")
ENOUGH = {"minilm": {2: 90.0, 3: 83.0, 5: 73.0}}
"""Scores of repaired networks that are promised whatever the others reach, by speed-up."""
KEEPS = {"yolo": {2: 0.8}}
"""The same as shares of the dense score."""


@dataclass(frozen=True)
class Rows:
    """What was measured of one task."""

    task: str
    title: str
    rows: Sequence[dict[str, Any]]

    @property
    def dense(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(r["score"] for r in self.rows if r["way"] == "dense")

    @property
    def speedups(self) -> list[float]:
        """Those that were measured."""
        return sorted({r["speedup"] for r in self.rows if "speedup" in r})

    def mean(self, speedup: float, way: str, state: str) -> float | None:
        """Over the seeds; None where there is nothing."""
        rows = [r for r in self.rows if r["way"] == way and r.get("speedup") == speedup]
        values = [r[state] for r in rows if state in r]
        return statistics.mean(values) if values and len(values) == len(rows) else None

    def best(self, speedup: float, ways: Sequence[str], states: Sequence[str]) -> float | None:
        """The highest mean."""
        return max((m for w in ways for s in states if (m := self.mean(speedup, w, s)) is not None), default=None)

    def table(self) -> Table:
        """Means over the seeds."""
        table = Table(title=f"{self.title}: {self.dense:.1f} % dense", title_justify="left")
        table.add_column("channels chosen by")
        states = [s for s in STATES if any(s in r for r in self.rows)]
        for speedup in self.speedups:
            for state in states:
                table.add_column(f"{speedup:g}x {state}", justify="right")
        for way in (*THEIRS, *OURS):
            means = [self.mean(speedup, way, state) for speedup in self.speedups for state in states]
            table.add_row(way, *("" if m is None else f"{m:.1f}" for m in means))
        return table

    def refusals(self) -> Iterator[str]:
        """What Torch-Pruning cannot do, and why."""
        reasons: dict[tuple[str, str], set[str]] = {}
        for row in self.rows:
            if "cannot" in row:
                reasons.setdefault((row["way"], row["cannot"]), set()).add(f"{row['speedup']:g}x")
        for (way, reason), speedups in reasons.items():
            yield f"{way} cannot do {', '.join(sorted(speedups))}: {reason}"

    def promises(self) -> Iterator[tuple[bool, str]]:
        """Whether each promise is kept, and the figures."""
        way = OURS[-1]
        for speedup in self.speedups:
            at = f"{self.task} {speedup:g}x"
            repaired, tuned = self.mean(speedup, way, "repaired"), self.mean(speedup, way, "fine-tuned")
            normed = self.best(speedup, THEIRS, STATES[:2])
            their_tuned = self.best(speedup, THEIRS, STATES[3:])
            if repaired is None:
                continue
            if self.task in CNNS and speedup >= 3 and normed is not None:
                ours, theirs = self.dense - repaired, self.dense - normed
                yield ours <= theirs / 5, f"{at}: drop of {ours:.1f}, at most a fifth of their {theirs:.1f}"
            if self.task in CNNS and speedup >= 3 and their_tuned is not None:
                text = f"{at}: {repaired:.1f} without training, not below their {their_tuned:.1f} after fine-tuning"
                yield repaired >= their_tuned, text
            for floor in (ENOUGH.get(self.task, {}).get(int(speedup)),):
                if floor is not None:
                    yield repaired >= floor, f"{at}: {repaired:.1f}, at least {floor:.0f}"
            share = KEEPS.get(self.task, {}).get(int(speedup))
            if share is not None:
                kept = repaired / self.dense
                yield kept >= share, f"{at}: {kept:.2f} of the dense score without training, at least {share:.2f}"
            if tuned is not None and their_tuned is not None:
                ahead = speedup >= 5
                text = (
                    f"{at}: {tuned:.1f} after fine-tuning, {'above' if ahead else 'not below'} their {their_tuned:.1f}"
                )
                yield (tuned > their_tuned if ahead else tuned >= their_tuned), text
