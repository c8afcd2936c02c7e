"""What repair costs in time and memory, against plain inference of the same samples on the dense model.

    python benchmarks/repair_cost.py
    python benchmarks/repair_cost.py --networks yolov8n --samples 64

ResNet-50 at 224 px and YOLOv8n at 320 px are cut to half their multiply-adds and repaired on 256 samples in batches of
32, each in a process of its own on one thread. Time is that of the processor; plain inference is timed in the same
process, right before and right after. Memory is the peak of the process, imports, weights and samples included, for
inference and for repair in two processes. The verdict asks for at most 6 times the time, and for at most twice the
memory of inference plus the second moments of the widest layer. The exit status says whether that was kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MOST_TIME, MOST_MEMORY = 6.0, 2.0
SIZES = {"resnet50": 224, "yolov8n": 320}


def megabytes() -> float:
    """Give the peak memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def build(name: str) -> Any:
    """The network at random weights, with running statistics of its own."""
    import torch

    torch.manual_seed(0)
    if name == "resnet50":
        import torchvision

        model: Any = torchvision.models.resnet50()
    else:
        from ultralytics.nn.tasks import DetectionModel

        model = DetectionModel("yolov8n.yaml", verbose=False)
    model.train()
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(4, 3, 64, 64))
    return model.eval()


def infer(model: Any, batches: Sequence[Any]) -> float:
    """Seconds of the processor for plain inference."""
    import torch

    start = time.process_time()
    with torch.inference_mode():
        for batch in batches:
            model(batch)
    return time.process_time() - start


def moments_mb(model: Any, report: Any) -> float:
    """The second moments of the widest layer, for the rows to fit and those to judge by, in float64."""
    weights = dict(model.named_parameters())
    widest = max(weights[f"{layer.layer}.weight"][0].numel() for layer in report.layers)
    return float(2 * 8 * widest**2 / 2**20)


def measure(name: str, what: str, samples: int, batch: int) -> dict[str, float]:
    """One network, inferred or repaired, in this process."""
    import torch

    import prunus

    torch.set_num_threads(1)
    model, size = build(name), SIZES[name]
    plan = None
    if what == "repair":
        cut = prunus.prune(model, torch.randn(1, 3, size, size), prunus.Target(macs=0.5))
        plan = cut.plan
        cut.undo()
    batches = [torch.randn(batch, 3, size, size) for _ in range(samples // batch)]
    before = megabytes()
    if plan is None:
        infer(model, batches)
        return {"megabytes": megabytes(), "before": before}
    plain = infer(model, batches)
    start = time.process_time()
    report = prunus.repair(model, plan, batches, samples=samples)
    seconds, peak = time.process_time() - start, megabytes()
    moments = moments_mb(model, report)
    report.undo()
    plain = (plain + infer(model, batches)) / 2
    errors = {"error_before": report.before, "error_after": report.after}
    return {"megabytes": peak, "before": before, "seconds": seconds, "plain": plain, "moments": moments, **errors}


def apart(name: str, what: str, samples: int, batch: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", name, what, "--samples", str(samples), "--batch", str(batch)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(found.splitlines()[-1])
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 if both promises were kept on all networks."""
    parser = argparse.ArgumentParser(description="What repair costs against plain inference of the same samples.")
    parser.add_argument("--networks", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=None, help="write all figures to this JSON file")
    parser.add_argument("--one", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one is not None:
        print(json.dumps(measure(*options.one, options.samples, options.batch)))
        return 0
    table = Table(title=f"Repair on {options.samples} samples, against plain inference", title_justify="left")
    for column in (
        "network",
        "inference, s",
        "repair, s",
        "times",
        "inference, MB",
        "repair, MB",
        "moments, MB",
        "times",
    ):
        table.add_column(column, justify="left" if column == "network" else "right")
    rows, kept = [], True
    for name in options.networks:
        plain = apart(name, "infer", options.samples, options.batch)
        repair = apart(name, "repair", options.samples, options.batch)
        times = repair["seconds"] / repair["plain"]
        memory = (repair["megabytes"] - repair["moments"]) / plain["megabytes"]
        kept = kept and times <= MOST_TIME and memory <= MOST_MEMORY
        figures = (repair["plain"], repair["seconds"], times, plain["megabytes"], repair["megabytes"])
        table.add_row(name, *(f"{f:,.1f}" for f in figures), f"moments {repair['moments']:,.0f}", f"{memory:.2f}")
        rows.append({"network": name, "inference": plain, "repair": repair, "time": times, "memory": memory})
    console = Console()
    console.print(table)
    console.print(f"At most {MOST_TIME:g} times and {MOST_MEMORY:g} times: {'kept' if kept else 'NOT KEPT'}.")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=2))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
