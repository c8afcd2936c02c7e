"""The pass over data: forward (and backward) for each sample, statistics summed up, the model left as it came."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from prunus.calibration.batches import batches_of, is_empty, sample_of, samples_in, split_batch, to_device
from prunus.calibration.ranks import sum_readings, sum_rows
from prunus.calibration.recording import Recorder
from prunus.calibration.statistics import Calibration, Gradient
from prunus.distributed import count, gathered, rank, together
from prunus.errors import InputError
from prunus.tracing import ForwardFn, call_model, tensors_in
from prunus.untouched import untouched, without_mha_fastpath

EVERYTHING = ("activations", "gradients", "grams")


def calibrate(  # noqa: PLR0913 - each keyword is a choice of the user
    model: nn.Module,
    loader: Any,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    steps: int | None = None,
    input_fn: Callable[[Any], Any] | None = None,
    *,
    collect: Collection[str] = EVERYTHING,
    forward_fn: ForwardFn | None = None,
    mask_fn: Callable[[Any], torch.Tensor] | None = None,
    per_sample: bool = True,
    keep: int = 256,
    max_gram: int = 2304,
    gram_rows: int = 1024,
    seed: int = 0,
    progress: bool | None = None,
) -> Calibration:
    """Collect, in one pass over data, what criteria need to know of gradients and activations.

    Each sample is run by itself where gradients are collected, so the result does not depend on how the data is cut
    into batches. The model is run in eval mode and left as it came: modes, gradients, hooks, buffers, random states.
    In a process group of ``torch.distributed`` every rank calls this with its own samples, and gets the sums over all.
    Memory does not grow with the data: for each parameter two tensors of its size and ``keep`` numbers for each
    position; for each weight, with "grams", the square of its inputs.

    Args:
        model: any module.
        loader: a DataLoader, any iterable of batches, or one batch (a tensor or a dict).
        loss_fn: ``loss_fn(output, targets)``, a mean over samples; ``targets`` is the second entry of a batch ``(x,
            y)``, the rest of a longer one, and the batch itself where it is no tuple or list. Without it, no labels
            are needed: gradients are those of random projections of all outputs (Gauss-Newton).
        steps: at most so many batches (default: all).
        input_fn: ``input_fn(batch)``: the model's inputs, as a tensor, a tuple of arguments or a dict (default: the
            first entry of a tuple or list, which is taken as inputs and targets, else the batch; where a tuple holds
            several inputs and no targets, as :func:`prunus.repair` takes it, pass ``lambda batch: batch``).
        collect: any of "activations" (moments of what each weight reads), "gradients" (of parameters, and the energy of
            the gradients of what weights make), "grams" (second moments between what a weight reads).
        forward_fn: ``forward_fn(model, inputs)`` to use instead of calling the model.
        mask_fn: ``mask_fn(batch)``: a bool tensor (samples, places) of the tokens that count (no padding).
        per_sample: whether gradients are taken sample by sample. Without it (for losses that compare samples), and
            where the tensors of a batch do not agree in their first size (graphs), a batch counts as one sample; with
            random projections, whose signs differ between samples, it still counts as many as it has: sums of squares
            are then right on average, several times faster.
        keep: so many samples' mask gradients are kept apart; beyond, they share rows, which is right on average.
        max_gram: weights with more columns have no second moments (convolutions: only those between channels).
        gram_rows: at most so many places of each sample enter second moments.
        seed: of the random projections.
        progress: whether to show a progress bar (default: on a terminal).

    Raises:
        InputError: the loader yields nothing, the loss is no finite number, or an argument cannot be used.

    Example:
        >>> import torch, prunus
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> prunus.calibrate(model, torch.randn(8, 4))
        Calibration(8 samples, random projections, 2 weights read, 2 Gram matrices)
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"calibrate: expected a torch.nn.Module, got {type(model).__name__}")
    wrong = set(collect) - set(EVERYTHING)
    if wrong or not collect or keep < 1:
        raise InputError(
            f"calibrate: collect={sorted(collect)!r}, keep={keep!r}: collect some of {EVERYTHING}, keep >= 1"
        )
    if loss_fn is not None and not callable(loss_fn):
        raise InputError(f"calibrate: loss_fn={loss_fn!r}: pass loss_fn(output, targets), or None")
    model = getattr(model, "_orig_mod", model)
    settings = _Settings(loss_fn, input_fn, forward_fn, mask_fn, per_sample, seed, frozenset(collect))
    names = [(n, p) for n, p in model.named_parameters(remove_duplicate=False)]
    if not names:
        raise InputError("calibrate: the model has no parameters, so no output of the model depends on them")
    if any(p.is_meta for _, p in names):
        raise InputError("calibrate: the model is on the meta device and has no values to run; calibrate a real copy")
    run = _Run(model, settings, keep, max_gram if "grams" in collect else 0, gram_rows)
    with together("prunus.calibrate"):
        with _as_found(model, run.parameters if run.with_gradients else {}), without_mha_fastpath():
            for batch in _shown(batches_of(loader, steps), _length(loader, steps), progress):
                run.add(batch)
        run.meet()
        return run.result(names)


@dataclass(frozen=True)
class _Settings:
    loss_fn: Callable[[Any, Any], torch.Tensor] | None
    input_fn: Callable[[Any], Any] | None
    forward_fn: ForwardFn | None
    mask_fn: Callable[[Any], torch.Tensor] | None
    per_sample: bool
    seed: int
    collect: frozenset[str]


@dataclass
class _Sums:
    """Sums over samples for one parameter."""

    mean: torch.Tensor
    square: torch.Tensor
    masks: tuple[torch.Tensor | None, ...] = field(default=())


class _Run:
    """One calibration while it runs."""

    def __init__(self, model: nn.Module, settings: _Settings, keep: int, max_gram: int, gram_rows: int) -> None:
        self.model, self.settings, self.keep = model, settings, keep
        self.parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
        ids = {id(p): n for n, p in model.named_parameters()}
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
        self.recorder = Recorder(ids, shapes, max_gram, gram_rows)
        self.with_gradients = "gradients" in settings.collect
        self.recorder.energies = self.with_gradients
        self.sums_are_apart = settings.loss_fn is None or not self.with_gradients
        self.mixed = False  # whether some row of mask gradients holds several samples
        self.watching = bool(settings.collect & {"activations", "grams"}) or self.with_gradients
        self.sums: dict[str, _Sums] = {}
        self.split = False  # whether the batch that runs is taken as inputs and targets
        self.samples, self.batches, self.loss = 0, 0, 0.0
        self.device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self.signs = torch.Generator().manual_seed(settings.seed + rank() * 7_919)

    def add(self, batch: Any) -> None:
        """Run a batch: sample by sample where gradients are wanted."""
        batch = to_device(batch, self.device)
        own = self.settings
        inputs, targets = split_batch(batch)
        self.split = own.input_fn is None and isinstance(batch, (tuple, list)) and len(batch) > 1
        if own.input_fn is not None:
            inputs = to_device(own.input_fn(batch), self.device)
        mask = None if own.mask_fn is None else own.mask_fn(batch).bool()
        whole = (inputs, targets if own.loss_fn is not None else None, mask)
        if is_empty(inputs):
            raise InputError(f"calibrate: batch {self.batches} has no samples; leave it out")
        count = samples_in(whole)
        single = self.with_gradients and own.per_sample and count is not None
        self.mixed = self.mixed or not (single or count == 1)
        for part in [sample_of(whole, k) for k in range(count or 0)] if single else [whole]:
            self._sample(*part)
            self.samples += 1 if single else count if count and self.sums_are_apart else 1
        self.batches += 1

    def _sample(self, inputs: Any, targets: Any, mask: torch.Tensor | None) -> None:
        self.recorder.mask = mask
        with torch.set_grad_enabled(self.with_gradients), self.recorder if self.watching else nullcontext():
            output = self._output(inputs)
        if not self.with_gradients:
            self._look(output)
        else:
            loss = self._loss(output, targets)
            found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
            self._sum(found)

    def _look(self, output: Any) -> None:
        """Refuse outputs that hold NaN."""
        if any(bool(t.isnan().any()) for t in tensors_in(output) if t.is_floating_point()):
            raise InputError(f"calibrate: the model returns NaN at batch {self.batches}; look at data and weights")

    def _output(self, inputs: Any) -> Any:
        try:
            return call_model(self.model, inputs, self.settings.forward_fn)
        except TypeError as error:
            if not self.split:
                raise
            raise InputError(
                f"calibrate: the model cannot run on the first entry of batch {self.batches} ({error}): tuples and "
                "lists are taken as (inputs, targets); if all entries are inputs, pass input_fn=lambda batch: batch"
            ) from error

    def _loss(self, output: Any, targets: Any) -> torch.Tensor:
        with torch.enable_grad():
            if self.settings.loss_fn is None:
                return self._projection(output)
            loss: Any = self.settings.loss_fn(output, targets)
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            raise InputError("calibrate: loss_fn must return a tensor that depends on the model's parameters")
        loss = loss.mean() if loss.dim() else loss
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(
                f"calibrate: the loss is {value} at batch {self.batches}, sample {self.samples}; look at the data, at "
                "loss_fn and at the weights for NaN"
            )
        self.loss += value
        return loss

    def _projection(self, output: Any) -> torch.Tensor:
        """The sum of all outputs with random signs: its squared gradient is that of Gauss-Newton on average."""
        outs = [t for t in tensors_in(output) if t.requires_grad and t.is_floating_point()]
        if not outs:
            raise InputError("calibrate: no output of the model depends on its parameters, so there are no gradients")
        total = torch.zeros((), device=outs[0].device)
        for out in outs:
            signs = torch.randint(0, 2, out.shape, generator=self.signs).to(out.device, torch.float32) * 2 - 1
            total = total + (out.float() * signs).sum().to(total.device)
        if not bool(torch.isfinite(total)):
            raise InputError(f"calibrate: the model returns NaN or infinity at batch {self.batches}")
        return total

    @torch.no_grad()
    def _sum(self, gradients: tuple[torch.Tensor | None, ...]) -> None:
        row, sign = self.samples % self.keep, 1.0
        if self.samples >= self.keep:
            generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.samples)
            sign = float(torch.randint(0, 2, (), generator=generator)) * 2 - 1
        for (name, weight), found in zip(self.parameters.items(), gradients, strict=True):
            if found is None:
                continue
            gradient = (found.to_dense() if found.is_sparse else found).float()
            sums = self.sums.get(name)
            if sums is None:
                sums = self.sums[name] = self._zeros(weight)
            sums.mean += gradient
            sums.square.addcmul_(gradient, gradient)
            product = weight.detach().float() * gradient
            for dim, rows in enumerate(sums.masks):
                if rows is not None:
                    others = [d for d in range(weight.dim()) if d != dim]
                    rows[row] += sign * (product.sum(dim=others) if others else product)

    def _zeros(self, weight: torch.Tensor) -> _Sums:
        zeros = torch.zeros_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        dims = weight.dim() if weight.dim() <= 3 else 2
        masks = [weight.new_zeros(self.keep, weight.shape[d], dtype=torch.float32) for d in range(dims)]
        return _Sums(zeros, zeros.clone(), (*masks, *[None] * (weight.dim() - dims)))

    def meet(self) -> None:
        """Add up what all ranks have found."""
        if count() == 1:
            return
        own = self.samples, self.loss, self.mixed, self.keep, sorted(self.sums)
        every = gathered(own, "the number of samples")
        offset = sum(one[0] for one in every[: rank()])
        for name in sorted({name for one in every for name in one[4]}):
            sums = self.sums[name] if name in self.sums else self._zeros(self.parameters[name])
            tensors = sum_rows(
                (sums.mean, sums.square, *sums.masks), offset, self.settings.seed, f"gradients of {name}"
            )
            self.sums[name] = _Sums(tensors[0], tensors[1], tuple(tensors[2:]))
        self.recorder.readings = sum_readings(self.recorder.readings, self.device)
        self.samples, self.loss = sum(one[0] for one in every), sum(one[1] for one in every)
        self.mixed = any(one[2] for one in every)

    def result(self, names: list[tuple[str, nn.Parameter]]) -> Calibration:
        """What was found, under every name of every parameter."""
        canonical = {id(p): n for n, p in self.model.named_parameters()}
        gradients, readings = {}, {}
        if self.with_gradients:
            rows = min(self.keep, self.samples)
            for name, weight in self.parameters.items():
                sums = self.sums[name] if name in self.sums else self._zeros(weight)
                masks = tuple(None if m is None else m[:rows] for m in sums.masks)
                gradients[name] = Gradient(sums.mean / self.samples, sums.square / self.samples, masks)
        for name, weight in names:
            own = canonical[id(weight)]
            if own in gradients:
                gradients[name] = gradients[own]
            if own in self.recorder.readings:
                readings[name] = self.recorder.readings[own]
        shapes = {n: tuple(p.shape) for n, p in names}
        loss = self.loss / max(self.samples, 1) if self.settings.loss_fn is not None and self.with_gradients else None
        keep = 0 if self.mixed and self.sums_are_apart else self.keep
        return Calibration(self.samples, loss, self.settings.collect, gradients, readings, shapes, keep)


@contextmanager
def _as_found(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Eval mode, gradients for all ``parameters``; everything is put back."""
    wanted = [(p, p.requires_grad) for p in parameters.values()]
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.callback(lambda: [p.requires_grad_(before) for p, before in wanted])
        for parameter, _ in wanted:
            parameter.requires_grad_(True)
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):  # cudnn differentiates them in training only
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _length(loader: Any, steps: int | None) -> int | None:
    """How many batches there will be, if that is known."""
    try:
        known = 1 if isinstance(loader, (torch.Tensor, dict)) else len(loader)
    except TypeError:
        return steps
    return known if steps is None else min(known, steps)


def _shown(batches: Iterator[Any], total: int | None, progress: bool | None) -> Iterator[Any]:
    """The same batches, with a progress bar on a terminal."""
    console = Console(stderr=True, force_terminal=progress or None)
    if progress is False or not console.is_terminal:
        yield from batches
        return
    with Progress(console=console, transient=True) as bar:
        yield from bar.track(batches, total=total, description="calibrating")
