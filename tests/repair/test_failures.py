"""Whatever goes wrong, the model is bit for bit as it was (values, modes, hooks), and one clear error says why."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import prunus


class Small(nn.Module):
    """A convolution, norms, dropout; frozen modes, buffers and hooks that have to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.count += 1
        x = torch.relu(self.norm(self.one(x)))
        return self.head(self.drop(torch.relu(self.two(x)).mean((2, 3))))


def small() -> nn.Module:
    model = Small().train()
    model.norm.eval()
    model.two.weight.requires_grad_(False)
    model.head.weight.grad = torch.randn(4, 16)
    model.one.register_forward_hook(lambda module, inputs, output: None)
    model.register_forward_pre_hook(lambda module, inputs: None)
    return model


def batches(count: int = 6, size: int = 8) -> list[torch.Tensor]:
    return [torch.randn(size, 3, 8, 8) for _ in range(count)]


class Broken(Exception):
    pass


def midway(error: BaseException) -> Iterator[torch.Tensor]:
    yield from batches(2)
    raise error


def nan(where: int) -> list[torch.Tensor]:
    found = batches()
    found[where][0, 0, 0, 0] = float("nan")
    return found


LOADERS: dict[str, tuple[Any, type[BaseException], str]] = {
    "NaN in a later batch": (lambda: nan(4), prunus.InputError, "batch 4 of the data holds NaN"),
    "constant inputs": (lambda: [torch.ones(8, 3, 8, 8)] * 5, prunus.InputError, "all 40 samples.*the same"),
    "one sample": (lambda: batches(1, 1), prunus.InputError, "1 sample"),
    "nothing": (lambda: iter(()), prunus.InputError, "no samples"),
    "empty batches": (lambda: [torch.zeros(0, 3, 8, 8)] * 3, prunus.InputError, "no samples"),
    "raises midway": (lambda: midway(Broken("disk")), Broken, "disk"),
    "interrupt midway": (lambda: midway(KeyboardInterrupt("stop")), KeyboardInterrupt, "stop"),
    "a tensor": (lambda: torch.randn(8, 3, 8, 8), prunus.InputError, "Tensor"),
    "numbers": (lambda: [1, 2], prunus.InputError, "no tensor"),
    "wrong size": (lambda: [torch.randn(8, 4, 8, 8)] * 5, prunus.InputError, "cannot run"),
    "labels too": (lambda: [(x, torch.zeros(8)) for x in batches()], prunus.InputError, "input_fn=lambda"),
}


def state(model: nn.Module) -> dict[str, Any]:
    """What the shared fixture sees, and hooks, modes, gradients, and which parameters are trained."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        found[f"{path} hooks"] = tuple(tuple((k, id(f)) for k, f in h.items()) for h in hooks)
        found[f"{path} mode"] = module.training
    for name, p in model.named_parameters():
        found[f"{name} rest"] = (id(p), p.requires_grad, None if p.grad is None else p.grad.clone().tolist())
    return found


def unchanged(model: nn.Module, before: Any, run: Any, error: type[BaseException], words: str, tools: Any) -> None:
    model_state, states_equal = tools
    own, theirs = before
    threads = threading.active_count()
    with pytest.raises(error, match=words):
        run()
    assert states_equal(theirs, model_state(model))
    assert own == state(model)
    assert threading.active_count() == threads, "a run is still under way"


@pytest.mark.parametrize("name", LOADERS)
def test_bad_data_leave_the_model_as_it_was(name, model_state, states_equal) -> None:
    data, error, words = LOADERS[name]
    model, example, tools = small(), torch.randn(1, 3, 8, 8), (model_state, states_equal)
    plan = prunus.prune(copy.deepcopy(model), example).plan
    before = state(model), model_state(model)
    unchanged(model, before, lambda: prunus.repair(model, plan, data()), error, words, tools)
    unchanged(model, before, lambda: prunus.prune(model, example, data=data()), error, words, tools)


@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), Broken("inside")])
@pytest.mark.parametrize("call", [2, 4, 9, 14])
def test_a_forward_that_breaks_leaves_the_model_as_it_was(call, error, model_state, states_equal) -> None:
    """The runs are those that record, those in lanes side by side, and those that judge."""
    model, example, tools = small(), torch.randn(1, 3, 8, 8), (model_state, states_equal)
    plan = prunus.prune(copy.deepcopy(model), example).plan
    before = state(model), model_state(model)
    calls = 0

    def breaks(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += len(x) > 1  # not those that trace
        if calls == call:
            raise error
        return model(x)

    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else prunus.InputError
    words = "stop" if isinstance(error, KeyboardInterrupt) else "Broken: inside"
    unchanged(model, before, lambda: prunus.repair(model, plan, batches(), forward_fn=breaks), expected, words, tools)
    assert calls >= call
    calls = 0
    run = lambda: prunus.prune(model, example, data=batches(), forward_fn=breaks)  # noqa: E731
    unchanged(model, before, run, expected, words, tools)


def test_a_model_that_gives_nan_keeps_what_the_cut_left() -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.two(torch.log(self.one(x)))

    model = Bad().eval()
    cut, data = copy.deepcopy(model), [torch.randn(16, 8) for _ in range(5)]
    plan = prunus.prune(cut, torch.randn(1, 8)).plan
    report = prunus.repair(model, plan, data)
    assert "its inputs are not finite" in str(report)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), cut.parameters(), strict=True))


def test_infinite_inputs_change_no_weight() -> None:
    model = small().eval()
    cut = copy.deepcopy(model)
    plan = prunus.prune(cut, torch.randn(1, 3, 8, 8)).plan
    report = prunus.repair(model, plan, [*batches(5), torch.full((8, 3, 8, 8), float("inf"))])
    assert "its inputs are not finite" in str(report)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), cut.parameters(), strict=True))


@pytest.mark.parametrize("data", [lambda: batches(1, 2), lambda: [*batches(1, 1), torch.ones(1, 3, 8, 8)]])
def test_two_samples_do_no_harm(data) -> None:
    model = small().eval()
    plan = prunus.prune(copy.deepcopy(model), torch.randn(1, 3, 8, 8)).plan
    report = prunus.repair(model, plan, data())
    assert report.after <= report.before
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
