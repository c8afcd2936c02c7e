"""Time a whole cut on the networks of the zoo: Prunus and Torch-Pruning side by side.

    make bench-zoo
    python benchmarks/zoo.py --sample 120
    python benchmarks/zoo.py --family torchvision --only 'res*' --limit 10

Each network has a process of its own, on one thread. There it is run, its graph is built, and then the two libraries
take turns at the same job on fresh copies: build the graph, score every group by magnitude, remove half. The figures
are medians over the turns, of which the first does not count; meanwhile freed memory is kept. Torch-Pruning counts as
able to do a network if it ends in time, at least a quarter of the parameters is gone and the network still runs. The
verdict asks for what is promised: the geometric mean of the ratios is at most 0.5, none is above 1.0 where the cut
takes more than 50 ms, and building the graph never takes ten forward passes.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402 - the environment comes first
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import nn  # noqa: E402
from zoo.network import Network  # noqa: E402
from zoo.networks import FAMILIES, PACKAGES, builders  # noqa: E402

RATIO = 0.5
LEAST_REMOVED = 0.25
MOST_MEAN, SLOW_FROM, MOST_PASSES = 0.5, 0.05, 10.0
LONG = 0.001  # seconds of a forward pass, of which the calls of PyTorch's functions themselves are not the most
TURNS, FEWEST, ENOUGH_S = 9, 3, 1.0  # how often something is timed: less often where it takes long
BUILDING = 4  # times the limit
Row = dict[str, Any]
Report = Callable[[Row], None]


def run_model(net: Network, model: nn.Module) -> Any:
    """One forward pass."""
    from prunus.tracing import call_model

    with torch.no_grad():
        return call_model(model, net.inputs, net.forward_fn)


def build_graph(net: Network, model: nn.Module) -> None:
    """Trace, and find all groups."""
    import prunus

    prunus.DependencyGraph().build_dependency(model, net.inputs, net.forward_fn, net.output_transform)


def cut_with_prunus(net: Network, model: nn.Module) -> None:
    """Remove half of each group."""
    import prunus

    prunus.prune(
        model,
        net.inputs,
        prunus.Target(ratio=RATIO),
        forward_fn=net.forward_fn,
        output_transform=net.output_transform,
    )


def cut_with_torch_pruning(net: Network, model: nn.Module) -> None:
    """Remove half of each group."""
    import torch_pruning

    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        net.inputs,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        forward_fn=net.forward_fn,
        output_transform=net.output_transform,
    )
    pruner.step()


CUTS = {"prunus": cut_with_prunus, "torch_pruning": cut_with_torch_pruning}


def seconds(function: Callable[[], object]) -> float:
    """The time of one call, which does not pay for the litter of earlier ones."""
    gc.collect()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def enough(times: Sequence[float]) -> bool:
    """Whether something was timed often enough."""
    return len(times) >= TURNS or (len(times) >= FEWEST and sum(times) > ENOUGH_S)


def median(function: Callable[[], object]) -> float:
    """Median time of some calls; the first one does not count."""
    function()
    times: list[float] = []
    while not enough(times):
        times.append(seconds(function))
    return statistics.median(times)


def check(net: Network, model: nn.Module) -> None:
    """Make sure that enough is gone, and that what is left runs."""
    left = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in net.model.parameters())
    if left > 1 - LEAST_REMOVED:
        raise ValueError(f"{left:.0%} of the parameters are left")
    run_model(net, model)


def take_turns(net: Network, report: Report) -> None:
    """Let the libraries cut fresh copies in turns; one that fails has no more turns."""
    times: dict[str, list[float]] = {library: [] for library in CUTS}
    warm = True
    while times and not all(map(enough, times.values())):
        for library in list(times):
            report({"running": library})
            try:
                model = copy.deepcopy(net.model)
                for parameter in model.parameters():
                    parameter.requires_grad_(parameter.is_floating_point())
                taken = seconds(lambda model=model, library=library: CUTS[library](net, model))
                if warm and library == "torch_pruning":
                    check(net, model)
            except Exception as error:  # whatever it is belongs in the table
                del times[library]
                report({f"{library}_error": f"{type(error).__name__}: {str(error)[:200]}"})
                continue
            if not warm:
                times[library].append(taken)
        warm = False
    report({library: statistics.median(found) for library, found in times.items()})


def measure(family: str, name: str, memory: int, send: Any) -> None:
    """Measure one network, in a process of its own, and report all the way."""
    from prunus.cost.timing import steady_memory

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    limit_memory(memory)
    with open(os.devnull, "w") as quiet:  # libraries talk while they build and prune
        os.dup2(quiet.fileno(), 1)
        os.dup2(quiet.fileno(), 2)
    try:
        torch.manual_seed(0)
        net = builders(family)[name]()
        net.model.eval()
        gc.collect()
        gc.freeze()  # what was imported is no litter
        send.send({"running": "forward"})
        with steady_memory():
            send.send({"forward": median(lambda: run_model(net, net.model)), "running": "graph"})
            send.send({"graph": median(lambda: build_graph(net, net.model))})
            take_turns(net, send.send)
        send.send({"running": None})
    except Exception as error:  # it cannot be built, or no graph of it: that belongs in the table too
        send.send({"prunus_error": f"{type(error).__name__}: {str(error)[:200]}", "running": None})


def limit_memory(mebibytes: int) -> None:
    """Let the process have so much memory, where the system can see to that (0: no limit)."""
    try:
        import resource
    except ImportError:
        return
    if mebibytes:
        resource.setrlimit(resource.RLIMIT_DATA, (mebibytes << 20, mebibytes << 20))


def in_time(family: str, name: str, limit: float, memory: int) -> Row:
    """What a process of its own found, until its time was up."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(family, name, memory, send), daemon=True)
    process.start()
    send.close()
    row: Row = {"family": family, "name": name, "running": "building"}
    try:
        while row["running"] is not None:
            patience = limit * (1 if row["running"] == "torch_pruning" else BUILDING)
            if not receive.poll(patience):
                row[f"{owner(row['running'])}_error"] = f"{row['running']}: no end in {patience:.0f} s"
                break
            row |= receive.recv()
    except EOFError:
        row[f"{owner(row['running'])}_error"] = f"{row['running']}: the process died"
    process.kill()
    process.join()
    del row["running"]
    return row


def owner(stage: str) -> str:
    """Whose failure it is when a stage does not end."""
    return stage if stage == "torch_pruning" else "prunus"


def title(row: Row) -> str:
    """The network's name."""
    return f"{row['family']}/{row['name']}"


def judge(rows: Sequence[Row]) -> dict[str, Any]:
    """Compare with what is promised."""
    both = [row for row in rows if "prunus" in row and "torch_pruning" in row]
    ratios = {title(row): row["prunus"] / row["torch_pruning"] for row in both}
    passes = {title(row): row["graph"] / row["forward"] for row in rows if "graph" in row}
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios)) if ratios else None
    slower = [title(row) for row in both if row["prunus"] > SLOW_FROM and ratios[title(row)] > 1]
    worst = max(passes, key=lambda key: passes[key]) if passes else None
    above = [row for row in rows if passes.get(title(row), 0.0) >= MOST_PASSES]
    longer = {title(row): passes[title(row)] for row in rows if row.get("forward", 0.0) >= LONG and "graph" in row}
    fails = {title(row): row["prunus_error"] for row in rows if "prunus_error" in row}
    return {
        "networks": len(rows),
        "prunus_fails": fails,
        "torch_pruning_can": len(both),
        "geometric_mean": mean,
        "slower": slower,
        "worst_forward_passes": passes[worst] if worst else None,
        "worst_network": worst,
        "median_forward_passes": statistics.median(passes.values()) if passes else None,
        "above_ten_passes": {title(row): passes[title(row)] for row in above},
        "longest_of_those_ms": max((1000 * row["graph"] for row in above), default=0.0),
        "where_forward_is_long": {"networks": len(longer), "worst_forward_passes": max(longer.values(), default=None)},
        "kept": mean is not None and mean <= MOST_MEAN and not slower and not above and not fails,
    }


def sentence(verdict: dict[str, Any]) -> str:
    """Say the verdict, a line for each promise."""
    if verdict["geometric_mean"] is None:
        return "NOT KEPT: there is nothing to compare"
    above = len(verdict["above_ten_passes"])
    longest = f"; of those the longest takes {verdict['longest_of_those_ms']:.0f} ms" if above else ""
    long = verdict["where_forward_is_long"]
    if long["networks"]:
        longest += (
            f"; at most {long['worst_forward_passes']:.1f} on the {long['networks']} networks whose forward pass takes "
            f"over {1000 * LONG:.0f} ms"
        )
    lines = (
        (
            verdict["geometric_mean"] <= MOST_MEAN,
            f"geometric mean of the ratios {verdict['geometric_mean']:.2f} over the {verdict['torch_pruning_can']} of "
            f"{verdict['networks']} networks that Torch-Pruning can do (promised: at most {MOST_MEAN})",
        ),
        (
            not verdict["slower"],
            f"slower where the cut takes over {1000 * SLOW_FROM:.0f} ms: {', '.join(verdict['slower']) or 'none'}",
        ),
        (
            not above,
            f"longest graph {verdict['worst_forward_passes']:.1f} forward passes ({verdict['worst_network']}; "
            f"promised: below {MOST_PASSES:.0f}), median {verdict['median_forward_passes']:.1f}, "
            f"not below: {above}{longest}",
        ),
    )
    failed = [f"NOT KEPT: Prunus fails on {name}: {why}" for name, why in verdict["prunus_fails"].items()]
    return "\n".join([*(f"{'KEPT' if kept else 'NOT KEPT'}: {text}" for kept, text in lines), *failed])


def table(rows: Sequence[Row]) -> Table:
    """Lay out the networks that both can do."""
    shown = Table(title="Graph, scores and cut of one half", caption="ms, medians of all turns; ratio of times")
    for head in ("network", "forward", "graph", "prunus", "torch-pruning", "ratio"):
        shown.add_column(head, justify="left" if head == "network" else "right", no_wrap=True)
    for row in rows:
        if "prunus" in row and "torch_pruning" in row:
            times = (f"{1000 * row[key]:.1f}" for key in ("forward", "graph", "prunus", "torch_pruning"))
            shown.add_row(title(row), *times, f"{row['prunus'] / row['torch_pruning']:.2f}")
    return shown


def sampled(names: Sequence[str], every: int) -> list[str]:
    """Every so-manieth network of a family, from the middle of the first stretch on (the same ones each time).

    Example:
        >>> sampled(["a", "b", "c", "d", "e"], 2)
        ['b', 'd']
    """
    return list(names[(every - 1) // 2 :: every]) or list(names[:1])


def options() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=FAMILIES, help="libraries (default: all)")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names to run, such as 'swin*'")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="about N networks, evenly over all families")
    parser.add_argument("--limit", type=float, default=15, help="seconds that a library may take for one cut")
    parser.add_argument("--memory", type=int, default=6144, help="mebibytes that a network may take (0: no limit)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/zoo.json"), help="where the figures go")
    return parser.parse_args()


def main() -> int:
    """Measure every network that is asked for; give the exit status."""
    chosen = options()
    console = Console(width=None if Console().is_terminal else 110)
    rows: list[Row] = []
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    found = {family: fnmatch.filter(builders(family), chosen.only) for family in chosen.family}
    every = max(1, round(sum(map(len, found.values())) / chosen.sample)) if chosen.sample else 1
    for family, names in found.items():
        try:
            for package in ("prunus", "torch_pruning", *PACKAGES[family]):
                import_module(package)
        except ImportError as error:
            console.print(f"{family} is left out: {error}")
            continue
        for name in sampled(names, every):
            rows.append(in_time(family, name, chosen.limit, chosen.memory))
            console.print(f"{len(rows)} {family}/{name}", highlight=False)
            chosen.out.write_text(json.dumps({"verdict": judge(rows), "networks": rows}, indent=1))
    console.print(table(rows))
    console.print(sentence(judge(rows)))
    return 0 if judge(rows)["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
