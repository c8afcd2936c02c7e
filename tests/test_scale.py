"""Models that are too big to run, or to hold: traced on meta tensors, with time and memory that grow with the model."""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import nn

import prunus
from prunus.coupling.explain import frozen


class Block(nn.Module):
    """A decoder layer with grouped queries and a gated feed-forward part."""

    def __init__(self, width: int, hidden: int, heads: int, groups: int) -> None:
        super().__init__()
        size = width // heads
        self.head_dim, self.shared = size, heads // groups
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        b, n, _ = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(b, n, -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(self.shared, 1), v.repeat_interleave(self.shared, 1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, n, -1))
        y = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, layers: int, width: int = 64, hidden: int = 96, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.layers = nn.Sequential(*[Block(width, hidden, heads, groups) for _ in range(layers)])
        self.head = nn.Linear(width, 100, bias=False)

    def forward(self, tokens):
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.layers(self.embed(tokens) + (positions[:, None] >= 0)))


TOKENS = torch.randint(0, 100, (1, 16))


def found(model, inputs, **options):
    graph = prunus.DependencyGraph().build_dependency(model, inputs, **options)
    groups = [[(d.target.name, d.handler.__name__, i) for d, i in g] for g in graph.get_all_groups()]
    return groups, frozen(graph.coupling)


def test_the_graph_without_data_is_the_graph_with_data(model_state, states_equal) -> None:
    model = Decoder(2).eval()
    before = model_state(model)
    with torch.device("meta"):
        empty = Decoder(2).eval()
    real = found(model, TOKENS)
    assert len(real[0]) > 3
    assert found(model, TOKENS, device="meta") == real
    assert found(empty, TOKENS) == real
    assert found(empty, TOKENS.to("meta")) == real
    assert states_equal(before, model_state(model))
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_a_wide_decoder_costs_seconds_and_little_memory() -> None:
    with torch.device("meta"):
        model = Decoder(8, 8192, 28672, 64, 8).eval()
    tracemalloc.start()
    start = time.process_time()
    graph = prunus.DependencyGraph().build_dependency(model, TOKENS)
    groups = list(graph.get_all_groups())
    taken = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(g.size for g in groups)[-8:] == [28672] * 8
    assert peak < 400e6
    assert taken < 30


def test_work_grows_with_layers_not_with_their_square() -> None:
    taken = {}
    for layers in (4, 16):
        with torch.device("meta"):
            model = Decoder(layers, 2048, 4096, 16, 4).eval()
        start = time.process_time()
        graph = prunus.DependencyGraph().build_dependency(model, TOKENS)
        assert all(len(g.items) > 2 for g in graph.get_all_groups())
        taken[layers] = time.process_time() - start
    assert taken[16] < 4 * taken[4] * 2.5  # four times the layers; linear with a margin for noise


def test_plans_of_empty_models_are_costed_saved_and_applied_anywhere(tmp_path) -> None:
    real = Decoder(2).eval()
    with torch.device("meta"):
        empty = Decoder(2).eval()
    graph = prunus.DependencyGraph().build_dependency(empty, TOKENS)
    plan = next(iter(graph.get_all_groups())).plan([0, 1])
    same = prunus.DependencyGraph().build_dependency(real, TOKENS)
    assert plan == next(iter(same.get_all_groups())).plan([0, 1])
    assert plan.after.params < plan.before.params == sum(p.numel() for p in real.parameters())
    plan.save(tmp_path / "plan.json")
    prunus.Plan.load(tmp_path / "plan.json").apply(real)
    assert sum(p.numel() for p in real.parameters()) == plan.after.params
    shapes = [p.shape for p in empty.parameters()]
    receipt = plan.apply(empty)
    assert all(p.is_meta for p in empty.parameters())
    assert [p.shape for p in empty.parameters()] == [p.shape for p in real.parameters()]
    assert real(TOKENS).shape == (1, 16, 100)
    receipt.undo()
    assert [p.shape for p in empty.parameters()] == shapes


def test_random_scores_prune_an_empty_model_and_scores_of_weights_say_what_is_missing() -> None:
    with torch.device("meta"):
        empty = Decoder(1).eval()
    twin = copy.deepcopy(empty)
    result = prunus.prune(empty, TOKENS, prunus.Target(params=0.6), importance=prunus.importance.RandomImportance())
    assert sum(p.numel() for p in empty.parameters()) == result.after.params <= 0.6 * result.before.params
    with pytest.raises(prunus.InputError, match="no values"):
        prunus.prune(twin, TOKENS, prunus.Target(params=0.6))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.a(x)
        return self.b(y) if y.sum() > 0 else self.b(-y)


def test_control_flow_that_depends_on_weights_names_the_cure() -> None:
    with pytest.raises(prunus.InputError, match=r"meta device.*leave device= out"):
        prunus.DependencyGraph().build_dependency(Branches(), torch.randn(1, 8), device="meta")
    with torch.device("meta"):
        empty = Branches()
    with pytest.raises(prunus.InputError, match="build the model outside"):
        prunus.DependencyGraph().build_dependency(empty, torch.randn(1, 8))
    with pytest.raises(prunus.InputError, match="only 'meta'"):
        prunus.DependencyGraph().build_dependency(Branches(), torch.randn(1, 8), device="cuda")


class Constants(nn.Module):
    """Branches on values that no weight enters, and writes activations into a tensor that it made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("on", torch.tensor([True]))
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

    def forward(self, x, writes: bool = False):
        self.calls += 1
        y = self.a(x)
        if self.on.item() and torch.arange(3).sum().item() == 3:
            y = torch.relu(y)
        if writes:
            out = torch.zeros(x.shape[0], 16)
            out[:, :] = y
            y = out
        return self.b(y)


def test_values_that_no_weight_enters_are_real() -> None:
    model = Constants()
    groups, _ = found(model, torch.randn(2, 8), device="meta")
    assert [len(i) for _, _, i in groups[0]] == [16, 16]
    assert int(model.calls) == 0
    with pytest.raises(prunus.InputError, match=r"writes into a constant|item"):
        found(model, (torch.randn(2, 8), True), device="meta")


def test_the_benchmark_tells_a_line_from_a_parabola() -> None:
    path = Path(__file__).parents[1] / "benchmarks" / "scale.py"
    spec = importlib.util.spec_from_file_location("scale_benchmark", path)
    bench = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, bench)  # dataclasses look their module up
        spec.loader.exec_module(bench)

    def rows(cost, layers=(10, 20, 40)):
        return [bench.Row(n, 64, cost(n), 100.0, 10.0 + n, 3, 1000) for n in layers]

    line, parabola = rows(lambda n: 1 + n / 100), rows(lambda n: n * n / 1000)
    assert bench.growth([10, 20, 40], [1, 2, 4]) == pytest.approx(1)
    assert bench.judge(line, line[-1:])["kept"]
    verdict = bench.judge(parabola, parabola[-1:])
    assert (verdict["kept"], verdict["not_linear"]) == (False, ["seconds over layers"])
    assert not bench.judge(rows(lambda n: 30.0), line[-1:])["kept"]
    assert bench.plot(line, line).count("<polyline") == 4
