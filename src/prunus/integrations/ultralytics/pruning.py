"""Pruning of an ultralytics model in place."""

from typing import Any

import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.modules import Conv

import prunus
from prunus import PruneResult, Target
from prunus.errors import InputError
from prunus.integrations.ultralytics.checkpoint import mark, version_of
from prunus.integrations.ultralytics.facts import width_facts

HALF = Target(macs=0.5)


def prune(yolo: YOLO, target: Target = HALF, *, imgsz: int = 640, guard: bool = True, **options: Any) -> PruneResult:
    """Prune ``yolo.model`` in place, mark it, and return what was removed.

    Hidden channels of the head are pruned like all others. What a box or a class score is computed from stays, because
    its size is written in the code of the head. Go through a file before training: ``save(yolo, "pruned.pt")``, then
    ``yolo = YOLO("pruned.pt")`` and ``yolo.train(trainer=trainer(yolo), ...)``.

    Args:
        yolo: A loaded or newly built model of any task; not a fused one, and not an exported one.
        target: What shall be left; default half of the multiply-accumulates.
        imgsz: Height and width in pixels that operations are counted at; a multiple of the stride, default 640.
        guard: Whether stock ``train()`` shall refuse the pruned model instead of silently training one of full width;
            default True.
        options: Whatever else :func:`prunus.prune` takes, such as ``data``, ``importance`` or ``round_to``.

    Raises:
        InputError: The model is fused or exported, or ``imgsz`` does not fit its stride.

    Example:
        >>> yolo = YOLO("yolov8n.pt")                          # doctest: +SKIP
        >>> print(prune(yolo, Target(macs=0.5), imgsz=320))    # doctest: +SKIP
    """
    model = prunable_model(yolo)
    check_imgsz(model, imgsz)
    model.criterion = None  # type: ignore[assignment]
    images = torch.zeros(1, channels(model), imgsz, imgsz, device=next(model.parameters()).device)
    facts = [*width_facts(model), *options.pop("facts", ())]
    options = {"forward_fn": without_features, **options}
    if options.get("data") is not None:
        options.setdefault("output_transform", raw_predictions)
    result = prunus.prune(model, images, target, facts=facts, **options)
    for layer in model.model:  # type: ignore[union-attr]
        layer.np = sum(p.numel() for p in layer.parameters())  # ultralytics prints this number in profiles
    mark(
        model,
        {
            "prunus": version_of("prunus"),
            "imgsz": imgsz,
            "macs": [int(result.before.macs), int(result.after.macs)],
            "params": [int(result.before.params), int(result.after.params)],
        },
        guard=guard,
    )
    yolo.predictor = None  # it holds a copy of the model as it was
    return result


def without_features(model: nn.Module, images: Any) -> Any:
    """Run a model, and leave the feature maps that enter the head out of what it returns.

    The widths of outputs stay as they are. Heads return their inputs under ``feats`` next to their predictions, for the
    loss, which reads the height and width of them only; so these need not stay.
    """
    return _drop(model(images), "feats")


def raw_predictions(output: Any) -> Any:
    """What a head computes before boxes are decoded: box distributions, class logits, coefficients of masks.

    What goes is chosen by its effect on outputs; decoded boxes are in pixels and would drown all others.
    """
    if isinstance(output, (list, tuple)) and len(output) == 2 and isinstance(output[1], dict):
        return output[1]
    return output


def _drop(output: Any, name: str) -> Any:
    if isinstance(output, dict):
        return {key: _drop(value, name) for key, value in output.items() if key != name}
    if isinstance(output, (list, tuple)):
        return [_drop(value, name) for value in output]
    return output


def prunable_model(yolo: YOLO) -> nn.Module:
    """Return the module of a model that can be pruned.

    Raises:
        InputError: The model is an exported one, or its batch norms were folded into its convolutions.
    """
    model = yolo.model
    if not isinstance(model, nn.Module):
        raise InputError(f"'{model}' is an exported model; prune the .pt file that it was exported from")
    convolutions = [module for module in model.modules() if isinstance(module, Conv)]
    if convolutions and not all(hasattr(module, "bn") for module in convolutions):
        raise InputError(
            "the model is fused: its batch norms were folded into the convolutions, so it can be neither pruned nor "
            "fine-tuned; load the file again with YOLO(...) and prune before fuse(), predict() or val()"
        )
    return model


def check_imgsz(model: nn.Module, imgsz: int) -> None:
    """Refuse a picture size that the model's pyramid cannot halve often enough."""
    stride = max(int(torch.as_tensor(getattr(model, "stride", 32)).max()), 32)
    if imgsz < stride or imgsz % stride:
        near = max(round(imgsz / stride), 1) * stride
        raise InputError(f"imgsz={imgsz} is not a multiple of the model's stride {stride}; use for example {near}")


def channels(model: nn.Module) -> int:
    """Return the number of channels of the pictures that a model takes."""
    description = getattr(model, "yaml", None)
    return int(description.get("channels", 3)) if isinstance(description, dict) else 3
