"""Tracing: one run, of which the model shows nothing afterwards."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import prunus
from prunus.tracing import trace

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Restless(nn.Module):
    """A module whose forward changes whatever it can reach."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.fail = fail
        self.a = nn.Linear(6, 8)
        self.drop = nn.Dropout(0.5)
        self.b = nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.history: list[int] = []
        self.cache: dict[str, torch.Tensor] = {}
        self.known = {1}
        self.sizes = (8, 4)
        self.config = SimpleNamespace(hidden=8, layers=[8, 4])
        self.plain = torch.ones(3)

    def forward(self, x):
        self.calls += 1
        h = self.drop(self.a(x))
        self.mean.mul_(0.9).add_(h.mean(0))
        self.plain.add_(1)
        self.history.append(int(h.shape[1]))
        self.cache["h"] = h
        self.known.add(2)
        self.last = h
        h = h + torch.rand(1) + random.random() * 0 + np.random.rand() * 0
        if self.fail:
            raise RuntimeError("in the middle")
        return self.b(h.view(-1, self.config.hidden))


def picture(model: Restless):
    """Everything that a user could notice."""
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        {name: m.training for name, m in model.named_modules()},
        list(model.history),
        dict(model.cache),
        set(model.known),
        model.sizes,
        dict(vars(model.config)),
        model.plain.clone(),
        sorted(vars(model)),
        torch.get_rng_state(),
        random.getstate()[1],
        np.random.get_state()[1].tolist(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
    )


def equal(a, b) -> bool:
    """Deep equality that knows tensors and tells subclasses of int from int."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fail", [True, False])
def test_the_model_comes_back_as_it_was(training, fail) -> None:
    """Modes, buffers, caches, containers, config objects, random states and grad modes, also when forward raises."""
    model = Restless(fail).train(training)
    model.drop.train(not training)
    before = picture(model)
    if fail:
        with pytest.raises(prunus.InputError, match="RuntimeError: in the middle"):
            trace(model, X)
    else:
        trace(model, X)
    assert equal(before, picture(model))


class Seeding(nn.Linear):
    """A layer that seeds numpy and draws from it."""

    def forward(self, x):
        np.random.seed(0)
        return super().forward(x) + float(np.random.rand()) * 0


def test_a_model_may_seed_numpy() -> None:
    """What numpy draws afterwards is what it would have drawn."""
    np.random.seed(3)
    expected = np.random.rand(2).tolist()
    np.random.seed(3)
    found = [np.random.rand()]
    trace(Seeding(6, 4), X)
    assert [*found, np.random.rand()] == expected


def test_verify_leaves_it_as_it_was() -> None:
    """So does the proof."""
    model = Restless()
    before = picture(model)
    assert prunus.verify(model, X).ok
    assert equal(before, picture(model))


def test_prune_and_undo_leave_it_as_it_was() -> None:
    """So does pruning followed by undo."""
    model = Restless()
    before = picture(model)
    prunus.prune(model, X, prunus.Target(ratio=0.5)).undo()
    assert equal(before, picture(model))


def test_new_keys_of_a_config_go_away() -> None:
    """What forward adds to a config object is taken off again."""

    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(hidden=8)
            self.a = nn.Linear(6, 4)

        def forward(self, x):
            self.config.seen = True
            return self.a(x)

    model = Noting()
    trace(model, X)
    assert vars(model.config) == {"hidden": 8}


def test_labels_are_not_left_on_held_tensors() -> None:
    """A buffer that forward overwrites carries nothing into the next trace."""
    model = Restless()
    trace(model, X)
    assert not any("prunus" in key for b in model.buffers() for key in vars(b))
    assert prunus.verify(model, X).groups == prunus.verify(model, X).groups == 2


def test_labels_are_not_left_on_the_inputs() -> None:
    """An input that forward overwrites carries nothing into the next trace."""

    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.a = nn.Parameter(torch.randn(6)), nn.Linear(6, 4)

        def forward(self, x):
            return self.a(x.add_(self.shift))

    x = torch.randn(2, 6)
    trace(Overwriting(), x)
    assert not any("prunus" in key for key in vars(x))


def test_gradients_are_left_alone() -> None:
    """Gradients stay the same objects, and the model trains on afterwards."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    model(X).sum().backward()
    own = [p.grad for p in model.parameters()]
    trace(model, X)
    assert all(a is p.grad for a, p in zip(own, model.parameters(), strict=True))
    assert not any(p.is_inference() for p in model.parameters())
    model(X).sum().backward()


def test_hooks_of_the_user_stay_and_run() -> None:
    """Hooks are not removed, and global hooks are not left behind."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    calls: list[str] = []
    model[0].register_forward_hook(lambda *args: calls.append("after"))
    model[0].register_forward_pre_hook(lambda *args: calls.append("before"))
    trace(model, X)
    assert calls == ["before", "after"]
    assert len(model[0]._forward_hooks) == len(model[0]._forward_pre_hooks) == 1
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_global_hooks_are_removed_when_forward_raises() -> None:
    """Nothing is left behind in torch either."""
    with pytest.raises(prunus.InputError):
        trace(Restless(fail=True), X)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_no_inference_tensors_are_left_on_the_model() -> None:
    """What a model caches while it is traced is taken off again, so that training does not meet it."""

    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
            self.table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.linspace(0, 1, 2)[:, None]
            return self.b(self.a(x) * self.table)

    model = Caching()
    trace(model, X)
    assert model.table is None
    model(X).sum().backward()


def test_models_without_gradients_can_be_traced() -> None:
    """``requires_grad=False`` changes nothing in the graph, nor does a surrounding no_grad."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).requires_grad_(False)
    with torch.no_grad():
        assert prunus.verify(model, X).ok
        result = prunus.prune(model, X, prunus.Target(ratio=0.5))
    assert result.after.params < result.before.params
    assert not any(p.requires_grad for p in model.parameters())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x, y=None, *, scale=1.0):
        return {"out": (self.c(self.a(x) + self.b(y)) * scale, [None])}


INPUTS = [
    ((X, torch.randn(2, 5)), None),
    ([X, torch.randn(2, 5)], None),
    ({"x": X, "y": torch.randn(2, 5), "scale": 2.0}, None),
    (7, lambda m, seven: m(X, torch.ones(2, 5), scale=seven)),
]


@pytest.mark.parametrize(("inputs", "forward_fn"), INPUTS, ids=["tuple", "list", "dict", "forward_fn"])
def test_ways_to_call_the_model(inputs, forward_fn) -> None:
    """Tuples, lists, dicts and a forward function; outputs nested in dicts and lists freeze."""
    found = prunus.verify(TwoInputs(), inputs, forward_fn)
    assert found.ok
    assert found.groups == 1
    assert "output" in found.frozen


def test_output_transform_picks_what_must_stay() -> None:
    """Only the chosen output keeps its size."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)

        def forward(self, x):
            x = self.a(x)
            return self.b(x), self.c(x)

    model = Heads()
    both, one = prunus.verify(model, X), prunus.verify(model, X, output_transform=lambda out: out[1])
    assert both.groups == 1
    assert one.groups == 2


def test_two_models_share_nothing() -> None:
    """Traces of two copies give equal graphs, in either order, and one inside the other's callbacks."""
    one = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    other = copy.deepcopy(one)
    first, second = trace(one, X), trace(other, X)
    again = trace(one, X)
    assert first.ledger is not second.ledger
    assert first.ledger.size == second.ledger.size == again.ledger.size
    assert [h.starts for h in first.held] == [h.starts for h in second.held] == [h.starts for h in again.held]
    assert not any("prunus" in key for p in one.parameters() for key in vars(p))


def test_a_model_that_traces_another_in_its_forward() -> None:
    """A nested trace does not disturb the outer one."""
    inner = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = self.a(x)
            prunus.cost.count(inner, X)
            return self.b(h)

    assert prunus.verify(Outer(), X).groups == 1


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (nn.Linear(6, 8), torch.randn(2, 7), "cannot run on the example inputs"),
        (nn.Linear(6, 8), {"nonsense": X}, "cannot run on the example inputs"),
        (nn.Linear(6, 8), (X, X), "cannot run on the example inputs"),
        (nn.LazyLinear(8), X, "not initialised"),
        ("model", X, "expected a torch.nn.Module, got str"),
    ],
)
def test_wrong_inputs_are_input_errors(model, inputs, words) -> None:
    """A wrong example input is an InputError that says what to try, not a crash inside torch."""
    with pytest.raises(prunus.InputError, match=words):
        trace(model, inputs)


def test_data_dependent_control_flow_runs() -> None:
    """The branch that the example takes is the one that is traced."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.a(x)
            return self.c(self.b(x) if x.sum() < 1e9 else x)

    assert prunus.verify(Branch(), X).groups == 2


def test_unused_parameters_are_left_alone() -> None:
    """A layer that does not run has no atoms and is not cut."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    model[0].unused = nn.Linear(8, 8)
    traced = trace(model, X)
    starts = {h.name: h.starts for h in traced.held}
    assert starts["0.unused.weight"] == [-1, -1]
    prunus.prune(model, X, prunus.Target(ratio=0.5))
    assert model[0].unused.weight.shape == (8, 8)


def test_events_name_op_and_module() -> None:
    """Every recorded op knows in which module's forward it ran, and where its inputs came from."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    traced = trace(model, X)
    assert [(e.name, e.module) for e in traced.events] == [("linear", "0"), ("relu", "1"), ("linear", "2")]
    assert traced.events[2].sources[0] == 1
    assert traced.unsupported == {}


def test_train_mode_is_not_used_while_tracing() -> None:
    """Dropout and batch norm run as in eval mode, without calling train() or eval() on the modules."""

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 4)

        def train(self, mode: bool = True):
            raise AssertionError("train() was called")

        def forward(self, x):
            assert not self.training
            return self.a(x)

    model = Watching()
    trace(model, X)
    assert model.training


def test_under_no_grad_composites_arrive_decomposed_all_the_same() -> None:
    """A model that leaves inference mode by itself is traced too."""

    class Decorated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x):
            with torch.inference_mode(False), torch.no_grad():
                return self.b(self.n(self.a(x.clone())).relu())

    found = prunus.verify(Decorated(), X)
    assert found.ok
    assert found.groups == 1
    assert not found.unsupported


def test_ops_that_return_a_held_tensor_leave_nothing_on_it() -> None:
    """`p.contiguous()` is `p` itself: what one trace knows of it must not reach the next one."""

    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = nn.Parameter(torch.randn(6, 8)), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x.contiguous() @ self.p.contiguous().to(torch.float32))

    model, x = Loose(), torch.randn(3, 6)
    for width in (4, 2):
        assert prunus.verify(model, x).ok
        prunus.prune(model, x, prunus.Target(ratio=0.5))
        assert model.p.shape == (6, width)
        assert not vars(model.p)
        assert not vars(x)


def test_statistics_survive_the_run_in_training(model_state, states_equal) -> None:
    """A second run in training mode, for parameters that evaluation does not read, leaves no batch norm changed."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.head, self.aux = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2), nn.Linear(4, 2)

        def forward(self, x):
            y = self.head(self.n(self.a(x)))
            return (y, self.aux(x)) if self.training else y

    model = Auxiliary().eval()
    before = model_state(model)
    found = trace(model, torch.randn(4, 4))
    assert not found.unread
    assert states_equal(before, model_state(model))


class Cache:
    """Keys and values of the tokens so far, as libraries of language models hand them from call to call."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []

    def get_seq_length(self) -> int:
        return sum(k.shape[1] for k in self.keys)

    def update(self, keys: torch.Tensor) -> torch.Tensor:
        self.keys.append(keys)
        return torch.cat(self.keys, dim=1)


class Cached(nn.Module):
    """Attention that returns its keys in a cache beside the output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(a, b) for a, b in ((6, 8), (6, 8), (6, 8), (8, 4)))

    def forward(self, x):
        cache = Cache()
        scores = self.q(x) @ cache.update(self.k(x)).transpose(1, 2)
        return {"logits": self.out(scores.softmax(-1) @ self.v(x)), "past_key_values": cache}


def test_a_cache_beside_the_output_is_state_and_keeps_nothing(oracle) -> None:
    found = oracle(Cached(), torch.randn(2, 5, 6))
    assert found.frozen == {"q.weight:1", "k.weight:1", "v.weight:1", "out.weight:0", "out.bias:0"}
