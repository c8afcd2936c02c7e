"""Graph networks and mixtures of experts: the graph is proved on each, and half of every group goes and trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import prunus

NODES, EDGES = 10, 30
LEAST_REMOVED = 0.25


def prove(model: nn.Module, inputs: Any, loss: Callable[[Any], torch.Tensor], share: float = 0.95) -> None:
    """The graph verifies, reaches nearly all parameters, and a model cut to half runs and trains one step."""
    model.eval()
    report = prunus.verify(model, inputs)
    assert report.ok, str(report)
    assert not report.unsupported
    assert report.prunable_share >= share, str(report)
    before = sum(p.numel() for p in model.parameters())
    prunus.prune(model, inputs, prunus.Target(ratio=0.5))
    model.train()
    loss(model(**inputs) if isinstance(inputs, dict) else model(*inputs)).backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert sum(p.numel() for p in model.parameters()) <= (1 - LEAST_REMOVED) * before


# Graph networks


class Residual(nn.Module):
    """Two convolutions over a graph with norms and skips, between linear layers."""

    def __init__(self, conv: Callable[[int], nn.Module], attributes: bool) -> None:
        super().__init__()
        self.attributes = attributes
        self.stem, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.convs = nn.ModuleList(conv(16) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm1d(16) for _ in range(2))

    def forward(self, x, edges, attributes):
        x = self.stem(x)
        more = {"edge_attr": attributes} if self.attributes else {}
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + norm(conv(x, edges, **more)).relu()
        return self.head(x)


def mlp(n: int, m: int) -> nn.Module:
    return nn.Sequential(nn.Linear(n, 24), nn.ReLU(), nn.Linear(24, m))


DEGREES = torch.tensor([0, 2, 4, 3, 1])
PNA = {"aggregators": ["mean", "min", "max", "std"], "scalers": ["identity", "amplification", "attenuation"]}

MODELS: dict[str, Callable[[Any], nn.Module]] = {
    "GCN": lambda g: g.models.GCN(6, 16, 3, 3, norm="batch", jk="cat"),
    "GraphSAGE": lambda g: g.models.GraphSAGE(6, 16, 3, 3, norm="batch"),
    "GAT": lambda g: g.models.GAT(6, 16, 3, 3, heads=2),
    "GATv2": lambda g: g.models.GAT(6, 16, 3, 3, heads=2, v2=True, concat=False),
    "GIN": lambda g: g.models.GIN(6, 16, 3, 3, norm="batch"),
    "PNA": lambda g: g.models.PNA(6, 16, 3, 3, deg=DEGREES, **PNA),
    "EdgeCNN": lambda g: g.models.EdgeCNN(6, 16, 3, 3),
}
LAYERS: dict[str, tuple[Callable[[Any], Callable[[int], nn.Module]], bool]] = {
    "GCNConv": (lambda g: lambda n: g.GCNConv(n, n), False),
    "SAGEConv": (lambda g: lambda n: g.SAGEConv(n, n, aggr=["mean", "max", "std"]), False),
    "GATConv": (lambda g: lambda n: g.GATConv(n, n // 4, heads=4, edge_dim=4), True),
    "GATv2Conv": (lambda g: lambda n: g.GATv2Conv(n, n // 4, heads=4, edge_dim=4), True),
    "TransformerConv": (lambda g: lambda n: g.TransformerConv(n, n // 4, heads=4, edge_dim=4, beta=True), True),
    "GINEConv": (lambda g: lambda n: g.GINEConv(mlp(n, n), edge_dim=4), True),
    "PNAConv": (lambda g: lambda n: g.PNAConv(n, n, deg=DEGREES, edge_dim=4, **PNA), True),
    "EdgeConv": (lambda g: lambda n: g.EdgeConv(mlp(2 * n, n)), False),
    "GatedGraphConv": (lambda g: lambda n: g.GatedGraphConv(n, 2), False),
}


def graph() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, edges and attributes of edges."""
    return torch.randn(NODES, 6), torch.randint(0, NODES, (2, EDGES)), torch.randn(EDGES, 4)


@pytest.mark.parametrize("name", MODELS)
def test_graph_networks(name) -> None:
    """The basic networks of torch_geometric.nn.models."""
    geometric = pytest.importorskip("torch_geometric.nn")
    prove(MODELS[name](geometric), graph()[:2], torch.Tensor.sum)


@pytest.mark.parametrize("name", LAYERS)
def test_residual_graph_networks(name) -> None:
    """Layers of torch_geometric with norms, skips and attributes of edges."""
    geometric = pytest.importorskip("torch_geometric.nn")
    build, attributes = LAYERS[name]
    prove(Residual(build(geometric), attributes), graph(), torch.Tensor.sum)


@pytest.mark.parametrize("name", ["mean", "max", "sum", "std", "softmax", "median", "powermean"])
def test_aggregations(name) -> None:
    """Rows reduced by an index, as torch_geometric does it."""
    geometric = pytest.importorskip("torch_geometric.nn")

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pool, self.head = nn.Linear(6, 16), geometric.aggr.MultiAggregation([name]), mlp(16, 3)

        def forward(self, x, index):
            return self.head(self.pool(self.stem(x), index))

    prove(Pooled(), (torch.randn(NODES, 6), torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 3])), torch.Tensor.sum, 0.9)


# Mixtures of experts

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
DEEPSEEK = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DECODERS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "DeepseekV3": {"num_key_value_heads": 4, "moe_intermediate_size": 24, **DEEPSEEK, **LATENT},
    "Olmoe": {"num_experts": 4},
    "GraniteMoe": {"num_local_experts": 4},
    "Phimoe": {"num_local_experts": 4},
    "JetMoe": {"num_local_experts": 4, "kv_channels": 8},
    "GptOss": {"num_local_experts": 4, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}
WHOLE_EXPERTS = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GptOss")
WAYS = ("eager", "grouped_mm", "batched_mm")


def decoder(name: str, way: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny causal language model of that family, and its inputs."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    sizes = {**SIZES, **DECODERS[name]}
    if name == "JetMoe":
        del sizes["num_attention_heads"]
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
    if way != "eager" or name != "JetMoe":
        try:
            model.set_experts_implementation(way)
        except (AttributeError, ValueError):
            pytest.skip(f"{name} has no choice of how experts run")
    return model, {"input_ids": torch.randint(1, 64, (2, 12))}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DECODERS)
def test_mixtures_of_experts(name, way) -> None:
    """Routed decoders of transformers, however their experts are run."""
    model, inputs = decoder(name, way)
    prove(model, inputs, lambda out: out.logits.float().square().mean())


@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", WHOLE_EXPERTS)
def test_whole_experts_go(name, way) -> None:
    """Where experts run side by side, half of them go, with their rows of the router."""
    model, inputs = decoder(name, way)
    result = prunus.prune(model, inputs, prunus.Target(ratio=0.5))
    left = {r.tensor: r.size - len(r.positions) for r in result.plan.removals if r.dim == 0 and ".experts." in r.tensor}
    assert left and set(left.values()) == {2}
    assert router_rows(model) == [2, 2]


def router_rows(model: nn.Module) -> list[int]:
    """How many experts each router knows."""
    return [len(m.weight) for path, m in model.named_modules() if path.endswith(("mlp.gate", "mlp.router"))]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", WHOLE_EXPERTS)
def test_whole_experts_go_where_a_loss_counts_them(name, masked) -> None:
    """Their balance is computed with their number, which follows; as many stay as each token asks for."""
    model, inputs = decoder(name, "grouped_mm")
    inputs = {**inputs, "labels": inputs["input_ids"], "output_router_logits": True}
    if masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    output = {"output_transform": lambda out: (out.logits, out.loss)}
    assert prunus.verify(model.eval(), inputs, **output).ok
    prunus.prune(model, inputs, prunus.Target(ratio=0.9), prune_num_heads=True, **output)
    assert router_rows(model) == [2, 2]
    assert model.num_experts == model.num_experts_per_tok == 2
    model.train()
    model(**inputs).loss.backward()


def test_images_between_tokens() -> None:
    """A decoder that reads an encoder's features in the place of some tokens (masked_scatter)."""
    transformers = pytest.importorskip("transformers")
    text = {k: v for k, v in SIZES.items() if k != "num_experts_per_tok"}
    vision = {k: text[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=32),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=3,
        vision_feature_layer=-1,
    )
    tokens = torch.randint(5, 64, (2, 12))
    tokens[:, 2:6] = 3
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 16, 16), "use_cache": False}
    model = transformers.LlavaForConditionalGeneration(config).eval()
    report = prunus.verify(model, inputs, output_transform=lambda out: out.logits)
    assert report.ok and report.prunable_share > 0.99, str(report)
    prunus.prune(model, inputs, prunus.Target(ratio=0.5), output_transform=lambda out: out.logits)
    model.train()
    model(**inputs).logits.sum().backward()
