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
ENOUGH = {("minilm", 2): 90.0, ("minilm", 3): 83.0, ("minilm", 5): 73.0}
"""Scores without training that are promised whatever the others reach."""
KEEPS = {("yolo", 2): 0.8}
"""The same, as shares of the dense score."""


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
        table.add_column("score")
        for speedup in self.speedups:
            table.add_column(f"{speedup:g}x", justify="right")
        for way in (*THEIRS, *OURS):
            states = [s for s in STATES if any(s in r for r in self.rows if r["way"] == way)]
            for k, state in enumerate(states):
                means = [self.mean(speedup, way, state) for speedup in self.speedups]
                cells = ["-" if m is None else f"{m:.1f}" for m in means]
                table.add_row("" if k else way, state, *cells, end_section=k == len(states) - 1)
            if not states:
                table.add_row(way, "cannot", *("-" for _ in self.speedups), end_section=True)
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
        for speedup in self.speedups:
            at, repaired = f"{self.task} {speedup:g}x", self.mean(speedup, OURS[-1], "repaired")
            if repaired is None:
                continue
            least = ENOUGH.get((self.task, speedup))
            if least is not None:
                yield repaired >= least, f"{at}: {repaired:.1f} without training, at least {least:.1f}"
            share = KEEPS.get((self.task, speedup))
            if share is not None:
                kept = repaired / self.dense
                yield kept >= share, f"{at}: {kept:.2f} of the dense score without training, at least {share:.2f}"
            normed = self.best(speedup, THEIRS, STATES[:2])
            if self.task in CNNS and speedup >= 3 and normed is not None:
                ours, theirs = self.dense - repaired, self.dense - normed
                text = f"{at}: {ours:.1f} lost without training, at most a fifth of their {theirs:.1f}"
                yield ours <= theirs / 5, text
            yield from self._tuned(speedup, at, repaired)

    def _tuned(self, speedup: float, at: str, repaired: float) -> Iterator[tuple[bool, str]]:
        """The promises about fine-tuning."""
        theirs, ours = self.best(speedup, THEIRS, ("fine-tuned",)), self.mean(speedup, OURS[-1], "fine-tuned")
        if theirs is None:
            return
        if self.task in CNNS and speedup >= 3:
            text = f"{at}: {repaired:.1f} without training, not below their {theirs:.1f} after fine-tuning"
            yield repaired >= theirs, text
        if ours is not None:
            good, bar = (ours > theirs, "above") if speedup >= 5 else (ours >= theirs, "not below")
            yield good, f"{at}: {ours:.1f} after fine-tuning, {bar} their {theirs:.1f}"
