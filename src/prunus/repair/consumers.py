"""Which multiplications of a pruned model read fewer inputs than the dense model's, and what answers to what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.plan import Plan
from prunus.repair.chains import Chain, Norm, Recorder
from prunus.repair.recurrent import Gates
from prunus.repair.sites import Region
from prunus.repair.watch import Key, Use, Weights


@dataclass(frozen=True)
class Consumer:
    """A part of a parameter by which the model multiplies, to be refitted.

    Args:
        name: the parameter.
        keys: the multiplications that read it, in the order in which they run.
        use: the last of them.
        kept: the dense output's channels that are left.
        factor: what the plan multiplies these channels by.
        chains: for each key, what becomes of the output, in the dense and in the pruned model.
        norm: the batch norm whose mean takes up what a layer without bias cannot.
        steps: when each key runs.
        states: in recurrent layers, the dense model's states that are left.
        look_up: the op that looks up rows of the parameter as well (a head tied to an embedding).
    """

    name: str
    keys: tuple[Key, ...]
    use: Use
    kept: Tensor
    factor: Tensor | None
    chains: Mapping[Key, tuple[Chain, Chain]]
    norm: Norm | None
    steps: Mapping[Key, int]
    states: Tensor | None = None
    look_up: str | None = None

    @property
    def free_bias(self) -> bool:
        """Whether the mean of the output can be set."""
        return self.use.bias is not None or self.norm is not None

    @property
    def layer(self) -> str:
        """The name of the layer, for people."""
        return self.name.rpartition(".")[0] if self.name.endswith(".weight") else self.name


class Cuts:
    """What a plan removes from, and multiplies, along each dim of each parameter."""

    def __init__(self, plan: Plan, weights: Weights) -> None:
        first = {name: known for known, names in weights.names.items() for name in names}
        self.removed = {(first.get(r.tensor, r.tensor), r.dim): (r.size, r.positions) for r in plan.removals}
        self._scaled: dict[tuple[str, int], list[tuple[tuple[int, ...], float]]] = {}
        for s in plan.scalings:
            self._scaled.setdefault((first.get(s.tensor, s.tensor), s.dim), []).append((s.positions, s.factor))

    def kept(self, name: str, dim: int, start: int, size: int) -> Tensor:
        """The positions left of ``size`` ones from ``start`` on, counted from ``start``."""
        keep = torch.ones(size, dtype=torch.bool)
        _, gone = self.removed.get((name, dim), (0, ()))
        keep[[p - start for p in gone if start <= p < start + size]] = False
        return keep.nonzero().flatten()

    def factor(self, name: str, dim: int, start: int, size: int) -> Tensor | None:
        """What these positions are multiplied by."""
        found = self._scaled.get((name, dim))
        if not found:
            return None
        factor = torch.ones(size, dtype=torch.float64)
        for positions, value in found:
            factor[[p - start for p in positions if start <= p < start + size]] *= value
        return factor


def find_consumers(
    plan: Plan, weights: Weights, dense: Recorder, pruned: Recorder, drift: bool
) -> tuple[list[Consumer], dict[str, str]]:
    """The layers to refit in the order in which they run, and those that are left, with the reasons.

    Args:
        plan: what was cut.
        weights: the parameters of the pruned model.
        dense: a run of the dense model.
        pruned: the same run of the pruned model.
        drift: also those behind the first, whose inputs are all there but other than they were.
    """
    cuts = Cuts(plan, weights)
    by_part: dict[tuple[str, Region], list[Key]] = {}
    for key, use in pruned.uses.items():
        by_part.setdefault((key.name, use.region), []).append(key)
    found: list[Consumer] = []
    left: dict[str, str] = {}
    begun = False
    for (name, _), keys in sorted(by_part.items(), key=lambda item: pruned.uses[item[1][-1]].step):
        pairs = [(dense.uses.get(key), pruned.uses[key]) for key in keys]
        shrunk = any(d is None or d.call.summed != p.call.summed for d, p in pairs)
        exact = isinstance(pairs[0][1].call, Gates) and pairs[0][1].call.forced  # it gets the states that it had
        if not shrunk and (exact or not (drift and begun)):
            continue
        consumer = _consumer(name, tuple(keys), cuts, dense, pruned)
        if isinstance(consumer, str):
            left[name] = consumer
        else:
            found.append(consumer)
            begun = True
    seen = {key.name for key in pruned.uses}
    for name, op in pruned.other_readers.items():
        if (
            name not in seen
            and len(weights.by_name[name].shape) > 1
            and any((name, d) in cuts.removed for d in range(3))
        ):
            left.setdefault(name, f"it is read by {op}, which is not refitted")
    return found, left


def _consumer(name: str, keys: tuple[Key, ...], cuts: Cuts, dense: Recorder, pruned: Recorder) -> Consumer | str:
    """The consumer, or why its outputs cannot be compared with the dense model's."""
    if any(key not in dense.uses for key in keys):
        return "the dense model does not run it at that place"
    old, use = dense.uses[keys[-1]], pruned.uses[keys[-1]]
    if old.call.spatial != use.call.spatial or old.region.dims != use.region.dims:
        return "the two models read it in different ways"
    axis = use.call.out_axis
    dim, start, size = (part[axis] for part in (old.region.dims, old.region.starts, old.region.sizes))
    kept, factor = cuts.kept(name, dim, start, size), cuts.factor(name, dim, start, size)
    if use.call.transposed and use.call.groups > 1:
        if old.call.groups != use.call.groups:
            return "it is a transposed convolution that lost whole groups"
        firsts = torch.arange(use.call.groups) * size
        kept = (firsts.unsqueeze(1) + kept).flatten()
        factor = None if factor is None else factor.repeat(use.call.groups)
    if len(kept) != pruned.sizes[keys[-1]][use.call.channel]:
        return "its outputs do not answer to the dense model's one by one"
    chains = {key: (dense.chain(key), pruned.chain(key)) for key in keys}
    norm = chains[keys[-1]][1].norm if len(keys) == 1 and use.bias is None and use.call.bias is None else None
    if use.call.spatial == 0 and norm is not None and len(pruned.sizes[keys[-1]]) != 2:
        norm = None  # it normalises another dim than the one of the outputs
    steps = {key: pruned.uses[key].step for key in keys}
    states = _states(name, use, old, cuts)
    return Consumer(
        name,
        keys,
        use,
        kept,
        None if factor is None else factor[kept],
        chains,
        norm,
        steps,
        states,
        pruned.look_ups.get(name),
    )


def _states(name: str, use: Use, old: Use, cuts: Cuts) -> Tensor | None:
    """Which of the dense model's states a recurrent layer still has."""
    if not isinstance(use.call, Gates) or not isinstance(old.call, Gates):
        return None
    whole, hidden = ((name, old.region), old.call) if use.call.forced else (use.beside, old.call.beside)
    if whole is None or hidden is None:
        return None
    return cuts.kept(whole[0], whole[1].dims[1], whole[1].starts[1], hidden.weight.shape[1])
