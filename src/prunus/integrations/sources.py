"""Models by name, for the command line: ``torchvision:resnet50``, ``timm:NAME``, ``hf:FOLDER``, factories, files."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunus.errors import InputError

FORMS = (
    "torchvision:NAME, timm:NAME, hf:FOLDER_OR_NAME, a .pt file that holds a module, a YOLO .yaml or .pt file, or "
    "MODULE:FACTORY (which returns the model, or model and inputs)"
)
INPUTS = "inputs.pt"  # beside a model's file: the inputs that it runs on


@dataclass(frozen=True)
class Source:
    """A model, inputs to run it on, and how to run it (None: call it); ``yolo`` is the ultralytics object around it."""

    model: nn.Module
    inputs: Any
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    yolo: Any = None


def load(spec: str, shape: Sequence[int] | None = None, weights: str | None = None) -> Source:
    """Build or load the model that ``spec`` names.

    A ``.pt`` file is unpickled, which runs code that it names: open only files that you trust.

    Args:
        spec: one of the forms above.
        shape: of the input tensor; default one picture of 224 pixels (640 for YOLO), 16 tokens for a language model,
            the file ``inputs.pt`` beside a ``.pt`` file.
        weights: None for random ones; a file of a state dict (.pt, .safetensors); else a name for torchvision
            ("DEFAULT") or anything for timm and hf, which then fetch those that belong to the model.

    Raises:
        InputError: there is no such model, or its package is not installed.
    """
    if spec.endswith((".yaml", ".pt")):
        source = _file(spec, shape) if spec.endswith(".pt") else _yolo(spec, shape or (1, 3, 640, 640))
        return _with_weights(source, weights)
    kind, _, name = spec.partition(":")
    if not name:
        raise InputError(f"{spec!r} names no model; give {FORMS}")
    fetched = weights if weights is not None and not _is_file(weights) else None
    if kind == "torchvision":
        source = Source(_torchvision(name, fetched), _noise(shape or (1, 3, 224, 224)))
    elif kind == "timm":
        source = _timm(name, shape, fetched)
    elif kind == "hf":
        from prunus.integrations.huggingface import load as load_hf

        source = Source(*load_hf(name, shape, fetched is not None))
    else:
        source = _factory(kind, name, shape)
        if fetched is not None:
            raise InputError(f"weights={weights!r} is no file; {spec} has no weights by name")
    return _with_weights(source, weights)


def _is_file(weights: str) -> bool:
    return weights.endswith((".pt", ".pth", ".safetensors"))


def _noise(shape: Sequence[int]) -> torch.Tensor:
    if not shape or any(n < 1 for n in shape):
        raise InputError(f"the input shape {','.join(map(str, shape))} is none: give sizes of 1 or more")
    return torch.randn(tuple(shape))


def _with_weights(source: Source, weights: str | None) -> Source:
    """The source, its model with the state dict of a file."""
    if weights is None or not _is_file(weights):
        return source
    try:
        if weights.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        source.model.load_state_dict(state)
    except (OSError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"cannot load the weights of {weights} into the model: {_first_line(error)}") from error
    return source


def _file(spec: str, shape: Sequence[int] | None) -> Source:
    """A module in a file, as ``prunus prune --out`` writes it, or a YOLO checkpoint."""
    path = Path(spec)
    if not path.exists() and path.parent != Path("."):
        raise InputError(f"there is no file {spec}")
    if not path.exists():
        return _yolo(spec, shape or (1, 3, 640, 640))  # the name of a stock checkpoint, perhaps
    sys.path.insert(0, os.getcwd())
    try:
        found = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise InputError(f"cannot read {spec}: {type(error).__name__}: {_first_line(error)}") from error
    finally:
        sys.path.pop(0)
    if isinstance(found, dict) and isinstance(found.get("model"), nn.Module) and "train_args" in found:
        return _yolo(spec, shape or (1, 3, 640, 640))
    if not isinstance(found, nn.Module):
        raise InputError(
            f"{spec} holds a {type(found).__name__}, not a torch.nn.Module; build the model with MODULE:FACTORY and "
            "pass a state dict as weights"
        )
    if shape is not None:
        return Source(found, _noise(shape))
    inputs = path.with_name(INPUTS)
    if not inputs.exists():
        raise InputError(f"{spec} does not say what the model runs on: give the input shape")
    return Source(found, torch.load(inputs, map_location="cpu", weights_only=True))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _timm(name: str, shape: Sequence[int] | None, fetched: str | None) -> Source:
    try:
        import timm
    except ImportError as error:
        raise InputError("timm is not installed: pip install timm") from error
    try:
        model = timm.create_model(name, pretrained=fetched is not None)
    except RuntimeError as error:
        raise InputError(f"timm has no model {name!r} ({_first_line(error)}); timm.list_models() lists them") from error
    size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    return Source(model, _noise(shape or (1, *size)))


def _torchvision(name: str, fetched: str | None) -> nn.Module:
    try:
        from torchvision.models import get_model
    except ImportError as error:
        raise InputError("torchvision is not installed: pip install torchvision") from error
    try:
        return get_model(name, weights=fetched)
    except (ValueError, KeyError) as error:
        raise InputError(
            f"torchvision has no model {name!r}{f' with weights {fetched!r}' if fetched else ''}; "
            "torchvision.models.list_models() lists them"
        ) from error


def _yolo(spec: str, shape: Sequence[int]) -> Source:
    os.environ.setdefault("YOLO_AUTOINSTALL", "false")
    try:
        from ultralytics import YOLO
    except ImportError as error:
        raise InputError("ultralytics is not installed: pip install 'prunus[ultralytics]'") from error
    from prunus.integrations.ultralytics.pruning import prunable_model, without_features

    try:
        yolo = YOLO(spec, verbose=False)
        model = prunable_model(yolo)
    except (FileNotFoundError, ConnectionError) as error:
        raise InputError(f"cannot read {spec}: {error}") from error
    return Source(model.float(), torch.rand(tuple(shape)), without_features, yolo)


def _made(module: str, name: str) -> Any:
    """What a factory makes; a model that is there is taken as it is."""
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"cannot find {name!r} in module {module!r}: {error}") from error
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as error:
        raise InputError(
            f"{module}:{name}() failed ({type(error).__name__}: {error}); it is called without arguments"
        ) from error


def _factory(module: str, name: str, shape: Sequence[int] | None) -> Source:
    sys.path.insert(0, os.getcwd())
    try:
        made = _made(module, name)
    finally:
        sys.path.pop(0)
    if isinstance(made, nn.Module):
        if shape is None:
            raise InputError(f"{module}:{name} returns a model only: give the input shape, or return (model, inputs)")
        return Source(made, _noise(shape))
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return Source(*made)
    raise InputError(f"{module}:{name} must return a torch.nn.Module or (model, inputs), not {type(made).__name__}")
