"""What :func:`prunus.prune` does with data: scores of what may go, and weights that make up for what went."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunus.calibration import Calibration, calibrate
from prunus.calibration.batches import samples_in
from prunus.distributed import OtherRankError, gathered
from prunus.errors import InputError
from prunus.importance import OutputErrorImportance
from prunus.plan import Plan
from prunus.repair import Batch, CannotRunError, RepairReport, explained, frozen, read, repair
from prunus.tracing import ForwardFn, call_model

WIDEST = 4608  # inputs that an output sums over: 512 channels under a 3 x 3 kernel
PARTS = 64  # at least so many, for averages over them
ROWS = 16_384  # of inputs for second moments: some for each unknown of an output


@dataclass(frozen=True)
class Samples:
    """Batches of inputs, read once, and the dense model, whose outputs are what counts.

    ``masked`` says that batches know which places count; ``transform`` picks from the outputs those that do.
    """

    batches: Sequence[Batch]
    masked: bool
    count: int
    dense: nn.Module
    forward_fn: ForwardFn | None
    transform: Callable[[Any], Any] | None

    @staticmethod
    def of(
        model: nn.Module,
        data: Iterable[Any],
        most: int,
        input_fn: Callable[[Any], Any] | None = None,
        mask_fn: Callable[[Any], Tensor] | None = None,
        forward_fn: ForwardFn | None = None,
        transform: Callable[[Any], Any] | None = None,
    ) -> Samples:
        """The first ``most`` samples of ``data``, for a model that is dense now.

        Raises:
            InputError: the data cannot be used, or the model cannot be copied.
        """
        found = read(data, input_fn, most, model, mask_fn)
        count = sum(gathered(sum(b.count for b in found), "the number of samples"))
        return Samples(found, mask_fn is not None, count, frozen(model), forward_fn, transform)

    def importance(self, model: nn.Module) -> tuple[OutputErrorImportance, str]:
        """The error of outputs as a criterion, and why it is not weighted by gradients ("" where it is)."""
        try:
            return OutputErrorImportance(self._calibration(model, ("grams", "gradients"))), ""
        except CannotRunError:
            raise
        except (InputError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, OtherRankError) and error.is_over():
                raise
            why = f"no gradient of the outputs could be had ({error}), so layers were not weighed against each other"
            return OutputErrorImportance(self._calibration(model, ("grams",))), why

    def _calibration(self, model: nn.Module, collect: Sequence[str]) -> Calibration:
        def run(model: nn.Module, inputs: Any) -> Any:
            with explained():
                output = (self.forward_fn or call_model)(model, inputs)
                return output if self.transform is None else self.transform(output)

        return calibrate(
            model,
            list(self._parts()),
            input_fn=_inputs,
            mask_fn=_mask if self.masked else None,
            collect=collect,
            forward_fn=run,
            per_sample=False,
            max_gram=WIDEST,
            gram_rows=max(1, ROWS // self.count),
        )

    def _parts(self) -> Iterator[Batch]:
        """The batches, cut small: gradients of masks are known batch by batch, and are averages over batches."""
        size = -(-self.count // PARTS)
        for batch in self.batches:
            whole = batch.inputs, batch.mask
            if batch.count <= size or samples_in(whole) != batch.count:
                yield batch
                continue
            for start in range(0, batch.count, size):
                cut = partial(_some, start, start + size)
                inputs, mask = tree_map(cut, whole)
                yield Batch(inputs, min(size, batch.count - start), mask, batch.held)

    def repair(self, model: nn.Module, plan: Plan) -> RepairReport:
        """Repair a model that ``plan`` has cut."""
        return repair(
            model,
            plan,
            self.batches,
            input_fn=_inputs,
            mask_fn=_mask if self.masked else None,
            dense=self.dense,
            forward_fn=self.forward_fn,
            samples=self.count,
        )

    def nearness(self, model: nn.Module, plan: Plan) -> float:
        """How near the outputs of a model that ``plan`` has cut come to the dense model's; it is left as it was."""
        report = self.repair(model, plan)
        report.undo()
        if report.after is None:
            raise InputError("search= cannot compare the outputs with the dense model's: pass metric= as well")
        return -report.after


def _some(start: int, stop: int, value: Any) -> Any:
    return value[start:stop] if isinstance(value, Tensor) else value


def _inputs(batch: Batch) -> Any:
    return batch.inputs


def _mask(batch: Batch) -> Any:
    return batch.mask
