"""Folds: a number that is computed from a size is made up for in the weights, or the result says why not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunus
from prunus.coupling import couple
from prunus.graph import DependencyGraph
from prunus.surgery import borrowed
from prunus.tracing import call_model, tensors_in, trace
from prunus.verification import _averaged, _silenced, _silent_units


class Fused(nn.Module):
    """Attention from one projection; the scale is written in several ways."""

    def __init__(self, how: str, norm: bool = False, rotary: bool = False) -> None:
        super().__init__()
        self.how, self.heads, self.head_dim = how, 2, 8
        self.qkv, self.out = nn.Linear(12, 48), nn.Linear(16, 5)
        self.norm = nn.RMSNorm(8) if norm else nn.Identity()
        self.turn = nn.Parameter(torch.rand(8)) if rotary else None
        self.watch = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.norm(q), self.norm(k)
        if self.turn is not None:
            q = q * self.turn + torch.cat([-q[..., 4:], q[..., :4]], -1) * self.turn
        out = self.attend(q, k, v).transpose(1, 2).reshape(b, n, -1)
        if self.how == "shared":
            return self.out(out), self.watch(q.transpose(1, 2).reshape(b, n, -1))
        return self.out(out)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.how in ("fused", "shared"):
            return F.scaled_dot_product_attention(q, k, v)
        if self.how == "given":
            return F.scaled_dot_product_attention(q, k, v, scale=1 / math.sqrt(q.shape[-1]))
        if self.how == "divided":
            return (q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)).softmax(-1) @ v
        if self.how == "power":
            return (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        scale = torch.full((), self.head_dim**0.5)
        return (q @ k.transpose(-2, -1) / scale).softmax(-1) @ v


class Pooled(nn.Module):
    """The mean over channels that may go."""

    def __init__(self, watched: bool = False) -> None:
        super().__init__()
        self.conv, self.out, self.watched = nn.Conv2d(3, 8, 1), nn.Linear(16, 2), watched

    def forward(self, x: Tensor) -> Any:
        h = self.conv(x).relu()
        pooled = self.out(h.mean(1).flatten(1))
        return (pooled, h.sum((1, 2, 3)).exp()) if self.watched else pooled


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in tensors_in(output) if t.is_floating_point()]


def exact(model: nn.Module, inputs: Any) -> list[str]:
    """Check that removal equals silence in float64, scales included; give what was not in the test."""
    graph = DependencyGraph().build_dependency(model.double().eval(), inputs)
    units = np.concatenate(_silent_units(graph.coupling))
    assert units.size
    values = {h.name: h.tensor.detach() for h in graph.coupling.trace.held}
    with torch.no_grad():
        with borrowed(model, _silenced(graph.coupling, values, units)):
            silent = call_model(model, inputs)
        receipt = graph._prune(units)
        pruned = call_model(model, inputs)
    receipt.undo()
    for a, b in zip(_tensors(silent), _tensors(pruned), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    return list(receipt.plan.notes)


@pytest.mark.parametrize("how", ["fused", "given", "divided", "power"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
def test_the_scale_of_attention_is_folded(how: str, norm: bool, rotary: bool) -> None:
    """However the code computes it: queries (or the parameter that scales them last) make up for it."""
    model = Fused(how, norm, rotary).double().eval()
    coupling = couple(trace(model, torch.randn(2, 5, 12).double()))
    (fold,) = [f for f in coupling.folds if f.power == -0.5]
    if norm:  # one norm serves queries and keys: scaling it would scale both
        assert fold.why
        assert not fold.targets
        return
    assert not fold.why
    names = {coupling.trace.held[t.held].name for t in fold.targets}
    assert names == {"qkv.weight", "qkv.bias"}
    assert exact(model, torch.randn(2, 5, 12).double()) == []


class Normed(nn.Module):
    """Queries and keys are normalised each by a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 4)
        self.q_norm, self.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v).transpose(1, 2).flatten(2))


def test_a_norm_of_the_queries_is_scaled_instead_of_the_projection() -> None:
    """The norm would undo a scale of the projection."""
    coupling = couple(trace(Normed().eval(), torch.randn(2, 5, 6)))
    (fold,) = [f for f in coupling.folds if f.power == -0.5]
    assert {coupling.trace.held[t.held].name for t in fold.targets} == {"q_norm.weight", "q_norm.bias"}


def test_nothing_is_folded_where_something_else_reads_the_queries() -> None:
    """Nor in the keys, if those are read elsewhere too; the result says so."""
    model, inputs = Fused("shared").eval(), torch.randn(2, 5, 12)
    result = prunus.prune(model, inputs, prunus.Target(ratio=0.5))
    assert not result.plan.scalings
    assert "scaled_dot_product_attention computes with a size" in str(result)
    result.undo()
    report = prunus.verify(model, inputs)
    assert report.ok


def test_a_number_that_comes_by_an_unknown_way_is_not_folded() -> None:
    """The scale is put into a tensor first: those dims are left out of the test of silence."""
    model, inputs = Fused("tensor").eval(), torch.randn(2, 5, 12)
    coupling = couple(trace(model, inputs))
    assert not coupling.folds
    held = next(h for h in coupling.trace.held if h.name == "qkv.weight")
    assert _averaged(coupling)[held.starts[0] : held.starts[0] + 48].any()
    assert prunus.verify(model, inputs).ok


def test_the_mean_over_a_pruned_dim_is_folded() -> None:
    """The layer that makes the averaged channels makes up for their number."""
    assert exact(Pooled(), torch.randn(2, 3, 4, 4).double()) == []
    result = prunus.prune(Pooled().eval(), torch.randn(2, 3, 4, 4), prunus.Target(ratio=0.5))
    assert {s.tensor for s in result.plan.scalings} == {"conv.weight", "conv.bias"}
    assert {s.factor for s in result.plan.scalings} == {0.5}


def test_a_mean_whose_channels_are_read_elsewhere_stays_as_it_is() -> None:
    """The other reader would see other values."""
    result = prunus.prune(Pooled(watched=True).eval(), torch.randn(2, 3, 4, 4), prunus.Target(ratio=0.5))
    assert not result.plan.scalings
    assert any("sum reads it too" in note for note in result.plan.notes)


def test_scalings_are_data(tmp_path: Path, model_state: Any, states_equal: Any) -> None:
    """They are saved, replayed on a copy, chained, and undone bit for bit; plans without them can be read."""
    model, inputs = Fused("fused").eval(), torch.randn(2, 5, 12)
    copied, chained, before = copy.deepcopy(model), copy.deepcopy(model), model_state(model)
    first = prunus.prune(model, inputs, prunus.Target(ratio=0.25))
    second = prunus.prune(model, inputs, prunus.Target(ratio=0.5))
    first.plan.save(tmp_path / "plan.json")
    plan = prunus.Plan.load(tmp_path / "plan.json")
    assert plan == first.plan
    assert plan.scalings
    plan.apply(copied)
    second.plan.apply(copied)
    first.plan.then(second.plan).apply(chained)
    with torch.no_grad():
        assert torch.equal(copied(inputs), model(inputs))
        torch.testing.assert_close(chained(inputs), model(inputs))
    second.undo()
    first.undo()
    assert states_equal(before, model_state(model))
    old = '{"format": 1, "removals": [], "settings": [], "mirrors": [], "before": %s, "after": %s}'
    cost = '{"macs": 1, "params": 1, "bytes": 4}'
    assert prunus.Plan.from_json(old % (cost, cost)).scalings == ()


def _vit() -> tuple[nn.Module, Any]:
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    return model, torch.randn(2, 3, 32, 32).double()


def _hf(name: str, **config: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        hf = pytest.importorskip("transformers")
        made = getattr(hf, f"{name}Config")(vocab_size=50, bos_token_id=0, eos_token_id=0, use_cache=False, **config)
        kind = {"Bert": "BertModel", "GPT2": "GPT2LMHeadModel", "Llama": "LlamaForCausalLM"}[name]
        return getattr(hf, kind)(made), {"input_ids": torch.randint(0, 50, (2, 7))}

    return build


REAL = {
    "vit": _vit,
    "bert": _hf("Bert", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    "gpt2": _hf("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "llama": _hf(
        "Llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REAL))
def test_removing_head_dims_is_silencing_them(name: str) -> None:
    """In real transformers the test of silence covers head dims, and holds exactly."""
    model, inputs = REAL[name]()
    exact(model, inputs)
    coupling = couple(trace(model, inputs))
    averaged = _averaged(coupling)
    inside = [f for f in coupling.families if not f.coarse and len(f.lanes) > 4]
    assert inside
    assert not any(averaged[coupling.atoms_of(f.units)].any() for f in inside)
