"""Whether a plan removes channels that may be constant, as far as the trace and a look at the weights can tell."""

from __future__ import annotations

import torch
from torch import nn

from prunus.held import Held
from prunus.modes import Event
from prunus.plan import Plan, Removal
from prunus.rules.table import MOVES
from prunus.tracing import Trace

_SUMS = frozenset(["add", "sub", "rsub"])
_KEEPS = frozenset([*_SUMS, *MOVES, "cat", "stack", "embedding", "copy"])
"""Ops that do not make a constant of what varies, whatever zeros are in the tensors of the model that they read."""
UNKNOWN = -1  # the source of a tensor that no recorded op makes


def may_have_constants(trace: Trace, plan: Plan) -> bool:
    """Whether something that the plan cuts reads channels that stem from a removed row of zeros alone.

    A row of zeros makes a constant of what is multiplied by it; nothing does that varies is added to (a residual sum).

    Args:
        trace: the run that the plan stems from; its model is not cut yet.
        plan: what is to be removed.
    """
    index = {held.name: k for k, held in enumerate(trace.held)}
    zeros: dict[int, list[int]] = {}
    for removal in plan.removals:
        k = index.get(removal.tensor)
        if k is not None and isinstance(trace.held[k].tensor, nn.Parameter) and _removes_zeros(trace.held[k], removal):
            zeros.setdefault(k, []).append(removal.dim)
    if not zeros:
        return False
    cut = {index[r.tensor] for r in plan.removals if r.tensor in index}
    origins: list[int] = []  # of what each step makes: the step, or the tensor of the model of which it is a view
    constant: list[bool] = []  # by step
    for step, event in enumerate(trace.events):
        read = [origins[t.source] if t.source >= 0 else t.source for t in event.inputs]
        computed = [constant[source] for source in read if source >= 0]
        if any(computed) and any(t.ndim > 1 and -2 - s in cut for t, s in zip(event.inputs, read, strict=True)):
            return True
        origins.append(read[0] if event.name in MOVES and read and read[0] != UNKNOWN else step)
        if event.name in _SUMS:
            constant.append(bool(computed) and all(computed))
        else:
            own = () if event.name in _KEEPS else [(-2 - s, dim) for s in read for dim in zeros.get(-2 - s, ())]
            constant.append(any(computed) or any(_makes(event, trace.held[k], dim) for k, dim in own))
    return False


def _removes_zeros(held: Held, removal: Removal) -> bool:
    """Whether a row of zeros of some layer goes, or a weight of zero of some norm."""
    values = held.tensor.detach()
    if values.is_meta or values.layout is not torch.strided or not values.is_floating_point():
        return False
    if values.dim() == 1 and not removal.tensor.endswith("weight"):
        return False
    first = values.as_strided((values.shape[removal.dim],), (values.stride(removal.dim),))
    if first.all():  # few rows begin with zero
        return False
    zeros = set((first == 0).nonzero().flatten().tolist())
    rows = [k for k in removal.positions if k in zeros]
    if not rows:
        return False
    return bool((values.movedim(removal.dim, 0)[rows] == 0).reshape(len(rows), -1).all(1).any())


def _makes(event: Event, held: Held, dim: int) -> bool:
    """Whether the rows along one dim of a tensor of the model become positions of what an op makes of it."""
    if len(held.shape) == 1 or event.name == "mul":
        return True
    start, end = held.starts[dim], held.starts[dim] + held.shape[dim]
    made = [label.ids for result in event.results for label in result.dims if label is not None]
    return any(bool(((ids >= start) & (ids < end)).any()) for ids in made)
