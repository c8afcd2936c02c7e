"""The part of surgery that takes children out of containers: checked first, and undone bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunus.drops import Cut, Drop, joined
from prunus.errors import SurgeryError
from prunus.plan import Plan
from prunus.sizes import Attribute, attribute_home


@dataclass(frozen=True)
class Swap:
    """One reference that is swapped."""

    do: Callable[[], None]
    undo: Callable[[], None]


def container_swaps(model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None) -> list[Swap]:
    """Every change that takes children out, none made.

    Raises:
        SurgeryError: the plan was made for other containers than the model has.
    """
    found = [_entries(model, cut) for cut in plan.cuts]
    dropped: list[nn.Module] = []
    for drop in plan.drops:
        container = _container(model, drop)
        children = container._modules
        dropped += [m for name in drop.gone if (m := children[name]) is not None]
        left = type(children)((after, children[before]) for before, after in drop.names)
        found.append(_swap(container.__dict__, "_modules", left))
    if optimizer is not None and dropped:
        forget = _Forget(model, dropped, optimizer)
        found.append(Swap(forget.do, forget.undo))
    return found


def _container(model: nn.Module, drop: Drop) -> nn.Module:
    try:
        container = model.get_submodule(drop.container)
    except AttributeError as error:
        raise SurgeryError(f"the model has no {drop.container}: the plan was made for another model") from error
    expected, have = {*drop.gone, *(before for before, _ in drop.names)}, set(container._modules)
    if expected != have:
        raise SurgeryError(
            f"{drop.container or 'the model'} has {len(have)} children where the plan needs {len(expected)} of the "
            "names that it had; was a block dropped from it since the plan was made?"
        )
    return container


def _entries(model: nn.Module, cut: Cut) -> Swap:
    try:
        home, key = attribute_home(model, Attribute(cut.path, cut.name))
        values = home[key]
    except (AttributeError, KeyError) as error:
        raise SurgeryError(f"the model has no {joined(cut.path, cut.name)}: the plan is for another model") from error
    if not isinstance(values, (list, tuple)) or len(values) != cut.size:
        raise SurgeryError(f"{joined(cut.path, cut.name)} is no list of {cut.size} entries in this model")
    left = type(values)(value for k, value in enumerate(values) if k not in cut.positions)
    return _swap(home, key, left)


class _Forget:
    """The optimiser lets go of the parameters that the model has no longer."""

    def __init__(self, model: nn.Module, dropped: list[nn.Module], optimizer: torch.optim.Optimizer) -> None:
        self.model, self.dropped, self.optimizer = model, dropped, optimizer
        self._groups: list[tuple[dict[str, Any], Any]] = []
        self._state: list[tuple[nn.Parameter, Any]] = []

    def do(self) -> None:
        """Once the children are out."""
        kept = {id(p) for p in self.model.parameters()}
        lost = {id(p): p for top in self.dropped for p in top.parameters() if id(p) not in kept}
        for group in self.optimizer.param_groups:
            self._groups.append((group, group["params"]))
            group["params"] = [p for p in group["params"] if id(p) not in lost]
        self._state = [(p, self.optimizer.state.pop(p)) for p in lost.values() if p in self.optimizer.state]

    def undo(self) -> None:
        """Before the children are back."""
        for group, params in self._groups:
            group["params"] = params
        self.optimizer.state.update(self._state)
        self._groups, self._state = [], []


def _swap(fields: Any, key: Any, new: Any) -> Swap:
    old = fields[key]
    return Swap(lambda: fields.__setitem__(key, new), lambda: fields.__setitem__(key, old))
