"""Heads and head dims as separate choices: counts afterwards are as asked, and the graph still proves itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.cost import count
from prunus.coupling import couple
from prunus.tracing import call_model, tensors_in, trace

HALF = prunus.Target(ratio=0.5)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [t.clone() for t in tensors_in(call_model(model, inputs)) if t.is_floating_point()]


class Attention(nn.Module):
    """Projections of their own for queries, keys and values; fewer key heads than query heads; cross attention."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, qk: int = 8, v: int = 6) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.qk, self.v = heads, kv_heads, qk, v
        self.to_q, self.to_k = nn.Linear(12, heads * qk), nn.Linear(10, kv_heads * qk)
        self.to_v, self.out = nn.Linear(10, kv_heads * v), nn.Linear(heads * v, 12)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        (b, n, _), m = x.shape, memory.shape[1]
        q = self.to_q(x).view(b, n, self.heads, self.qk).transpose(1, 2)
        k = self.to_k(memory).view(b, m, self.kv_heads, self.qk).transpose(1, 2)
        v = self.to_v(memory).view(b, m, self.kv_heads, self.v).transpose(1, 2)
        k = k.repeat_interleave(self.heads // self.kv_heads, 1)
        v = v.repeat_interleave(self.heads // self.kv_heads, 1)
        weights = (q @ k.transpose(-2, -1) * 0.3).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class OneWidth(Attention):
    """One attribute sizes queries, keys and values."""

    def __init__(self) -> None:
        super().__init__(4, 4, 8, 8)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        self.v = self.qk
        return super().forward(x, memory)


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(16, 32), nn.Linear(32, 5)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return self.out(self.attention(h, h, h, need_weights=False)[0])


class Experts(nn.Module):
    """Every token goes through every expert; the experts are rows of one wide layer."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = 4
        self.up = nn.Linear(6, 4 * 8)
        self.mix = nn.Parameter(torch.randn(4, 8, 5))
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).view(x.shape[0], self.experts, -1).relu()
        return self.out(torch.einsum("neh,eho->neo", hidden, self.mix).relu().sum(1))


def _vit() -> tuple[nn.Module, Any]:
    models = pytest.importorskip("torchvision").models
    return models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5), torch.randn(2, 3, 32, 32)


def _swin() -> tuple[nn.Module, Any]:
    models = pytest.importorskip("torchvision").models
    return models.SwinTransformer([2, 2], 24, [2, 2], [2, 4], [4, 4], num_classes=5), torch.randn(2, 3, 32, 32)


def _timm() -> tuple[nn.Module, Any]:
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=5)
    return model, torch.randn(2, 3, 32, 32)


def _llama() -> tuple[nn.Module, Any]:
    hf = pytest.importorskip("transformers")
    config = hf.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config), {"input_ids": torch.randint(0, 50, (2, 7))}


def _bert() -> tuple[nn.Module, Any]:
    hf = pytest.importorskip("transformers")
    config = hf.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return hf.BertModel(config), {"input_ids": torch.randint(0, 50, (2, 7))}


def _gpt2() -> tuple[nn.Module, Any]:
    hf = pytest.importorskip("transformers")
    config = hf.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return hf.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 50, (2, 7))}


def _memory() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 12), torch.randn(2, 3, 10)


# a weight whose rows are queries, its number of query heads and their dims, rows per query row (fused: 3)
ZOO: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], str, int, int, float]] = {
    "fused": (_timm, "blocks.0.attn.qkv.weight", 4, 8, 3),
    "torchvision": (_vit, "encoder.layers.encoder_layer_1.self_attention.in_proj_weight", 4, 8, 3),
    "windowed": (_swin, "features.3.1.attn.qkv.weight", 4, 12, 3),
    "module": (lambda: (MultiHead(), torch.randn(2, 6, 16)), "attention.in_proj_weight", 4, 8, 3),
    "grouped": (_llama, "model.layers.1.self_attn.q_proj.weight", 8, 8, 1),
    "grouped keys": (_llama, "model.layers.1.self_attn.k_proj.weight", 4, 8, 1),
    "separate": (_bert, "encoder.layer.1.attention.self.query.weight", 4, 8, 1),
    "cross": (lambda: (Attention(), _memory()), "to_q.weight", 4, 8, 1),
    "cross values": (lambda: (Attention(), _memory()), "to_v.weight", 4, 6, 1),
    "cross grouped": (lambda: (Attention(8, 4), _memory()), "to_k.weight", 4, 8, 1),
    "experts": (lambda: (Experts(), torch.randn(3, 6)), "up.weight", 4, 8, 1),
}


@pytest.fixture(params=list(ZOO))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, str, int, int, float]:
    torch.manual_seed(0)
    build, *rest = ZOO[request.param]
    model, inputs = build()
    return (model.eval(), inputs, *rest)


def _rows(model: nn.Module, name: str) -> int:
    return int(model.get_parameter(name).shape[0])


@pytest.mark.parametrize(
    ("choice", "heads", "dims"),
    [
        ({"prune_num_heads": True, "prune_head_dims": False}, 0.5, 1.0),
        ({"prune_num_heads": True, "head_pruning_ratio": 0.25}, 0.75, 0.5),
        ({"prune_num_heads": True}, 0.5, 0.5),
        ({}, 1.0, 0.5),
        ({"prune_head_dims": False}, 1.0, 1.0),
    ],
)
def test_heads_and_head_dims_are_what_was_asked(
    case: tuple[nn.Module, Any, str, int, int, float],
    choice: dict[str, Any],
    heads: float,
    dims: float,
    model_state: Any,
    states_equal: Any,
) -> None:
    """Rows left are heads times dims; cost, symmetry, replay and undo hold."""
    model, inputs, name, had, width, times = case
    dense, before, replayed = outputs(model, inputs), model_state(model), copy.deepcopy(model)
    try:
        result = prunus.prune(model, inputs, HALF, **choice)
    except prunus.NothingToPruneError:
        assert heads == dims == 1.0
        return
    assert _rows(model, name) == int(had * heads) * int(width * dims) * times
    cost = count(model, inputs)
    assert (result.after.macs, result.after.params) == (cost.macs, cost.params)
    pruned = outputs(model, inputs)
    assert [t.shape for t in pruned] == [t.shape for t in dense]
    assert prunus.verify(model, inputs).ok
    result.plan.apply(replayed)
    assert all(torch.equal(a, b) for a, b in zip(outputs(replayed, inputs), pruned, strict=True))
    result.undo()
    assert states_equal(before, model_state(model))


def test_a_budget_is_met_with_a_fixed_share_of_heads() -> None:
    """The search over the common share leaves the heads' own share alone."""
    model, inputs = _timm()
    result = prunus.prune(model.eval(), inputs, prunus.Target(macs=0.5), prune_num_heads=True, head_pruning_ratio=0.25)
    assert [b.attn.num_heads for b in model.blocks] == [3, 3]
    assert result.after.macs <= 0.5 * result.before.macs


def test_attributes_follow_heads_and_head_dims() -> None:
    """What the code reads is set, for fused, grouped and module attention."""
    model, inputs = _timm()
    prunus.prune(model.eval(), inputs, HALF, prune_num_heads=True)
    assert [(b.attn.num_heads, b.attn.head_dim, b.attn.attn_dim) for b in model.blocks] == [(2, 4, 8)] * 2
    model, inputs = _llama()
    prunus.prune(model.eval(), inputs, HALF, prune_num_heads=True)
    assert [(k.self_attn.head_dim, k.self_attn.num_key_value_groups) for k in model.model.layers] == [(4, 2)] * 2
    module = MultiHead().eval()
    prunus.prune(module, torch.randn(2, 6, 16), HALF, prune_num_heads=True)
    found = module.attention
    assert (found.num_heads, found.embed_dim, found.head_dim) == (2, 8, 4)


def test_heads_of_one_layer_get_a_share_of_their_own() -> None:
    """``head_pruning_ratio_dict`` overrides the share for what is inside a module; 0 keeps them."""
    model, inputs = _timm()
    prunus.prune(model.eval(), inputs, HALF, prune_num_heads=True, head_pruning_ratio_dict={model.blocks[0]: 0.75})
    assert [b.attn.num_heads for b in model.blocks] == [1, 2]
    model, inputs = _timm()
    prunus.prune(model.eval(), inputs, HALF, prune_num_heads=True, head_pruning_ratio_dict={model.blocks[0]: 0.0})
    assert [b.attn.num_heads for b in model.blocks] == [4, 2]


def test_the_least_important_head_goes() -> None:
    """A head's score is that of all its slices under the criterion."""
    model, inputs = _timm()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.view(3, 4, 8, 32)[:, 2] *= 1e-3
        model.blocks[0].attn.proj.weight.view(32, 4, 8)[:, 2] *= 1e-3
    result = prunus.prune(model.eval(), inputs, prunus.Target(ratio=0.25), prune_num_heads=True, prune_head_dims=False)
    (gone,) = (r.positions for r in result.plan.removals if r.tensor == "blocks.0.attn.proj.weight" and r.dim == 1)
    assert gone == tuple(range(16, 24))


@pytest.mark.parametrize("interactive", [False, True])
def test_a_pruner_counts_heads_as_it_goes(interactive: bool) -> None:
    """``num_heads`` is the pruner's own, and up to date after every step."""
    model, inputs = _timm()
    given = {b.attn.qkv: 4 for b in model.blocks}
    pruner = prunus.pruner.MagnitudePruner(
        model.eval(), inputs, pruning_ratio=0.5, iterative_steps=2, num_heads=given, prune_num_heads=True
    )
    for heads, dims in ((3, 6), (2, 4)):
        groups = pruner.step(interactive=interactive)
        for group in groups or ():
            group.prune()
        assert [pruner.num_heads[b.attn.qkv] for b in model.blocks] == [heads, heads]
        assert [(b.attn.num_heads, b.attn.head_dim) for b in model.blocks] == [(heads, dims)] * 2
        assert prunus.verify(model, inputs).ok
    assert set(given.values()) == {4}


def test_a_pruner_takes_heads_only_of_the_layers_that_were_named() -> None:
    """Layers that are not in ``num_heads`` keep their heads."""
    model, inputs = _timm()
    pruner = prunus.pruner.MagnitudePruner(
        model.eval(), inputs, num_heads={model.blocks[0].attn.qkv: 4}, prune_num_heads=True, prune_head_dims=False
    )
    pruner.step()
    assert [b.attn.num_heads for b in model.blocks] == [2, 4]


def test_a_pruner_counts_grouped_heads() -> None:
    """A key head takes its query heads; each layer counts its own."""
    model, inputs = _llama()
    attention = model.model.layers[0].self_attn
    pruner = prunus.pruner.MagnitudePruner(
        model.eval(), inputs, num_heads={attention.q_proj: 8, attention.k_proj: 4}, prune_num_heads=True,
        head_pruning_ratio=0.25,
    )  # fmt: skip
    pruner.step()
    assert (pruner.num_heads[attention.q_proj], pruner.num_heads[attention.k_proj]) == (6, 3)


def test_the_one_key_head_of_multi_query_attention_stays() -> None:
    """Its query heads would all go with it; dims go."""
    model = Attention(4, 1).eval()
    prunus.prune(model, _memory(), HALF, prune_num_heads=True)
    assert (model.to_k.out_features, model.to_q.out_features) == (4, 16)
    assert prunus.verify(model, _memory()).ok


def test_whole_groups_of_a_convolution_go() -> None:
    """The groups of a grouped convolution are rows too."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 4, 1))
    inputs = torch.randn(1, 3, 8, 8)
    prunus.prune(model.eval(), inputs, HALF, prune_num_heads=True, prune_head_dims=False)
    assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (2, 8, 8)
    assert prunus.verify(model, inputs).ok


def test_norm_groups_are_no_heads() -> None:
    """Nothing is batched over the groups of a norm, so ``prune_num_heads`` leaves their number alone."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    prunus.prune(model.eval(), torch.randn(1, 3, 8, 8), HALF, prune_num_heads=True)
    assert (model[1].num_groups, model[1].num_channels) == (4, 8)


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_shares_of_heads_out_of_range_are_refused(ratio: float) -> None:
    """Nothing is changed."""
    model, inputs = _timm()
    with pytest.raises(prunus.InputError, match="heads"):
        prunus.prune(model, inputs, HALF, prune_num_heads=True, head_pruning_ratio=ratio)


def _families_of(model: nn.Module, inputs: Any, *names: str) -> list[set[int]]:
    """The families that each weight's rows belong to."""
    found = couple(trace(model, inputs))
    by_name = {h.name: h for h in found.trace.held}
    return [
        set(found.family_of_unit[found.unit_of_atom[by_name[n].starts[0] + np.arange(by_name[n].shape[0])]].tolist())
        for n in names
    ]


def test_widths_of_keys_and_values_are_independent_where_the_code_lets_them() -> None:
    """Two attributes: two families, and one can be cut alone."""
    model = Attention().eval()
    q, k, v = _families_of(model, _memory(), "to_q.weight", "to_k.weight", "to_v.weight")
    assert q == k
    assert not q & v
    prunus.prune(model, _memory(), HALF, ignored_layers=[model.to_v])
    assert (model.to_q.out_features, model.to_v.out_features) == (16, 24)
    assert (model.qk, model.v) == (4, 6)


def test_widths_of_keys_and_values_go_together_where_one_attribute_sizes_both() -> None:
    """One attribute: one family; keeping the values keeps the keys."""
    model = OneWidth().eval()
    q, v = _families_of(model, _memory(), "to_q.weight", "to_v.weight")
    assert q == v
    with pytest.raises(prunus.NothingToPruneError, match="leave this layer alone"):
        prunus.prune(model, _memory(), HALF, ignored_layers=[model.to_v])


class Compared(nn.Module):
    """Attention by hand that would repeat keys for grouped queries; only that comparison reads ``kv_heads``."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = 4, 4, 8
        self.qkv, self.out = nn.Linear(16, 96), nn.Linear(32, 16)

    def forward(self, x):
        n, length, _ = x.shape
        q, k, v = self.qkv(x).view(n, length, self.heads, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        if self.kv_heads != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, length, self.heads * self.head_dim))


def test_an_attribute_that_was_compared_with_a_count_stays_equal_to_it() -> None:
    model, x = Compared(), torch.randn(2, 5, 16)
    result = prunus.prune(model, x, prunus.Target(ratio=0.5), prune_num_heads=True, prune_head_dims=False)
    assert (model.heads, model.kv_heads) == (2, 2)
    assert model(x).shape == x.shape
    result.undo()
    assert (model.heads, model.kv_heads) == (4, 4)


@pytest.mark.parametrize("unpack", ["unbind", "select"])
def test_heads_go_where_each_holds_its_queries_keys_and_values(unpack, oracle) -> None:
    """The three parts of a head stay three; heads, and dims inside them, are choices of their own."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.head_dim = 4, 8
            self.qkv, self.out = nn.Linear(16, 96), nn.Linear(32, 16)

        def forward(self, x):
            n, length, _ = x.shape
            split = self.qkv(x).view(n, length, self.heads, 3, self.head_dim).transpose(1, 2)
            q, k, v = split.unbind(3) if unpack == "unbind" else (split[..., i, :] for i in range(3))
            y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
            return self.out(y.transpose(1, 2).reshape(n, length, self.heads * self.head_dim))

    x = torch.randn(2, 5, 16)
    oracle(Fused(), x)
    for rows, dims, expected in ((True, False, (2, 8)), (False, True, (4, 4)), (True, True, (2, 4))):
        model = Fused()
        prunus.prune(model, x, HALF, prune_num_heads=rows, prune_head_dims=dims)
        assert (model.heads, model.head_dim) == expected
        assert model(x).shape == x.shape
