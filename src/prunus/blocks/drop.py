"""Depth pruning: choose blocks by what their stream gains from them, and take them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from rich.table import Table
from torch import nn

from prunus.blocks.find import Block, Search, Sums
from prunus.blocks.silence import Silenced
from prunus.budget import Target
from prunus.drops import within
from prunus.errors import InputError, NothingToPruneError, SurgeryError, TargetError
from prunus.graph import DependencyGraph
from prunus.opaque import matching
from prunus.plan import Footprint, Plan
from prunus.report import render, share_left
from prunus.surgery import Receipt, apply
from prunus.tracing import ForwardFn, Inputs

Score: TypeAlias = "str | Callable[[Block, torch.Tensor, torch.Tensor], float]"
OWN_SCORES = ("influence", "change", "outputs")


@dataclass(frozen=True)
class DropResult:
    """What :func:`drop_blocks` did: ``print`` it for a table, ``undo()`` it, save its ``plan``.

    Args:
        plan: what went, as data.
        receipt: what undoes it.
        blocks: every block that was looked at, those that stay too.
        scores: the score of each droppable block that was ranked, by name.
    """

    plan: Plan
    receipt: Receipt
    blocks: tuple[Block, ...]
    scores: dict[str, float]

    @property
    def dropped(self) -> tuple[str, ...]:
        """The names that the dropped blocks had."""
        return tuple(f"{d.container}.{name}" if d.container else name for d in self.plan.drops for name in d.gone)

    @property
    def before(self) -> Footprint:
        """The cost with all blocks."""
        return self.plan.before

    @property
    def after(self) -> Footprint:
        """The cost now."""
        return self.plan.after

    def undo(self) -> None:
        """Put the model back as it was, bit for bit."""
        self.receipt.undo()

    def frozen(self) -> str:
        """The blocks that cannot be dropped, and why."""
        return "\n".join(str(block) for block in self.blocks if not block.droppable)

    def __str__(self) -> str:
        table = Table(title="Blocks", title_justify="left")
        table.add_column("block", overflow="fold")
        for name in ("MACs", "parameters", "score", ""):
            table.add_column(name, justify="right")
        gone = set(self.dropped)
        for block in self.blocks:
            if block.droppable:
                score = f"{self.scores[block.name]:.4f}" if block.name in self.scores else ""
                out = "dropped" if block.name in gone else ""
                table.add_row(block.name, f"{block.macs:,}", f"{block.params:,}", score, out)
        return "\n".join((render(table), share_left(self.before, self.after), *self.plan.notes))


def drop_blocks(  # noqa: PLR0913 - each keyword is a choice of the user
    model: nn.Module | DependencyGraph,
    example_inputs: Inputs,
    count: int | None = None,
    *,
    target: Target | None = None,
    importance: Score = "influence",
    blocks: Sequence[Block | str] | None = None,
    data: Iterable[Inputs] | None = None,
    forward_fn: ForwardFn | None = None,
    output_transform: Callable[[Any], Any] | None = None,
    optimizer: Any = None,
) -> DropResult:
    """Take the least important residual blocks out of ``model``, in place.

    Children of containers go; the others move up, and what counts them follows (their own ``layer_idx``, the number of
    layers in the configuration), so that stock code loads the result. The set that goes is proved once more as a whole.

    Args:
        model: any module, or a graph of it (build the graph again afterwards).
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        count: how many blocks go.
        target: instead, what must hold afterwards; the least important go until it does. A ratio is a share of blocks.
        importance: "influence" (one minus the cosine of the stream before and after, ShortGPT, arXiv 2403.03853),
            "change" (the relative length of what is added), "outputs" (how far the model's outputs move, relative to
            their length, when the block is silent) or ``importance(block, before, after) -> float``.
        blocks: which blocks to choose from, as :func:`find_blocks` gives them, names or name patterns; without
            ``count`` and ``target``, these go.
        data: batches on which the score is averaged (default: the example inputs).
        forward_fn: ``forward_fn(model, example_inputs)`` to use instead of calling the model.
        output_transform: picks from the output what must not change (default: every tensor in it).
        optimizer: an optimiser that shall let go of the parameters.

    Raises:
        InputError: an argument cannot be used; nothing was changed.
        TargetError: the target cannot be met; nothing was changed.
        NothingToPruneError: no block can be dropped; nothing was changed.

    Example:
        >>> import torch, prunus
        >>> from torch import nn
        >>> class Residual(nn.Sequential):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> model = nn.Sequential(nn.Linear(8, 16), *(Residual(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)))
        >>> result = prunus.drop_blocks(model, torch.randn(2, 8), count=1)
        >>> len(model), result.after.params
        (3, 688)
    """
    if (count is not None) + (target is not None) > 1 or (count is None and target is None and blocks is None):
        raise InputError("drop_blocks: give count=, target=Target(...), or the blocks= that shall go")
    if count is not None and (type(count) is not int or count < 1):
        raise InputError(f"drop_blocks: count={count!r} must be a positive int")
    if not callable(importance) and importance not in OWN_SCORES:
        raise InputError(f"drop_blocks: importance={importance!r}; pass a function or one of {', '.join(OWN_SCORES)}")
    search = Search(model, example_inputs, forward_fn, output_transform)
    found = search.blocks(_paths(search, blocks))
    choice = _choice(found, blocks)
    if not choice:
        stay = "\n".join(str(block) for block in found)
        raise NothingToPruneError(f"no block of this model can be dropped:\n{stay or 'nothing is added to a stream'}")
    batches = [example_inputs] if data is None else data
    scores = scored(search, choice, importance, batches) if count is not None or target is not None else {}
    chosen = _outermost(_picked(search, choice, scores, count, target))
    plan = search.planner.plan([part for block in chosen for part in block.parts], final=True)
    wrong = search.prover.wrong([block.shape for block in chosen if block.shape is not None], plan)
    if wrong:
        raise SurgeryError(f"these blocks cannot go together ({', '.join(b.name for b in chosen)}): {wrong}")
    return DropResult(plan, apply(search.model, plan, optimizer), tuple(found), scores)


def _paths(search: Search, asked: Sequence[Block | str] | None) -> frozenset[str] | None:
    """The children that were asked for, if all of them are known by their paths."""
    names = [entry.name if isinstance(entry, Block) else entry for entry in asked or ()]
    known = bool(names) and set(names) <= search.children.keys()
    return frozenset(names) if known else None


def _choice(found: Sequence[Block], asked: Sequence[Block | str] | None) -> list[Block]:
    """The droppable blocks that were asked for."""
    if asked is None:
        return [block for block in found if block.droppable]
    names = [block.name for block in found]
    wanted: set[str] = set()
    for entry in asked:
        name = entry.name if isinstance(entry, Block) else entry
        if not isinstance(name, str):
            raise InputError(f"drop_blocks: blocks holds {entry!r}; pass blocks, names or name patterns")
        wanted.update([name] if name in names else matching(names, name, "blocks"))
    chosen = [block for block in found if block.name in wanted]
    stuck = [block for block in chosen if not block.droppable]
    if stuck:
        raise InputError(f"drop_blocks: {stuck[0]}")
    return chosen


def scored(search: Search, blocks: Sequence[Block], importance: Score, batches: Iterable[Inputs]) -> dict[str, float]:
    """The score of each block, averaged over batches."""
    if importance == "outputs":
        return _moved(search, blocks, batches)
    shapes = [block.shape for block in blocks if block.shape is not None]
    sums = Sums(len(blocks))
    own = [[0.0, 0] for _ in blocks]

    def see(k: int, x: torch.Tensor, y: torch.Tensor) -> None:
        if callable(importance):
            own[k] = [own[k][0] + float(importance(blocks[k], x, y)), own[k][1] + 1]
        else:
            sums.add(k, x, y)

    for batch in batches:
        search.stream(shapes, see, batch)
    values = (
        own[k][0] / max(own[k][1], 1) if callable(importance) else getattr(sums, str(importance))(k)
        for k in range(len(blocks))
    )
    found = {block.name: float(value) for block, value in zip(blocks, values, strict=True)}
    bad = [name for name, value in found.items() if value != value]  # noqa: PLR0124 - NaN differs from itself
    if bad:
        raise InputError(f"the importance of {bad[0]} is no number; check the data and the weights for NaN")
    return found


def _moved(search: Search, blocks: Sequence[Block], batches: Iterable[Inputs]) -> dict[str, float]:
    """How far the outputs move when each block is silent, relative to their length."""
    sums = dict.fromkeys((block.name for block in blocks), 0.0)
    many = 0
    for batch in batches:
        subject = replace(search.subject, inputs=batch)
        dense = [t.double() for t in subject.run()]
        many += 1
        for block in blocks:
            run = Silenced(subject, [block.shape] if block.shape is not None else [])
            outputs = subject.run(run.following(), run)
            pairs = [(a, b) for a, b in zip(dense, outputs, strict=True) if a.shape == b.shape]
            moved = sum(float((a - b).square().sum()) for a, b in pairs)
            sums[block.name] += (moved / max(sum(float(a.square().sum()) for a, _ in pairs), 1e-24)) ** 0.5
    return {name: total / max(many, 1) for name, total in sums.items()}


def _picked(
    search: Search, choice: Sequence[Block], scores: dict[str, float], count: int | None, target: Target | None
) -> list[Block]:
    """The blocks that go: the least important ones, as many as asked or as needed."""
    if count is None and target is None:
        return list(choice)
    order = sorted(choice, key=lambda block: scores[block.name])
    if target is not None and target.ratio is not None:
        count = max(1, round(target.ratio * len(order)))
    if count is not None:
        if count > len(order):
            raise TargetError(f"{count} blocks were asked for; only {len(order)} can be dropped")
        return order[:count]
    taken: list[Block] = []
    for block in order:
        taken.append(block)
        if _met(search, taken, target):
            break
    else:
        raise TargetError(f"{target} cannot be met by dropping all {len(order)} blocks; prune channels too")
    for block in taken[-2::-1]:  # what the last one made needless stays, the most important first
        fewer = [other for other in taken if other is not block]
        if _met(search, fewer, target):
            taken = fewer
    return taken


def _met(search: Search, blocks: Sequence[Block], target: Target | None) -> bool:
    plan = search.planner.plan([part for block in _outermost(blocks) for part in block.parts])
    return target is None or target.met_by(plan.before, plan.after)


def _outermost(blocks: Sequence[Block]) -> list[Block]:
    """The blocks that are not inside others of them."""
    names = [block.name for block in blocks]
    return [b for b in blocks if not any(b.name != name and within(b.name, name) for name in names)]
