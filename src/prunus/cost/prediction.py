"""Latency of a plan, predicted from a table of measured calls, without cutting the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import nn

from prunus.cost.counting import call as run_model
from prunus.cost.extents import Extents
from prunus.cost.formulas import MACS
from prunus.cost.recorded import Call, Shape, record_calls
from prunus.cost.table import LatencyTable
from prunus.coupling import Coupling
from prunus.labels import first_row
from prunus.plan import Alive
from prunus.untouched import untouched

FINE, COARSE = 8, 4  # widths at which a call is measured: those that multiply, and all others
CACHED = 16 << 20  # bytes of weights that may stay in a processor's cache from one run to the next
DOUBTS, SLOWER = 3, 1.2  # how often a narrow call is timed again that takes so much longer than at full width
STEP = 8  # measured widths are multiples of it
_MULTIPLY = frozenset(name.partition("::")[2] for name in MACS)


@dataclass(frozen=True)
class _Timed:
    """A call whose time counts: by tensor, the places of its dims; the variables, as (places, full size)."""

    call: Call
    places: tuple[tuple[int, ...], ...]
    variables: tuple[tuple[tuple[int, ...], int], ...]


class LatencyModel:
    """Milliseconds of one run: the sum of its calls, each from a table, scaled to what the whole model was timed at.

    ``model(alive)`` interpolates between measured widths (about an eighth of the full width apart, in multiples of 8;
    for calls that do not multiply a quarter); ``exact(alive)`` measures every call at the very widths. Calls of modules
    in Python cost a constant each, as timed on this machine; what then is left of the dense model's time is shared out
    in proportion.

    Args:
        coupling: a traced model.
        example_inputs: what it was traced with, on its device.
        table: measured calls.
        forward_fn: ``forward_fn(model, example_inputs)`` to use instead of calling the model.

    Source: latency tables over widths, as in HALP (arXiv 2110.10811) and ZipLM (arXiv 2302.04089).
    """

    def __init__(
        self,
        coupling: Coupling,
        example_inputs: Any,
        table: LatencyTable,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        self.coupling, self._table = coupling, table
        self._extents = Extents()
        model = coupling.trace.model
        calls, modules = record_calls(model, example_inputs, forward_fn)
        self._checked: set[tuple[Any, ...]] = set()
        self._timed = [t for t in self._matched(calls) if not t.call.free]
        weights = (h.tensor for h in coupling.trace.held if h.places[0].kind == "parameter")
        self._cold = sum(t.numel() * t.element_size() for t in weights) > CACHED
        alive = np.ones(coupling.trace.ledger.size, dtype=bool)
        self._full = self._extents.sizes(alive)
        self._run = run_model if forward_fn is None else forward_fn
        self._inputs = example_inputs
        whole = nn.Sequential(*(nn.Identity() for _ in range(64)))
        nothing = torch.zeros(1, device=table.device)
        self._overhead = modules * table.timer(lambda: whole(nothing), table.device) / 65
        (self.dense,) = self.race(model)
        self._parts = self._sum(self._full, exact=True)
        self._overhead = min(self._overhead, 0.5 * self.dense)
        self._scale = (self.dense - self._overhead) / self._parts if self._parts > 0 else 1.0

    def __call__(self, alive: Alive) -> float:
        """The predicted milliseconds with only the ``alive`` atoms, between measured widths."""
        return self._overhead + self._scale * self._sum(self._extents.sizes(alive), exact=False)

    def exact(self, alive: Alive) -> float:
        """The same with every call measured at its very widths."""
        return self._overhead + self._scale * self._sum(self._extents.sizes(alive), exact=True)

    def race(self, *models: nn.Module) -> list[float]:
        """The milliseconds of one run of each model, run in turns."""
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(untouched(model))
            return self._table.race([partial(self._run, model, self._inputs) for model in models], self._table.device)

    def _sum(self, sizes: Any, exact: bool) -> float:
        return sum(self._at(one, sizes) if exact else self._between(one, sizes) for one in self._timed)

    def _at(self, one: _Timed, sizes: Any) -> float:
        """The time of a call at the very widths; one that is slower than at full width may have met noise, or both."""
        shapes, whole = ([tuple(int(n[k]) for k in places) for places in one.places] for n in (sizes, self._full))
        found = self._table.time(one.call, shapes, self._cold)
        key = (one.call.name, *map(tuple, shapes))
        if shapes == whole or key in self._checked:
            return found
        self._checked.add(key)
        full = self._table.time(one.call, whole, self._cold)
        for _ in range(DOUBTS):
            if found <= SLOWER * full:
                break
            found = self._table.again(one.call, shapes, self._cold)
        return found

    def _between(self, one: _Timed, sizes: Any) -> float:
        """Linear between the measured widths around the present ones: of each of two, or of all in proportion."""
        wide = [full for _, full in one.variables]
        now = [int(sizes[places[0]]) for places, _ in one.variables]
        if now == wide or any(n == 0 for n in now):
            return self._at(one, self._full) if now == wide else 0.0
        parts = FINE if one.call.name in _MULTIPLY else COARSE
        if len(wide) > 2:
            share = prod(n / full for n, full in zip(now, wide, strict=True)) ** (1 / len(wide))
            low, high = np.floor(share * parts) / parts, np.ceil(share * parts) / parts
            low, high = max(low, 1 / parts), max(high, 1 / parts)
            ends = [self._measured(one, [max(round(full * s), 1) for full in wide]) for s in (low, high)]
            return float(ends[0] if low == high else np.interp(share, (low, high), ends))
        brackets = [_bracket(n, full, parts) for n, full in zip(now, wide, strict=True)]
        total = 0.0
        for corner in range(2 ** len(brackets)):
            weight, widths = 1.0, []
            for k, (low, high, along) in enumerate(brackets):
                upper = corner >> k & 1
                weight *= along if upper else 1 - along
                widths.append(high if upper else low)
            if weight:
                total += weight * self._measured(one, widths)
        return total

    def _measured(self, one: _Timed, widths: Sequence[int]) -> float:
        sizes = self._full.copy()
        for (places, _), width in zip(one.variables, widths, strict=True):
            sizes[list(places)] = width
        return self._at(one, sizes)

    def _matched(self, calls: Sequence[Call]) -> list[_Timed]:
        """The calls with the labels that tracing gave their tensors; a call that tracing did not keep is fixed."""
        trace = self.coupling.trace
        found, at = [], 0
        for event in trace.events[: trace.ledger.evaluated or None]:
            shapes = tuple(tuple(t.shape) for t in event.inputs)
            place = next((k for k in range(at, len(calls)) if _same(calls[k], event.name, shapes)), None)
            if place is None:
                continue
            found += [self._timed_as(call, [self._fixed(s) for s in call.shapes]) for call in calls[at:place]]
            call = calls[place]
            found.append(self._timed_as(call, [self._extents.shape(t) for t in event.inputs[: len(call.specs)]]))
            at = place + 1
        return found + [self._timed_as(call, [self._fixed(s) for s in call.shapes]) for call in calls[at:]]

    def _fixed(self, shape: Shape) -> tuple[int, ...]:
        return tuple(self._extents.dim(None, size) for size in shape)

    def _timed_as(self, call: Call, places: Sequence[tuple[int, ...]]) -> _Timed:
        by_units: dict[bytes, list[int]] = {}
        full: dict[bytes, int] = {}
        for place in dict.fromkeys(k for dims in places for k in dims):
            ids = self._extents.ids(place)
            if ids is not None and self.coupling.removable[(row := self.coupling.unit_of_atom[first_row(ids)])].any():
                key = np.sort(row).tobytes()
                by_units.setdefault(key, []).append(place)
                full[key] = len(row)
        variables = tuple((tuple(found), full[key]) for key, found in by_units.items())
        return _Timed(call, tuple(places), variables)


def _same(call: Call, name: str, shapes: tuple[Shape, ...]) -> bool:
    return call.name == name and (call.shapes == shapes or call.shapes == shapes[:1])


def _bracket(now: int, full: int, parts: int) -> tuple[int, int, float]:
    """The measured widths below and above, and how far between them."""
    step = max(-(-full // parts) + STEP - 1, STEP) // STEP * STEP
    widths = [*range(step, full, step), full]
    if now <= widths[0]:
        return widths[0], widths[0], 0.0
    above = int(np.searchsorted(widths, now))
    low, high = widths[above - 1], widths[above]
    return low, high, (now - low) / (high - low)
