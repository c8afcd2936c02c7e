"""What a job is asked to do, and the checks that it passes before anything is written."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import SETTINGS
from ultralytics.utils.checks import check_file
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

from prunus.errors import InputError
from prunus.integrations.shapes import CLASSES
from prunus.integrations.ultralytics.pruning import check_imgsz, prunable_model

SHAPES = "shapes"
_SHAPES_EPOCHS, _SHAPES_DENSE_EPOCHS, _SHAPES_BATCH = 6, 10, 8
_EPOCHS, _DENSE_EPOCHS, _BATCH = 50, 100, 16


@dataclass(frozen=True)
class Job:
    """A job as the user states it; None means: choose for me.

    Attributes:
        model: A ``.pt`` file (or a name that ultralytics downloads), or a ``.yaml`` description to train from scratch.
        data: A ``data.yaml``, or ``shapes`` for the generated set.
        out: The folder to write to.
        macs: Share of the multiply-accumulates to keep, between 0 and 1.
        epochs: Epochs of fine-tuning; default 6 on shapes, else 50.
        dense_epochs: Epochs of training before pruning; default 0 for a ``.pt``; for a ``.yaml`` 10 on shapes, else
            100.
        imgsz: Height and width in pixels.
        batch: Pictures at a time in training; default 8 on shapes, else 16.
        device: ``cpu``, ``mps`` or the number of a GPU; default the first GPU, else the CPU.
        seed: Of training, and of the generated set.
        repair: Refit what the cut left on training pictures (no labels), before fine-tuning.
    """

    model: str
    data: str
    out: Path
    macs: float = 0.5
    epochs: int | None = None
    dense_epochs: int | None = None
    imgsz: int = 640
    batch: int | None = None
    device: str | None = None
    seed: int = 0
    repair: bool = True


@dataclass(frozen=True)
class Arguments:
    """The arguments of a job with every choice made and every path absolute; see :class:`Job` for what they mean."""

    model: str
    data: str
    macs: float
    epochs: int
    dense_epochs: int
    imgsz: int
    batch: int
    device: str
    seed: int
    repair: bool

    @property
    def workers(self) -> int:
        """Number of processes that load pictures."""
        return 0 if self.device == "cpu" else 8

    @property
    def torch_device(self) -> torch.device:
        """The device, as PyTorch writes it."""
        return torch.device(f"cuda:{self.device}" if self.device.isdigit() else self.device)


def settle(job: Job) -> Arguments:
    """Check a job and make every choice that it leaves open; nothing is written.

    Raises:
        InputError: An argument cannot be used; the message says which, why, and what to give instead.
    """
    on_shapes = job.data == SHAPES
    from_scratch = Path(job.model).suffix in (".yaml", ".yml")
    dense_epochs = job.dense_epochs
    if dense_epochs is None:
        dense_epochs = (_SHAPES_DENSE_EPOCHS if on_shapes else _DENSE_EPOCHS) if from_scratch else 0
    arguments = Arguments(
        model=_model_path(job.model),
        data=SHAPES if on_shapes else _data_path(job.data),
        macs=job.macs,
        epochs=(_SHAPES_EPOCHS if on_shapes else _EPOCHS) if job.epochs is None else job.epochs,
        dense_epochs=dense_epochs,
        imgsz=job.imgsz,
        batch=(_SHAPES_BATCH if on_shapes else _BATCH) if job.batch is None else job.batch,
        device=_device(job.device),
        seed=job.seed,
        repair=job.repair,
    )
    _check_numbers(arguments, from_scratch)
    _check_packages()
    yolo = _load(arguments.model)
    check_imgsz(prunable_model(yolo), arguments.imgsz)
    if yolo.task != "detect":
        raise InputError(
            f"model '{job.model}' is of the task '{yolo.task}', and this job handles detection; prune(), save() and "
            "trainer() of prunus.integrations.ultralytics take any task"
        )
    _check_classes(yolo, arguments, _classes(arguments.data))
    return arguments


def _check_numbers(arguments: Arguments, from_scratch: bool) -> None:
    if not 0.0 < arguments.macs < 1.0:
        raise InputError(
            f"macs={arguments.macs} is not between 0 and 1; it is the share of operations to keep, such as 0.5"
        )
    for name, number, least in (
        ("epochs", arguments.epochs, 1),
        ("dense-epochs", arguments.dense_epochs, 1 if from_scratch else 0),
        ("batch", arguments.batch, 1),
        ("seed", arguments.seed, 0),
    ):
        if number < least:
            raise InputError(f"{name}={number} is too small; give at least {least}")


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"the job exports to ONNX and needs {' and '.join(missing)}: pip install 'prunus[ultralytics]'"
        )


def _device(asked: str | None) -> str:
    if asked is None:
        return "0" if torch.cuda.is_available() else "cpu"
    if asked == "cpu" or (asked == "mps" and torch.backends.mps.is_available()):
        return asked
    if asked.isdigit() and int(asked) < torch.cuda.device_count():
        return asked
    raise InputError(
        f"device='{asked}' is not here; this machine has cpu"
        + "".join(f", {number}" for number in range(torch.cuda.device_count()))
        + (", mps" if torch.backends.mps.is_available() else "")
    )


def _model_path(model: str) -> str:
    """Return the absolute path of a model file, or the name itself where ultralytics finds or downloads it."""
    path = Path(model)
    if path.suffix not in (".pt", ".yaml", ".yml"):
        raise InputError(f"model '{model}' is neither a .pt file nor a .yaml description")
    if path.is_file():
        return str(path.resolve())
    if path.suffix != ".pt" and path.name == model:
        return model
    known = path.name == model and (model in GITHUB_ASSETS_NAMES or (Path(SETTINGS["weights_dir"]) / model).is_file())
    if not known:
        raise InputError(f"model file '{model}' does not exist, and ultralytics has no model of this name to download")
    return model


def _load(model: str) -> YOLO:
    try:
        return YOLO(model)
    except Exception as error:  # whatever is wrong with the file, ultralytics may raise anything
        raise InputError(f"model '{model}' cannot be loaded: {_first_line(error)}") from error


def _data_path(data: str) -> str:
    """Return the absolute path of a data file, or of the one that ultralytics ships under this name."""
    path = Path(data)
    if path.suffix not in (".yaml", ".yml"):
        raise InputError(
            f"data '{data}' is not a .yaml file; give a data.yaml in the format of ultralytics, or 'shapes'"
        )
    if path.is_file():
        return str(path.resolve())
    shipped = check_file(data, download=False, hard=False) if path.name == data else None
    if not shipped:
        raise InputError(f"data file '{data}' does not exist; give a data.yaml, or 'shapes' for a generated set")
    return str(shipped)


def _classes(data: str) -> dict[int, str]:
    """Return the classes of a data set, after checking that its pictures are there."""
    if data == SHAPES:
        return dict(enumerate(CLASSES))
    try:
        content: dict[str, Any] = check_det_dataset(data)
    except Exception as error:
        raise InputError(f"data file '{data}' cannot be used: {_first_line(error)}") from error
    folders = content["train"] if isinstance(content["train"], list) else [content["train"]]
    if missing := [folder for folder in folders if not Path(folder).exists()]:
        raise InputError(f"data file '{data}' cannot be used: its training pictures '{missing[0]}' do not exist")
    classes: dict[int, str] = content["names"]
    return classes


def _check_classes(yolo: YOLO, arguments: Arguments, classes: dict[int, str]) -> None:
    if arguments.dense_epochs == 0 and len(yolo.names) != len(classes):
        raise InputError(
            f"the model predicts {len(yolo.names)} classes and the data has {len(classes)}, so there is nothing to "
            "compare with; train it on this data before pruning: --dense-epochs 50"
        )


def _first_line(error: Exception) -> str:
    text = str(error).replace("❌", "").strip() or type(error).__name__
    return text.splitlines()[0]
