"""What scoring and selecting cost on deep networks, in forward passes, and over the number of steps.

    python benchmarks/scoring.py --out runs/bench/scoring.json
    python benchmarks/scoring.py --models resnet152 --steps 1 2

ResNet-152 and ViT-L at 224 px, and a decoder of 48 layers (width 1024, 16 heads, 128 tokens), with random weights.
Timed are one forward pass, one look at what the magnitude pruner would remove (`step(interactive=True)`: scores of all
groups, and the choice), the same for Torch-Pruning, and whole pruners of 1, 2, 4 and 8 steps down to half of every
group (scores, choice and cut in each step). All in seconds of the one thread that works, the best of several rounds;
each model in a process of its own. The promise: a look costs less than two forward passes, and twice as many steps cost
hardly more than twice as much. Everything goes into a JSON file; the exit status says whether the promise was kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MODELS = ("resnet152", "vit_large", "decoder")
STEPS = (1, 2, 4, 8)
MOST_FORWARD_PASSES = 2.0
MOST_GROWTH = 1.25
"""What the last doubling of the number of steps may cost, in doublings: 1 is a straight line, 2 a parabola."""


@dataclass(frozen=True)
class Row:
    """What was measured on one model, in seconds; ``steps`` are whole pruners by their number of steps."""

    model: str
    parameters: int
    forward: float
    look: float
    steps: dict[int, float]
    torch_pruning: float | None = None
    torch_pruning_error: str = ""

    @property
    def in_forward_passes(self) -> float:
        """What a look costs, in forward passes."""
        return self.look / self.forward

    @property
    def growth(self) -> float | None:
        """What the last increase of the steps costs, in its own proportion (None: there is none)."""
        if len(self.steps) < 2:
            return None
        (few, before), (many, now) = sorted(self.steps.items())[-2:]
        return (now / before) / (many / few)


def make(name: str) -> tuple[Any, Any, Any]:
    """Give the model, its inputs and the layer whose outputs stay."""
    import torch

    torch.manual_seed(0)
    image = torch.randn(1, 3, 224, 224)
    if name == "resnet152":
        from torchvision.models import resnet152

        model = resnet152().eval()
        return model, image, model.fc
    if name == "vit_large":
        import timm

        model = timm.create_model("vit_large_patch16_224").eval()
        return model, image, model.head
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024,
        num_hidden_layers=48,
        num_attention_heads=16,
        intermediate_size=2816,
        vocab_size=32000,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    return model, {"input_ids": torch.randint(0, 32000, (1, 128))}, model.lm_head


def best(run: Callable[[], Any], rounds: int) -> float:
    """Give the shortest time of several runs, in seconds of this thread."""
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times)


def pruner_of(library: Any, model: Any, inputs: Any, stays: Any, steps: int) -> Any:
    """Give a magnitude pruner that takes half of every group."""
    criterion = library.importance.MagnitudeImportance(p=2)
    return library.pruner.MagnitudePruner(
        model, inputs, criterion, pruning_ratio=0.5, iterative_steps=steps, ignored_layers=[stays]
    )


def look_of(pruner: Any, rounds: int) -> float:
    """Time the scores of all groups and the choice; nothing is cut."""

    def look() -> None:
        pruner.current_step = 0
        list(pruner.step(interactive=True))

    return best(look, rounds)


def steps_of(library: Any, model: Any, inputs: Any, stays: Any, steps: int) -> float:
    """Time all steps of a pruner on a copy of the model."""
    both = copy.deepcopy([model, stays])
    pruner = pruner_of(library, both[0], inputs, both[1], steps)

    def all_steps() -> None:
        for _ in range(steps):
            pruner.step()

    return best(all_steps, 1)


def measure(name: str, steps: Sequence[int], rounds: int) -> Row:
    """Measure one model."""
    import torch

    import prunus

    torch.set_num_threads(1)
    model, inputs, stays = make(name)

    def forward() -> None:
        with torch.inference_mode():
            model(**inputs) if isinstance(inputs, dict) else model(inputs)

    forward()
    passes = best(forward, rounds)
    look = look_of(pruner_of(prunus, model, inputs, stays, 1), rounds)
    taken = {many: steps_of(prunus, model, inputs, stays, many) for many in steps}
    return Row(name, sum(p.numel() for p in model.parameters()), passes, look, taken)


def measure_torch_pruning(name: str, rounds: int) -> float:
    """Time the same look of Torch-Pruning's pruner."""
    import torch
    import torch_pruning

    torch.set_num_threads(1)
    return look_of(pruner_of(torch_pruning, *make(name), 1), rounds)


def in_process(arguments: Sequence[str], limit: float) -> Any:
    """Run this file on one model in a process of its own, and give what it prints last.

    Raises:
        RuntimeError: it failed, or took too long; the message says which.
    """
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no end in {limit:.0f} s") from error
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:120] if done.stderr.strip() else "failed")
    return json.loads(done.stdout.splitlines()[-1])


def row_of(name: str, steps: Sequence[int], rounds: int, limit: float) -> Row:
    """Measure one model, and Torch-Pruning on it where it can."""
    found = in_process(["--one", name, "--rounds", str(rounds), "--steps", *map(str, steps)], 10 * limit)
    found["steps"] = {int(many): seconds for many, seconds in found["steps"].items()}
    try:
        other = in_process(["--other", name, "--rounds", str(rounds)], limit)
        return Row(**{**found, "torch_pruning": other})
    except RuntimeError as error:
        return Row(**{**found, "torch_pruning_error": str(error)})


def judge(rows: Sequence[Row]) -> dict[str, Any]:
    """Compare with what is promised."""
    costly = [row.model for row in rows if row.in_forward_passes >= MOST_FORWARD_PASSES]
    growths = {row.model: row.growth for row in rows if row.growth is not None}
    bent = [model for model, growth in growths.items() if growth > MOST_GROWTH]
    known = [row for row in rows if row.torch_pruning is not None]
    return {
        "most_forward_passes": max((row.in_forward_passes for row in rows), default=None),
        "most_growth": max(growths.values(), default=None),
        "too_costly": costly,
        "growing": bent,
        "slower_than_torch_pruning": [row.model for row in known if row.look > (row.torch_pruning or 0)],
        "kept": bool(rows) and not costly and not bent,
    }


def sentence(verdict: dict[str, Any]) -> str:
    """Say the verdict in one line."""
    if verdict["most_forward_passes"] is None:
        return "NOT KEPT: no model was measured"
    parts = [
        f"scores and choice cost at most {verdict['most_forward_passes']:.2f} forward passes (promised: below 2)",
        "steps were not compared"
        if verdict["most_growth"] is None
        else f"the last doubling of steps costs {verdict['most_growth']:.2f} of a doubling (promised: {MOST_GROWTH})",
        f"slower than Torch-Pruning on {', '.join(verdict['slower_than_torch_pruning']) or 'none'}",
    ]
    return f"{'KEPT' if verdict['kept'] else 'NOT KEPT'}: {'; '.join(parts)}"


def table(rows: Sequence[Row], steps: Sequence[int]) -> Table:
    """Show all rows."""
    found = Table(title="Scores and choice, and whole steps, in ms", title_justify="left")
    names = ("model", "parameters", "forward", "scores, choice", "in forward passes", "Torch-Pruning")
    for name in (*names, *(f"{many} step{'s' if many > 1 else ''}" for many in steps)):
        found.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        other = row.torch_pruning_error if row.torch_pruning is None else f"{row.torch_pruning * 1e3:,.0f}"
        figures = (f"{row.forward * 1e3:,.0f}", f"{row.look * 1e3:,.0f}", f"{row.in_forward_passes:.2f}", other)
        found.add_row(
            row.model,
            f"{row.parameters / 1e6:,.0f} M",
            *figures,
            *(f"{row.steps[many] * 1e3:,.0f}" if many in row.steps else "" for many in steps),
        )
    return found


def save(path: Path, rows: Sequence[Row], verdict: dict[str, Any]) -> None:
    """Write everything that was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [{**asdict(row), "in_forward_passes": row.in_forward_passes, "growth": row.growth} for row in rows]
    path.write_text(json.dumps({"rows": found, "verdict": verdict}, indent=2) + "\n")


def main() -> int:
    """Measure every model that is asked for; give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--steps", nargs="+", type=int, default=list(STEPS), help="numbers of steps of whole pruners")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--limit", type=float, default=60, help="seconds that Torch-Pruning may take on a model")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/scoring.json"), help="where the figures go")
    parser.add_argument("--one", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--other", choices=MODELS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    if chosen.one or chosen.other:
        mine = chosen.one and asdict(measure(chosen.one, chosen.steps, chosen.rounds))
        print(json.dumps(mine or measure_torch_pruning(chosen.other, chosen.rounds)))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    rows = []
    for name in chosen.models:
        rows.append(row_of(name, sorted(chosen.steps), chosen.rounds, chosen.limit))
        save(chosen.out, rows, judge(rows))  # after each model: a run that is cut keeps what it has
        console.print(f"{name}: {rows[-1].in_forward_passes:.2f} forward passes")
    verdict = judge(rows)
    console.print(table(rows, sorted(chosen.steps)))
    console.print(sentence(verdict))
    console.print(f"figures: {chosen.out}")
    return 0 if verdict["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
