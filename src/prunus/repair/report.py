"""What repair did, for people and for code."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.table import Table

from prunus.report import percent, render
from prunus.surgery import Receipt


@dataclass(frozen=True)
class LayerRepair:
    """One layer that reads what was removed.

    Args:
        layer: its name.
        before: mean squared error on held-out samples, as a share of the variance of the target, before; None where it
            could not be measured.
        after: the same with the weights that the layer has now.
        ridge: the strength of the ridge; None where only the bias was refitted, or nothing.
        rows: how many rows of inputs were fitted.
        corrected: whether the target makes up for a stream that earlier cuts have changed.
        reason: why it keeps the weights that the cut left; empty if it was refitted.
    """

    layer: str
    before: float | None
    after: float | None
    ridge: float | None
    rows: int
    corrected: bool
    reason: str = ""

    @property
    def accepted(self) -> bool:
        """Whether the layer was refitted."""
        return not self.reason


@dataclass(frozen=True)
class RepairReport:
    """What :func:`repair` did: ``print`` it for a table per layer, ``undo()`` it.

    Args:
        layers: each layer that reads what was removed.
        before: mean squared error of the model's outputs against the dense model's on held-out samples, as a share of
            the variance of the dense outputs, after the cut; None if the outputs cannot be compared.
        after: the same after the repair.
        accepted: whether the repair stands; if not, all weights are as the cut left them.
        norms: how many batch norms have new statistics.
        samples: how many samples were read, and how many of them were held out.
        notes: what else there is to say.
        receipt: puts the weights back, and the cut too where :func:`repair` made it.
    """

    layers: tuple[LayerRepair, ...]
    before: float | None
    after: float | None
    accepted: bool
    norms: int
    samples: tuple[int, int]
    notes: tuple[str, ...]
    receipt: Receipt = field(repr=False)

    def undo(self) -> None:
        """Put every bit back."""
        self.receipt.undo()

    def __str__(self) -> str:
        table = Table(title="Repaired layers", title_justify="left")
        table.add_column("layer", overflow="fold")
        for name in ("rows", "error before", "after", "ridge"):
            table.add_column(name, justify="right")
        table.add_column("")
        for layer in self.layers:
            ridge = "" if layer.reason else "bias only" if layer.ridge is None else f"{layer.ridge:g}"
            why = layer.reason or ("with the stream's drift" if layer.corrected else "")
            table.add_row(layer.layer, f"{layer.rows:,}", percent(layer.before), percent(layer.after), ridge, why)
        lines = [render(table)] if self.layers else []
        if self.before is not None and self.after is not None:
            lines.append(
                f"Error of the outputs on {self.samples[1]} of {self.samples[0]} samples, held out: "
                f"{self.before:.2%} of their variance after the cut, {self.after:.2%} after the repair."
            )
        if self.norms:
            lines.append(f"{self.norms} batch norms have new statistics.")
        return "\n".join((*lines, *self.notes))
