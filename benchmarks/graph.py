"""Time the dependency graph: Prunus against one forward pass of the same model, and against Torch-Pruning.

    make bench
    python benchmarks/graph.py --models resnet18 vit_b_16 --rounds 5

For each model, three things take turns in one process, and the best of several rounds counts: a forward pass (batch of
one, evaluation, no gradients), and for each library `build_dependency` with all groups. Torch-Pruning crashes on some
of the models and does not come to an end on others, so it first tries each of them in a process of its own, with a time
limit; where it does not make it, the table says what happened, and only Prunus is timed.

The verdict asks for what the library promises: at most two forward passes (median over the models), and on no model
slower than Torch-Pruning. Everything measured goes into a JSON file; the exit status says whether the promise was kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

MOST_FORWARD_PASSES = 2.0
ROOTS = [nn.Conv2d, nn.Linear, nn.LSTM, nn.GRU]

TORCHVISION = (
    "resnet18",
    "resnet50",
    "vgg16_bn",
    "densenet121",
    "mobilenet_v3_large",
    "shufflenet_v2_x1_0",
    "resnext50_32x4d",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
)
ULTRALYTICS = ("yolov8n", "yolo11n")
RECURRENT = {"lstm": nn.LSTM, "gru": nn.GRU}
MODELS = (*TORCHVISION, *ULTRALYTICS, *RECURRENT)


class SequenceClassifier(nn.Module):
    """Tokens in, classes out: embedding, a recurrent layer of two levels and two directions, a linear head."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        self.recurrent = kind(128, 256, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify token numbers of shape (batch, time)."""
        states, _ = self.recurrent(self.embedding(tokens))
        return self.head(states[:, -1])


def make(name: str) -> tuple[nn.Module, Tensor]:
    """Build a model with random weights, and an input of its native size."""
    torch.manual_seed(0)
    if name in TORCHVISION:
        import torchvision

        return torchvision.models.get_model(name, weights=None).eval(), torch.rand(1, 3, 224, 224)
    if name in ULTRALYTICS:
        from ultralytics.nn.tasks import DetectionModel

        return DetectionModel(f"{name}.yaml", verbose=False).eval(), torch.rand(1, 3, 640, 640)
    return SequenceClassifier(RECURRENT[name]).eval(), torch.randint(0, 1000, (1, 64))


def all_groups(library: ModuleType, model: nn.Module, inputs: Tensor) -> int:
    """Do what is timed, with either library: build the graph, list every group. Give their number."""
    options = {"verbose": False} if library.__name__ == "torch_pruning" else {}
    graph = library.DependencyGraph().build_dependency(model, example_inputs=inputs, **options)
    return len(list(graph.get_all_groups(root_module_types=ROOTS)))


def forward(model: nn.Module, inputs: Tensor) -> None:
    with torch.no_grad():  # not inference mode: YOLO heads cache tensors, which Torch-Pruning then cannot trace
        model(inputs)


def seconds(function: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@dataclass
class Row:
    """What was measured on one model, in seconds."""

    model: str
    forward: list[float] = field(default_factory=list)
    prunus: list[float] = field(default_factory=list)
    torch_pruning: list[float] = field(default_factory=list)
    prunus_groups: int | None = None
    torch_pruning_groups: int | None = None
    prunus_error: str | None = None
    torch_pruning_error: str | None = None

    @property
    def in_forward_passes(self) -> float | None:
        """Best time of Prunus, in best forward passes."""
        return min(self.prunus) / min(self.forward) if self.prunus else None

    @property
    def in_torch_pruning(self) -> float | None:
        """Best time of Prunus, in best times of Torch-Pruning."""
        return min(self.prunus) / min(self.torch_pruning) if self.prunus and self.torch_pruning else None


def probe(name: str, limit: float) -> str | None:
    """Let Torch-Pruning try a model in a process of its own; say what went wrong, or None."""
    command = [sys.executable, __file__, "--probe", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"no end in {limit:.0f} s"
    if done.returncode == 0:
        return None
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit {done.returncode}"]
    return last[0].split(":")[0].strip()


def measure(name: str, rounds: int, limit: float) -> Row:
    """Time one model: everything takes turns, after one round that does not count."""
    import prunus

    row = Row(name, torch_pruning_error=probe(name, limit))
    libraries = {"prunus": prunus}
    if row.torch_pruning_error is None:
        import torch_pruning

        libraries["torch_pruning"] = torch_pruning
    model, inputs = make(name)
    for turn in range(rounds + 1):
        passes = [seconds(lambda: forward(model, inputs)) for _ in range(5)]
        if turn:
            row.forward.extend(passes)
        for key, library in list(libraries.items()):
            try:
                groups: list[int] = []
                taken = seconds(
                    lambda library=library, groups=groups: groups.append(all_groups(library, model, inputs))
                )
            except Exception as error:  # whatever it is belongs in the table
                setattr(row, f"{key}_error", f"{type(error).__name__}: {error}")
                del libraries[key]
                continue
            setattr(row, f"{key}_groups", groups[0])
            if turn:
                getattr(row, key).append(taken)
    return row


def table(rows: Sequence[Row], verdict: dict[str, Any]) -> Table:
    """Lay the rows out; times are the best of all rounds."""
    shown = Table(title="Dependency graph and all groups", caption="ms, best of all rounds; / is a ratio of times")
    for head in ("model", "forward", "prunus", "torch-pruning", "prunus/fwd", "prunus/t-p"):
        shown.add_column(head, justify="left" if head == "model" else "right", no_wrap=True)

    def ms(values: Sequence[float], error: str | None = None) -> str:
        return f"{1000 * min(values):.1f}" if values else (error or "-").split(":")[0][:22]

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    for row in rows:
        times = ms(row.forward), ms(row.prunus, row.prunus_error), ms(row.torch_pruning, row.torch_pruning_error)
        shown.add_row(row.model, *times, ratio(row.in_forward_passes), ratio(row.in_torch_pruning))
    shown.add_section()
    medians = verdict["median_forward_passes"], verdict["median_against_torch_pruning"]
    shown.add_row("median", "", "", "", *(ratio(value) for value in medians))
    return shown


def judge(rows: Sequence[Row]) -> dict[str, Any]:
    """Compare with what is promised."""
    passes = [row.in_forward_passes for row in rows if row.in_forward_passes is not None]
    against = [row.in_torch_pruning for row in rows if row.in_torch_pruning is not None]
    failed = [row.model for row in rows if row.prunus_error]
    slower = [row.model for row in rows if (row.in_torch_pruning or 0) > 1]
    median = statistics.median(passes) if passes else None
    return {
        "median_forward_passes": median,
        "median_against_torch_pruning": statistics.median(against) if against else None,
        "failed": failed,
        "slower_than_torch_pruning": slower,
        "torch_pruning_failed": [row.model for row in rows if row.torch_pruning_error],
        "kept": not failed and not slower and median is not None and median <= MOST_FORWARD_PASSES,
    }


def sentence(verdict: dict[str, Any]) -> str:
    """Say the verdict in one line."""
    median, against = verdict["median_forward_passes"], verdict["median_against_torch_pruning"]
    parts = [
        "no model was measured" if median is None else f"median {median:.2f} forward passes (promised: at most 2)",
        "no comparison" if against is None else f"median {against:.2f} of the time of Torch-Pruning",
        f"slower than it on {', '.join(verdict['slower_than_torch_pruning']) or 'none'}",
        f"it cannot do {', '.join(verdict['torch_pruning_failed']) or 'none'} of them",
    ]
    if verdict["failed"]:
        parts.append(f"Prunus failed on {', '.join(verdict['failed'])}")
    return f"{'KEPT' if verdict['kept'] else 'NOT KEPT'}: {'; '.join(parts)}"


def machine() -> dict[str, Any]:
    """Say what the figures were measured with."""
    from importlib.metadata import version

    names = ("torch", "torchvision", "ultralytics", "torch-pruning")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in names},
    }


def save(path: Path, rows: Sequence[Row], verdict: dict[str, Any]) -> None:
    """Write everything measured so far."""
    ratios = [{"prunus_forward": row.in_forward_passes, "prunus_torch_pruning": row.in_torch_pruning} for row in rows]
    figures = [{**asdict(row), "ratios": ratio} for row, ratio in zip(rows, ratios, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"verdict": verdict, "machine": machine(), "models": figures}, indent=2) + "\n")


def main() -> int:
    """Measure every model that is asked for; give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="NAME", help=str(MODELS))
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds for each model")
    parser.add_argument("--limit", type=float, default=60, help="seconds that Torch-Pruning may take to show it can")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/graph.json"), help="where the figures go")
    parser.add_argument("--probe", choices=MODELS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    if chosen.probe:
        import torch_pruning

        all_groups(torch_pruning, *make(chosen.probe))
        return 0

    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    rows: list[Row] = []
    verdict: dict[str, Any] = {"kept": False}
    for name in chosen.models:
        start = time.perf_counter()
        rows.append(measure(name, chosen.rounds, chosen.limit))
        console.print(f"{len(rows)}/{len(chosen.models)} {name}: {time.perf_counter() - start:.0f} s")
        verdict = judge(rows)
        save(chosen.out, rows, verdict)  # after each model: a run that is cut keeps what it has
    console.print(table(rows, verdict))
    console.print(sentence(verdict))
    console.print(f"figures: {chosen.out}")
    return 0 if verdict["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
