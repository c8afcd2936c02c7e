"""The proof of a block: the model that surgery makes without it gives what the model with the block silent gives.

The runs that prove something use other values in scales, biases and tensors of zeros: a branch that a fresh layer scale
multiplies with 0.000001 would look like nothing, whatever is done to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from prunus.blocks.flow import Flow, Subject
from prunus.blocks.shape import Inner, Reading
from prunus.blocks.silence import Shape, Silenced, distance
from prunus.errors import PrunusError
from prunus.plan import Plan
from prunus.surgery import apply, borrowed
from prunus.verification import TOLERANCE


class Prover:
    """Compares removal with silence on one model."""

    def __init__(self, subject: Subject, flow: Flow, reading: Reading) -> None:
        self.subject, self._flow, self._reading = subject, flow, reading
        self._values: dict[str, torch.Tensor] = {}

    @property
    def tolerance(self) -> float:
        """How far numbers of the model's type may differ."""
        return max((TOLERANCE.get(p.dtype, 0.0) for p in self.subject.model.parameters()), default=1e-5)

    def disturbed(self) -> AbstractContextManager[None]:
        """Let the model run with values that hide nothing."""
        if not self._values:
            generator = torch.Generator().manual_seed(0)
            for name, p in self.subject.model.named_parameters():
                vector = sum(size > 1 for size in p.shape) <= 1
                if p.is_floating_point() and (vector or not p.detach().any()):
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).clamp(-3, 3)
                    self._values[name] = p.detach() + (0.2 if vector else 0.02) * noise.to(p)
        return borrowed(self.subject.model, self._values)

    def silent(self, shapes: Sequence[Shape]) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
        """What the model returns with the blocks silent, and what the other children of containers give.

        Tensors that the blocks alone compute are left out.
        """
        run = Silenced(self.subject, shapes)
        outputs = self.subject.run(run.following(), run)
        return [t.clone() for t, keep in zip(outputs, self._kept(shapes, outputs), strict=True) if keep], run.given

    def _kept(self, shapes: Sequence[Shape], outputs: Sequence[torch.Tensor]) -> list[bool]:
        """Which of the model's outputs are there without the blocks."""
        steps = {k for shape in shapes for path in shape.paths for k in self._reading.inside(path)}
        streams = {s.call.outs[pair.exit] for s in shapes if isinstance(s, Inner) for pair in s.pairs}
        if not shapes:
            return [True] * len(outputs)
        maker = self._reading.maker
        return [n in streams or maker.get(n, -1) not in steps for n in self._flow.outputs]

    def wrong(self, shapes: Sequence[Shape], plan: Plan) -> str:
        """How the model that ``plan`` makes differs from the silent one; empty if it does not."""
        with self.disturbed():
            try:
                silent, given = self.silent(shapes)
            except Exception as error:  # the model's own code runs
                return f"the model does not run while it is silent ({_short(error)})"
            try:
                receipt = apply(self.subject.model, plan)
            except PrunusError as error:
                return str(error)
            try:
                without, others = self.silent(())
            except Exception as error:
                return f"the model's code does not run without it ({_short(error)})"
            finally:
                receipt.undo()
        if len(without) != len(silent):
            return f"the model returns {len(without)} tensors without it, and {len(silent)} with it silent"
        if len(given) != len(others):
            return "without it other parts of the model run"
        worst = max(distance(a, b) for a, b in ((silent, without), *zip(given, others, strict=True)))
        return (
            f"removal is not silence: the model computes something else ({worst:.1e})" if worst > self.tolerance else ""
        )


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
