"""Measurements of ultralytics models: operations, precision, latency, and how far an ONNX file is off."""

import importlib.util
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics import YOLO

from prunus.cost import Cost, count, latency
from prunus.errors import PrunusError
from prunus.integrations.ultralytics.pruning import channels


def cost(model: nn.Module, imgsz: int) -> Cost:
    """Count the parameters of a model and the operations of one picture of ``imgsz`` by ``imgsz`` pixels."""
    device = next(model.parameters()).device
    return count(model, torch.zeros(1, channels(model), imgsz, imgsz, device=device))


def precision(weights: Path, *, data: str, imgsz: int, batch: int, device: str) -> dict[str, float]:
    """Validate a checkpoint with the stock validator and return ``map50`` and ``map50_95``, in 0..1.

    Args:
        weights: A ``.pt`` file.
        data: The ``data.yaml``.
        imgsz: Height and width in pixels.
        batch: Pictures at a time.
        device: As ultralytics takes it, such as ``cpu`` or ``0``.
    """
    with tempfile.TemporaryDirectory() as folder:  # the validator insists on a folder, even if it writes nothing
        metrics = YOLO(weights).val(
            data=data,
            imgsz=imgsz,
            batch=batch,
            device=device,
            workers=0 if device == "cpu" else 8,
            plots=False,
            verbose=False,
            project=folder,
            name="val",
            exist_ok=True,
        )
    return {"map50": float(metrics.box.map50), "map50_95": float(metrics.box.map)}


def latencies(
    weights: Mapping[str, Path], *, imgsz: int, device: torch.device, seconds: float = 20.0
) -> dict[str, float]:
    """Time one forward pass of one picture for each of some checkpoints, and return the medians in milliseconds.

    The models are fused, as they would be deployed, and take turns on the same input.

    Args:
        weights: ``.pt`` files by name.
        imgsz: Height and width in pixels.
        device: Where to run.
        seconds: About how long to measure; between 10 and 60 turns are taken. Default 20.
    """
    models = {name: YOLO(path).model.fuse(verbose=False).eval().to(device) for name, path in weights.items()}
    first = next(iter(models.values()))
    images = torch.rand(1, channels(first), imgsz, imgsz, generator=torch.Generator().manual_seed(0)).to(device)
    turn = sum(latency(models, images, repeat=3, warmup=2).values()) / 1e3
    return latency(models, images, repeat=int(min(max(seconds / turn, 10), 60)), warmup=5)


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what latencies were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def export_onnx(weights: Path, *, imgsz: int) -> Path:
    """Export a checkpoint to an ONNX file beside it, with the stock exporter, and return its path."""
    simplify = importlib.util.find_spec("onnxslim") is not None
    return Path(YOLO(weights).export(format="onnx", imgsz=imgsz, device="cpu", simplify=simplify, verbose=False))


def onnx_difference(weights: Path, exported: Path, *, imgsz: int, tolerance: float = 1e-3) -> dict[str, float]:
    """Run an ONNX file in onnxruntime beside its checkpoint in PyTorch, and return how far apart the outputs are.

    Args:
        weights: The ``.pt`` file.
        exported: The ``.onnx`` file made from it.
        imgsz: Height and width in pixels.
        tolerance: Greatest difference that is allowed, as a share of the greatest output of the same row (box edges
            are pixels, scores are 0..1, so each row has its own scale) or of 1, whichever is more; default 1e-3.

    Raises:
        PrunusError: The outputs differ in shape or by more than the tolerance.
    """
    import onnxruntime

    model: Any = YOLO(weights).model.float().eval()
    images = torch.rand(1, channels(model), imgsz, imgsz, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        output = model(images)
    expected = (output[0] if isinstance(output, (tuple, list)) else output).clone()
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    if got.shape != expected.shape:
        raise PrunusError(f"'{exported}' gives {tuple(got.shape)} where PyTorch gives {tuple(expected.shape)}")
    gap = (got - expected).abs()
    scale = expected.abs().flatten(2).amax(dim=2, keepdim=True).clamp(min=1.0) if expected.dim() > 2 else 1.0
    relative = float((gap / scale).max())
    if not relative <= tolerance:
        raise PrunusError(
            f"'{exported}' is off by {relative:.2e} of the output's size; at most {tolerance:.0e} is allowed"
        )
    return {"max_abs_difference": float(gap.max()), "max_relative_difference": relative, "tolerance": tolerance}
