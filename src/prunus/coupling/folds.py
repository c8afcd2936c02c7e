"""Folds: numbers that are computed from a size, and the parameters that can make up for their change.

Attention divides by the root of its head size, a mean by its length. When the size shrinks, what the model computes
from the positions that stay changes with it, unless the tensors that make the multiplied operand are scaled the other
way. They are found by walking back from the product over ops that hand a factor on. Nothing is folded unless every
step of the way is of that kind and nothing else reads what would be scaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from typing import Any, NamedTuple

import numpy as np

from prunus.held import axes_of
from prunus.labels import Ids, Labelled
from prunus.ledger import Scale
from prunus.sizes import Extent, expression_of, leaves
from prunus.tracing import Trace

MOST_WAYS = 8  # how many ways back are tried for one product


class Target(NamedTuple):
    """Positions ``atoms`` along one dim of a held tensor, which are to be multiplied."""

    held: int
    dim: int
    atoms: tuple[int, ...]


class Fold(NamedTuple):
    """Where the rows ``ids`` shrink from n to m, ``targets`` times ``(m / n) ** -power`` leave the function as it was.

    ``why`` says why it cannot be done (empty: it can), ``step`` which op of the trace multiplies.
    """

    ids: Ids
    power: float
    targets: tuple[Target, ...]
    why: str
    step: int


class _Way(NamedTuple):
    """A way back from a tensor to what makes it: what to multiply, and every tensor on the way with its reader."""

    targets: frozenset[Target]
    steps: tuple[tuple[Labelled, int], ...]


class _Unknown(Exception):
    """The walk met something that it cannot see through."""


_PASSES = frozenset(
    [
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "view_as", "reshape_as", "permute", "transpose", "t"),
        *("swapaxes", "movedim", "unsqueeze", "squeeze", "expand", "expand_as", "flatten", "unflatten", "mT"),
        *("clone", "contiguous", "alias", "detach", "to", "_to_copy", "dropout", "slice", "select", "narrow", "split"),
        *("split_with_sizes", "chunk", "unbind", "roll", "repeat", "repeat_interleave", "neg", "sum", "mean", "flip"),
        *("relu", "leaky_relu", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d"),
        "adaptive_avg_pool2d",
    ]
)  # ops of one tensor that hand a positive factor on
_CUTS = frozenset(["slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind"])
_PRODUCTS = frozenset(["mul", "matmul", "bmm", "mm", "einsum"])
_SUMS = frozenset(["add", "sub", "cat", "stack"])
_MAKERS: Mapping[str, tuple[tuple[int, int], ...]] = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), ((1, 0), (2, 0))),
    **dict.fromkeys(("layer_norm", "rms_norm", "_fused_rms_norm", "group_norm", "batch_norm"), ((1, 0), (2, 0))),
    "addmm": ((0, -1), (2, -1)),
}  # ops whose output is linear in some operands (weight and bias) together: each with its dim that is the output's


def find_folds(trace: Trace) -> tuple[Fold, ...]:
    """A fold for each product with a power of a size that was seen."""
    if not trace.ledger.scales:
        return ()
    walk = _Walk(trace)
    sized: dict[Any, Ids] = {}
    for requirement in trace.ledger.requirements:
        sized.setdefault(expression_of(requirement.asked), requirement.ids)
    found = []
    again: list[_Way] = []  # the same products in the run in training mode
    for scale in trace.ledger.scales:
        if scale.step >= trace.ledger.evaluated:
            again += walk.ways(scale)[0]
    for scale in trace.ledger.scales:
        if scale.step >= trace.ledger.evaluated:
            continue
        ids = _rows(scale, sized)
        if ids is not None:
            found.append(walk.fold(scale, ids, again))
            continue
        why = f"the size {scale.of} is that of no dim"
        mentioned = set(leaves(scale.of))
        affected = [ids for expression, ids in sized.items() if mentioned.intersection(leaves(expression))]
        found += [Fold(ids, scale.power, (), why, scale.step) for ids in affected]
    return tuple(found)


def _rows(scale: Scale, sized: Mapping[Any, Ids]) -> Ids | None:
    """The rows whose length is the size."""
    if isinstance(scale.of, np.ndarray):
        return scale.of
    return scale.of.ids if isinstance(scale.of, Extent) else sized.get(scale.of)


def _some(ways: Iterator[_Way], most: int) -> tuple[list[_Way], str]:
    """The first ways, and why there are no more."""
    found: list[_Way] = []
    try:
        for way in islice(ways, most):
            found.append(way)
    except _Unknown as error:
        return found, str(error)
    return found, "nothing that the model keeps makes it"


class _Walk:
    """Ways back through the recorded ops."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.readers: dict[int, list[int]] = {}
        for step, event in enumerate(trace.events):
            for tensor in event.inputs:
                self.readers.setdefault(id(tensor), []).append(step)
        self._starts, _, _, self._ends = axes_of(trace.held)

    def ways(self, scale: Scale) -> tuple[list[_Way], str]:
        """Ways back from the operand of a product, and why there are no more."""
        atoms = scale.of if isinstance(scale.of, np.ndarray) else self._kept(scale.operand)
        return _some(self._ways(scale.operand, scale.step, np.unique(atoms)), MOST_WAYS)

    def fold(self, scale: Scale, ids: Ids, again: Sequence[_Way]) -> Fold:
        """The first way back on which nothing else reads what would be multiplied."""
        ways, why = self.ways(scale)
        for way in ways:
            both = [way, *(w for w in again if w.targets == way.targets)]
            shared = self._shared(both, np.array([a for t in way.targets for a in t.atoms], dtype=np.int64))
            if not shared:
                return Fold(ids, scale.power, tuple(sorted(way.targets)), "", scale.step)
            why = shared
        return Fold(ids, scale.power, (), why, scale.step)

    def _kept(self, tensor: Labelled) -> Ids:
        """The atoms of the last dim of a tensor that are positions of tensors which the model keeps."""
        for label in reversed(tensor.dims):
            if label is not None and label.ids.min() > 0:
                axis = np.searchsorted(self._starts, label.ids, side="right") - 1
                if (axis >= 0).all() and (label.ids < self._ends[axis]).all():
                    return label.ids
        return np.empty(0, dtype=np.int64)

    def _ways(self, tensor: Labelled, reader: int, atoms: Ids) -> Iterator[_Way]:
        """Every way back from a tensor that op ``reader`` reads (the first ones of several operands)."""
        if tensor.source < 0:
            raise _Unknown("it stems from a tensor that no op makes")
        event = self.trace.events[tensor.source]
        if sum(t is tensor for t in self.trace.events[reader].inputs) != 1:
            raise _Unknown(f"{self.trace.events[reader].name} reads it twice")
        here = (tensor, reader)
        if event.name in _PASSES or (event.name == "div" and event.inputs):
            ways: Iterator[Sequence[_Way]] = ((w,) for w in self._ways(event.inputs[0], tensor.source, atoms))
        elif event.name in _PRODUCTS:
            ways = ((w,) for w in self._ways_of_a_product(event.inputs, tensor.source, atoms))
        elif event.name in _SUMS and len(event.inputs) > 1:
            parts = [_some(self._ways(t, tensor.source, atoms), 2) for t in event.inputs]
            missing = [why for found, why in parts if not found]
            if missing:
                raise _Unknown(missing[0])
            ways = product(*(found for found, _ in parts))
        elif event.name in _MAKERS:
            ways = iter([(self._made(tensor, atoms),)])
        else:
            raise _Unknown(f"{event.name} does not hand a factor on")
        for found in ways:
            targets = frozenset(t for w in found for t in w.targets)
            yield _Way(targets, (here, *(s for w in found for s in w.steps)))

    def _ways_of_a_product(self, operands: Sequence[Labelled], step: int, atoms: Ids) -> Iterator[_Way]:
        why = "none of its factors can be scaled"
        for operand in operands:
            try:
                wanted = atoms if atoms.size else np.unique(self._kept(operand))
                if operand.source <= -2:
                    yield self._parameter(operand, step, wanted)
                else:
                    yield from self._ways(operand, step, wanted)
            except _Unknown as error:
                why = str(error)
        raise _Unknown(why)

    def _parameter(self, tensor: Labelled, step: int, atoms: Ids) -> _Way:
        """A parameter that is a factor itself and holds the positions."""
        held = self.trace.held[-2 - tensor.source]
        if held.places[0].kind != "parameter":
            raise _Unknown(f"{held.name} is no parameter")
        for dim, (start, n) in enumerate(zip(held.starts, held.shape, strict=True)):
            if start >= 0 and atoms.size and atoms[0] >= start and atoms[-1] < start + n:
                target = Target(-2 - tensor.source, dim, tuple(atoms.tolist()))
                return _Way(frozenset([target]), ((tensor, step),))
        raise _Unknown(f"{held.name} does not make it")

    def _made(self, tensor: Labelled, atoms: Ids) -> _Way:
        """The weight and bias of the op that makes a tensor: their positions that the ``atoms`` stem from."""
        event = self.trace.events[tensor.source]
        label = next((d for d in tensor.dims if d is not None and np.isin(atoms, d.ids).all()), None)
        if label is None or not atoms.size:
            raise _Unknown(f"the rows of {event.name} that make it cannot be told")
        inside = np.isin(label.ids, atoms).reshape(-1, label.size)
        if not (inside == inside[0]).all():
            raise _Unknown(f"{event.name} makes other positions with the same entries")
        targets: list[Target] = []
        steps: list[tuple[Labelled, int]] = []
        for index, dim in _MAKERS[event.name]:
            operand = event.inputs[index] if index < len(event.inputs) else None
            if operand is None and index == _MAKERS[event.name][-1][0] and targets:
                continue  # without bias
            held = self.trace.held[-2 - operand.source] if operand is not None and operand.source <= -2 else None
            if held is None or operand is None or held.places[0].kind != "parameter":
                raise _Unknown(f"{event.name} has no parameter that makes it")
            axis = dim % len(held.shape)
            if held.shape[axis] != label.size or held.starts[axis] < 0:
                raise _Unknown(f"{held.name} does not make it position by position")
            entries = held.starts[axis] + np.flatnonzero(inside[0])
            targets.append(Target(-2 - operand.source, axis, tuple(entries.tolist())))
            steps.append((operand, tensor.source))
        return _Way(frozenset(targets), tuple(steps))

    def _shared(self, ways: Sequence[_Way], atoms: Ids) -> str:
        """Why something else would change too (empty: nothing would)."""
        steps = [step for way in ways for step in way.steps]
        own = {(id(tensor), reader) for tensor, reader in steps}
        for tensor, _ in steps:
            for step in self.readers[id(tensor)]:
                event = self.trace.events[step]
                if (id(tensor), step) in own:
                    continue
                carried = [d.ids for t in event.results for d in t.dims if d is not None]
                if event.name not in _CUTS or any(np.isin(ids, atoms).any() for ids in carried):
                    return f"{event.name} reads it too"
        return ""
