"""Modules of a list that the example run does not reach shrink with those that it does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus
from prunus.tracing import trace


class Expert(nn.Module):
    """A gated layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x, scale=1.0):
        return self.down(self.up(x) * self.gate(x).sigmoid()) * scale


class Separate(nn.Module):
    """Experts that are modules of their own, each called on the tokens that were sent to it."""

    def __init__(self, experts: list[nn.Module], width: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.router = nn.Linear(width, len(experts))
        self.experts = nn.ModuleList(experts)

    def forward(self, x):
        x = self.stem(x)
        weights, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            (tokens,) = torch.where(chosen == k)
            if tokens.numel():
                out.index_add_(0, tokens, expert(x[tokens], scale=2.0) * weights[tokens, None])
        return self.head(x + out)


def test_experts_without_tokens_follow_the_others(oracle) -> None:
    """Two tokens reach at most two of eight experts; all are cut, each in its own neurons, and all still run."""
    model, inputs = Separate([Expert(8, 12) for _ in range(8)]), torch.randn(2, 5)
    assert trace(model, inputs).unread == ()
    found = oracle(model, inputs)
    assert found.share > 0.95
    prunus.prune(model, inputs, prunus.Target(ratio=0.5))
    assert {(e.up.in_features, e.up.out_features, e.down.out_features) for e in model.experts} == {(4, 6, 4)}
    assert torch.isfinite(model(torch.randn(200, 5))).all()


def test_neurons_of_separate_experts_are_free_of_each_other() -> None:
    """An expert loses the neurons that one names, and no other expert loses any."""
    model = Separate([Expert(8, 12) for _ in range(4)])
    graph = prunus.DependencyGraph().build_dependency(model, torch.randn(2, 5))
    for k, expert in enumerate(model.experts):
        graph.get_pruning_group(expert.up, prunus.prune_linear_out_channels, list(range(k + 1))).prune()
    assert [e.down.in_features for e in model.experts] == [11, 10, 9, 8]
    assert torch.isfinite(model(torch.randn(200, 5))).all()


def test_a_module_of_another_shape_is_no_alternative() -> None:
    """What differs in class or shape is not called with arguments that are not its own; it is reported as not read."""
    torch.manual_seed(0)
    model = Separate([Expert(8, 12), Expert(8, 10), Expert(8, 12)])
    with torch.no_grad():
        model.router.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    unread = trace(model, torch.randn(2, 5)).unread
    assert unread and all(name.startswith("experts.1.") for name in unread)


def test_the_cost_is_that_of_the_example_run() -> None:
    """Calls that only teach the graph are not counted."""
    model, inputs = Separate([Expert(8, 12) for _ in range(8)]), torch.randn(2, 5)
    cost = prunus.cost.count(model, inputs)
    assert prunus.prune(model, inputs, prunus.Target(ratio=0.5)).before.macs == cost.macs


class Hooked(nn.Module):
    """Installs a hook on its layer at the first run, and remembers that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        if not getattr(self, "hooked", False):
            self.hooked = True
            self.seen = []
            self.fc.register_forward_hook(lambda m, args, out: self.seen.append(1))
        self.seen.clear()
        out = self.head(self.fc(x))
        if len(self.seen) != 1:
            raise RuntimeError(f"the hook ran {len(self.seen)} times")
        return out


def test_hooks_installed_while_tracing_are_taken_off() -> None:
    """A model that installs hooks at its first run can be traced again and again, and comes back without them."""
    model, inputs = Hooked(), torch.randn(2, 4)
    for _ in range(2):
        trace(model, inputs)
        assert not model.fc._forward_hooks
    assert prunus.verify(model, inputs).ok
    with pytest.raises(AttributeError):
        _ = model.hooked
