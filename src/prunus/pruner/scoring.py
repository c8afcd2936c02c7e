"""Scores of what is on offer, from a criterion that is called with groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from prunus.coupling import Coupling, Family, UnitGroup
from prunus.errors import InputError
from prunus.graph import DependencyGraph
from prunus.group import Group
from prunus.heads import Offer
from prunus.pruner.scopes import root_of
from prunus.selection import Scores, score_units

Criterion = Callable[[Any], "torch.Tensor | None"]
"""``group -> one score for each unit``, or None: leave this group alone."""


def score_with(
    graph: DependencyGraph, importance: Criterion, coupling: Coupling | None = None
) -> Callable[[UnitGroup], torch.Tensor | None]:
    """The criterion as a function of the engine's groups (those of ``coupling``, default the graph's own)."""
    coupling = coupling or graph.coupling
    living = coupling.alive_units(graph.alive)

    def score(group: UnitGroup) -> torch.Tensor | None:
        there = living[group.units]
        left = group.units[there]
        scores = torch.full((len(group.units),), float("inf"), dtype=torch.float32)
        if left.size == 0:
            return scores
        root = root_of(graph, left, coupling)
        if root is None:
            return None
        try:
            found = importance(Group(graph, left, root, coupling))
        except NotImplementedError as error:
            if any(p.is_meta for p in graph.model.parameters()):
                raise InputError(
                    "the model is on the meta device and its weights have no values to score; score a real copy and "
                    "apply the plan here, or pass importance=prunus.importance.RandomImportance()"
                ) from error
            raise
        if found is None:
            return None
        if found.shape != (len(left),):
            raise InputError(f"the importance returned shape {tuple(found.shape)} for a group of {len(left)} units")
        scores[torch.from_numpy(there)] = found.float().cpu()
        return scores

    return score


def _scores(graph: DependencyGraph, coupling: Coupling, families: Sequence[Family], importance: Criterion) -> Scores:
    if not families:
        return np.full(coupling.units.total, np.nan)
    return score_units(coupling, families, score_with(graph, importance, coupling))


def score_offer(graph: DependencyGraph, found: Offer, importance: Criterion) -> tuple[Offer, Scores, Scores]:
    """What is on offer and was scored, and the scores of whole rows and of everything else.

    A family that the criterion left alone stays.
    """
    of_rows = _scores(graph, found.by_rows, found.rows, importance)
    scores = _scores(graph, graph.coupling, found.families, importance)
    rows = tuple(f for f in found.rows if not np.isnan(of_rows[f.units]).all())
    families = tuple(f for f in found.families if not np.isnan(scores[f.units]).all())
    return replace(found, rows=rows, families=families), of_rows, scores


__all__ = ["Criterion", "score_offer", "score_with"]
