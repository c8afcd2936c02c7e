"""Removed channels that never change: what their readers made of them goes into the readers' bias, without data.

A channel is constant if its batch norm has weight 0, or if the layer that makes it has a row of zeros, whatever
activation follows. That is found out by running the dense model twice with noise in place of all that its matrices and
kernels make of their inputs: what still has one value everywhere depends on no input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunus.plan import Plan
from prunus.repair.chains import Recorder
from prunus.repair.consumers import Consumer, Cuts, find_consumers
from prunus.repair.recurrent import Gates
from prunus.repair.sites import Call
from prunus.repair.twins import frozen, sharing
from prunus.repair.watch import Key, Use, Watch, Weights, guarded
from prunus.surgery import Change
from prunus.untouched import untouched

Run = Callable[[nn.Module, Any], Any]
Known = Mapping[Key, "tuple[Tensor, Tensor]"]  # by multiplication: what it reads at one place, what is so everywhere


class Constants(NamedTuple):
    """A model before it is cut, and what its multiplications read that depends on no input."""

    dense: nn.Module
    known: Known


def find_constants(model: nn.Module, inputs: Any, run: Run) -> Constants | None:
    """What a model computes that depends on no input; None where all of that is zero, or where nothing can be told.

    Args:
        model: any module; it is left as it came.
        inputs: example inputs.
        run: calls a model on inputs.
    """
    try:
        with untouched(model):
            first = _constants(model, inputs, run, 1)
            if not _some(first):
                return None
            second = _constants(model, inputs, run, 2)
        both = {key: (values, same & second[key][1]) for key, (values, same) in first.items() if key in second}
        known = {key: (values, same & (values == second[key][0])) for key, (values, same) in both.items()}
        return Constants(frozen(model), known) if _some(known) else None
    except Exception:  # it does not run on noise, or cannot be copied: constants are lost, as anything that is removed
        return None


def _some(known: Known) -> bool:
    return any(bool((values[same] != 0).any()) for values, same in known.values())


def fold_constants(found: Constants, model: nn.Module, plan: Plan, inputs: Any, run: Run) -> list[Change]:
    """What puts removed constants into the bias of their readers (or into the mean of the batch norm that follows).

    Args:
        found: of the model as it was before the cut.
        model: the cut model.
        plan: what was cut.
        inputs: example inputs.
        run: calls a model on inputs.

    Returns:
        changes to be made on ``model``; none where no removed channel is constant.
    """
    try:
        with untouched(model), untouched(found.dense):
            old, new = (_recorded(m, inputs, run) for m in (found.dense, model))
    except Exception:  # a model that runs only once: nothing is changed
        return []
    weights = Weights(model)
    consumers, _ = find_consumers(plan, weights, old, new, drift=False)
    cuts = Cuts(plan, weights)
    changes = []
    for consumer in consumers:
        change = _change(consumer, old.uses[consumer.keys[-1]], cuts, found.known, weights)
        if change is not None:
            changes.append(change)
    return changes


def _recorded(model: nn.Module, inputs: Any, run: Run) -> Recorder:
    recorder = Recorder()
    runner = sharing(model)
    with guarded(), Watch(Weights(runner), after=recorder.after):
        run(runner, inputs)
    return recorder


class _Noise:
    """A run in which all outputs that depend on an input are noise, and what its multiplications then read.

    For each plain multiplication: the inputs' values at one place, and whether they are the same everywhere.
    """

    def __init__(self, seed: int) -> None:
        self.found: dict[Key, tuple[Tensor, Tensor]] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def like(self, tensor: Tensor) -> Tensor:
        """Noise so large that no activation is saturated everywhere."""
        return torch.randn(tensor.shape, generator=self._generator).mul_(LARGE).to(tensor)

    def before(self, use: Use) -> None:
        """Look at what a multiplication reads."""
        call = use.call
        if isinstance(call, Gates) and call.forced:
            return  # states, which are not known yet, and begin with zeros
        if call.groups == 1 and not call.transposed and not any(any(pair) for pair in call.padding):
            dim = call.x.dim() - 1 - call.spatial
            rows = call.x.movedim(dim, -1).reshape(-1, call.x.shape[dim])
            self.found[use.key] = rows[0].clone(), (rows == rows[0]).all(0)

    def after(self, step: int, func: Any, args: Any, kwargs: Any, result: Any, use: Use | None) -> Tensor | None:
        """Noise in place of every output but those of rows of zeros."""
        if func.overloadpacket.__name__ == "embedding":
            return self.like(result)
        if use is None:
            return None
        fixed = (use.call.matrix(use.call.weight) == 0).all(2).flatten()
        shape = [-1 if d == result.dim() + use.call.channel else 1 for d in range(result.dim())]
        return torch.where(fixed.view(shape), result, self.like(result))


LARGE = 1_000.0


def _constants(model: nn.Module, inputs: Any, run: Run, seed: int) -> Known:
    noise, runner = _Noise(seed), sharing(model)
    other = tree_map(lambda t: noise.like(t) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)
    with guarded(), Watch(Weights(runner), noise.before, noise.after):
        run(runner, other)
    return noise.found


def _change(consumer: Consumer, old: Use, cuts: Cuts, known: Known, weights: Weights) -> Change | None:
    """What makes up for the constants among the removed inputs of one consumer."""
    seen = [known.get(key) for key in consumer.keys]
    values = [s for s in seen if s is not None]
    if len(values) < len(seen) or any(not torch.equal(v[0] * v[1], values[0][0] * values[0][1]) for v in values):
        return None
    call: Call = old.call
    axis = 0 if call.inputs_first else 1
    kept = cuts.kept(consumer.name, *(part[axis] for part in (old.region.dims, old.region.starts, old.region.sizes)))
    gone = torch.ones(old.region.sizes[axis], dtype=torch.bool)
    gone[kept] = False
    constant, same = values[0]
    value = torch.where(gone.to(same.device) & same & torch.isfinite(constant), constant, 0).double()
    if not bool(value.any()):
        return None
    weight = call.matrix(call.weight.detach())[0].double().unflatten(1, (len(value), -1)).sum(2)
    shift = (weight @ value)[consumer.kept.to(value.device)]
    shift = shift if consumer.factor is None else shift * consumer.factor.to(shift)
    if consumer.use.bias is not None:
        name, region = consumer.use.bias
        return _added(weights.by_name[name], lambda bias: region.of(bias).add_(shift.to(bias.dtype)))
    if consumer.norm is not None:
        return _added(consumer.norm.mean, lambda mean: mean.sub_(shift.to(mean.dtype)))
    return None


def _added(tensor: Tensor, add: Callable[[Tensor], Any]) -> Change:
    old, new = tensor.data, tensor.data.clone()
    with torch.no_grad():
        add(new)

    def put(data: Tensor) -> None:
        grad, tensor.grad = tensor.grad, None
        tensor.data = data
        tensor.grad = grad

    return Change(lambda: put(new), lambda: put(old))
