"""Time and memory of the graph of decoders that are too big to hold: over layers, and over widths.

    make bench
    python benchmarks/scale.py --layers 5 10 --widths 1024 2048

A Llama of the shape of Llama-3-70B (80 layers, width 8192, feed-forward width 28672, 64 heads over 8 groups,
vocabulary 128256) is built on the meta device, where it costs nothing, and `build_dependency` with all groups is timed
in a process of its own for each size. Memory is the peak of the process, imports of torch and transformers included,
and beside it what the graph added to that. The verdict asks for 20 s and 4 GB at full size, and for growth that is
linear: twice the layers (or channels) may cost hardly more than twice as much. Everything measured goes into a JSON
file, and a plot beside it; the exit status says whether the promise was kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

LAYERS = (5, 10, 20, 40, 80)
WIDTHS = (1024, 2048, 4096, 8192)
HEAD = 128
MOST_SECONDS = 20.0
MOST_MEGABYTES = 4096.0
MOST_GROWTH = 1.25
"""What the last doubling of a size may cost, in doublings of the cost: 1 is a straight line, 2 a parabola.

Slopes are not compared: they rise where arrays no longer fit the caches of the machine.
"""


@dataclass(frozen=True)
class Row:
    """What was measured at one size."""

    layers: int
    width: int
    seconds: float
    peak_mb: float
    added_mb: float
    groups: int
    parameters: int


def megabytes() -> float:
    """Give the peak memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def measure(layers: int, width: int) -> Row:
    """Build the decoder on meta, and time its graph and all its groups, layer by layer as a user sees them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import prunus

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_attention_heads=width // HEAD,
        num_key_value_heads=max(1, width // HEAD // 8),
        vocab_size=128256,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 1000, (1, 16))
    before = megabytes()
    start = time.perf_counter()
    graph = prunus.DependencyGraph().build_dependency(model, {"input_ids": tokens}, device="meta")
    groups = list(graph.get_all_groups())
    taken = time.perf_counter() - start
    peak = megabytes()
    parameters = sum(p.numel() for p in model.parameters())
    return Row(layers, width, taken, peak, peak - before, len(groups), parameters)


def in_process(layers: int, width: int, limit: float) -> Row:
    """Measure in a process of its own, so that peaks do not add up."""
    command = [sys.executable, __file__, "--one", str(layers), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    if done.returncode:
        raise SystemExit(f"{layers} layers of width {width} failed:\n{done.stderr[-2000:]}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def growth(sizes: Sequence[int], costs: Sequence[float]) -> float | None:
    """What the last step of the size costs, in its own proportion: 1 for a line through zero, 2 for a parabola.

    Whatever is paid once makes it smaller. None for fewer than 3 sizes.
    """
    if len(sizes) < 3:
        return None
    return (costs[-1] / max(costs[-2], 1e-9)) / (sizes[-1] / sizes[-2])


def judge(deep: Sequence[Row], wide: Sequence[Row]) -> dict[str, object]:
    """Compare with what is promised."""
    rows = (*deep, *wide)
    found: dict[str, object] = {
        "most_seconds": max(r.seconds for r in rows),
        "most_megabytes": max(r.peak_mb for r in rows),
    }
    bent = []
    for name, series, size in (("layers", deep, "layers"), ("widths", wide, "width")):
        sizes = [getattr(r, size) for r in series]
        for cost in ("seconds", "added_mb"):
            ratio = growth(sizes, [getattr(r, cost) for r in series])
            found[f"growth_of_{cost}_over_{name}"] = ratio
            if ratio is not None and ratio > MOST_GROWTH:
                bent.append(f"{cost} over {name}")
    found["not_linear"] = bent
    found["kept"] = not bent and found["most_seconds"] <= MOST_SECONDS and found["most_megabytes"] <= MOST_MEGABYTES
    return found


def table(rows: Sequence[Row]) -> Table:
    """Lay the rows out."""
    shown = Table(title="Graph and all groups of a Llama on the meta device")
    for head in ("layers", "width", "parameters", "groups", "seconds", "peak MB", "added MB"):
        shown.add_column(head, justify="right", no_wrap=True)
    for r in rows:
        size = f"{r.parameters / 1e9:.1f} G"
        cost = f"{r.seconds:.2f}", f"{r.peak_mb:.0f}", f"{r.added_mb:.0f}"
        shown.add_row(str(r.layers), str(r.width), size, str(r.groups), *cost)
    return shown


def plot(deep: Sequence[Row], wide: Sequence[Row]) -> str:
    """Draw four small charts: time and added memory, over layers and over widths. Straight lines are what is wanted."""
    charts = []
    for row, (cost, unit) in enumerate((("seconds", "s"), ("added_mb", "MB"))):
        for column, (series, size, name) in enumerate(((deep, "layers", "layers"), (wide, "width", "width"))):
            points = [(float(getattr(r, size)), float(getattr(r, cost))) for r in series]
            charts.append(chart(60 + 380 * column, 40 + 230 * row, points, name, f"{cost.partition('_')[0]} ({unit})"))
    body = "\n".join(charts)
    style = "font: 12px sans-serif; background: white"
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="780" height="490" style="{style}">\n{body}\n</svg>\n'


def chart(left: int, top: int, points: Sequence[tuple[float, float]], across: str, up: str) -> str:
    """Draw one chart, 300 by 150, axes from zero."""
    most = max(x for x, _ in points), max((y for _, y in points)) or 1.0
    spots = [(left + 300 * x / most[0], top + 150 - 150 * y / most[1]) for x, y in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    parts = [
        f'<path d="M{left} {top}v150h300" fill="none" stroke="#888"/>',
        f'<polyline points="{line}" fill="none" stroke="#2563eb" stroke-width="2"/>',
        f'<text x="{left}" y="{top - 10}">{up}: {most[1]:.3g} at {most[0]:g} {across}</text>',
    ]
    for (x, y), (size, _) in zip(spots, points, strict=True):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#2563eb"/>')
        parts.append(f'<text x="{x:.1f}" y="{top + 166}" text-anchor="middle" fill="#555">{size:g}</text>')
    return "\n".join(parts)


def main() -> int:
    """Measure all sizes; give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", type=int, default=list(LAYERS))
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--limit", type=float, default=300, help="seconds that one size may take")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/scale.json"), help="where the figures go")
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(asdict(measure(*chosen.one))))
        return 0
    console = Console()
    depth, width = sorted(chosen.layers), sorted(chosen.widths)
    deep = [in_process(layers, width[-1], chosen.limit) for layers in depth]
    wide = [in_process(depth[-1], w, chosen.limit) for w in width[:-1]] + deep[-1:]
    verdict = judge(deep, wide)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    figures = {"verdict": verdict, "layers": [asdict(r) for r in deep], "widths": [asdict(r) for r in wide]}
    chosen.out.write_text(json.dumps(figures, indent=2) + "\n")
    chosen.out.with_suffix(".svg").write_text(plot(deep, wide))
    console.print(table([*deep, *wide[:-1]]))
    bent = ", ".join(verdict["not_linear"]) or "linear"
    console.print(
        f"{'KEPT' if verdict['kept'] else 'NOT KEPT'}: at most {verdict['most_seconds']:.1f} s and "
        f"{verdict['most_megabytes']:.0f} MB (promised: {MOST_SECONDS:.0f} s, {MOST_MEGABYTES:.0f} MB); growth: {bent}"
    )
    console.print(f"figures: {chosen.out}, {chosen.out.with_suffix('.svg')}")
    return 0 if verdict["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
