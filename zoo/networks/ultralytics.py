"""Ultralytics: every generation of YOLO in its smallest size, all tasks, RT-DETR and the open-vocabulary models.

Heads run as `prunus.integrations.ultralytics` runs them: the feature maps that they hand through are no outputs.
"""

from __future__ import annotations

from typing import Any

import torch

from zoo.network import Builder, Network, Table

NAMES = [
    "yolov3-tiny",
    "yolov5n",
    "yolov6n",
    "yolov8n",
    "yolov9t",
    "yolov10n",
    "yolo11n",
    "yolo12n",
    "yolo26n",
    "yolov8n-seg",
    "yolov8n-pose",
    "yolov8n-obb",
    "yolov8n-cls",
    "yolov8n-ghost",
    "yolov8n-p2",
    "yolov8n-p6",
    "yolov8n-world",
    "yolov8n-worldv2",
    "yolov9c-seg",
    "yolo11n-seg",
    "yolo11n-pose",
    "yolo11n-obb",
    "yolo11n-cls",
    "yolo12n-seg",
    "yolo12n-cls",
    "yolo26n-seg",
    "yolo26n-pose",
    "yolo26n-obb",
    "yolo26n-cls",
    "yolo26n-sem",
    "yolo26n-depth",
    "yolov8n-rtdetr",
    "yolov5n-p6",
    "yolov10s",
    "yolov9s",
    "yoloe-v8s",
    "yoloe-11s",
    "yolov3-spp",
]
HEAVY = {"rtdetr-l": 64}


def _build(name: str, size: int) -> Builder:
    def build() -> Network:
        from ultralytics import RTDETR, YOLO, YOLOE, YOLOWorld

        from prunus.integrations.ultralytics.pruning import prunable_model, without_features

        kinds: dict[str, Any] = {"rtdetr": RTDETR, "world": YOLOWorld, "yoloe": YOLOE}
        kind = next((kind for part, kind in kinds.items() if part in name), YOLO)
        options = {} if kind is RTDETR else {"verbose": False}
        model = prunable_model(kind(f"{name}.yaml", **options)).float()
        return Network(model, torch.rand(1, 3, size, size), without_features)

    return build


def table() -> Table:
    """Every network of the family, by name."""
    found: Table = {name: _build(name, 128 if name.endswith("p6") else 64) for name in NAMES}
    found.update({name: _build(name, size) for name, size in HEAVY.items()})
    return found
