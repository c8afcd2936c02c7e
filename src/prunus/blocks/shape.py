"""Where a child of a container is a residual block, from the steps of one run: nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prunus.blocks.flow import Call, Flow, Step

ADDS = frozenset({"add", "sub", "addcmul"})
NORMS = frozenset(
    {"native_layer_norm", "native_batch_norm", "native_group_norm", "_fused_rms_norm", "cudnn_batch_norm", "rms_norm"}
    | {"_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "batch_norm", "layer_norm"}
)
JOINS = frozenset({"cat", "stack"})
CONVOLUTIONS = frozenset({"convolution", "conv1d", "conv2d", "conv3d"})
NO_STREAM = "its output is not its input with branches added"
MOVES = frozenset(
    {"view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "clone", "contiguous"}
    | {
        "alias",
        "detach",
        "_to_copy",
        "squeeze",
        "unsqueeze",
        "flatten",
        "unflatten",
        "constant_pad_nd",
        "slice",
        "roll",
    }
)


@dataclass(frozen=True)
class Pair:
    """A stream through a call: which float input, which float output, and the steps of the path between them.

    ``path`` holds (step, what goes in, what comes out, kind); a kind is "add", "norm" or "same".
    """

    entry: int
    exit: int
    path: tuple[tuple[int, int, int, str], ...]

    @property
    def adds(self) -> tuple[int, ...]:
        """The steps that add a branch."""
        return tuple(step for step, _, _, kind in self.path if kind == "add")


@dataclass(frozen=True)
class Beside:
    """The stream before and after a child are put side by side for a convolution, which may read the first twice.

    Args:
        weight: the weight of the convolution, by its name.
        width: how many channels it reads.
        size: how many channels the stream has.
        before: the first of these that are the stream before the child.
        after: the first of those that are the stream after it.
    """

    weight: str
    width: int
    size: int
    before: int
    after: int


@dataclass(frozen=True)
class Inner:
    """A child that computes ``x -> x + f(x)`` (or a chain of these) for each of its streams."""

    path: str
    call: Call
    pairs: tuple[Pair, ...]
    beside: tuple[Beside, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The children that go."""
        return (self.path,)


@dataclass(frozen=True)
class Outer:
    """Children whose output the code around adds to a stream; ``adds`` are (step, which operand is the stream)."""

    paths: tuple[str, ...]
    adds: tuple[tuple[int, int], ...]

    @property
    def path(self) -> str:
        """The first child that goes."""
        return self.paths[0]


class Reading:
    """A flow, and who reads each tensor."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.readers: dict[int, list[int]] = {}
        self.maker: dict[int, int] = {}
        for k, step in enumerate(flow.steps):
            for number in step.ins:
                self.readers.setdefault(number, []).append(k)
            for number in step.outs:
                self.maker[number] = k

    def inside(self, path: str) -> list[int]:
        """The steps that run in a module, in the modules in it, or while it is called."""
        spans = [range(call.start, call.end) for call in self.flow.calls.get(path, ())]
        if spans:
            return [k for span in spans for k in span]
        return [k for k, s in enumerate(self.flow.steps) if s.module == path or s.module.startswith(f"{path}.")]

    def residual_adds(self) -> Iterator[tuple[int, int]]:
        """The steps that add to a tensor what was computed from it, and which operand that tensor is."""
        steps, active, shapes = self.flow.steps, self.flow.active, self.flow.shapes
        root = self._roots()
        watched: dict[int, int] = {}
        for step in steps:
            if step.name in ADDS:
                for number in step.ins:
                    if number in active:
                        watched.setdefault(root.get(number, number), 1 << len(watched))
        near: dict[int, int] = {}  # of which watched tensors a tensor was computed entry by entry,
        far: dict[int, int] = {}  # and of which by an op that mixes entries
        for k, step in enumerate(steps):
            entries = mixed = 0
            for number in step.ins:
                entries |= near.get(number, 0) | watched.get(number, 0)
                mixed |= far.get(number, 0)
            if step.name in ADDS and len(step.ins) > 1:
                for spot in range(1 if step.name != "add" else 2):
                    stream, other = step.ins[spot], step.ins[1 - spot if len(step.ins) == 2 else -1]
                    same = shapes[stream] == shapes[other] == shapes[step.outs[0]]
                    if same and far.get(other, 0) & watched.get(root.get(stream, stream), 0):
                        yield k, spot
                        break
            if not (step.pointwise or step.name in MOVES or step.name in NORMS):
                entries, mixed = 0, entries | mixed
            for number in step.outs:
                near[number], far[number] = entries, mixed

    def _roots(self) -> dict[int, int]:
        """The tensor that each moved one (seen in another shape) has its entries from."""
        root: dict[int, int] = {}
        for step in self.flow.steps:
            if step.name in MOVES and step.ins and step.outs:
                root[step.outs[0]] = root.get(step.ins[0], step.ins[0])
        return root

    def origin(self, number: int) -> str:
        """The module that computed a tensor, before it was scaled, moved or passed on."""
        while number in self.maker:
            step = self.flow.steps[self.maker[number]]
            through = [n for n in step.ins if n in self.flow.active]
            if len(through) != 1 or not (step.pointwise or step.name in MOVES):
                return step.module
            module, number = step.module, through[0]
            if number not in self.maker:
                return module
        return ""


def inner(reading: Reading, path: str) -> Inner | str:
    """How a child is a residual block by itself, or why it is none."""
    calls = reading.flow.calls.get(path, ())
    if len(calls) != 1:
        return "it is not called as a module" if not calls else f"it runs {len(calls)} times in one pass"
    call = calls[0]
    span = range(call.start, call.end)
    streams = {number: _stream(reading, call, number) for number in dict.fromkeys(call.ins)}
    pairs: list[Pair] = []
    others: list[int] = []
    for spot, number in enumerate(call.outs):
        if number in call.ins:
            continue
        later = [k for k in reading.readers.get(number, ()) if k not in span]
        if not later and number not in reading.flow.outputs:
            continue
        entry = next((e for e, found in streams.items() if number in found), None)
        if entry is not None:
            pairs.append(Pair(call.ins.index(entry), spot, _walk(streams[entry], number)))
        elif later:
            others.append(later[0])
    if not any(pair.adds for pair in pairs):
        return NO_STREAM
    if others:
        reader = reading.flow.steps[others[0]]
        return f"{reader.module or 'the model'} reads something else that it computes ({reader.name})"
    shapes = reading.flow.shapes
    if any(shapes[call.ins[p.entry]] != shapes[call.outs[p.exit]] for p in pairs):
        return "its output has another shape than its input"
    beside = _all_beside(reading, call, pairs)
    if isinstance(beside, str):
        return beside
    returned = {call.outs[p.exit] for p in pairs}.union(call.ins)
    return _leak(reading, span, returned) or Inner(path, call, tuple(pairs), beside)


def _all_beside(reading: Reading, call: Call, pairs: Sequence[Pair]) -> tuple[Beside, ...] | str:
    """Where streams before and after a call are put side by side, or why they may not be."""
    found: list[Beside] = []
    for pair in pairs:
        before, after = call.ins[pair.entry], call.outs[pair.exit]
        for k in sorted(set(reading.readers.get(before, ())).intersection(reading.readers.get(after, ()))):
            step = reading.flow.steps[k]
            if step.name in JOINS:
                place = _beside(reading, step, before, after)
                if place is None:
                    module = step.module or "the model"
                    return f"{module} puts its output beside its input ({step.name}), which sets a width"
                found.append(place)
    return tuple(found)


def _beside(reading: Reading, step: Step, before: int, after: int) -> Beside | None:
    """Where the stream before and after stand among the channels that one convolution, and nothing else, reads."""
    flow = reading.flow
    readers = reading.readers.get(step.outs[0], ())
    if step.name != "cat" or len(readers) != 1 or step.outs[0] in flow.outputs:
        return None
    reader, whole = flow.steps[readers[0]], flow.shapes[step.outs[0]]
    if reader.name not in CONVOLUTIONS or reader.ins[0] != step.outs[0] or len(whole) < 3:
        return None
    weight, sizes = flow.shapes[reader.ins[1]], [flow.shapes[n][1] for n in step.ins]
    name = flow.names.get(reader.ins[1])
    if name is None or len(weight) != len(whole) or not weight[1] == whole[1] == sum(sizes):
        return None
    spots = [step.ins.index(n) for n in (before, after)]
    if step.ins.count(before) > 1 or step.ins.count(after) > 1 or sizes[spots[0]] != sizes[spots[1]]:
        return None
    return Beside(name, whole[1], sizes[spots[0]], *(sum(sizes[:spot]) for spot in spots))


def _leak(reading: Reading, span: range, returned: set[int]) -> str:
    """Who else reads what is computed inside; empty if nobody does."""
    for k in span:
        for number in reading.flow.steps[k].outs:
            if number not in returned and number in reading.flow.active:
                later = [r for r in reading.readers.get(number, ()) if r >= span.stop]
                if later:
                    reader = reading.flow.steps[later[0]]
                    return f"{reader.module or 'the model'} reads what is computed inside ({reader.name})"
    return ""


_Found = dict[int, tuple[int, int, str]]  # tensor -> the tensor before it, the step between, the step's kind


def _stream(reading: Reading, call: Call, entry: int) -> _Found:
    """Every tensor that is the input ``entry`` with branches added, and how it came about."""
    found: _Found = {entry: (-1, -1, "")}
    below = {entry}
    for k in range(call.start, call.end):
        step = reading.flow.steps[k]
        if below.isdisjoint(step.ins):
            continue
        below.update(step.outs)
        kind = _kind(reading.flow, step, found, below)
        if kind and step.outs:
            before = next(n for n in step.ins if n in found)
            found.setdefault(step.outs[0], (before, k, kind))
    return found


def _kind(flow: Flow, step: Step, stream: _Found, below: set[int]) -> str:
    own = [n for n in step.ins if n in stream]
    others = [n for n in step.ins if n not in stream]
    if len(own) != 1:
        return ""
    if step.name in ADDS and others and any(n in below for n in others):
        same = flow.shapes[own[0]] == flow.shapes[step.outs[0]]
        return "add" if same and (step.name == "add" or step.ins[0] == own[0]) else ""
    if any(n in flow.active for n in others):
        return ""
    if step.name in NORMS:
        return "norm"
    return "same" if step.pointwise or step.name in MOVES else ""


def _walk(found: _Found, number: int) -> tuple[tuple[int, int, int, str], ...]:
    path = []
    while found[number][1] >= 0:
        before, step, kind = found[number]
        path.append((step, before, number, kind))
        number = before
    return tuple(reversed(path))


def outer(reading: Reading, *paths: str) -> Outer | str:
    """How what children compute is added to a stream by the code around them, or why it is not."""
    steps = reading.flow.steps
    inside = {k for path in paths for k in reading.inside(path)}
    if not inside:
        return "nothing runs in it"
    often = max(len(reading.flow.calls.get(path, ())) for path in paths)
    if often > 1:
        return f"it runs {often} times in one pass"
    made = {n for k in inside for n in steps[k].outs if n in reading.flow.active}
    adds: list[tuple[int, int]] = []
    for k in range(min(inside), len(steps)):
        if k in inside or made.isdisjoint(steps[k].ins):
            continue
        step = steps[k]
        others = [n for n in step.ins if n not in made and n in reading.flow.active]
        if step.name in ADDS and len(step.ins) == 2 and len(others) == 1:
            spot = step.ins.index(others[0])
            if reading.flow.shapes[others[0]] == reading.flow.shapes[step.outs[0]] and (step.name == "add" or not spot):
                adds.append((k, spot))
                continue
        if others or not (step.pointwise or step.name in MOVES):
            return f"what it computes is read by {step.module or 'the model'} ({step.name}), not only added to a stream"
        made.update(step.outs)
    return Outer(paths, tuple(adds)) if adds else "what it computes is not added to a stream"
