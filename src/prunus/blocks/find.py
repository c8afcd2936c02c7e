"""Find the blocks of a network: what adds to a stream and can be left out, so that the stream passes by.

Everything is found from the ops of one run, never from names of classes, and each block is proved: the network from
which surgery took it gives the same outputs as the network in which what it adds is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from prunus.blocks.flow import Recorder, Subject
from prunus.blocks.planning import Planner
from prunus.blocks.proof import Prover
from prunus.blocks.shape import Inner, Outer, Reading, inner, outer
from prunus.blocks.silence import Measured, Shape
from prunus.drops import joined, within
from prunus.errors import InputError
from prunus.graph import DependencyGraph
from prunus.tracing import ForwardFn, Inputs


@dataclass(frozen=True)
class Block:
    """A part of a network that adds to a stream.

    Args:
        name: the path of the child of a container that goes (or of the module whose code adds, if none can go).
        branches: the modules that compute what is added.
        macs: multiply-adds that go with it.
        params: parameters that go with it.
        reason: why it cannot be dropped; empty if it can.
        post_norm: whether it norms the stream after the addition; that norm goes too.
        influence: one minus the cosine between the stream before and after it (ShortGPT, arXiv 2403.03853).
        change: the length of what it adds, relative to the stream's.
    """

    name: str
    branches: tuple[str, ...]
    macs: int = 0
    params: int = 0
    reason: str = ""
    post_norm: bool = False
    influence: float = float("nan")
    change: float = float("nan")
    shape: Shape | None = field(default=None, repr=False, compare=False)

    @property
    def parts(self) -> tuple[str, ...]:
        """The paths of all children of containers that go with it: one, or one of each of several lists."""
        return self.shape.paths if self.shape is not None else (self.name,)

    @property
    def droppable(self) -> bool:
        """Whether it can be dropped."""
        return not self.reason

    def __str__(self) -> str:
        if self.reason:
            return f"{self.name or 'the model'} stays: {self.reason}"
        kind = ", with its norm" if self.post_norm else ""
        kind += f", with {', '.join(self.parts[1:])}" if len(self.parts) > 1 else ""
        return (
            f"{self.name}: {self.macs:,} MACs, {self.params:,} parameters, influence {self.influence:.4f}{kind} "
            f"({', '.join(self.branches)})"
        )


def find_blocks(
    model: nn.Module | DependencyGraph,
    example_inputs: Inputs,
    forward_fn: ForwardFn | None = None,
    output_transform: Callable[[Any], Any] | None = None,
) -> list[Block]:
    """Every residual block of a network, in the order in which they run, with its cost or the reason why it stays.

    A block is a child of an ``nn.Sequential``, ``nn.ModuleList`` or ``nn.ModuleDict`` that gives back what came in with
    branches added (and, in post-norm networks, normed), or what the code around it adds to a stream. Each is taken out
    for a moment to compare the outputs: two watched forward passes for each block, about the time of four.

    Args:
        model: any module that holds data, or a graph of it; it is left as it came.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        forward_fn: ``forward_fn(model, example_inputs)`` to use instead of calling the model.
        output_transform: picks from the output what must not change (default: every tensor in it).

    Raises:
        InputError: the model cannot run on the inputs, or holds no data.

    Example:
        >>> import torch, prunus
        >>> from torch import nn
        >>> class Residual(nn.Sequential):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> model = nn.Sequential(nn.Linear(8, 16), *(Residual(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)))
        >>> [block.name for block in prunus.find_blocks(model, torch.randn(2, 8))]
        ['1', '2', '3']
    """
    return Search(model, example_inputs, forward_fn, output_transform).blocks()


class Search:
    """The blocks of one model, and the plans that drop them."""

    def __init__(
        self,
        model: nn.Module | DependencyGraph,
        example_inputs: Inputs,
        forward_fn: ForwardFn | None = None,
        output_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if isinstance(model, DependencyGraph):
            graph = model
        else:
            graph = DependencyGraph().build_dependency(model, example_inputs, forward_fn, output_transform)
        self.model = graph.model
        if any(t.is_meta for t in (*self.model.parameters(), *self.model.buffers())):
            raise InputError(
                "the model is on the meta device: blocks are proved by running it, which takes real tensors"
            )
        self.subject = Subject(self.model, example_inputs, forward_fn, output_transform)
        recorder = Recorder(self.subject)
        try:
            self.flow = recorder.record(self.subject)
        except Exception as error:
            raise InputError(
                f"the model cannot run on the example inputs ({type(error).__name__}: {error}); call it with the same "
                "inputs in eval mode to see where"
            ) from error
        self.children = recorder.children
        self.reading = Reading(self.flow)
        self.planner = Planner(graph, self.subject)
        self.prover = Prover(self.subject, self.flow, self.reading)

    def blocks(self, asked: frozenset[str] | None = None) -> list[Block]:
        """All of them (or those with the paths that are asked for), each proved or refused."""
        adds = {add: self._candidates(*add) for add in self.reading.residual_adds()}
        if asked is not None:
            adds = {add: paths for add, paths in adds.items() if not asked.isdisjoint(paths)}
        checked = self._checked(self._shapes(path for paths in adds.values() for path in paths))
        tried: dict[str, Block] = {}
        for paths in adds.values():
            for path in paths:
                if path not in tried:
                    tried[path] = self._proved(checked[path])
                if tried[path].droppable:
                    break
            else:
                self._try_rows(paths, tried)
        found: dict[str, Block] = {}
        for add, paths in adds.items():
            block = self._level(add, paths, tried)
            block = found.setdefault(block.name, block)
            branch = self._branch(*add)
            if branch not in block.branches:
                found[block.name] = replace(block, branches=(*block.branches, branch))
        return self._scored(list(found.values()))

    def _branch(self, step: int, spot: int) -> str:
        """The module that computes what an add adds."""
        ins = self.flow.steps[step].ins
        return self.reading.origin(ins[1 - spot if len(ins) == 2 else -1])

    def _candidates(self, step: int, spot: int) -> list[str]:
        """The children of containers that may go with an add, the smallest first."""
        here = self.flow.steps[step].module
        found = []
        for path in (self._branch(step, spot), here):
            parts = path.split(".")
            found += [p for k in range(len(parts), 0, -1) if (p := ".".join(parts[:k])) in self.children]
        found = [p for p in found if within(here, p) or not self._passes_on(p)]
        return sorted(dict.fromkeys(found), key=lambda p: -p.count("."))

    def _try_rows(self, paths: Sequence[str], tried: dict[str, Block]) -> None:
        """Lists of one length in one module may be run through in step: what stands at the same place goes together."""
        for path in paths:
            container, _, name = path.rpartition(".")
            owner, _, own = container.rpartition(".")
            if not own or not isinstance(self.model.get_submodule(container), nn.ModuleList):
                continue
            size = len(self.model.get_submodule(container)._modules)
            lists = [
                joined(owner, other)
                for other, child in self.model.get_submodule(owner).named_children()
                if isinstance(child, nn.ModuleList) and len(child) == size
            ]
            rows = sorted((joined(found, name) for found in lists), key=lambda found: found != path)
            ran = [found for found in rows if found == path or self.reading.inside(found)]
            shape = outer(self.reading, *ran) if len(ran) > 1 else ""
            if isinstance(shape, Outer):
                block = self._proved(Block(path, (), shape=shape))
                if block.droppable:
                    tried.update(dict.fromkeys(ran, block))
                    return

    def _passes_on(self, path: str) -> bool:
        """Whether what goes into a child would come out in its place: it stands in a plain sequence."""
        return type(self.model.get_submodule(path.rpartition(".")[0])).forward is nn.Sequential.forward

    def _level(self, add: tuple[int, int], paths: Sequence[str], tried: Mapping[str, Block]) -> Block:
        """What goes with an add: the smallest block that may go; if none may, the one whose neighbours may."""
        here = [tried[path] for path in paths if path in tried]
        if not here:
            module = self.flow.steps[add[0]].module
            return Block(module, (), reason=f"the code of {module or 'the model'} adds it, and no container holds it")
        shelves = {name.rpartition(".")[0] for name, block in tried.items() if block.droppable}
        likely = [block for block in here if block.name.rpartition(".")[0] in shelves]
        around = [block for block in here if within(self.flow.steps[add[0]].module, block.name)] or here[:-2:-1]
        return next((block for block in here if block.droppable), (likely or around)[0])

    def _shapes(self, paths: Iterable[str]) -> dict[str, Shape | str]:
        """How each child is a block, or why it is none."""
        places: dict[int, list[str]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            places.setdefault(id(module), []).append(path)
        found: dict[str, Shape | str] = {}
        for path in dict.fromkeys(paths):
            elsewhere = [p for p in places[id(self.children[path])] if p != path]
            if elsewhere:
                found[path] = f"it is also {elsewhere[0]}"
                continue
            shape = inner(self.reading, path)
            if isinstance(shape, Inner):
                self.planner.beside[path] = shape.beside
            added = "" if self._passes_on(path) or isinstance(shape, Inner) else outer(self.reading, path)
            found[path] = added if isinstance(added, Outer) else shape if self.flow.calls.get(path) else added or shape
        return found

    def _checked(self, shapes: Mapping[str, Shape | str]) -> dict[str, Block]:
        """The blocks, without those that do more to their stream than add to it and norm it."""
        real = [shape for shape in shapes.values() if not isinstance(shape, str)]
        run = Measured(self.subject, real, None, self.flow)
        with self.prover.disturbed():
            self.subject.run(run.following(), run)
        found = {path: Block(path, (), reason=s) for path, s in shapes.items() if isinstance(s, str)}
        for k, shape in enumerate(real):
            reason = "" if run.same else "the model does not do the same in every run"
            error = run.errors.get(k, 0.0)
            if error > self.prover.tolerance:
                ops = ", ".join(self._ops(shape))
                reason = f"it does more to its input than add to it ({ops}): without what it adds, {error:.1e} is left"
            found[shape.path] = Block(shape.path, (), reason=reason, post_norm=k in run.normed, shape=shape)
        return found

    def _ops(self, shape: Shape) -> list[str]:
        pairs = shape.pairs if isinstance(shape, Inner) else ()
        steps = {step for pair in pairs for step, _, _, kind in pair.path if kind == "same"}
        return list(dict.fromkeys(self.flow.steps[step].name for step in sorted(steps)))

    def _proved(self, block: Block) -> Block:
        """The block with its cost, or with the reason why removal is not silence."""
        if block.shape is None or block.reason:
            return block
        try:
            plan = self.planner.plan(block.parts)
        except Exception as error:  # the cost of shared modules is counted by running the model without the block
            return replace(block, reason=f"the model's code does not run without it ({type(error).__name__})")
        reason = self.prover.wrong([block.shape], plan)
        macs, params = plan.before.macs - plan.after.macs, plan.before.params - plan.after.params
        return replace(block, reason=reason, macs=macs, params=params)

    def _scored(self, blocks: list[Block]) -> list[Block]:
        """The blocks with influence and change, on the model's own values."""
        sums = Sums(len(blocks))
        where = [k for k, block in enumerate(blocks) if block.droppable]
        shapes = [shape for k in where if (shape := blocks[k].shape) is not None]
        self.stream(shapes, lambda k, x, y: sums.add(where[k], x, y))
        return [
            replace(block, influence=sums.influence(k), change=sums.change(k)) if block.droppable else block
            for k, block in enumerate(blocks)
        ]

    def stream(
        self,
        shapes: Sequence[Shape],
        see: Callable[[int, torch.Tensor, torch.Tensor], None],
        inputs: Inputs | None = None,
    ) -> None:
        """Run the model and hand out the stream before and after each block."""
        subject = self.subject if inputs is None else replace(self.subject, inputs=inputs)
        run = Measured(subject, shapes, see, None)
        subject.run(run.following(), run)


class Sums:
    """Sums over the streams before and after blocks."""

    def __init__(self, blocks: int) -> None:
        self._sums = [[0.0, 0.0, 0.0] for _ in range(blocks)]

    def add(self, k: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Note the stream of block ``k`` at every position of a sequence, or (maps of features) of each sample."""
        x = x.detach().flatten(0, -2) if x.dim() in (2, 3) else x.detach().flatten(1)
        x, y = x.double(), y.detach().reshape(x.shape).double()
        sums = self._sums[k]
        sums[0] += float(nn.functional.cosine_similarity(x, y, dim=-1).sum())
        sums[1] += float(((y - x).norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-12)).sum())
        sums[2] += x.shape[0]

    def influence(self, k: int) -> float:
        """One minus the mean cosine."""
        return max(0.0, 1 - self._sums[k][0] / self._sums[k][2]) if self._sums[k][2] else float("nan")

    def change(self, k: int) -> float:
        """The mean relative length of what is added."""
        return self._sums[k][1] / self._sums[k][2] if self._sums[k][2] else float("nan")
