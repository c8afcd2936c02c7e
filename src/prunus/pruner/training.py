"""Sparse training with the groups that a pruner has on offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prunus.coupling import Coupling, Family
from prunus.errors import InputError
from prunus.graph import DependencyGraph
from prunus.group import Group, root_of
from prunus.heads import Offer
from prunus.regularize import Regularizer, add_gradients


class Penalties:
    """Regularisers, and the groups that they are about, as the model is now."""

    def __init__(
        self, graph: DependencyGraph, found: Offer, regularizers: Regularizer | Sequence[Regularizer] | None
    ) -> None:
        self._graph, self._offer = graph, found
        chosen = regularizers if isinstance(regularizers, (list, tuple)) else (regularizers,)
        self.regularizers: list[Regularizer] = [one for one in chosen if one is not None]
        for one in self.regularizers:
            if isinstance(one, type) or not hasattr(one, "gradients") or not hasattr(one, "update"):
                raise InputError(f"regularizer={one!r}: pass one of prunus.regularize, with update() and gradients()")
        self._known: tuple[Any, list[Group]] = None, []

    @property
    def groups(self) -> list[Group]:
        """The groups on offer; found anew when something was cut."""
        if self._known[0] is not self._graph.alive:
            found = self._offer
            groups = [*self._of(found.families, found.coupling), *self._of(found.rows, found.by_rows)]
            self._known = self._graph.alive, groups
        return self._known[1]

    def _of(self, families: Sequence[Family], coupling: Coupling) -> list[Group]:
        wanted = np.zeros(coupling.units.total, dtype=bool)
        for family in families:
            wanted[family.units] = True
        wanted &= coupling.alive_units(self._graph.alive)
        found = []
        for group in coupling.groups:
            units = group.units[wanted[group.units]]
            root = root_of(self._graph, units, coupling) if units.size else None
            if root is not None:
                found.append(Group(self._graph, units, root, coupling))
        return found

    def update(self) -> None:
        """Prepare all regularisers."""
        for regularizer in self.regularizers:
            regularizer.update(self.groups)

    def add(
        self, scaler: Any = None, weight: float = 1.0, bias: bool = False, only: Sequence[Regularizer] = ()
    ) -> None:
        """Add the gradients of all penalties (or of ``only`` these), times the scale that gradients have."""
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        add_gradients(self.groups, only or self.regularizers, weight * scale, bias)


__all__ = ["Penalties"]
