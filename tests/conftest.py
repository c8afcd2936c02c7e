"""The run-and-compare oracle that the tests of the engine share: a graph is right if the pruned model proves it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import prunus
from prunus.cost import count
from prunus.coupling import Coupling, couple
from prunus.coupling.explain import frozen
from prunus.selection import default_families
from prunus.tracing import call_model, tensors_in, trace


@dataclass(frozen=True)
class Found:
    """What a check learnt: ``frozen`` are "tensor:dim" (partly) frozen, ``bundles`` how many removals are on offer."""

    frozen: frozenset[str]
    bundles: int
    groups: int
    share: float
    result: prunus.PruneResult
    model: nn.Module


def outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """Every float tensor that the model returns in eval mode."""
    with torch.no_grad():
        return [t.detach().clone() for t in tensors_in(call_model(model, inputs)) if t.is_floating_point()]


def state(model: nn.Module) -> dict[str, Any]:
    """Values, gradients and attributes of every module, to compare before with after."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (int, float, str, tuple, list)) and not name.startswith("_flat_weight"):
                found[f"{path}.{name}"] = copy.copy(value)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[f"{path}.{name}"] = tensor.detach().clone()
    return found


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bit for bit, types included."""
    if one.keys() != other.keys():
        return False
    for name, a in one.items():
        b = other[name]
        equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else (type(a) is type(b) and a == b)
        if not equal:
            return False
    return True


def frozen_axes(coupling: Coupling) -> frozenset[str]:
    """The used dims of tensors of which some position has to stay, as "tensor:dim"."""
    return frozenset(f"{name}:{dim}" for name, dim, _, _ in frozen(coupling))


def check(model: nn.Module, inputs: Any, ratio: float = 0.5, again: bool = True) -> Found:
    """Assert all that must hold on any model, and return what the caller wants to compare with golden values."""
    model.eval()
    dense, before = outputs(model, inputs), state(model)
    coupling = couple(trace(model, inputs))
    report = prunus.verify(model, inputs)
    assert report.ok, f"the graph is wrong:\n{report}"
    assert same_state(before, state(model)), "tracing or verifying changed the model"
    cost = count(model, inputs)
    copied = copy.deepcopy(model)
    result = prunus.prune(model, inputs, prunus.Target(ratio=ratio))
    pruned = outputs(model, inputs)
    assert [t.shape for t in pruned] == [t.shape for t in dense], "the outputs changed their shapes"
    assert all(bool(torch.isfinite(t).all()) for t in pruned)
    after = count(model, inputs)
    assert (result.before.macs, result.before.params) == (cost.macs, cost.params), "the dense cost is wrong"
    assert (result.after.macs, result.after.params) == (after.macs, after.params), "the plan's cost is wrong"
    if again:
        repeated = prunus.verify(model, inputs)
        assert repeated.ok, f"the pruned model does not verify:\n{repeated}"
    result.plan.apply(copied)
    for a, b in zip(outputs(copied, inputs), pruned, strict=True):
        assert torch.equal(a, b), "the plan does something else on a copy"
    result.undo()
    assert same_state(before, state(model)), "undo does not restore the model"
    for a, b in zip(outputs(model, inputs), dense, strict=True):
        assert torch.equal(a, b)
    families = default_families(coupling)
    bundles = int(np.sum([f.count for f in families]))
    return Found(frozen_axes(coupling), bundles, len(coupling.groups), report.prunable_share, result, model)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def oracle() -> Callable[..., Found]:
    """``oracle(model, inputs)``: symmetry, silence, cost, replay and undo hold; gives what was found."""
    return check


@pytest.fixture
def model_state() -> Callable[[nn.Module], dict[str, Any]]:
    """Everything that may not change behind the user's back."""
    return state


@pytest.fixture
def states_equal() -> Callable[[dict[str, Any], dict[str, Any]], bool]:
    """Bit for bit equality of two states."""
    return same_state
