"""Runs of a model in which blocks are measured, or made silent: what they add to their stream is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from prunus.blocks.flow import Call, Flow, Recorder, Subject, float_leaves
from prunus.blocks.shape import Inner, Outer
from prunus.drops import within

Shape = Inner | Outer
See = Callable[[int, torch.Tensor, torch.Tensor], None]  # (which block, stream before, stream after)


class Silenced(Recorder):
    """Blocks run, but their streams leave them as they came; what all other children of containers give is kept."""

    def __init__(self, subject: Subject, shapes: Sequence[Shape]) -> None:
        super().__init__(subject)
        self.given: list[list[torch.Tensor]] = []
        self._within = tuple(path for shape in shapes for path in shape.paths)
        self._inner = {shape.path: shape for shape in shapes if isinstance(shape, Inner)}
        self._adds = {step: spot for shape in shapes if isinstance(shape, Outer) for step, spot in shape.adds}
        self._streams: dict[str, list[torch.Tensor]] = {}
        self._before: dict[int, torch.Tensor] = {}

    def entered(self, call: Call, tensors: list[torch.Tensor]) -> None:
        """Keep the stream as it comes."""
        if call.path in self._inner:
            self._streams[call.path] = [t.clone() for t in tensors]

    def left(self, call: Call, output: Any) -> Any:
        """Give the stream back as it came."""
        shape = self._inner.get(call.path)
        if shape is None:
            if not any(within(call.path, path) for path in self._within):
                self.given.append([t.clone() for t in float_leaves(output)])
            return None
        came = self._streams.pop(call.path)
        instead = {pair.exit: came[pair.entry] for pair in shape.pairs}
        seen = -1

        def swap(leaf: Any) -> Any:
            nonlocal seen
            if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
                return leaf
            seen += 1
            return instead.get(seen, leaf)

        return tree_map(swap, output)

    def computed(self, step: int, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Leave out what the code around a block would add."""
        if step not in self._adds:
            return result
        stream = self._before.pop(step)
        return result.copy_(stream) if func._schema.is_mutable else stream

    def computing(self, step: int, func: Any, args: Any) -> None:
        """Keep the stream: the sum may be written over it."""
        if step in self._adds:
            self._before[step] = args[self._adds[step]].clone()


class Measured(Recorder):
    """Hands out, for each block, the stream before it and after it, and what it would be if nothing were added."""

    def __init__(self, subject: Subject, shapes: Sequence[Shape], see: See | None, flow: Flow | None) -> None:
        super().__init__(subject)
        self._shapes, self._see, self._flow = shapes, see, flow
        self._inner: dict[str, tuple[int, Inner]] = {}
        self._adds: dict[int, tuple[int, int]] = {}
        self._steps: dict[int, list[tuple[int, int, int, str]]] = {}
        self._streams: dict[str, list[torch.Tensor]] = {}
        self._before: dict[int, torch.Tensor] = {}
        self._alone: dict[tuple[int, int], torch.Tensor] = {}  # (block, tensor) -> without what the block adds
        self.errors: dict[int, float] = {}  # block -> how far the stream is from its input without what it adds
        self.normed = {k for k, s in enumerate(shapes) if isinstance(s, Inner) and _has_norm(s)}
        self.same = True
        for k, shape in enumerate(shapes):
            if isinstance(shape, Inner):
                self._inner[shape.path] = (k, shape)
                for pair in shape.pairs:
                    for step, before, after, kind in pair.path:
                        self._steps.setdefault(step, []).append((k, before, after, kind))
            else:
                self._adds[shape.adds[0][0]] = (k, shape.adds[0][1])

    def entered(self, call: Call, tensors: list[torch.Tensor]) -> None:
        """Keep the stream as it comes."""
        if call.path in self._inner:
            k, shape = self._inner[call.path]
            self._streams[call.path] = came = [t.clone() for t in tensors]
            for pair in shape.pairs:
                self._alone[k, call.ins[pair.entry]] = came[pair.entry]

    def computed(self, step: int, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Follow the stream as it would be if nothing were added."""
        if self._flow is None:
            if step in self._adds and self._see is not None:
                self._see(self._adds[step][0], self._before.pop(step), result)
            return result
        name = func.overloadpacket.__name__
        if step >= len(self._flow.steps) or self._flow.steps[step].name != (name.rstrip("_") or name):
            self.same = False
            return result
        for k, before, after, kind in self._steps.get(step, ()):
            stream = self._alone.get((k, before))
            if stream is None:
                continue
            if kind == "same":
                stream = _again(func, args, kwargs, self._flow.steps[step].ins.index(before), stream)
            self._alone[k, after] = stream
        return result

    def computing(self, step: int, func: Any, args: Any) -> None:
        """Keep the stream: the sum may be written over it."""
        if step in self._adds and self._flow is None:
            self._before[step] = args[self._adds[step][1]].clone()

    def left(self, call: Call, output: Any) -> Any:
        """Compare what is left of the stream, and hand it out."""
        if call.path not in self._inner:
            return None
        k, shape = self._inner[call.path]
        came = self._streams.pop(call.path)
        went = dict(zip(call.outs, float_leaves(output), strict=True))
        for pair in shape.pairs:
            x, y = came[pair.entry], went[call.outs[pair.exit]]
            alone = self._alone.get((k, call.outs[pair.exit]))
            if alone is not None:
                self.errors[k] = max(self.errors.get(k, 0.0), relative(x, alone))
            if pair.adds and self._see is not None:
                self._see(k, x, y)
        self._alone = {key: t for key, t in self._alone.items() if key[0] != k}
        return None


def _has_norm(shape: Inner) -> bool:
    return any(kind == "norm" for pair in shape.pairs for _, _, _, kind in pair.path)


def _again(func: Any, args: Any, kwargs: Any, spot: int, stream: torch.Tensor) -> torch.Tensor:
    """The op once more, with ``stream`` for its tensor number ``spot``."""
    seen = -1

    def swap(leaf: Any) -> Any:
        nonlocal seen
        if not isinstance(leaf, torch.Tensor):
            return leaf
        seen += 1
        return stream.clone() if seen == spot else leaf

    new_args, new_kwargs = tree_map(swap, (args, kwargs))
    result = func(*new_args, **new_kwargs)
    return result[0] if isinstance(result, (tuple, list)) else result


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where shapes differ or a value is NaN."""
    if x.shape != y.shape:
        return float("inf")
    if not x.numel():
        return 0.0
    error = float((x.double() - y.double()).abs().max()) / max(float(x.double().abs().max()), 1e-12)
    return error if error == error else float("inf")  # noqa: PLR0124 - NaN differs from itself


def distance(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """The largest :func:`relative` difference between two lists of outputs."""
    if len(one) != len(other):
        return float("inf")
    return max((relative(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
