"""The commands for any model: prune, inspect, sensitivity. Heavy imports are inside, so that help answers at once."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunus.cli.screen import errors_in_one_line, number, sizes

if TYPE_CHECKING:
    from prunus.integrations.sources import Source

Model = Annotated[
    str,
    typer.Argument(
        help="torchvision:NAME, timm:NAME, hf:FOLDER_OR_NAME, MODULE:FACTORY, a .pt file, or a YOLO .yaml or .pt file."
    ),
]
Shape = Annotated[str | None, typer.Option("--input-shape", "--shape", help="Shape of the input, such as 1,3,224,224.")]
Weights = Annotated[
    str | None,
    typer.Option(help="A state dict (.pt, .safetensors), or e.g. DEFAULT to fetch the model's own; random without."),
]
Seed = Annotated[int, typer.Option(help="Seed of random weights and inputs.")]
Ignore = Annotated[list[str] | None, typer.Option(help="A layer whose width stays: a name or a pattern; repeatable.")]
Heads = Annotated[bool, typer.Option("--heads", help="Whole heads may go too.")]
Score = Annotated[str, typer.Option(help="The score: magnitude, random, or another of prunus.importance.")]


def prune(  # noqa: PLR0913, PLR0917 - each argument is an option of the command
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Folder for model.pt, inputs.pt and plan.json.")] = None,
    target_macs: Annotated[str | None, typer.Option(help="MACs that may be left: 0.5, 50% or 1.5G.")] = None,
    target_params: Annotated[str | None, typer.Option(help="Parameters that may be left: 0.5, 50% or 3M.")] = None,
    target_memory: Annotated[str | None, typer.Option(help="Weights and peak activations: 0.5 or 20MB.")] = None,
    target_latency: Annotated[str | None, typer.Option(help="Latency on this device: 0.6 or 8ms.")] = None,
    ratio: Annotated[str | None, typer.Option(help="Instead: the share of every group that goes.")] = None,
    importance: Score = "magnitude",
    allocation: Annotated[str, typer.Option(help="uniform, global or greedy.")] = "uniform",
    round_to: Annotated[int | None, typer.Option(help="Widths that stay are multiples of it.")] = None,
    max_ratio: Annotated[float, typer.Option(help="The largest share of any group that may go.")] = 1.0,
    ignore: Ignore = None,
    heads: Heads = False,
    input_shape: Shape = None,
    weights: Weights = None,
    seed: Seed = 0,
) -> None:
    """Cut a model to a target, and write it so that it can be loaded again."""
    with errors_in_one_line():
        from rich.console import Console

        import prunus

        asked = {
            "macs": number("--target-macs", target_macs),
            "params": number("--target-params", target_params),
            "memory": number("--target-memory", target_memory),
            "latency": number("--target-latency", target_latency),
            "ratio": number("--ratio", ratio),
        }
        given = any(value is not None for value in asked.values())
        target = prunus.Target(**asked) if given else prunus.Target(macs=0.5)
        score = _importance(importance)
        options: dict[str, Any] = {
            "importance": score,
            "allocation": allocation,
            "round_to": round_to,
            "max_pruning_ratio": max_ratio,
            "ignored_layers": tuple(ignore or ()),
            "prune_num_heads": heads,
        }
        source = _load(model, input_shape, weights, seed)
        if source.yolo is not None:
            from prunus.integrations.ultralytics import prune as prune_yolo

            result = prune_yolo(source.yolo, target, imgsz=int(source.inputs.shape[-1]), **options)
        else:
            result = prunus.prune(source.model, source.inputs, target, forward_fn=source.forward_fn, **options)
        console = Console(soft_wrap=True)
        console.print(str(result), markup=False, highlight=False)
        if out is not None:
            written = _write(source, result, out)
            console.print(f"written to {out}: {', '.join(written)}", markup=False, highlight=False)


def inspect(  # noqa: PLR0913, PLR0917 - each argument is an option of the command
    model: Model,
    layers: Annotated[bool, typer.Option("--layers", help="Also what each layer costs.")] = False,
    explain: Annotated[str | None, typer.Option(help="Also explain this layer (dotted name).")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    ignore: Ignore = None,
    heads: Heads = False,
    input_shape: Shape = None,
    weights: Weights = None,
    seed: Seed = 0,
) -> None:
    """Show what a model is made of: groups, what each saves, what layers cost, and what has to stay and why."""
    with errors_in_one_line():
        from rich.console import Console

        from prunus.graph import DependencyGraph
        from prunus.inspection import as_data, group_table, groups_of, layer_costs_table, layers_of
        from prunus.plan import footprint
        from prunus.report import frozen_text

        source = _load(model, input_shape, weights, seed)
        graph = DependencyGraph().build_dependency(
            source.model, source.inputs, source.forward_fn, ignored_layers=tuple(ignore or ())
        )
        cost = footprint(graph.coupling, graph.alive)
        groups, costs = groups_of(graph, heads), layers_of(graph)
        console = Console()
        if layers:
            console.print(layer_costs_table(costs, cost.macs, cost.params))
        console.print(group_table(groups, cost.macs, cost.params))
        lines = [f"{cost.macs:,} MACs, {cost.params:,} parameters, {len(groups)} groups"]
        stays = [line for line in frozen_text(graph.coupling).splitlines() if "it is a kernel size" not in line]
        lines += ["", "What has to stay, besides the sizes of kernels:", *stays] if stays else []
        lines += ["", graph.explain(explain)] if explain is not None else []
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        if as_json is not None:
            as_json.write_text(json.dumps(as_data(graph, groups, costs), indent=1), encoding="utf-8")


def sensitivity(  # noqa: PLR0913, PLR0917 - each argument is an option of the command
    model: Model,
    metric: Annotated[
        str | None,
        typer.Option(
            help="MODULE:FUNCTION of the model that returns a number, higher is better.",
            show_default="closeness of the outputs to the whole model's on the inputs",
        ),
    ] = None,
    shares: Annotated[str, typer.Option(help="Shares of each group to remove.")] = "0.125,0.25,0.5,0.75",
    out: Annotated[Path | None, typer.Option(help="File to write: .csv, .json, or .html for a picture.")] = None,
    importance: Score = "magnitude",
    ignore: Ignore = None,
    heads: Heads = False,
    input_shape: Shape = None,
    weights: Weights = None,
    seed: Seed = 0,
) -> None:
    """Measure what a metric loses when each group alone loses more and more."""
    with errors_in_one_line():
        from rich.console import Console

        import prunus
        from prunus.errors import InputError

        parts = [number("--shares", part) for part in shares.split(",")]
        if out is not None and out.suffix not in (".csv", ".json", ".html"):
            raise InputError(f"--out={out}: give a name that ends in .csv, .json or .html")
        score = _importance(importance)
        source = _load(model, input_shape, weights, seed)
        found = prunus.sensitivity(
            source.model,
            source.inputs,
            _closeness(source) if metric is None else _named(metric),
            shares=[float(part) for part in parts if part is not None],
            importance=score,
            ignored_layers=tuple(ignore or ()),
            forward_fn=source.forward_fn,
            prune_num_heads=heads,
            progress=True,
        )
        Console(soft_wrap=True).print(str(found), markup=False, highlight=False)
        if out is not None:
            _write_curves(found, out)


def _load(spec: str, shape: str | None, weights: str | None, seed: int) -> Source:
    import torch

    from prunus.integrations.sources import load

    torch.manual_seed(seed)
    source = load(spec, sizes("--input-shape", shape), weights)
    source.model.eval()
    return source


def _importance(name: str) -> Any:
    """A criterion by its name; those that need data cannot be had from here."""
    from prunus import importance
    from prunus.errors import InputError

    known = {key.removesuffix("Importance").lower(): key for key in dir(importance) if key.endswith("Importance")}
    known.pop("", None)
    if name.lower() not in known:
        raise InputError(f"--importance={name}: choose one of {', '.join(sorted(known))}")
    try:
        return getattr(importance, known[name.lower()])()
    except TypeError as error:
        raise InputError(f"--importance={name} needs data ({error}); use it from Python") from error


def _named(spec: str) -> Callable[[Any], float]:
    """A function by ``MODULE:NAME``."""
    from prunus.errors import InputError

    module, _, name = spec.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found: Callable[[Any], float] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"--metric={spec}: cannot find it ({error}); give MODULE:FUNCTION") from error
    finally:
        sys.path.pop(0)
    return found


def _closeness(source: Source) -> Callable[[Any], float]:
    """How close the outputs are to those of the whole model: 1 minus the relative squared error (1: equal)."""
    import torch

    from prunus.tracing import call_model, tensors_in
    from prunus.untouched import untouched

    def outputs(model: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            found = tensors_in(call_model(model, source.inputs, source.forward_fn))
            return [tensor.detach().clone() for tensor in found if tensor.is_floating_point()]

    with untouched(source.model):
        dense = outputs(source.model)
    size = sum(float(tensor.square().sum()) for tensor in dense)

    def metric(model: Any) -> float:
        pairs = zip(outputs(model), dense, strict=True)
        return 1 - sum(float((a - b).square().sum()) for a, b in pairs) / max(size, 1e-30)

    return metric


def _write(source: Source, result: Any, out: Path) -> list[str]:
    """The pruned model, the inputs that it runs on, and the plan."""
    import torch

    from prunus.errors import InputError
    from prunus.integrations.sources import INPUTS

    out.mkdir(parents=True, exist_ok=True)
    result.plan.save(out / "plan.json")
    if source.yolo is not None:
        from prunus.integrations.ultralytics import save

        save(source.yolo, out / "model.pt")
        return ["model.pt", "plan.json"]
    try:
        torch.save(source.model, out / "model.pt")
    except Exception as error:
        (out / "model.pt").unlink(missing_ok=True)
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"the pruned model cannot be pickled ({type(error).__name__}: {first}); plan.json is written: apply it to "
            "a new copy with prunus.Plan.load(...).apply(model)"
        ) from error
    torch.save(source.inputs, out / INPUTS)
    return ["model.pt", INPUTS, "plan.json"]


def _write_curves(found: Any, out: Path) -> None:
    if out.suffix == ".html":
        found.plot(out)
    elif out.suffix == ".json":
        out.write_text(json.dumps({"dense": found.dense, "rows": found.rows}, indent=1), encoding="utf-8")
    else:
        import csv

        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(found.rows[0]) if found.rows else [])
            writer.writeheader()
            writer.writerows(found.rows)
