"""Networks of many families: repair brings their outputs nearer to the dense model's on new inputs, or says why not."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import prunus
from prunus.tracing import call_model, tensors_in

sys.path.insert(0, str(Path(__file__).parents[2]))

NETWORKS = {
    "handwritten": [
        *("mlp", "grouped", "inverted_residual", "dense_block", "squeeze_excite", "layer_scale", "unet", "fpn"),
        *("generator", "mixer", "attention", "tied", "experts", "pixel_shuffle", "wave_net", "bilinear"),
    ],
    "recurrent": ["lstm_bidirectional", "gru_packed", "lstm_projected", "grucell", "seq2seq_attention"],
    "torchvision": ["squeezenet1_1"],
    "geometric": ["gcn", "sage", "gat"],
    "transformers": ["bert", "gpt2", "llama"],
    "timm": ["test_convnext"],
    "diffusers": ["unet_2d_plain"],
}
LIBRARIES = {"geometric": "torch_geometric", "handwritten": "torch", "recurrent": "torch"}


def needs(family: str) -> Any:
    library = LIBRARIES.get(family, family)
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


def fresh(inputs: Any, family: str, seed: int) -> Any:
    """Other inputs of the same form; more samples where all tensors count them in their first dim."""
    generator = torch.Generator().manual_seed(seed)
    leaves, spec = tree_flatten(inputs)
    sizes = {t.shape[0] if t.dim() else 0 for t in leaves if isinstance(t, Tensor)}
    times = 8 if len(sizes) == 1 and sizes != {0, 1} and family != "geometric" else 1

    def other(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if t.is_floating_point():
            return torch.randn(times * len(t), *t.shape[1:], generator=generator) if t.dim() else t
        if t.dim() < 2 or family == "geometric":
            return t.repeat(times) if t.dim() == 1 else t
        return torch.randint(int(t.min()), int(t.max()) + 1, (times * len(t), *t.shape[1:]), generator=generator)

    return tree_unflatten([other(t) for t in leaves], spec)


def outputs(model: nn.Module, inputs: Any, run: Any) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in tensors_in(call_model(model, inputs, run)) if t.is_floating_point()]


def settle(model: nn.Module, batches: list[Any], run: Any) -> None:
    """Running statistics of its own."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        model.train()
        for batch in batches:
            outputs(model, tree_map(lambda t: t, batch), run)
    model.eval()


@pytest.mark.parametrize(
    ("family", "name"),
    [pytest.param(family, name, marks=needs(family)) for family, names in NETWORKS.items() for name in names],
)
def test_repair_helps_or_says_why_not(family, name) -> None:
    network = importlib.import_module(f"zoo.networks.{family}").table()[name]()
    model, run = network.model, network.forward_fn
    batches = [fresh(network.inputs, family, seed) for seed in range(5)]
    settle(model, batches, run)
    dense, cut = copy.deepcopy(model), copy.deepcopy(model)
    plan = prunus.prune(
        cut, network.inputs, prunus.Target(ratio=0.4), forward_fn=run, output_transform=network.output_transform
    ).plan
    report = prunus.repair(model, plan, batches, forward_fn=run)
    tests = [fresh(network.inputs, family, seed) for seed in range(100, 104)]
    errors = [
        sum(
            float((a - b).square().mean() / a.var().clamp_min(1e-12))
            for inputs in tests
            for a, b in zip(outputs(dense, inputs, run), outputs(other, inputs, run), strict=True)
        )
        for other in (cut, model)
    ]
    print(
        f"{family}/{name}: {report.before} -> {report.after}; new inputs {errors}; {len(report.layers)} {report.notes}"
    )
    if name == "tied":
        assert any(layer.layer == "embedding" and layer.accepted for layer in report.layers)
    if name == "gat":
        assert "att_src keeps its weights: it is read by mul and sum" in str(report)
    if any(layer.accepted for layer in report.layers) and report.accepted:
        assert errors[1] < errors[0]
    else:
        assert report.notes or all(layer.reason for layer in report.layers)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), cut.parameters(), strict=True))
