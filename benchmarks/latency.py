"""Does a latency target hold, and what is it worth? ResNet-50, MobileNetV3, ViT-S and YOLOv8n on this machine.

    python benchmarks/latency.py --out runs/bench/latency.json
    python benchmarks/latency.py --only resnet50 --share 0.6 --device cuda

Run it on an idle machine. Each network is cut to a share of its latency; then a copy is cut to the multiply-adds that
this plan has left, as a plain target of MACs would; and the dense network, both of them and a second dense network (the
noise of the machine) are timed in turns. The promise: the measured latency is within 10 % of the prediction, and not
above that of the plain plan. Everything measured goes into a JSON file; the exit status says whether it was kept.
"""

from __future__ import annotations

import argparse
import copy
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

OFF = 0.10
NOISE = 0.02


@dataclass(frozen=True)
class Row:
    """One network: times in milliseconds (in turns), MACs as shares of the dense network's."""

    network: str
    dense: float = 0.0
    again: float = 0.0
    predicted: float = 0.0
    measured: float = 0.0
    plain: float = 0.0
    macs: float = 0.0
    plain_macs: float = 0.0
    note: str = ""
    search_s: float = 0.0
    error: str = ""

    @property
    def off(self) -> float:
        """How far the measured latency is from the prediction, both as shares of the dense one of their own run."""
        return self.measured / self.predicted - 1 if self.predicted else 0.0

    @property
    def kept(self) -> bool:
        """Whether the prediction held, and the plan is no slower than the plain one."""
        return not self.error and abs(self.off) <= OFF and self.measured <= self.plain * (1 + NOISE)


def resnet50(size: int) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    from torchvision.models import resnet50 as build

    return build(), torch.randn(1, 3, size, size), {}


def mobilenet_v3(size: int) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    from torchvision.models import mobilenet_v3_large as build

    return build(), torch.randn(1, 3, size, size), {}


def vit_s(size: int) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    import timm

    return timm.create_model("vit_small_patch16_224", img_size=size), torch.randn(1, 3, size, size), {}


def yolov8n(size: int) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    from ultralytics import YOLO

    from prunus.integrations.ultralytics.pruning import without_features

    model: Any = YOLO("yolov8n.yaml", verbose=False).model
    return model, torch.zeros(1, 3, 2 * size // 32 * 32, 2 * size // 32 * 32), {"forward_fn": without_features}


NETWORKS: dict[str, Callable[[int], tuple[nn.Module, torch.Tensor, dict[str, Any]]]] = {
    "resnet50": resnet50,
    "mobilenet_v3": mobilenet_v3,
    "vit_s": vit_s,
    "yolov8n": yolov8n,
}


def facts_of(network: str, model: nn.Module) -> dict[str, Any]:
    if network != "yolov8n":
        return {}
    from prunus.integrations.ultralytics.facts import width_facts

    return {"facts": width_facts(model)}


def measure(network: str, share: float, size: int, device: str, turns: int) -> Row:
    """Cut two copies of a network, and time them against it."""
    import prunus
    from prunus.cost import latency

    torch.manual_seed(0)
    model, inputs, options = NETWORKS[network](size)
    model, inputs = model.eval().to(device), inputs.to(device)
    again, timed, plain = (copy.deepcopy(model) for _ in range(3))
    try:
        start = time.perf_counter()
        result = prunus.prune(timed, inputs, prunus.Target(latency=share), **options, **facts_of(network, timed))
        taken = time.perf_counter() - start
        left = result.after.macs / result.before.macs
        other = prunus.prune(plain, inputs, prunus.Target(macs=left), **options, **facts_of(network, plain))
    except prunus.PrunusError as error:
        return Row(network, error=str(error))
    models = {"dense": model, "again": again, "timed": timed, "plain": plain}
    forward = options.get("forward_fn")
    runs: Any = models if forward is None else {n: _bound(forward, m) for n, m in models.items()}
    found = latency(runs, inputs, repeat=turns)
    budget = result.budget
    if budget is None:
        return Row(network, error="no budget came back")
    predicted = budget.reached["latency"] / budget.dense["latency"] * found["dense"]
    return Row(
        network,
        found["dense"],
        found["again"],
        predicted,
        found["timed"],
        found["plain"],
        left,
        other.after.macs / other.before.macs,
        budget.note,
        taken,
    )


def _bound(forward: Callable[..., Any], model: nn.Module) -> Callable[[Any], Any]:
    return lambda inputs: forward(model, inputs)


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="Latency", title_justify="left")
    for name in ("network", "dense ms", "noise", "predicted", "measured", "off by", "plain MACs plan", "MACs", "kept"):
        table.add_column(name, justify="left" if name == "network" else "right")
    for row in rows:
        if row.error:
            table.add_row(row.network, row.error, *[""] * 6, "no")
            continue
        table.add_row(
            row.network,
            f"{row.dense:.2f}",
            f"{row.again / row.dense - 1:+.1%}",
            f"{row.predicted:.2f} ({row.predicted / row.dense:.1%})",
            f"{row.measured:.2f} ({row.measured / row.dense:.1%})",
            f"{row.off:+.1%}",
            f"{row.plain:.2f} ({row.plain / row.dense:.1%})",
            f"{row.macs:.1%}",
            "yes" if row.kept else "no",
        )
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.network}: {row.note}; the search took {row.search_s:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--size", type=int, default=224, help="height and width of the pictures (twice it for YOLO)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for network in arguments.only:
        rows.append(measure(network, arguments.share, arguments.size, arguments.device, arguments.turns))
        print(rows[-1], file=sys.stderr)
    console = Console(width=140)
    show(rows, console)
    kept = sum(row.kept for row in rows)
    console.print(f"{'KEPT' if kept == len(rows) else 'NOT KEPT'}: {kept} of {len(rows)} latencies")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return 0 if kept == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
