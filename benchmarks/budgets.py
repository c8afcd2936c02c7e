"""Are budgets met? Networks of many kinds to shares of their multiply-adds and of their parameters.

    python benchmarks/budgets.py --out runs/bench/budgets.json
    python benchmarks/budgets.py --only resnet18 llama --shares 0.5

For each network, budget and share: what the plan says is left, what is counted after the cut, how far below the target
that is, and the time of the whole cut (graph, scores, budget, surgery) against one forward pass, both in seconds of the
thread. The promise: never above the target, at most 2 % of it below (or the result says which step was
too large), and the count after the cut is what the plan said. Weights are random: budgets depend on shapes only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

SHARES = (0.75, 0.5, 0.25)
BELOW = 0.02


@dataclass(frozen=True)
class Row:
    """One network cut to one budget."""

    network: str
    budget: str
    share: float
    predicted: int = 0
    counted: int = 0
    dense: int = 0
    below: float = 0.0
    cut_s: float = 0.0
    forward_s: float = 0.0
    reason: str = ""
    error: str = ""

    @property
    def kept(self) -> bool:
        """Whether the promise was kept."""
        if self.error:
            return False
        met = self.counted == self.predicted and self.below >= -1e-9
        return met and (self.below <= BELOW or bool(self.reason))


class Classifier(nn.Module):
    """Embedding, two LSTM layers, a head on the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 96)
        self.lstm = nn.LSTM(96, 128, num_layers=2, batch_first=True)
        self.head = nn.Linear(128, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the last step."""
        return self.head(self.lstm(self.embed(tokens))[0][:, -1])


def vision(name: str, size: int = 64, **options: Any) -> Callable[[], tuple[nn.Module, Any, dict[str, Any]]]:
    def make() -> tuple[nn.Module, Any, dict[str, Any]]:
        from torchvision.models import get_model

        return get_model(name, **options), torch.randn(1, 3, size, size), {}

    return make


def vit() -> tuple[nn.Module, Any, dict[str, Any]]:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=64, patch_size=16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072, num_classes=100
    )
    return model, torch.randn(1, 3, 64, 64), {}


def yolo() -> tuple[nn.Module, Any, dict[str, Any]]:
    from ultralytics import YOLO

    from prunus.integrations.ultralytics.facts import width_facts
    from prunus.integrations.ultralytics.pruning import without_features

    model: Any = YOLO("yolov8n.yaml", verbose=False).model
    return model, torch.zeros(1, 3, 64, 64), {"forward_fn": without_features, "facts": width_facts(model)}


def llama() -> tuple[nn.Module, Any, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=128,
        intermediate_size=344,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=500,
        use_cache=False,
    )
    return LlamaForCausalLM(config), {"input_ids": torch.randint(0, 500, (1, 16))}, {}


def lstm() -> tuple[nn.Module, Any, dict[str, Any]]:
    return Classifier(), torch.randint(0, 1000, (1, 12)), {}


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any, dict[str, Any]]]] = {
    "resnet18": vision("resnet18"),
    "resnet50": vision("resnet50"),
    "mobilenet_v3": vision("mobilenet_v3_large"),
    "efficientnet_b0": vision("efficientnet_b0"),
    "densenet121": vision("densenet121"),
    "vgg16_bn": vision("vgg16_bn"),
    "vit_b_16": vit,
    "yolov8n": yolo,
    "convnext_tiny": vision("convnext_tiny"),
    "swin_t": vision("swin_t"),
    "lstm": lstm,
    "llama": llama,
}


def measure(network: str, budget: str, share: float, allocation: str) -> Row:
    """Cut a new copy of a network, and count what is left."""
    import prunus
    from prunus.cost import count
    from prunus.tracing import call_model

    torch.manual_seed(0)
    model, inputs, options = NETWORKS[network]()
    model.eval()
    forward_fn = options.get("forward_fn")
    try:
        with torch.inference_mode():
            call_model(model, inputs, forward_fn)
            start = time.thread_time()
            call_model(model, inputs, forward_fn)
            forward = time.thread_time() - start
        start = time.thread_time()
        result = prunus.prune(model, inputs, prunus.Target(**{budget: share}), allocation=allocation, **options)
        taken = time.thread_time() - start
        counted = getattr(count(model, inputs, forward_fn), budget)
    except Exception as error:
        return Row(network, budget, share, error=f"{type(error).__name__}: {error}")
    dense, now = getattr(result.before, budget), getattr(result.after, budget)
    below = 1 - counted / (share * dense)
    reason = result.budget.note if result.budget is not None else ""
    return Row(network, budget, share, now, counted, dense, below, taken, forward, reason)


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="Budgets", title_justify="left")
    for name in ("network", "budget", "asked", "got", "below by", "counted = predicted", "cut / forward", "kept"):
        table.add_column(name)
    for row in rows:
        if row.error:
            table.add_row(row.network, row.budget, f"{row.share:.0%}", row.error, "", "", "", "no")
            continue
        table.add_row(
            row.network,
            row.budget,
            f"{row.share:.0%}",
            f"{row.counted / row.dense:.2%}",
            f"{row.below:.2%}",
            "yes" if row.counted == row.predicted else f"no: {row.counted} and {row.predicted}",
            f"{row.cut_s / max(row.forward_s, 1e-9):.2f}",
            "yes" if row.kept else "no",
        )
        if row.reason:
            table.add_row("", "", "", row.reason, "", "", "", "")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--budgets", nargs="+", choices=["macs", "params"], default=["macs", "params"])
    parser.add_argument("--allocation", default="uniform")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for network in arguments.only:
        for budget in arguments.budgets:
            for share in arguments.shares:
                rows.append(measure(network, budget, share, arguments.allocation))
                print(rows[-1], file=sys.stderr)
    console = Console(width=140)
    show(rows, console)
    kept = sum(row.kept for row in rows)
    console.print(f"{'KEPT' if kept == len(rows) else 'NOT KEPT'}: {kept} of {len(rows)} budgets")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return 0 if kept == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
