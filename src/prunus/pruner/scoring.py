"""Scores of what is on offer, from a criterion that is called with groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from prunus.coupling import Coupling, Family, UnitGroup
from prunus.errors import InputError, NothingToPruneError
from prunus.graph import DependencyGraph
from prunus.group import Group, root_of
from prunus.heads import Offer
from prunus.importance import MagnitudeImportance
from prunus.labels import Ids
from prunus.selection import Scores, score_units

Criterion = Callable[[Any], "torch.Tensor | None"]
"""``group -> one score for each unit`` (or for each of ``group[0].idxs``), or None: leave this group alone."""


def criterion_of(importance: Any) -> Criterion:
    """The caller's criterion, or the default one.

    Raises:
        InputError: it cannot be called with a group.
    """
    if importance is None:
        return MagnitudeImportance()
    if isinstance(importance, type):
        raise InputError(f"importance={importance.__name__} is a class: pass one of its kind, {importance.__name__}()")
    if not callable(importance):
        raise InputError(f"importance={importance!r}: pass a criterion, called with a group, that gives scores")
    found: Criterion = importance
    return found


def score_with(
    graph: DependencyGraph, importance: Criterion, coupling: Coupling | None = None
) -> Callable[[UnitGroup], torch.Tensor | None]:
    """The criterion as a function of the engine's groups (those of ``coupling``, default the graph's own)."""
    coupling = coupling or graph.coupling
    living = coupling.alive_units(graph.alive)

    def score(group: UnitGroup) -> torch.Tensor | None:
        there = living[group.units]
        if there.all():
            return ask(group, group.units)
        scores = torch.full((len(there),), float("inf"), dtype=torch.float32)
        if not there.any():
            return scores
        found = ask(group, group.units[there])
        if found is not None:
            scores[torch.from_numpy(there)] = found
        return None if found is None else scores

    def ask(group: UnitGroup, left: Ids) -> torch.Tensor | None:
        if not _of_layers(graph, group):
            return None
        asked = Group(graph, left, coupling=coupling)
        try:
            found = importance(asked)
        except NotImplementedError as error:
            if any(p.is_meta for p in graph.model.parameters()):
                raise InputError(
                    "the model is on the meta device and its weights have no values to score; score a real copy and "
                    "apply the plan here, or pass importance=prunus.importance.RandomImportance()"
                ) from error
            raise
        if found is None:
            return None
        found = by_unit(found, asked)
        _check_scores(found, asked)
        return found.detach().float().cpu()

    return score


def by_unit(found: Any, group: Group) -> Any:
    """Scores for each unit, where they are for each of ``group[0].idxs``: the mean over what goes with the unit."""
    if not isinstance(found, torch.Tensor) or found.dim() != 1 or len(found) == group.size or not len(group):
        return found
    if len(found) != len(group[0].idxs):
        return found
    places = torch.tensor(group.root_places())
    number = torch.bincount(places, minlength=group.size)
    if not bool(number.all()):
        return found
    return torch.zeros(group.size).index_add_(0, places, found.detach().float().cpu()) / number


def _of_layers(graph: DependencyGraph, group: UnitGroup) -> bool:
    """Whether a parameter or a layer is cut, rather than only tensors beside them."""
    held = graph.coupling.trace.held
    if any(isinstance(held[part.held].tensor, nn.Parameter) for part in group.slices):
        return True
    return root_of(graph, group.units, group.coupling) is not None


def _check_scores(found: Any, group: Group) -> None:
    """Refuse what is no score for each unit.

    Raises:
        InputError: it is none.
    """
    if not isinstance(found, torch.Tensor):
        wrong, instead = f"a {type(found).__name__}", "return a tensor of as many scores"
    elif found.shape != (group.size,):
        wrong, instead = f"shape {tuple(found.shape)}", "return one score for each"
    elif found.is_complex() or found.is_meta:
        wrong = "complex numbers" if found.is_complex() else "scores without values (meta)"
        instead = "return real ones"
    elif bool(found.isnan().any()):
        wrong, instead = "NaN", "check weights, gradients and data for NaN"
    else:
        return
    where = f"for the group of {group.root.node.name}, which has {group.size} units"
    raise InputError(f"the importance returned {wrong} {where}: {instead}")


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
    unknown = np.isnan(scores)
    families = tuple(f for f in found.families if not unknown[f.units].all())
    return replace(found, rows=rows, families=families), of_rows, scores


def some_scored(scored: tuple[Offer, Scores, Scores]) -> tuple[Offer, Scores, Scores]:
    """What :func:`score_offer` gave, if it is anything.

    Raises:
        NothingToPruneError: the criterion left all families alone.
    """
    if not scored[0]:
        raise NothingToPruneError("the importance returned None for every group: it leaves all of them alone")
    return scored


__all__ = ["Criterion", "by_unit", "criterion_of", "score_offer", "score_with", "some_scored"]
