"""The command ``prunus``. Heavy imports are inside the commands, so that ``prunus --help`` answers at once."""

import os
from pathlib import Path
from typing import Annotated

import typer

from prunus.cli import models
from prunus.cli.screen import errors_in_one_line, sizes

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Remove whole channels, heads and neurons from PyTorch networks, and keep them working.",
)


@app.callback()
def main() -> None:
    """Remove whole channels, heads and neurons from PyTorch networks, and keep them working."""


@app.command()
def yolo(  # noqa: PLR0913, PLR0917 - each argument is an option of the command
    model: Annotated[str, typer.Option(help="A .pt file to prune, or a .yaml description to train first.")],
    data: Annotated[str, typer.Option(help="A data.yaml, or 'shapes' for a generated set.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    macs: Annotated[float, typer.Option(help="Share of the operations to keep, between 0 and 1.")] = 0.5,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of fine-tuning.", show_default="6 on shapes, else 50")
    ] = None,
    dense_epochs: Annotated[
        int | None,
        typer.Option(
            help="Epochs of training before pruning.", show_default="0 for a .pt; for a .yaml 10 on shapes, else 100"
        ),
    ] = None,
    imgsz: Annotated[int, typer.Option(help="Height and width of the pictures in pixels.")] = 640,
    batch: Annotated[
        int | None, typer.Option(help="Pictures at a time in training.", show_default="8 on shapes, else 16")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, mps or the number of a GPU.", show_default="the first GPU, else cpu")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of training and of the generated set.")] = 0,
    repair: Annotated[
        bool, typer.Option("--repair/--no-repair", help="Refit what the cut left on training pictures, without labels.")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a job that was cut.")] = False,
) -> None:
    """Prune a YOLO detector, fine-tune it, and write files that stock ultralytics loads."""
    from rich.console import Console

    from prunus.errors import InputError, PrunusError

    os.environ.setdefault("YOLO_AUTOINSTALL", "false")  # ultralytics reads it at import; a job installs nothing
    console, problems = Console(), Console(stderr=True)
    try:
        from prunus.integrations.ultralytics import Job, run
        from prunus.integrations.ultralytics.report import ScreenReporter
    except ImportError as error:
        problems.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
    job = Job(model, data, out, macs, epochs, dense_epochs, imgsz, batch, device, seed, repair)
    try:
        with ScreenReporter(console) as reporter:
            result = run(job, resume=resume, reporter=reporter)
    except PrunusError as error:
        problems.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, InputError) else 1) from error
    except KeyboardInterrupt:
        problems.print("stopped; the same command with --resume goes on from here")
        raise typer.Exit(130) from None
    console.print(result.table())
    console.print(f"written to {out}: best.pt, best.onnx, pruned.pt, plan.json, result.json", highlight=False)


@app.command()
def verify(
    model: models.Model,
    shape: models.Shape = None,
    explain: Annotated[str | None, typer.Option(help="Also explain this layer (dotted name).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights, inputs and permutations.")] = 0,
) -> None:
    """Check numerically that a model's groups are right, and list what cannot be pruned and why."""
    with errors_in_one_line():
        import torch
        from rich.console import Console

        import prunus
        from prunus.integrations.sources import load

        console = Console(soft_wrap=True)
        torch.manual_seed(seed)
        source = load(model, sizes("--shape", shape))
        report = prunus.verify(source.model, source.inputs, source.forward_fn, seed=seed)
        console.print(str(report), markup=False, highlight=False)
        if explain is not None:
            graph = prunus.DependencyGraph().build_dependency(source.model, source.inputs, source.forward_fn)
            console.print(graph.explain(explain), markup=False, highlight=False)
        if not report.ok:
            raise typer.Exit(1)


app.command()(models.prune)
app.command()(models.inspect)
app.command()(models.sensitivity)
