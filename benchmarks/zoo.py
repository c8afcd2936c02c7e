"""Time a whole cut on the networks of the zoo: Prunus and Torch-Pruning side by side.

    make bench
    python benchmarks/zoo.py --family torchvision --only 'res*' --limit 10

On copies of one network, each library takes turns at the same job: build the graph, score every group by magnitude,
remove half. Torch-Pruning counts as able to do a network if it ends in time, at least a quarter of the parameters is
gone and the network still runs. The verdict asks for what is promised: the geometric mean of the ratios is at most 0.5,
none is above 1.0 where the cut takes more than 50 ms, and building the graph never takes ten forward passes.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import math
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402 - the environment comes first
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402
from zoo.network import Network  # noqa: E402
from zoo.networks import FAMILIES, PACKAGES, builders  # noqa: E402

RATIO = 0.5
LEAST_REMOVED = 0.25
MOST_MEAN, SLOW_FROM, MOST_PASSES = 0.5, 0.05, 10.0
ROUNDS = 3
Row = dict[str, Any]


def run_model(net: Network, model: nn.Module) -> Any:
    from prunus.tracing import call_model

    torch.manual_seed(0)
    with torch.no_grad():
        return call_model(model, net.inputs, net.forward_fn)


def cut_with_prunus(net: Network, model: nn.Module) -> None:
    import prunus

    prunus.prune(
        model,
        net.inputs,
        prunus.Target(ratio=RATIO),
        forward_fn=net.forward_fn,
        output_transform=net.output_transform,
    )


def cut_with_torch_pruning(net: Network, model: nn.Module) -> None:
    import torch_pruning

    model.requires_grad_(True)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        net.inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        forward_fn=net.forward_fn,
        output_transform=net.output_transform,
    )
    pruner.step()


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def best(cut: Callable[[Network, nn.Module], None], net: Network, runs_after: bool) -> float:
    """Best time of several cuts, each of a fresh copy; the first one does not count."""
    times = []
    for _ in range(ROUNDS + 1):
        model = copy.deepcopy(net.model)
        times.append(seconds(lambda model=model: cut(net, model)))
    if runs_after:
        left = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in net.model.parameters())
        if left > 1 - LEAST_REMOVED:
            raise ValueError(f"{left:.0%} of the parameters are left")
        run_model(net, model)
    return min(times[1:])


def measure(family: str, name: str, library: str, send: Any) -> None:
    """Measure one network with one library, in a process of its own."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with open(os.devnull, "w") as quiet:
        os.dup2(quiet.fileno(), 1)
        os.dup2(quiet.fileno(), 2)
    try:
        torch.manual_seed(0)
        net = builders(family)[name]()
        net.model.eval()
        row: Row = {}
        if library == "prunus":
            import prunus

            run_model(net, net.model)
            row["forward"] = min(seconds(lambda: run_model(net, net.model)) for _ in range(5))
            row["prunus"] = best(cut_with_prunus, net, runs_after=False)
            options = net.forward_fn, net.output_transform
            row["graph"] = min(
                seconds(lambda: prunus.DependencyGraph().build_dependency(net.model, net.inputs, *options))
                for _ in range(3)
            )
        else:
            row["torch_pruning"] = best(cut_with_torch_pruning, net, runs_after=True)
        send.send(row)
    except Exception as error:  # whatever it is belongs in the table
        send.send({f"{library}_error": f"{type(error).__name__}: {str(error)[:200]}"})


def in_time(family: str, name: str, library: str, limit: float) -> Row:
    """What a process of its own found, unless its time was up."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(family, name, library, send), daemon=True)
    process.start()
    send.close()
    found: Row = {f"{library}_error": f"no end in {limit:.0f} s"}
    try:
        if receive.poll(limit):
            found = receive.recv()
    except EOFError:
        found = {f"{library}_error": "the process died"}
    process.kill()
    process.join()
    return found


def judge(rows: Sequence[Row]) -> dict[str, Any]:
    """Compare with what is promised."""
    both = [row for row in rows if "prunus" in row and "torch_pruning" in row]
    ratios = {f"{row['family']}/{row['name']}": row["prunus"] / row["torch_pruning"] for row in both}
    slow = [row for row in both if row["prunus"] > SLOW_FROM]
    passes = {f"{r['family']}/{r['name']}": r["graph"] / r["forward"] for r in rows if "graph" in r}
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios)) if ratios else None
    above = [key for row in slow if ratios[key := f"{row['family']}/{row['name']}"] > 1]
    worst = max(passes, key=lambda key: passes[key]) if passes else None
    return {
        "networks": len(rows),
        "prunus_fails": [f"{r['family']}/{r['name']}" for r in rows if "prunus_error" in r],
        "torch_pruning_can": len(both),
        "geometric_mean": mean,
        "slower": above,
        "worst_forward_passes": passes[worst] if worst else None,
        "worst_network": worst,
        "above_ten_passes": sum(value > MOST_PASSES for value in passes.values()),
        "kept": mean is not None and mean <= MOST_MEAN and not above and max(passes.values()) < MOST_PASSES,
    }


def sentence(verdict: dict[str, Any]) -> str:
    """Say the verdict in a line."""
    if verdict["geometric_mean"] is None:
        return "NOT KEPT: there is nothing to compare"
    return (
        f"{'KEPT' if verdict['kept'] else 'NOT KEPT'}: {verdict['networks']} networks, Torch-Pruning can do "
        f"{verdict['torch_pruning_can']}; geometric mean of the ratios {verdict['geometric_mean']:.2f} (promised: at "
        f"most {MOST_MEAN}); slower where the cut takes over {1000 * SLOW_FROM:.0f} ms: "
        f"{', '.join(verdict['slower']) or 'none'}; longest graph {verdict['worst_forward_passes']:.1f} forward passes "
        f"({verdict['worst_network']}; promised: below {MOST_PASSES:.0f}, above it: {verdict['above_ten_passes']})"
    )


def table(rows: Sequence[Row]) -> Table:
    """Lay out the networks that both can do."""
    shown = Table(title="Graph, scores and cut of one half", caption="ms, best of all rounds; ratio of times")
    for head in ("network", "forward", "graph", "prunus", "torch-pruning", "ratio"):
        shown.add_column(head, justify="left" if head == "network" else "right", no_wrap=True)
    for row in rows:
        if "prunus" in row and "torch_pruning" in row:
            times = (f"{1000 * row[key]:.1f}" for key in ("forward", "graph", "prunus", "torch_pruning"))
            shown.add_row(f"{row['family']}/{row['name']}", *times, f"{row['prunus'] / row['torch_pruning']:.2f}")
    return shown


def main() -> int:
    """Measure every network that is asked for; give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=FAMILIES, help="libraries (default: all)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names to run, such as 'swin*'")
    parser.add_argument("--limit", type=float, default=15, help="seconds that a library may take for one network")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/zoo.json"), help="where the figures go")
    chosen = parser.parse_args()
    console = Console(width=None if Console().is_terminal else 110)
    rows: list[Row] = []
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    for family in chosen.family:
        try:
            for package in ("prunus", "torch_pruning", *PACKAGES[family]):
                import_module(package)
        except ImportError as error:
            console.print(f"{family} is left out: {error}")
            continue
        for name in fnmatch.filter(builders(family), chosen.only):
            row: Row = {"family": family, "name": name}
            for library in ("prunus", "torch_pruning"):
                row |= in_time(family, name, library, chosen.limit * (4 if library == "prunus" else 1))
            rows.append(row)
            console.print(f"{len(rows)} {family}/{name}", highlight=False)
            chosen.out.write_text(json.dumps({"verdict": judge(rows), "networks": rows}, indent=1))
    console.print(table(rows))
    console.print(sentence(judge(rows)))
    return 0 if judge(rows)["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
