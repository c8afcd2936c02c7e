"""The stages of a job, one function each: files in the output folder in, files and plain figures out."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ultralytics import YOLO
from ultralytics.utils import NUM_THREADS

from prunus import Target
from prunus.integrations.shapes import shapes
from prunus.integrations.ultralytics import measure
from prunus.integrations.ultralytics.checkpoint import is_pruned, save
from prunus.integrations.ultralytics.pictures import Pictures
from prunus.integrations.ultralytics.preflight import SHAPES, Arguments
from prunus.integrations.ultralytics.pruning import prune
from prunus.integrations.ultralytics.state import State
from prunus.integrations.ultralytics.training import trainer

DENSE, PRUNED, BEST, PLAN = "dense.pt", "pruned.pt", "best.pt", "plan.json"
_DENSE_RUN, _FINETUNE_RUN = "training-dense", "training-finetune"
OWNED = (DENSE, PRUNED, BEST, "best.onnx", PLAN, "result.json", _DENSE_RUN, _FINETUNE_RUN)


class Reporter:
    """Hears how a job goes; this one says nothing, others override what they want to show."""

    def started(self, title: str) -> None:
        """A stage begins."""

    def epoch(self, number: int, total: int, map50: float | None) -> None:
        """An epoch of a training stage ended; ``number`` counts from 1."""

    def finished(self, title: str, seconds: float) -> None:
        """A stage ended."""

    def skipped(self, title: str) -> None:
        """A stage was done before the job was cut."""


@dataclass(frozen=True)
class Run:
    """A job that is under way.

    Attributes:
        arguments: The settled arguments.
        out: The output folder.
        state: Which stages are done, and what they found.
        reporter: Who hears of the progress.
    """

    arguments: Arguments
    out: Path
    state: State
    reporter: Reporter

    @property
    def data(self) -> str:
        """Path of the ``data.yaml``."""
        return str(self.state.found("data")["yaml"])

    @property
    def dense(self) -> Path:
        """Path of the dense model's file."""
        return self.out / DENSE if self.arguments.dense_epochs else Path(self.arguments.model)

    @property
    def weights(self) -> dict[str, Path]:
        """Paths of the three models' files."""
        return {"dense": self.dense, "pruned": self.out / PRUNED, "finetuned": self.out / BEST}


def prepare_data(run: Run) -> dict[str, Any]:
    """Draw the generated set, or take the user's."""
    if run.arguments.data != SHAPES:
        return {"yaml": run.arguments.data}
    return {"yaml": str(shapes(seed=run.arguments.seed, size=run.arguments.imgsz))}


def train_dense(run: Run) -> dict[str, Any]:
    """Train the model before pruning, where that is asked for."""
    if run.arguments.dense_epochs:
        best = _train(run, run.arguments.model, _DENSE_RUN, run.arguments.dense_epochs)
        save(YOLO(best), run.out / DENSE)
    return {}


def prune_model(run: Run) -> dict[str, Any]:
    """Prune the dense model and repair what is left; write the pruned one and the plan."""
    yolo, arguments = YOLO(run.dense), run.arguments
    yolo.model.to(arguments.torch_device)
    data = Pictures(run.data, imgsz=arguments.imgsz, device=arguments.torch_device) if arguments.repair else None
    result = prune(yolo, Target(macs=arguments.macs), imgsz=arguments.imgsz, data=data)
    result.plan.save(run.out / PLAN)
    save(yolo, run.out / PRUNED)
    return {"macs": [result.before.macs, result.after.macs], "params": [result.before.params, result.after.params]}


def finetune(run: Run) -> dict[str, Any]:
    """Train the pruned model at the widths that it has."""
    best = _train(run, str(run.out / PRUNED), _FINETUNE_RUN, run.arguments.epochs)
    save(YOLO(best), run.out / BEST)
    return {}


def assess(name: str, run: Run) -> dict[str, Any]:
    """Count and validate one of the three models."""
    weights = run.weights[name]
    arguments = run.arguments
    cost = measure.cost(YOLO(weights).model, arguments.imgsz)
    precision = measure.precision(
        weights, data=run.data, imgsz=arguments.imgsz, batch=arguments.batch, device=arguments.device
    )
    return {"params": cost.params, "macs": cost.macs, **precision}


def time_models(run: Run) -> dict[str, Any]:
    """Time the three models side by side."""
    device = run.arguments.torch_device
    torch.set_num_threads(NUM_THREADS)  # as ultralytics itself predicts on a CPU, also where a resumed job starts here
    medians = measure.latencies(run.weights, imgsz=run.arguments.imgsz, device=device)
    return {"latency_ms": medians, "machine": measure.machine(device)}


def export(run: Run) -> dict[str, Any]:
    """Write the ONNX file and compare it with the model that it was made from."""
    best = run.out / BEST
    exported = measure.export_onnx(best, imgsz=run.arguments.imgsz)
    return measure.onnx_difference(best, exported, imgsz=run.arguments.imgsz)


STAGES: tuple[tuple[str, str, Callable[[Run], dict[str, Any]]], ...] = (
    ("data", "prepare the data", prepare_data),
    ("train_dense", "train the dense model", train_dense),
    ("dense", "validate the dense model", functools.partial(assess, "dense")),
    ("prune", "prune and repair", prune_model),
    ("pruned", "validate the pruned model", functools.partial(assess, "pruned")),
    ("finetune", "fine-tune", finetune),
    ("finetuned", "validate the fine-tuned model", functools.partial(assess, "finetuned")),
    ("latency", "measure latency", time_models),
    ("onnx", "export to ONNX and compare", export),
)


def _train(run: Run, weights: str, folder: str, epochs: int) -> Path:
    """Train to the end, from the last epoch that an earlier, cut run finished; return the best checkpoint."""
    files = run.out / folder / "weights"
    begun = _begun(files / "last.pt")
    if begun is None or _epochs_left(begun):
        yolo = YOLO(weights) if begun is None else begun
        yolo.add_callback("on_fit_epoch_end", functools.partial(_report_epoch, run.reporter))
        yolo.train(
            trainer=trainer(yolo) if is_pruned(yolo.model) else None,
            resume=begun is not None,
            data=run.data,
            epochs=epochs,
            device=run.arguments.device,
            workers=run.arguments.workers,
            plots=False,
            verbose=False,
            **({} if begun is not None else _new_run(run, folder, epochs)),
        )
    return files / "best.pt" if (files / "best.pt").exists() else files / "last.pt"


def _begun(last: Path) -> YOLO | None:
    """Load the last checkpoint of a cut training; None where there is none, or where it was cut in the middle of it."""
    try:
        return YOLO(last) if last.is_file() else None
    except Exception:  # a half-written file can raise anything; the stage then starts from its beginning
        return None


def _epochs_left(yolo: YOLO) -> bool:
    """Tell whether a checkpoint is from the middle of a training; at the end its epoch is the last one, or -1."""
    epoch = int(yolo.ckpt.get("epoch", -1))
    return 0 <= epoch < int(yolo.ckpt["train_args"]["epochs"]) - 1


def _new_run(run: Run, folder: str, epochs: int) -> dict[str, Any]:
    """Return the arguments of a training that starts at its beginning."""
    arguments = run.arguments
    settings: dict[str, Any] = {
        "imgsz": arguments.imgsz,
        "batch": arguments.batch,
        "seed": arguments.seed,
        "project": str(run.out),
        "name": folder,
        "exist_ok": True,
    }
    if folder == _FINETUNE_RUN:
        settings["warmup_epochs"] = min(3.0, epochs / 10)
    if arguments.data == SHAPES:
        # Few, small, clean pictures: a step for each batch, and mild augmentation, converge in about ten epochs.
        settings |= {"optimizer": "AdamW", "lr0": 1e-3, "nbs": arguments.batch, "mosaic": 0.0, "scale": 0.2}
        settings |= {"translate": 0.05, "warmup_epochs": 0.0 if folder == _FINETUNE_RUN else 1.0}
    return settings


def _report_epoch(reporter: Reporter, training: Any) -> None:
    """Pass an epoch on; ultralytics calls this once more after the last one, for its final validation."""
    if training.epoch < training.epochs:
        map50 = training.metrics.get("metrics/mAP50(B)")
        reporter.epoch(training.epoch + 1, training.epochs, None if map50 is None else float(map50))
