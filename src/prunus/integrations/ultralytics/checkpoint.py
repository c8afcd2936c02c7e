"""What makes a checkpoint a pruned one: its marker, its guard, and the file.

*Marker*: ``model.pruned``, a plain dict. It survives ``deepcopy``, the EMA, ``strip_optimizer`` and every save.
*Guard*: the first layer's name in ``model.yaml`` becomes a sentence. Stock ``train()`` rebuilds the network from that
description; it now fails and prints the sentence, where it used to train a network of full width without a word.
Loading, validating, predicting, fusing and exporting do not read the description.
"""

import copy
import importlib.metadata
import os
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import ultralytics
from torch import nn
from ultralytics import YOLO

from prunus._version import __version__
from prunus.errors import InputError

GUARD = (
    "This model is pruned; stock train() would rebuild it at full width. Train it with "
    "'from prunus.integrations.ultralytics import trainer' and 'yolo.train(trainer=trainer(yolo), ...)'"
)
_OF_ONE_RUN = ("project", "name", "save_dir", "exist_ok", "resume", "model")  # where and how, not what, was trained


def is_pruned(model: nn.Module) -> bool:
    """Tell whether a model carries the marker of a pruned model."""
    return isinstance(getattr(model, "pruned", None), dict)


def mark(model: nn.Module, facts: dict[str, Any], *, guard: bool = True) -> None:
    """Put the marker, and the guard if asked for, on a model, in place.

    Args:
        model: The pruned model.
        facts: What the marker says, plain Python values only.
        guard: Whether stock ``train()`` shall refuse the model; default True.
    """
    model.pruned = dict(facts)  # type: ignore[assignment]
    if guard and isinstance(getattr(model, "yaml", None), dict):
        description: dict[str, Any] = copy.deepcopy(model.yaml)  # type: ignore[arg-type]
        description["backbone"][0][2] = GUARD
        model.yaml = description  # type: ignore[assignment]


def save(yolo: YOLO, path: str | Path) -> Path:
    """Write a model to a ``.pt`` file that stock ultralytics loads, in float32, and return the path.

    Unlike ``yolo.save()`` this neither rounds to float16 nor carries over a stale ``ema`` of the file that the model
    came from. The file appears complete or not at all.

    Args:
        yolo: The model, pruned or not.
        path: The file to write; its name must end in ``.pt``, and folders are made as needed.

    Raises:
        InputError: The name does not end in ``.pt``, or ``yolo`` holds an exported model.
    """
    path = Path(path)
    if path.suffix != ".pt":
        raise InputError(f"save(): '{path}' does not end in .pt, and ultralytics loads no other ending as a checkpoint")
    if not isinstance(yolo.model, nn.Module):
        raise InputError(f"save(): '{yolo.model}' is an exported model, not a PyTorch one; load its .pt file instead")
    model = copy.deepcopy(yolo.model).float().cpu()
    model.criterion = None  # type: ignore[assignment]  # a cached loss holds the arguments and the device of its run
    arguments = model.args if isinstance(model.args, dict) else vars(model.args)
    content = {
        "epoch": -1,
        "best_fitness": None,
        "model": model,
        "ema": None,
        "updates": None,
        "optimizer": None,
        "train_args": {key: value for key, value in arguments.items() if key not in _OF_ONE_RUN},
        "date": datetime.now(timezone.utc).isoformat(),
        "version": ultralytics.__version__,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(suffix=".pt", prefix=f".{path.stem}-", dir=path.parent)
    os.close(handle)
    try:
        torch.save(content, draft)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    finally:
        Path(draft).unlink(missing_ok=True)
    return path


def version_of(package: str) -> str:
    """Return the version of an installed package, or ``unknown``."""
    if package == "prunus":
        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
