"""Models by name, for the command line: ``torchvision:resnet50``, ``yolov8n.yaml``, ``package.module:factory``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunus.errors import InputError

FORMS = "torchvision:NAME, a YOLO .yaml or .pt file, or MODULE:FACTORY (which returns the model, or model and inputs)"


@dataclass(frozen=True)
class Source:
    """A model, inputs to run it on, and how to run it (None: call it)."""

    model: nn.Module
    inputs: Any
    forward_fn: Callable[[nn.Module, Any], Any] | None = None


def load(spec: str, shape: Sequence[int] | None = None) -> Source:
    """Build or load the model that ``spec`` names.

    Args:
        spec: one of the forms above.
        shape: of the input tensor; default one picture of 224 pixels (640 for YOLO).

    Raises:
        InputError: there is no such model, or its package is not installed.
    """
    if spec.endswith((".yaml", ".pt")):
        return _yolo(spec, shape or (1, 3, 640, 640))
    kind, _, name = spec.partition(":")
    if not name:
        raise InputError(f"{spec!r} names no model; give {FORMS}")
    if kind == "torchvision":
        return Source(_torchvision(name), torch.randn(tuple(shape or (1, 3, 224, 224))))
    return _factory(kind, name, shape)


def _torchvision(name: str) -> nn.Module:
    try:
        from torchvision.models import get_model
    except ImportError as error:
        raise InputError("torchvision is not installed: pip install torchvision") from error
    try:
        return get_model(name)
    except ValueError as error:
        raise InputError(f"torchvision has no model {name!r}; torchvision.models.list_models() lists them") from error


def _yolo(spec: str, shape: Sequence[int]) -> Source:
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    try:
        from ultralytics import YOLO
    except ImportError as error:
        raise InputError("ultralytics is not installed: pip install 'prunus[ultralytics]'") from error
    from prunus.integrations.ultralytics.pruning import prunable_model, without_features

    try:
        model = prunable_model(YOLO(spec, verbose=False))
    except (FileNotFoundError, ConnectionError) as error:
        raise InputError(f"cannot read {spec}: {error}") from error
    return Source(model.float(), torch.rand(tuple(shape)), without_features)


def _factory(module: str, name: str, shape: Sequence[int] | None) -> Source:
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise InputError(f"cannot find {name!r} in module {module!r}: {error}") from error
    finally:
        sys.path.pop(0)
    if isinstance(made, nn.Module):
        if shape is None:
            raise InputError(f"{module}:{name} returns a model only: give --shape, or return (model, inputs)")
        return Source(made, torch.randn(tuple(shape)))
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return Source(*made)
    raise InputError(f"{module}:{name} must return a torch.nn.Module or (model, inputs), not {type(made).__name__}")
