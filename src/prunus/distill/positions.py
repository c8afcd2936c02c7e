"""Which positions of what a layer makes are left by a plan: the labels of a trace know, for any module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunus.distill.terms import floats
from prunus.errors import InputError
from prunus.labels import Labelled
from prunus.modes import MARK
from prunus.plan import Plan
from prunus.tracing import ForwardFn, Trace, call_model, trace


@dataclass(frozen=True)
class Kept:
    """What is left of one tensor: for each dim that shrinks, the positions that stay."""

    dims: tuple[tuple[int, Tensor], ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a dense tensor that the pruned model makes too."""
        for dim, positions in self.dims:
            tensor = tensor.index_select(dim, positions.to(tensor.device))
        return tensor


Parts = dict[str, tuple[Kept, ...]]
"""By module: what is left of each float tensor that it returns, call after call."""


def kept_positions(
    dense: nn.Module, plan: Plan, inputs: Any, names: Iterable[str], forward_fn: ForwardFn | None = None
) -> Parts:
    """What a plan leaves of the outputs of modules, found by tracing the dense model once.

    Args:
        dense: a copy of the model that the plan was made for: hooks are hung on it, and taken off.
        plan: what was removed.
        inputs: what the model is called with.
        names: paths of modules of the dense model.
        forward_fn: ``forward_fn(model, inputs)`` to use instead of calling the model.

    Raises:
        InputError: the model cannot run on the inputs.
    """
    seen: dict[str, list[Labelled | None]] = {}

    def run(model: nn.Module, inputs: Any) -> Any:
        if not model.training:  # a second run, for layers that only train, tells nothing more
            seen.clear()
        return call_model(model, inputs, forward_fn)

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if not module.training:
                seen.setdefault(name, []).extend(t.__dict__.get(MARK) for t in floats(output))

        return note

    handles = [dense.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        found = trace(dense, inputs, run)
    finally:
        for handle in handles:
            handle.remove()
    alive = _alive(found, plan)
    return {name: tuple(_kept(labels, alive) for labels in labelled) for name, labelled in seen.items()}


def _alive(found: Trace, plan: Plan) -> Any:
    """Which atoms the plan leaves."""
    alive = np.ones(found.ledger.size, dtype=bool)
    held = {place.full: h for h in found.held for place in h.places}
    for removal in plan.removals:
        tensor = held.get(removal.tensor)
        if tensor is None or removal.dim >= len(tensor.shape) or tensor.shape[removal.dim] != removal.size:
            raise InputError(
                f"the plan removes from {removal.tensor} dim {removal.dim} of size {removal.size}, which the dense "
                "model does not have: pass the model as it was before the cut that the plan made"
            )
        if tensor.starts[removal.dim] >= 0:
            alive[tensor.starts[removal.dim] + np.array(removal.positions, dtype=np.int64)] = False
    return alive


def _kept(labelled: Labelled | None, alive: Any) -> Kept:
    dims = []
    for dim, label in enumerate(labelled.dims if labelled is not None else ()):
        if label is None or label.context:
            continue  # a dim whose rows keep different positions: shapes will not fit, and that is told
        stays = alive[label.ids]
        if not stays.all():
            dims.append((dim, torch.from_numpy(np.flatnonzero(stays))))
    return Kept(tuple(dims))
