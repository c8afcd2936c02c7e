"""Refinement block by block: a few steps of gradient descent towards what the dense block makes, without labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunus.distill.finding import blocks_of
from prunus.distill.positions import Kept, Parts, kept_positions
from prunus.distill.report import BlockRefinement, RefineReport
from prunus.distill.running import Arguments, Run, parted
from prunus.distill.terms import apart, floats, share_apart
from prunus.drops import earlier_name, within
from prunus.errors import InputError, PrunusError
from prunus.plan import Plan
from prunus.repair import frozen, read, takeover
from prunus.surgery import Receipt
from prunus.tracing import ForwardFn
from prunus.untouched import untouched, without_mha_fastpath

SLOWER = 10  # how much the rate falls where it was too high
HALF = (torch.float16, torch.bfloat16)


def refine(  # noqa: PLR0913 - each keyword is a choice of the user
    model: nn.Module,
    dense: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    *,
    input_fn: Callable[[Any], Any] | None = None,
    forward_fn: ForwardFn | None = None,
    samples: int = 256,
    steps: int = 200,
    rate: float = 1e-3,
    blocks: Iterable[str] | None = None,
    seed: int = 0,
) -> RefineReport:
    """Train each block of a pruned model, for a few steps, towards what the dense block makes of the same samples.

    No labels are needed. In the order in which they run, each block gets its inputs from the pruned (and so far
    refined) model, and AdamW, its rate falling to zero along a cosine, brings its outputs nearer to those of the dense
    block (at the channels that stayed). Norms are in eval mode, and their statistics stay. A block whose error on
    held-out samples does not fall, at this rate or a tenth of it, goes back to what it was. Then what is in no block
    (the stem, the head) is trained in the same way towards the outputs of the dense model. If the error of the model's
    outputs does not fall, all goes back. The model itself is changed at the very end. Parameters with
    ``requires_grad=False``, in half precision, or shared with another block stay. Memory: what goes into and comes out
    of one block, for all samples.

    Args:
        model: the pruned model, best repaired first.
        dense: the model as it was before the cut.
        plan: what was removed.
        data: yields batches, each of them what the model is called with, as for :func:`prunus.repair`. One in five is
            held out (with fewer than five, a fifth of each).
        input_fn: makes that of what the data yields, such as ``lambda batch: batch[0]``.
        forward_fn: ``forward_fn(model, inputs)`` to use instead of calling the model.
        samples: batches are read until there are so many samples.
        steps: of each block, on one batch each.
        rate: the learning rate of the first step.
        blocks: names of the modules to refine; by default the children of containers (``nn.Sequential``,
            ``nn.ModuleList``), then what is in none of them; the whole model where there are no two of them.
        seed: of the order of the batches.

    Raises:
        InputError: the data or a name cannot be used, or a model cannot run on it; the model is as it was.

    Source: Li et al. 2021 (BRECQ, arXiv 2102.05426) reconstruct block by block, for quantisation; He et al. 2017
    (arXiv 1707.06168) for inputs from the pruned model.

    Example:
        >>> import copy, torch, prunus
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
        >>> dense, data = copy.deepcopy(model), [torch.randn(32, 8) for _ in range(5)]
        >>> plan = prunus.prune(model, torch.randn(1, 8), prunus.Target(macs=0.2), data=data).plan
        >>> report = prunus.distill.refine(model, dense, plan, data)
        >>> report.after < report.before
        True
    """
    if steps < 1 or not 0 < rate < math.inf:
        raise InputError(f"steps={steps} and rate={rate}: at least one step, and a rate above 0, are needed")
    batches = read(data, input_fn, samples, model)
    with torch.inference_mode(False):
        fit, held = parted(batches)
        run = Run(fit, held, forward_fn)
        new, old = _copies(model, dense)
        work = _Work(old, new, plan, run, steps, rate, seed, _own_memory(model))
        names = None if blocks is None else list(blocks)
        try:
            with without_mha_fastpath(), untouched(old), untouched(new), torch.enable_grad():
                report = work.report(names)
        except PrunusError:
            raise
        except Exception as error:
            raise InputError(
                f"a model cannot run on the data ({type(error).__name__}: {error}): call both with what input_fn makes "
                "of a batch, in eval mode, to see where; if batches hold labels, pass input_fn=lambda b: b[0]"
            ) from error
    count = sum(b.count for b in batches)
    out = sum(_count(b.count, b.held) for b in batches)
    try:
        for change in takeover(model, new, work.trained) if report.accepted else ():
            report.receipt.changes.append(change)
            change.do()
    except BaseException:
        report.receipt.undo()
        raise
    return replace(report, samples=(count, out))


def _count(count: int, held: bool | None) -> int:
    return -(-count // 5) if held is None else count * held


def _copies(model: nn.Module, dense: nn.Module) -> tuple[nn.Module, nn.Module]:
    if dense is model:
        raise InputError("dense and model are the same: pass a copy.deepcopy of the model made before the cut")
    try:
        return copy.deepcopy(model), frozen(dense)
    except PrunusError:
        raise
    except Exception as error:
        raise InputError(
            f"refinement works on a copy of the model, and copy.deepcopy cannot make one ({type(error).__name__}: "
            f"{error}); give what it cannot copy a __deepcopy__"
        ) from error


def _own_memory(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter that has its memory for itself: all its names."""
    by_memory: dict[int, dict[str, int]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        by_memory.setdefault(p.untyped_storage().data_ptr(), {})[name] = id(p)
    return {name: tuple(names) for names in by_memory.values() if len(set(names.values())) == 1 for name in names}


@dataclass
class _Work:
    """One refinement, of a copy."""

    dense: nn.Module
    model: nn.Module
    plan: Plan
    run: Run
    steps: int
    rate: float
    seed: int
    names: dict[str, tuple[str, ...]]
    trained: set[str] = field(default_factory=set)
    kept: Parts | None = None

    def report(self, blocks: list[str] | None) -> RefineReport:
        """Refine and judge."""
        notes = []
        names = blocks_of(self.model, self.run, blocks)
        if not names:
            names = [""]
            notes.append("The model has no two blocks in containers, so its outputs were refined as a whole.")
        wanted = [self.run.out_of(self.dense, "", x) for x in self.run.held]
        before = self._error(wanted)
        done = tuple(self._block(name, names) for name in names)
        if names != [""] and blocks is None:
            done = (*done, self._block("", names))
        after = self._error(wanted)
        better = bool(self.trained) and (before is None or after is None or after < before)
        if self.trained and not better:
            notes.append("The outputs would have been no nearer to the dense model's: all weights are as they were.")
        return RefineReport(done, before, after if better else before, better, (0, 0), tuple(notes), Receipt(self.plan))

    def _error(self, wanted: Sequence[Sequence[Tensor]]) -> float | None:
        outs = [self.run.out_of(self.model, "", x) for x in self.run.held]
        if any(len(a) != len(b) for a, b in zip(outs, wanted, strict=True)):
            return None
        return share_apart(outs, wanted)

    def _block(self, name: str, names: Sequence[str]) -> BlockRefinement:
        parameters = self._parameters(name, () if name else names)
        if not parameters:
            return BlockRefinement(name, None, None, "no parameter of its own that may be trained")
        block = _Block(self, name)
        fit, held = (block.pairs(part) for part in (self.run.fit, self.run.held))
        if fit is None or held is None:
            fit, held = (block.pairs(part, self._kept(names)) for part in (self.run.fit, self.run.held))
        if fit is None or held is None:
            return BlockRefinement(name, None, None, "its outputs cannot be matched with those of the dense block")
        before = block.error(held)
        keep = [p.detach().clone() for p in parameters.values()]
        for rate in (self.rate, self.rate / SLOWER):
            block.descend(list(parameters.values()), fit, rate)
            after = block.error(held)
            if before is not None and after is not None and after < before:  # false for NaN too
                self.trained.update(parameters)
                return BlockRefinement(name, before, after)
            with torch.no_grad():
                for p, values in zip(parameters.values(), keep, strict=True):
                    p.copy_(values)
        return BlockRefinement(name, before, before, "no nearer to the dense block on held-out samples")

    def _parameters(self, name: str, others: Sequence[str]) -> dict[str, nn.Parameter]:
        """Those of a block that may be trained: its own alone; of the whole model, those in no other block."""
        others = [other for other in others if other]
        found = {}
        for full, p in self.model.named_parameters():
            aliases = self.names.get(full, ())
            inside = bool(aliases) and all(not name or within(alias, name) for alias in aliases)
            inside = inside and not any(within(alias, other) for alias in aliases for other in others)
            if inside and p.requires_grad and p.is_floating_point() and p.dtype not in HALF:
                found[full] = p
        return found

    def _kept(self, names: Sequence[str]) -> Parts:
        """By the names that modules have now."""
        if self.kept is None:
            earlier = {self.earlier(name): name for name in names}
            found = kept_positions(self.dense, self.plan, self.run.fit[0], earlier, self.run.forward_fn)
            self.kept = {earlier[name]: parts for name, parts in found.items()}
        return self.kept

    def earlier(self, name: str) -> str:
        """What a module is called in the dense model."""
        return earlier_name(self.plan.drops, name) if name else name


Pair = tuple[Arguments, list[Tensor]]


@dataclass(frozen=True)
class _Block:
    """One block while it is refined."""

    work: _Work
    name: str

    def pairs(self, batches: Sequence[Any], kept: Parts | None = None) -> list[Pair] | None:
        """What goes into it now, and what should come out; None where the shapes do not fit."""
        work = self.work
        found: list[Pair] = []
        for inputs in batches:
            wanted = work.run.out_of(work.dense, work.earlier(self.name), inputs)
            parts = (kept or {}).get(self.name, (Kept(),) * len(wanted))
            into = work.run.into(work.model, self.name, inputs) if self.name else ((inputs,), {})
            if len(parts) != len(wanted):
                return None
            wanted = [part.of(t) for part, t in zip(parts, wanted, strict=True)]
            if not found:
                with torch.no_grad():
                    outs = self.outputs(into)
                if [t.shape for t in outs] != [t.shape for t in wanted]:
                    return None
            found.append((into, wanted))
        return found

    def outputs(self, into: Arguments) -> list[Tensor]:
        """What comes out now."""
        if not self.name:
            return floats(self.work.run.call(self.work.model, into[0][0]))
        args, kwargs = copy.deepcopy(into)  # some blocks write into what they get
        return floats(self.work.model.get_submodule(self.name)(*args, **kwargs))

    def error(self, pairs: Sequence[Pair]) -> float | None:
        """On held-out samples."""
        with torch.no_grad():
            return share_apart([self.outputs(into) for into, _ in pairs], [wanted for _, wanted in pairs])

    def descend(self, parameters: Sequence[nn.Parameter], pairs: Sequence[Pair], rate: float) -> None:
        """The steps."""
        work = self.work
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, work.steps)
        generator = torch.Generator().manual_seed(work.seed)
        order: list[int] = []
        for _ in range(work.steps):
            order = order or torch.randperm(len(pairs), generator=generator).tolist()
            into, wanted = pairs[order.pop()]
            outs = self.outputs(into)
            gaps = [apart(a, b) for a, b in zip(outs, wanted, strict=True) if a.requires_grad]
            if not gaps:
                return
            loss = torch.stack(gaps).mean()
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad
            optimizer.step()
            schedule.step()
        for p in parameters:
            p.grad = None
