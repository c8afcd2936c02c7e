"""What refinement did, for people and for code."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.table import Table

from prunus.report import percent, render
from prunus.surgery import Receipt


@dataclass(frozen=True)
class BlockRefinement:
    """One block.

    Args:
        block: its name; empty for what is in no block, judged by the outputs of the model.
        before: mean squared error of its outputs on held-out samples, as a share of the variance of the dense block's,
            before; None where it could not be measured.
        after: the same with the weights that it has now.
        reason: why it keeps its weights; empty if it was refined.
    """

    block: str
    before: float | None
    after: float | None
    reason: str = ""

    @property
    def accepted(self) -> bool:
        """Whether it was refined."""
        return not self.reason


@dataclass(frozen=True)
class RefineReport:
    """What :func:`refine` did: ``print`` it for a table per block, ``undo()`` it.

    Args:
        blocks: each block, in the order in which they run.
        before: mean squared error of the model's outputs against the dense model's on held-out samples, as a share of
            the variance of the dense outputs, before; None if the outputs cannot be compared.
        after: the same after.
        accepted: whether anything changed.
        samples: how many samples were read, and how many of them were held out.
        notes: what else there is to say.
        receipt: puts the weights back.
    """

    blocks: tuple[BlockRefinement, ...]
    before: float | None
    after: float | None
    accepted: bool
    samples: tuple[int, int]
    notes: tuple[str, ...]
    receipt: Receipt = field(repr=False)

    def undo(self) -> None:
        """Put every bit back."""
        self.receipt.undo()

    def __str__(self) -> str:
        table = Table(title="Refined blocks", title_justify="left")
        table.add_column("block", overflow="fold")
        for name in ("error before", "after"):
            table.add_column(name, justify="right")
        table.add_column("")
        for b in self.blocks:
            table.add_row(b.block or "outputs", percent(b.before), percent(b.after), b.reason)
        lines = [render(table)]
        if self.before is not None and self.after is not None:
            lines.append(
                f"Error of the outputs on {self.samples[1]} of {self.samples[0]} samples, held out: "
                f"{self.before:.2%} of their variance before, {self.after:.2%} after."
            )
        return "\n".join((*lines, *self.notes))
