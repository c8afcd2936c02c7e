"""The figures of a job: one row for each of the three models, a table to read and a file to keep."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from prunus.integrations.ultralytics.checkpoint import version_of


@dataclass(frozen=True)
class Figures:
    """What one model costs and how well it detects.

    Attributes:
        params: Number of parameters.
        macs: Multiply-accumulates of one forward pass of one picture.
        latency_ms: Median milliseconds of one forward pass of one picture, fused, on the device of the job.
        map50: Mean average precision at an overlap of 0.5, in 0..1.
        map50_95: The same, averaged over overlaps of 0.5 to 0.95.
    """

    params: int
    macs: int
    latency_ms: float
    map50: float
    map50_95: float


@dataclass(frozen=True)
class Result:
    """What a job found.

    Attributes:
        dense: The model before pruning.
        pruned: Right after pruning, before any training.
        finetuned: After fine-tuning; this is ``best.pt``.
        onnx: Largest differences between ``best.onnx`` in onnxruntime and ``best.pt`` in PyTorch.
        arguments: The settled arguments of the job.
        machine: What the latencies were measured on.
        seconds: Wall time of each stage.
    """

    dense: Figures
    pruned: Figures
    finetuned: Figures
    onnx: Mapping[str, float]
    arguments: Mapping[str, Any]
    machine: Mapping[str, Any]
    seconds: Mapping[str, float]

    def save(self, path: Path) -> None:
        """Write everything as JSON, with the versions of the packages that were used."""
        packages = ("prunus", "torch", "ultralytics", "onnx", "onnxruntime")
        content = {**asdict(self), "versions": {package: version_of(package) for package in packages}}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def table(self) -> Table:
        """Return the figures as a table: a row for each model, and how the other two compare with the dense one."""
        table = Table(title="dense, pruned and fine-tuned")
        table.add_column("")
        for title in ("parameters", "MACs", "latency", "mAP50", "mAP50-95"):
            table.add_column(title, justify="right")
        for name, figures in (("dense", self.dense), ("pruned", self.pruned), ("fine-tuned", self.finetuned)):
            table.add_row(name, *_cells(figures))
        table.add_section()
        table.add_row("pruned / dense", *_ratios(self.pruned, self.dense))
        table.add_row("fine-tuned / dense", *_ratios(self.finetuned, self.dense))
        return table


def _cells(figures: Figures) -> list[str]:
    return [
        f"{figures.params:,}",
        _short(figures.macs),
        f"{figures.latency_ms:.2f} ms",
        f"{figures.map50:.3f}",
        f"{figures.map50_95:.3f}",
    ]


def _ratios(part: Figures, whole: Figures) -> list[str]:
    read: list[Callable[[Figures], float]] = [
        lambda f: f.params,
        lambda f: f.macs,
        lambda f: f.latency_ms,
        lambda f: f.map50,
        lambda f: f.map50_95,
    ]
    return [f"{of(part) / of(whole):.3f}" if of(whole) else "-" for of in read]


def _short(number: int) -> str:
    """Write a large number with three or four digits: 4.37 G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return str(number)
