"""Whether a plan removes channels that may be constant, as far as the trace and a look at the weights can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunus.held import Held
from prunus.modes import Event
from prunus.plan import Plan, Removal
from prunus.repair.chains import BATCH_NORMS
from prunus.repair.sites import MULTIPLICATIONS
from prunus.rules.table import MOVES
from prunus.tracing import Trace

_SUMS = frozenset(["add", "sub", "rsub"])
_NO_READERS = frozenset([*_SUMS, "mul"])
"""Ops that have no bias into which a constant could go, whatever tensors of the model they read."""
_KEEPS = frozenset([*_SUMS, *MOVES, "cat", "stack", "embedding", "copy"])
"""Ops that do not make a constant of what varies, whatever zeros are in the tensors of the model that they read."""
_KEEPS_ZEROS = frozenset(
    [
        *(*MOVES, "cat", "stack", "mul", "mean", "sum", "dropout"),
        *("relu", "gelu", "silu", "leaky_relu", "tanh", "hardswish", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d"),
    ]
)
"""Ops that make zeros of zeros."""
_AFFINE = frozenset([*BATCH_NORMS, *MULTIPLICATIONS, "layer_norm", "group_norm", "mul"])
"""Ops that multiply by a tensor of the model, and add nothing but other tensors that they read."""
UNKNOWN = -1  # the source of a tensor that no recorded op makes
VARIES, ZERO, CONSTANT = range(3)  # what the channels that stem from removed rows of zeros are; of several, the largest
_Zeros = Mapping[int, Mapping[int, Sequence[int]]]  # by source (a tensor of the model) and dim: the removed rows


def may_have_constants(trace: Trace, plan: Plan) -> bool:
    """Whether something that the plan cuts reads channels that stem from a removed row of zeros alone, and are not 0.

    A row of zeros makes a constant of what is multiplied by it; nothing does that varies is added to (a residual sum).

    Args:
        trace: the run that the plan stems from; its model is not cut yet.
        plan: what is to be removed.
    """
    index = {held.name: k for k, held in enumerate(trace.held)}
    removals = [(k, removal) for removal in plan.removals if (k := index.get(removal.tensor)) is not None]
    zeros = _zero_rows(trace, removals)
    if not zeros:
        return False
    cut = {k for k, _ in removals}
    origins: list[int] = []  # of what each step makes: the step, or the tensor of the model of which it is a view
    states: list[int] = []  # by step
    for step, event in enumerate(trace.events):
        read = [origins[t.source] if t.source >= 0 else t.source for t in event.inputs]
        computed = [states[source] for source in read if source >= 0]
        if (
            CONSTANT in computed
            and event.name not in _NO_READERS
            and any(t.ndim > 1 and -2 - s in cut for t, s in zip(event.inputs, read, strict=True))
        ):
            return True
        origins.append(read[0] if event.name in MOVES and read and read[0] != UNKNOWN else step)
        passed = _passed_on(event, read, computed, trace.held) if any(computed) else VARIES
        own = [s for s in read if s in zeros] if event.name not in _KEEPS else []
        states.append(max(passed, _made(event, read, own, trace.held, zeros)) if own else passed)
    return False


def _passed_on(event: Event, read: Sequence[int], computed: Sequence[int], held: Sequence[Held]) -> int:
    """What becomes of the constants that an op reads."""
    if event.name in _SUMS:
        if VARIES in computed:
            return VARIES
        return max(computed) if len(computed) == len(event.inputs) > 1 else CONSTANT
    if event.name in MULTIPLICATIONS and any(
        s < UNKNOWN and t.ndim == held[-2 - s].tensor.dim() > 1 and isinstance(held[-2 - s].tensor, nn.Parameter)
        for t, s in zip(event.inputs, read, strict=True)
    ):
        return VARIES  # what matrices make of constants counts as varying (see constants.py)
    return max(computed) if event.name in _KEEPS_ZEROS else CONSTANT


def _made(event: Event, read: Sequence[int], own: Sequence[int], held: Sequence[Held], zeros: _Zeros) -> int:
    """What an op makes of rows of zeros of its ``own``, the tensors of the model that have some."""
    rows = ((-2 - s, dim, rows) for s in own for dim, rows in zeros[s].items())
    return max((_value(event, read, held, *r) for r in rows if _makes(event, held[r[0]], r[1])), default=VARIES)


def _value(event: Event, read: Sequence[int], held: Sequence[Held], k: int, dim: int, rows: Sequence[int]) -> int:
    """Zero, if all that the op can add to its products with these rows is zero there too; else some constant."""
    if event.name not in _AFFINE:
        return CONSTANT
    others = [held[-2 - s].tensor for s in read if s < UNKNOWN and -2 - s != k]
    if event.name in BATCH_NORMS:  # statistics are not added to products with zero
        others = [tensor for tensor in others if isinstance(tensor, nn.Parameter)]
    alike = all(tensor.shape == (held[k].tensor.shape[dim],) for tensor in others)
    return ZERO if alike and not any(tensor.detach()[rows].any() for tensor in others) else CONSTANT


def _zero_rows(trace: Trace, removals: Sequence[tuple[int, Removal]]) -> _Zeros:
    """The removed rows, along any dim of a parameter, that are zeros of some layer, or weights of zero of some norm."""
    only_read = trace.ledger.only_read  # inputs of a layer, of which zeros make no constant
    found: dict[int, dict[int, list[int]]] = {}
    for k, removal in removals:
        held = trace.held[k]
        if held.starts[removal.dim] in only_read or not isinstance(held.tensor, nn.Parameter):
            continue
        rows = _removed_zeros(held.tensor.detach(), removal)
        if rows:
            found.setdefault(-2 - k, {})[removal.dim] = rows
    return found


def _removed_zeros(values: Tensor, removal: Removal) -> list[int]:
    """Which of the rows that go hold nothing but zeros."""
    if values.is_meta or values.layout is not torch.strided or not values.is_floating_point():
        return []
    if values.dim() == 1 and not removal.tensor.endswith("weight"):
        return []
    first = values.as_strided((values.shape[removal.dim],), (values.stride(removal.dim),))
    if first.all():  # few rows begin with zero
        return []
    zeros = set((first == 0).nonzero().flatten().tolist())
    rows = [p for p in removal.positions if p in zeros]
    if values.dim() == 1 or not rows:
        return rows
    whole = (values.movedim(removal.dim, 0)[rows] == 0).reshape(len(rows), -1).all(1).tolist()
    return [p for p, zero in zip(rows, whole, strict=True) if zero]


def _makes(event: Event, held: Held, dim: int) -> bool:
    """Whether the rows along one dim of a tensor of the model become positions of what an op makes of it."""
    if len(held.shape) == 1 or event.name == "mul":
        return True
    start, end = held.starts[dim], held.starts[dim] + held.shape[dim]
    made = [label.ids for result in event.results for label in result.dims if label is not None]
    return any(bool(((ids >= start) & (ids < end)).any()) for ids in made)
