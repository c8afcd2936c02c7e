"""The face of repair: read the samples, refit layer after layer on copies, and only then change the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from prunus.distributed import gathered, together
from prunus.errors import InputError
from prunus.plan import Plan
from prunus.repair.chains import Recorder
from prunus.repair.consumers import Consumer, find_consumers
from prunus.repair.crowd import ROOM, Place, trim
from prunus.repair.judge import distance, judged
from prunus.repair.norms import reestimate
from prunus.repair.report import LayerRepair, RepairReport
from prunus.repair.samples import LANES, Batch, explained, held_share, read
from prunus.repair.sweep import Refitted, Run, Sweep, wanted
from prunus.repair.twins import frozen, separate, sharing, takeover
from prunus.repair.watch import Key, Watch, Weights, guarded
from prunus.surgery import Receipt, apply
from prunus.tracing import ForwardFn, call_model
from prunus.untouched import untouched, without_mha_fastpath

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def repair(  # noqa: PLR0913 - each keyword is a choice of the user
    model: nn.Module,
    plan: Plan,
    loader: Iterable[Any],
    *,
    input_fn: Callable[[Any], Any] | None = None,
    dense: nn.Module | None = None,
    forward_fn: ForwardFn | None = None,
    samples: int = 256,
    ridges: Sequence[float] = RIDGES,
    drift: bool = True,
    norms: bool = True,
    widest: int = 8_192,
    memory: int | None = None,
    mask_fn: Callable[[Any], torch.Tensor] | None = None,
) -> RepairReport:
    """Cut ``model`` in place and refit, without training, the layers that read what was removed.

    Each layer that lost inputs gets new weights by ridge regression, from its inputs in the pruned (and so far
    repaired) model to what it computes in the dense one; the ridge pulls towards the weights that the cut left. Where
    the layer's output is added to a stream, its target makes up for what earlier cuts changed in the stream. Then the
    statistics of batch norms are computed anew, unless all of them read layers that were fitted, which has set the mean
    and the scale. Whatever does not lower the error on samples that were held out is left out.

    Args:
        model: the dense model; or the cut one, if ``dense`` is given.
        plan: what to remove (or what was removed).
        loader: yields batches, each of them what the model is called with: a tensor, a tuple of positional arguments
            or a dict of keyword arguments. No labels are needed. One batch in five is held out (with fewer than five,
            a fifth of each).
        input_fn: makes that of what the loader yields: ``lambda batch: batch[0]`` for batches of inputs and labels,
            which :func:`prunus.calibrate` takes as they are.
        dense: the model as it was before the cut, if ``model`` was cut already.
        forward_fn: ``forward_fn(model, inputs)`` to use instead of calling the model.
        samples: batches are read until there are so many samples.
        ridges: strengths to choose from, as shares of the mean square of a layer's inputs.
        drift: also refit the layers behind the first, that lost no inputs but get others than they did.
        norms: also compute the statistics of batch norms anew.
        widest: a layer whose outputs sum over more inputs than this keeps its weights: the memory for it grows with
            the square of that number, and the time with its cube.
        memory: bytes that the activations of all samples may take together; where it is too little for all at once,
            layers with large maps are fitted on fewer samples. Default: what one batch takes in plain inference, and
            at least 256 MiB.
        mask_fn: ``mask_fn(batch)``, given what the loader yields: a bool tensor (samples, places) of the tokens that
            count (no padding), in fits, statistics and errors, wherever a layer has a row for each of them.

    Raises:
        InputError: the data cannot be used, or the model cannot run on it; the model is as it was.
        SurgeryError: the plan does not fit; the model is as it was.

    Source: He et al. 2017 (arXiv 1707.06168) for least squares on the readers of removed channels; Kwon et al. 2022
    (arXiv 2204.09656) for the residual in the target.

    Example:
        >>> import torch, prunus
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> plan = prunus.prune(model, torch.randn(1, 8)).plan
        >>> dense = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> report = prunus.repair(dense, plan, [torch.randn(64, 8) for _ in range(5)])
        >>> report.after < report.before
        True
    """
    receipt = Receipt(plan)
    try:
        with together("prunus.repair"):
            batches = read(loader, input_fn, samples, model, mask_fn)
            old = frozen(model if dense is None else dense)
            if dense is None:
                receipt = apply(model, plan)
            run: Run = forward_fn if forward_fn is not None else call_model
            work = _Work(old, model, plan, batches, run, tuple(ridges), drift, norms, widest, memory)
            return work.report(receipt)
    except BaseException:
        receipt.undo()
        raise


@dataclass
class _Work:
    """One repair."""

    dense: nn.Module
    model: nn.Module
    plan: Plan
    batches: list[Batch]
    run: Run
    ridges: tuple[float, ...]
    drift: bool
    norms: bool
    widest: int
    memory: int | None

    def report(self, receipt: Receipt) -> RepairReport:
        """Repair a copy, judge it, and let the model have its values."""
        with explained(), without_mha_fastpath(), untouched(self.model), untouched(self.dense):
            copy = separate(self.model)
            found = self._on(copy)
        layers, before, after, accepted, norms, notes = found
        if accepted:
            for change in takeover(self.model, copy):
                change.do()
                receipt.changes.append(change)
        own = [(b.count, held_share(b.count) if b.held is None else b.count * b.held) for b in self.batches]
        counts = [one for rank in gathered(own, "the number of samples") for one in rank]
        total, held = (sum(numbers) for numbers in zip(*counts, strict=True))
        return RepairReport(layers, before, after, accepted, norms, (total, held), notes, receipt)

    def _on(self, copy: nn.Module) -> Any:
        judge = next((k for k, b in enumerate(self.batches) if b.held is not False), 0)
        old, _ = self._recorded(self.dense, judge)
        new, cut_out = self._recorded(copy, judge)
        consumers, left = find_consumers(self.plan, Weights(copy), old, new, self.drift)
        for c in consumers:
            if c.use.call.summed > self.widest:
                left[c.name] = f"its outputs sum over {c.use.call.summed:,} inputs, more than widest={self.widest}"
        consumers = [c for c in consumers if c.use.call.summed <= self.widest]
        _check_alike(consumers, new)
        notes = [f"{name} keeps its weights: {why}" for name, why in left.items()]
        names = {True: [s.name for s in old.steps], False: [s.name for s in new.steps]}
        room = max(ROOM, *old.held, 0) if self.memory is None else self.memory
        places = {key: _place(c, key, old, new) for c in consumers for key in c.keys}
        sweep = Sweep(self.dense, copy, self.run, self.batches, self.ridges, names, places, room)
        with guarded():
            results = sweep.over(consumers)
        judging = [k for k, b in enumerate(self.batches) if b.held is not False]
        both = {k: results[k] or (self._judged(self.dense, k), self._judged(copy, k)) for k in judging}
        dense_outs, outs = ({k: pair[j] for k, pair in both.items()} for j in (0, 1))
        after = distance(dense_outs, outs) if not sweep.tied else self._untie(copy, sweep, dense_outs)
        layers = tuple(_layer(label, done) for label, done in sweep.done.items())
        raw = {k: cut_out if k == judge else self._judged(self.model, k) for k in judging}
        before = distance(dense_outs, raw)
        restated = 0
        held = new.held_at_norms()
        fitted = [key for done in sweep.done.values() if done.fit is not None for key in done.consumer.keys]
        if self.norms and held and new.has_norm_beside(fitted):
            restated, after = self._norms(copy, dense_outs, after, (held, room))
        accepted = before is None or after is None or after < before
        if not accepted:
            notes.append(
                "The outputs would have been no nearer to the dense model's: all weights are as the cut left them."
            )
        return layers, before, after if accepted else before, accepted, restated, tuple(notes)

    def _untie(self, copy: nn.Module, sweep: Sweep, dense_outs: dict[int, list[Tensor]]) -> float | None:
        """Where rows of a new weight are looked up too, what ran before it has changed: only the outputs can tell."""
        parameters = dict(copy.named_parameters())

        def error() -> float | None:
            return distance(dense_outs, {k: self._judged(copy, k) for k in dense_outs})

        after = error()
        new = {name: parameters[name].clone() for name in sweep.tied}
        with torch.no_grad():
            for name, (_, old) in sweep.tied.items():
                parameters[name].copy_(old)
            before = error()
            if after is not None and before is not None and after < before:
                for name, weight in new.items():
                    parameters[name].copy_(weight)
                return after
        for label, done in sweep.done.items():
            if done.consumer.name in sweep.tied:
                reason = f"{done.consumer.look_up} looks up rows of it too, and gets worse by others"
                sweep.done[label] = replace(done, reason=reason)
        return before

    def _norms(
        self, copy: nn.Module, dense_outs: dict[int, list[Tensor]], after: float | None, memory: tuple[list[int], int]
    ) -> tuple[int, float | None]:
        keep = {name: b.clone() for name, b in copy.named_buffers()}
        count = reestimate(copy, self.batches, self.run, *memory)
        error = distance(dense_outs, {k: self._judged(copy, k) for k in dense_outs})
        if count and after is not None and error is not None and error < after:
            return count, error
        with torch.no_grad():
            for name, buffer in copy.named_buffers():
                buffer.copy_(keep[name])
        return 0, after

    def _recorded(self, model: nn.Module, k: int) -> tuple[Recorder, list[Tensor]]:
        recorder = Recorder()
        runner = sharing(model)
        watch = Watch(Weights(runner), after=recorder.after)
        recorder.find = watch.find
        with guarded(), watch:
            output = judged(self.batches[k], self.run(runner, self.batches[k].inputs))
        trim()
        return recorder, output

    def _judged(self, model: nn.Module, k: int) -> list[Tensor]:
        with guarded():
            output = judged(self.batches[k], self.run(sharing(model), self.batches[k].inputs))
        trim()
        return output


def _check_alike(consumers: Sequence[Consumer], recorded: Recorder) -> None:
    """Refuse ranks that would refit other layers."""
    mine = [(c.name, c.keys, c.use.region, c.kept.tolist()) for c in consumers], len(recorded.held_at_norms())
    if any(one != mine for one in gathered(mine, "the choice of layers")):
        raise InputError(
            "the ranks of torch.distributed have other layers to refit: give all of them the same model and the same "
            "plan, and samples on which the model runs in the same way"
        )


def _place(consumer: Consumer, key: Key, old: Recorder, new: Recorder) -> Place:
    """What one batch holds at a call, and how many batches it takes for the rows that are wanted."""
    call = consumer.use.call
    rows = (1 - 1 / LANES) * new.sizes[key].numel() / max(1, new.sizes[key][call.channel])
    held = old.held[old.uses[key].step] + new.held[new.uses[key].step]
    return Place(held, ceil(wanted(call) / max(1.0, rows)))


def _layer(label: str, done: Refitted) -> LayerRepair:
    fit = done.fit
    before, after = (None, None) if fit is None else (fit.before, fit.after)
    ridge = None if fit is None else fit.ridge
    return LayerRepair(label, before, after, ridge, done.rows, done.corrected, done.reason)
