"""One pass of all samples through the dense and the pruned model side by side, in which every layer is refitted.

Each batch runs in two lanes. The lanes of the pruned model halt at every layer to be refitted; when all that take part
are there, the dense lanes are brought to the same place, the layer is solved from what the pruned lanes hold and the
dense ones have got, and all go on with its new weights. So every layer sees inputs that the repaired prefix makes, for
the price of one forward pass of each model. Batches join as late as :mod:`~prunus.repair.crowd` lets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunus.distributed import count
from prunus.repair.chains import Chain
from prunus.repair.consumers import Consumer
from prunus.repair.crowd import Heap, Place, crowds
from prunus.repair.judge import judged
from prunus.repair.lanes import Lane
from prunus.repair.moments import Sums
from prunus.repair.recurrent import Gates
from prunus.repair.ridge import Fit, as_on_first_rank, refit
from prunus.repair.samples import LANES, Batch, held_share, least
from prunus.repair.sites import Call
from prunus.repair.twins import sharing
from prunus.repair.watch import Key, Use, Watch, Weights, guarded

Run = Callable[[nn.Module, Any], Any]
ROWS = 16_384  # at least so many rows are used where there are so many,
ROWS_PER_INPUT = 16  # or so many for each unknown of an output
AT_ONCE = 1 << 21  # numbers of a block of rows


@dataclass(frozen=True)
class Stop:
    """Where a lane halts: a use, what the dense model computed there, and the other operand of a later sum."""

    use: Use
    output: Tensor | None
    other: Tensor | None


@dataclass(frozen=True)
class Refitted:
    """What became of one consumer."""

    consumer: Consumer
    fit: Fit | None
    rows: int
    corrected: bool
    reason: str = ""


@dataclass
class Sweep:
    """The settings of a pass, and the two models: the pruned one's tensors are written to, the dense one's are not."""

    dense: nn.Module
    pruned: nn.Module
    run: Run
    batches: Sequence[Batch]
    ridges: Sequence[float]
    names: Mapping[bool, Sequence[str]]  # of the ops that a recorded run of the dense (True) and the pruned model made
    places: Mapping[Key, Place]  # what one batch holds, and how many are needed
    room: int  # bytes that waiting batches may hold together
    done: dict[str, Refitted] = field(default_factory=dict)
    tied: dict[str, tuple[Consumer, Tensor]] = field(default_factory=dict)  # looked up too: as they were
    _solved: set[Key] = field(default_factory=set)
    _heap: Heap = field(default_factory=Heap)

    def over(self, consumers: Sequence[Consumer]) -> list[Any]:
        """Refit all consumers; what the lanes returned at the end, for each batch (dense, pruned)."""
        todo = list(consumers)
        while True:
            again = [c for c in todo if len(c.keys) > 1]
            results = self._pass(todo, restart=len(again) <= MOST_RESTARTS)
            todo = [c for c in todo if c.keys[-1] not in self._solved]
            if results is not None:
                for consumer in todo:
                    self._note(consumer, None, _Sums(), "no samples reach it")
                return results

    def _pass(self, consumers: Sequence[Consumer], restart: bool) -> list[Any] | None:
        """One pass; None if another must follow, because earlier calls of a layer ran with its old weights.

        That one begins at once with ``restart``; without, the other layers that run several times are solved first.
        """
        order = {key: k for k, key in enumerate(sorted_keys(consumers))}
        by_key = {key: c for c in consumers for key in c.keys}
        places = [replace(self.places[key], same=_one(by_key[key])) for key in order]
        counts = crowds(places, len(self.batches), least(self.batches), self.room)
        stale = False
        with self._lanes(by_key) as pairs:
            sums: dict[int, _Sums] = {}
            for key, most in zip(order, counts, strict=True):
                _leave(pairs, most)
                self._join(pairs, by_key, most)
                for _, _, pruned in pairs:
                    self._bring(pruned, key, order)
                here = [(b, d, p) for b, d, p in pairs if _at(p, key)]
                consumer = by_key[key]
                if (here or count() > 1) and (not stale or len(consumer.keys) > 1):
                    state = sums.setdefault(id(consumer), _Sums())
                    stale = self._visit(state, consumer, key, here, order) or stale
                    if stale and restart:
                        return None
            if stale:
                return None
            for batch, *lanes in pairs:
                for lane in lanes if batch.held is False else ():
                    lane.close()
            return self._results(pairs)

    def _results(self, pairs: Sequence[tuple[Batch, Lane[Stop], Lane[Stop]]]) -> list[Any]:
        """What each batch is judged by, for both models; None for those that nothing is judged by, or that had left."""
        results: list[Any] = [None] * len(self.batches)
        for k, (batch, *lanes) in enumerate(pairs):
            for lane in lanes:
                while batch.held is not False and lane.advance() is not None:
                    pass
            if batch.held is not False:
                results[k] = tuple(judged(batch, lane.result) for lane in lanes)
                for lane in lanes:
                    lane.result = None
        return results

    def _visit(
        self,
        sums: _Sums,
        consumer: Consumer,
        key: Key,
        here: Sequence[tuple[Batch, Lane[Stop], Lane[Stop]]],
        order: Mapping[Key, int],
    ) -> bool:
        """See to one call of a consumer, for which lanes wait; whether earlier calls should have run otherwise."""
        shares = tuple(sum(b.held is not other for b, _, _ in here) for other in (True, False))
        for batch, dense, pruned in here:
            self._bring(dense, key, order)
            if _at(dense, key):
                self._feed(sums, consumer, batch, dense, pruned, shares)
        if key != consumer.keys[-1]:
            return False
        return self._solve(consumer, sums, [p for _, _, p in here]) and len(consumer.keys) > 1

    @contextmanager
    def _lanes(self, by_key: Mapping[Key, Consumer]) -> Iterator[list[tuple[Batch, Lane[Stop], Lane[Stop]]]]:
        pairs: list[tuple[Batch, Lane[Stop], Lane[Stop]]] = []
        try:
            yield pairs
        finally:
            _leave(pairs, 0)

    def _join(
        self, pairs: list[tuple[Batch, Lane[Stop], Lane[Stop]]], by_key: Mapping[Key, Consumer], count: int
    ) -> None:
        """Let more batches take part, until there are ``count``."""
        for batch in self.batches[len(pairs) : count]:
            dense, pruned = (
                Lane(_Follower(sharing(model), batch.inputs, self.run, by_key, first, self.names[first]))
                for model, first in ((self.dense, True), (self.pruned, False))
            )
            pairs.append((batch, dense, pruned))

    def _bring(self, lane: Lane[Stop], key: Key, order: Mapping[Key, int]) -> None:
        """Let a lane go on until it is at ``key`` or past it."""
        while not lane.over and (lane.stop is None or order[lane.stop.use.key] < order[key]):
            lane.advance()
        self._heap.tidy()

    def _feed(
        self,
        sums: _Sums,
        consumer: Consumer,
        batch: Batch,
        dense: Lane[Stop],
        pruned: Lane[Stop],
        shares: tuple[int, ...],
    ) -> None:
        """Add what one batch says about a consumer."""
        a, b = dense.stop, pruned.stop
        if a is None or b is None or a.output is None:
            return
        call, target = b.use.call, a.output
        if not _comparable(a.use.call, call):
            sums.reason = "the two models call it with different numbers of rows"
            return
        chains = consumer.chains[b.use.key]
        others = None
        if a.other is not None and b.other is not None and consumer.factor is None:
            others = _other(chains[0], a.other, target), _other(chains[1], b.other, None)
        kept = consumer.kept.to(target.device)
        states = None if consumer.states is None else consumer.states.to(target.device)
        if isinstance(call, Gates):
            call = call.forced_by(a.use.call, states)
        rows = call.prepared()
        samples, each = call.positions(target)
        for held, picked in _picks(batch, samples, each, wanted(call), shares, target.device):
            for part in picked.split(max(call.summed // call.groups, AT_ONCE // (call.summed * call.groups), 64)):
                y = call.out_rows(target, part)[:, kept]
                if consumer.factor is not None:
                    y = y * consumer.factor.to(y)
                if others is not None and others[0] is not None and others[1] is not None:
                    y = y + call.out_rows(others[0], part)[:, kept] - call.out_rows(others[1], part)
                    sums.corrected = True
                if isinstance(call, Gates) and isinstance(a.use.call, Gates) and states is not None:
                    y = y + call.missing(a.use.call, states, kept, part)
                y = y.reshape(len(part), call.groups, -1).transpose(0, 1)
                (sums.held if held else sums.fit).add(rows(part, call.places(target)), y)

    def _solve(self, consumer: Consumer, sums: _Sums, pruned: Sequence[Lane[Stop]]) -> bool:
        """Refit one consumer, and let the lanes that wait at it go on with its new weights, if they are better."""
        self._solved.add(consumer.keys[-1])
        use = next((lane.stop.use for lane in pruned if lane.stop is not None), consumer.use)
        weight = use.call.matrix(use.call.weight)
        fit, held = (s.moments(weight, consumer.name) for s in (sums.fit, sums.held))
        if fit is None or held is None:
            reason = sums.reason or ("its inputs are not finite" if sums.fit.count else "no samples reach it")
            self._note(consumer, None, sums, reason)
            return False
        bias = None if use.call.bias is None else use.call.bias.reshape(weight.shape[0], -1)
        sums.fit.count = fit.count
        found = as_on_first_rank(refit(weight, bias, fit, held, self.ridges, consumer.free_bias), consumer.name)
        better = found.after < found.before
        if better:
            self._write(consumer, use, found)
            for lane in pruned[1:]:
                if lane.stop is not None:
                    _refresh(lane.stop.use.call, use.call)
        self._note(consumer, found, sums, "" if better else "no fit is better on held-out samples")
        return better

    def _note(self, consumer: Consumer, fit: Fit | None, sums: _Sums, reason: str) -> None:
        label = consumer.layer
        if label in self.done:
            label = f"{label} [{consumer.use.region.starts[consumer.use.call.out_axis]}:]"
        self.done[label] = Refitted(consumer, fit, sums.fit.count, sums.corrected, reason)

    def _write(self, consumer: Consumer, use: Use, fit: Fit) -> None:
        parameters = dict(self.pruned.named_parameters())
        call, new = use.call, use.call.unmatrix(fit.weight)
        if consumer.look_up is not None:
            self.tied.setdefault(consumer.name, (consumer, parameters[consumer.name].clone()))
        use.region.of(parameters[consumer.name]).copy_(new)
        call.weight.copy_(new)
        if use.bias is not None and call.bias is not None:
            use.bias[1].of(parameters[use.bias[0]]).copy_(fit.bias.flatten())
            call.bias.copy_(fit.bias.flatten())
        elif consumer.norm is not None:
            consumer.norm.mean.sub_(fit.bias.flatten().to(consumer.norm.mean.dtype))


MOST_RESTARTS = 6  # where more layers than this run several times, the pass goes on with what ran before


class _Sums:
    def __init__(self) -> None:
        self.fit, self.held = Sums(), Sums()
        self.corrected = False
        self.reason = ""


def sorted_keys(consumers: Sequence[Consumer]) -> list[Key]:
    """The keys of all consumers in the order in which they run."""
    steps = [(c.steps[key], key) for c in consumers for key in c.keys]
    return [key for _, key in sorted(steps)]


class _Follower:
    """Runs one model on one batch in a lane, and halts at the uses of consumers."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        run: Run,
        by_key: Mapping[Key, Consumer],
        dense: bool,
        names: Sequence[str],
    ) -> None:
        self.model, self.inputs, self.run = model, inputs, run
        self.by_key, self.dense, self.names = by_key, dense, names
        wanted: dict[int, int] = {}
        for key, consumer in by_key.items():
            step = self._chain(consumer, key).other
            if step is not None:
                wanted[step] = wanted.get(step, 0) + 1
        self._wanted = wanted
        self._kept: dict[int, Tensor] = {}
        self._same = True  # as the recorded run, so far

    def _chain(self, consumer: Consumer, key: Key) -> Chain:
        return consumer.chains[key][0 if self.dense else 1]

    def __call__(self, lane: Lane[Stop]) -> Any:
        def before(use: Use) -> None:
            if not self.dense and use.key in self.by_key:
                lane.halt(Stop(use, None, self._other(use.key)))

        def after(step: int, func: Any, args: Any, kwargs: Any, result: Any, use: Use | None) -> None:
            lane.check()
            self._same = self._same and step < len(self.names) and func.overloadpacket.__name__ == self.names[step]
            if self._same and step in self._wanted and isinstance(result, Tensor):
                self._kept[step] = result
            if self.dense and use is not None and use.key in self.by_key:
                lane.halt(Stop(use, result, self._other(use.key)))

        with guarded(), Watch(Weights(self.model), before, after):
            return self.run(self.model, self.inputs)

    def _other(self, key: Key) -> Tensor | None:
        step = self._chain(self.by_key[key], key).other
        if step is None:
            return None
        self._wanted[step] -= 1
        found = self._kept.get(step)
        if self._wanted[step] == 0:
            self._kept.pop(step, None)
        return found


def wanted(call: Call) -> int:
    """How many rows to fit a call on, where there are so many."""
    return max(ROWS, ROWS_PER_INPUT * call.summed)


def _one(consumer: Consumer) -> int | None:
    return id(consumer) if len(consumer.keys) > 1 else None


def _leave(pairs: list[tuple[Batch, Lane[Stop], Lane[Stop]]], count: int) -> None:
    """End the lanes beyond the first ``count`` pairs."""
    for _, *lanes in pairs[count:]:
        for lane in lanes:
            lane.close()
    del pairs[count:]


def _at(lane: Lane[Stop], key: Key) -> bool:
    return lane.stop is not None and lane.stop.use.key == key


def _comparable(dense: Call, pruned: Call) -> bool:
    if pruned.spatial:
        return dense.x.shape[pruned.channel + 1 :] == pruned.x.shape[pruned.channel + 1 :] and (
            dense.x.shape[0] == pruned.x.shape[0]
        )
    return dense.x.shape[:-1] == pruned.x.shape[:-1]


def _other(chain: Chain, other: Tensor, like: Tensor | None) -> Tensor | None:
    try:
        found = chain.back(other)
    except RuntimeError:
        return None
    return found if like is None or found.shape == like.shape else None


def _refresh(call: Call, source: Call) -> None:
    """Copies of a weight in another dtype, which the op has been given already."""
    if call.weight.data_ptr() != source.weight.data_ptr():
        call.weight.copy_(source.weight)
    if call.bias is not None and source.bias is not None and call.bias.data_ptr() != source.bias.data_ptr():
        call.bias.copy_(source.bias)


def _picks(
    batch: Batch, samples: int, each: int, rows: int, shares: Sequence[int], device: torch.device
) -> Iterator[tuple[bool, Tensor]]:
    """Which rows to fit on and which to judge by: (held out, indices), spread evenly where there are too many.

    ``rows`` are wanted to fit on and a quarter of that to judge by, from as many batches as ``shares`` says.
    """
    counted = None if batch.mask is None or batch.mask.numel() != samples * each else batch.mask.flatten()
    if batch.held is None and samples < LANES:
        samples, each = samples * each, 1
    out = held_share(samples) if batch.held is None else samples * batch.held
    for held, start, stop in ((False, 0, samples - out), (True, samples - out, samples)):
        first, last = start * each, stop * each
        places = None if counted is None else first + counted[first:last].nonzero().flatten()
        total = last - first if places is None else len(places)
        if total:
            most = -(-rows // (4 * shares[1] if held else shares[0]))
            picked = _spread(total, most, device)
            yield held, first + picked if places is None else places[picked]


def _spread(total: int, most: int, device: torch.device) -> Tensor:
    if total <= most:
        return torch.arange(total, device=device)
    generator = torch.Generator().manual_seed(total)
    edges = torch.arange(most, dtype=torch.float64) * (total / most)
    picked = edges + torch.rand(most, generator=generator, dtype=torch.float64) * (total / most)
    return picked.long().clamp_max(total - 1).to(device)
