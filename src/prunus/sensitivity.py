"""Sensitivity: how a metric falls as each group alone loses more and more, the least important first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunus.allocation import Ladder, offered
from prunus.coupling import Coupling
from prunus.errors import InputError
from prunus.graph import DependencyGraph
from prunus.heads import offer
from prunus.importance import Importance
from prunus.importance.criteria import ScoredGroup
from prunus.plan import footprint
from prunus.pruner import Criterion, score_offer
from prunus.pruner.beginning import graph_of, something
from prunus.pruner.scoring import criterion_of, some_scored
from prunus.tracing import ForwardFn, Inputs
from prunus.untouched import untouched

SHARES = (0.125, 0.25, 0.5, 0.75)
Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Curve:
    """One group: the first layer that it cuts, its units, and the metric after each share of it is gone.

    ``tensors`` are (name, dim) of everything that it cuts.
    """

    layer: str
    units: int
    shares: tuple[float, ...]
    metrics: tuple[float, ...]
    macs: tuple[float, ...]
    params: tuple[float, ...]
    tensors: frozenset[tuple[str, int]] = field(repr=False)


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` found: curves, as rows, as a frame, as a picture, and as an importance.

    ``dense`` is the metric of the model as it is; ``base`` is the criterion that said which units go first.
    """

    dense: float
    curves: tuple[Curve, ...]
    base: Criterion = field(repr=False)
    higher_is_better: bool = True

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dict for each group and share: layer, units, share, metric, drop, and the shares of cost that are left."""
        return [
            {
                "layer": curve.layer,
                "units": curve.units,
                "share": share,
                "metric": metric,
                "drop": self._drop(metric),
                "macs": macs,
                "params": params,
            }
            for curve in self.curves
            for share, metric, macs, params in zip(curve.shares, curve.metrics, curve.macs, curve.params, strict=True)
        ]

    def frame(self) -> Any:
        """The rows as a pandas DataFrame.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError("pandas is not installed: pip install pandas, or use .rows") from error
        return pandas.DataFrame(self.rows)

    def plot(self, path: str | Path | None = None) -> Any:
        """A plotly figure with a line for each group; ``path`` is where to write it as a page (None: nowhere).

        Raises:
            InputError: plotly is not installed.
        """
        try:
            from plotly import graph_objects
        except ImportError as error:
            raise InputError("plotly is not installed: pip install plotly, or use .rows") from error
        figure = graph_objects.Figure()
        for curve in self.curves:
            figure.add_scatter(x=[0.0, *curve.shares], y=[self.dense, *curve.metrics], name=curve.layer)
        figure.update_layout(xaxis_title="share of the group removed", yaxis_title="metric", template="plotly_white")
        if path is not None:
            figure.write_html(str(path), include_plotlyjs="cdn")
        return figure

    def importance(self) -> SensitivityImportance:
        """The curves as a criterion whose scores compare across groups (for ``allocation="greedy"`` or "global").

        Raises:
            InputError: the metric was NaN after some cut.
        """
        for curve in self.curves:
            if any(math.isnan(metric) for metric in curve.metrics):
                share = next(s for s, metric in zip(curve.shares, curve.metrics, strict=True) if math.isnan(metric))
                raise InputError(
                    f"the metric was NaN with {share:.0%} of {curve.layer} removed, so its curve says nothing: let the "
                    "metric give a low number instead, or measure smaller shares"
                )
        return SensitivityImportance(self)

    def _drop(self, metric: float) -> float:
        return self.dense - metric if self.higher_is_better else metric - self.dense

    def __str__(self) -> str:
        lines = [f"metric of the model as it is: {self.dense:.6g}"]
        wide = max((len(curve.layer) for curve in self.curves), default=0)
        for curve in self.curves:
            found = zip(curve.shares, curve.metrics, strict=True)
            lines.append(
                f"{curve.layer:<{wide}}  " + "  ".join(f"{share:.0%}: {metric:.6g}" for share, metric in found)
            )
        return "\n".join(lines)


class SensitivityImportance(Importance):
    """Scores from curves: what the metric loses when a unit goes, after all that the base criterion ranks below it.

    Source: sensitivity curves over widths, as FastNAS (NVIDIA Model Optimizer) uses them to compare layers; here each
    unit gets the slope of its group's curve, made monotone, at its rank.
    """

    def __init__(self, found: Sensitivity) -> None:
        self._curves = {tensor: curve for curve in found.curves for tensor in curve.tensors}
        self._found = found

    def __call__(self, group: ScoredGroup) -> torch.Tensor | None:
        """One score for each unit; None for a group without a curve."""
        curve = next(
            (
                self._curves[m.name, m.dim]
                for _, members in group.parts
                for m in members
                if (m.name, m.dim) in self._curves
            ),
            None,
        )
        base = self._found.base(group)
        if curve is None or base is None:
            return None
        count = group.size
        drops = np.maximum.accumulate([0.0, *(max(self._found._drop(m), 0.0) for m in curve.metrics)])
        shares = np.array([0.0, *curve.shares])
        slope = (drops[-1] - drops[-2]) / (shares[-1] - shares[-2])
        if shares[-1] < 1:
            shares, drops = np.append(shares, 1.0), np.append(drops, drops[-1] + slope * (1 - shares[-1]))
        gone = np.arange(count + 1) / count
        lost = np.maximum.accumulate(np.diff(np.interp(gone, shares, drops)))
        tiny = 1e-6 * max(float(drops[-1]), 1e-12) / count
        lost = lost * (1 + 1e-3 * gone[1:]) + tiny * gone[1:]  # equal slopes keep the order of the base criterion
        scores = torch.empty(count, dtype=torch.float32)
        scores[base.detach().cpu().double().argsort(stable=True)] = torch.from_numpy(lost).float()
        return scores


def sensitivity(  # noqa: PLR0913 - each keyword is a choice of the user
    model: nn.Module,
    example_inputs: Inputs,
    metric: Metric,
    *,
    shares: Sequence[float] = SHARES,
    importance: Criterion | None = None,
    higher_is_better: bool = True,
    ignored_layers: Sequence[Any] = (),
    forward_fn: ForwardFn | None = None,
    prune_num_heads: bool = False,
    progress: bool = False,
) -> Sensitivity:
    """Cut each group alone, by growing shares, measure, and put the model back after each cut, bit for bit.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        metric: ``metric(model) -> float`` on calibration or validation data. Mode, buffers and random state are put
            back after each call; it must not train.
        shares: of a group's units that go, ascending, each in (0, 1).
        importance: which units go first, default :class:`~prunus.importance.MagnitudeImportance`.
        higher_is_better: whether a higher metric is better (accuracy) or worse (loss).
        ignored_layers: modules, names, patterns or types whose output widths stay.
        forward_fn: ``forward_fn(model, example_inputs)`` to use instead of calling the model.
        prune_num_heads: whether whole heads are groups too.
        progress: whether to show a bar.

    Raises:
        InputError: an argument cannot be used, or the metric of the model as it is is no finite number.
        NothingToPruneError: nothing may be removed, or the importance leaves all groups alone.

    Example:
        >>> import torch, prunus
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> data = torch.randn(32, 8)
        >>> dense = model(data).detach()
        >>> found = prunus.sensitivity(model, data, lambda m: -float((m(data) - dense).square().mean()), shares=[0.5])
        >>> [(row["layer"], row["units"], row["share"], row["drop"] > 0) for row in found.rows]
        [('0', 16, 0.5, True)]
    """
    asked, base = _checked(shares, metric), criterion_of(importance)
    graph = graph_of(model, example_inputs, ignored_layers, forward_fn=forward_fn)
    found = something(graph, offer(graph.coupling, prune_num_heads))
    found, *scores = some_scored(score_offer(graph, found, base))
    choices = offered(found, scores, graph.alive)
    dense = _measured(model, metric)
    if not math.isfinite(dense):
        raise InputError(f"the metric of the model as it is is {dense}; it must be a finite number")
    whole = footprint(graph.coupling, graph.alive)
    curves = []
    for one in _shown(choices.ladders, progress):
        coupling = found.by_rows if one.number < len(found.rows) else found.coupling
        stops = _stops(one, asked)
        points = []
        for stop in stops:
            lost = choices.fixed.copy()
            lost[one.number] = stop
            receipt = graph._prune(choices.choose(lost), record_history=False)
            try:
                points.append((_measured(model, metric), receipt.plan.after))
            finally:
                receipt.undo()
        if not points:
            continue
        tensors = _tensors(coupling, one)
        curves.append(
            Curve(
                _first_layer(graph, coupling, one),
                one.family.count,
                tuple(stop / one.family.count for stop in stops),
                tuple(value for value, _ in points),
                tuple(cost.macs / max(whole.macs, 1) for _, cost in points),
                tuple(cost.params / max(whole.params, 1) for _, cost in points),
                tensors,
            )
        )
    return Sensitivity(dense, tuple(curves), base, higher_is_better)


def _checked(shares: Any, metric: Any) -> list[float]:
    if not callable(metric):
        raise InputError(f"metric={metric!r}: pass a function of the model that returns a number")
    found = list(shares) if isinstance(shares, Iterable) else []
    if not found or any(isinstance(s, (str, bool)) or not 0 < s < 1 for s in found) or found != sorted(set(found)):
        raise InputError(f"shares={shares!r}: give ascending numbers, each above 0 and below 1")
    return found


def _measured(model: nn.Module, metric: Metric) -> float:
    with untouched(model):
        value: Any = metric(model)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"the metric returned {value!r}: it must return one number") from error


def _stops(one: Ladder, shares: Sequence[float]) -> list[int]:
    """How many bundles go at each share (each number once; at least one goes and at least one stays)."""
    if not one.stops.size:
        return []
    wanted = (max(round(share * one.family.count), 1) for share in shares)
    allowed: Mapping[int, None] = {int(one.stops[np.abs(one.stops - n).argmin()]): None for n in wanted}
    return list(allowed)


def _tensors(coupling: Coupling, one: Ladder) -> frozenset[tuple[str, int]]:
    slices = [s for _, group in coupling.groups_of(one.family.units) for s in group.slices]
    return frozenset((coupling.trace.held[s.held].name, s.dim) for s in slices)


def _first_layer(graph: DependencyGraph, coupling: Coupling, one: Ladder) -> str:
    sides = graph.sides_of(one.family.units, coupling)
    return sides[0].node.name if sides else "(no layer)"


def _shown(ladders: Sequence[Ladder], progress: bool) -> Any:
    if not progress:
        return ladders
    from rich.progress import track

    return track(ladders, description="groups")


__all__ = ["Curve", "Metric", "Sensitivity", "SensitivityImportance", "sensitivity"]
