"""A YOLOv8n on drawn shapes (the set of ``prunus yolo --data shapes``) at 160 px: trained in a few minutes."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.task import Task, fit

SIZE, BATCH, EPOCHS, TUNING = 160, 8, 10, 50


class Halves(nn.Module):
    """A C2f block with two convolutions for the two halves that it splits: Torch-Pruning cannot cut the stock one.

    This is the rewriting that its own example for YOLOv8 asks for.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.first, self.second = self._half(block.cv1, 0), self._half(block.cv1, 1)
        self.m, self.cv2 = block.m, block.cv2
        self.i, self.f, self.type, self.np = block.i, block.f, block.type, block.np

    @staticmethod
    def _half(conv: Any, number: int) -> Any:
        conv = copy.deepcopy(conv)
        tensors = [(conv.conv, "weight"), *((conv.bn, n) for n in ("weight", "bias", "running_mean", "running_var"))]
        for owner, name in tensors:
            getattr(owner, name).data = getattr(owner, name).data.chunk(2)[number].clone()
        conv.conv.out_channels = conv.bn.num_features = len(conv.bn.weight)
        return conv

    def forward(self, x: Tensor) -> Tensor:
        """What the stock block computes."""
        parts = [self.first(x), self.second(x)]
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


def halved(model: Any) -> nn.Module:
    """Every C2f of a model rewritten, in place."""
    from ultralytics.nn.modules import C2f

    for k, layer in enumerate(model.model):
        if isinstance(layer, C2f):
            model.model[k] = Halves(layer)
    return model


def _trained(file: Path, data: str, seed: int) -> None:
    from ultralytics import YOLO

    from prunus.integrations.ultralytics import save

    gentle = {"optimizer": "AdamW", "lr0": 1e-3, "nbs": BATCH, "mosaic": 0.0, "scale": 0.2, "translate": 0.05}
    with tempfile.TemporaryDirectory() as folder:
        yolo, where = YOLO("yolov8n.yaml"), {"project": folder, "name": "train", "exist_ok": True}
        settings: dict[str, Any] = {"imgsz": SIZE, "batch": BATCH, "epochs": EPOCHS, "warmup_epochs": 1.0, "seed": seed}
        yolo.train(data=data, workers=0, device="cpu", plots=False, verbose=False, **settings, **gentle, **where)
        save(YOLO(Path(folder) / "train" / "weights" / "best.pt"), file)


def _batches(data: str, count: int, seed: int) -> tuple[Any, list[dict[str, Any]]]:
    """Settings of the loss, and labelled training batches with mild augmentation."""
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    info = check_det_dataset(data)
    settings = get_cfg(overrides={"task": "detect", "imgsz": SIZE, "mosaic": 0.0, "scale": 0.2, "translate": 0.05})
    pictures: Any = build_yolo_dataset(settings, info["train"], BATCH, info, mode="train", rect=False)
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randperm(len(pictures), generator=generator) for _ in range(-(-count * BATCH // len(pictures)))]
    parts = torch.cat(numbers).split(BATCH)[:count]
    return settings, [pictures.collate_fn([pictures[int(k)] for k in part]) for part in parts]


def yolo(seed: int, cache: Path) -> Task:
    """The score is 100 times the mAP50 on 100 pictures; 200 others to calibrate on, 2 epochs to fine-tune."""
    os.environ.setdefault("YOLO_VERBOSE", "false")
    from ultralytics import YOLO

    from prunus.integrations.shapes import shapes
    from prunus.integrations.ultralytics import Pictures
    from prunus.integrations.ultralytics.pruning import raw_predictions, without_features

    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    data = str(shapes(cache.resolve(), seed=seed, size=SIZE, val=100))
    file = cache / f"yolov8n-{seed}.pt"
    if not file.exists():
        _trained(file, data, seed)
    model: Any = YOLO(file).model.float().eval().requires_grad_(True)
    model.model[-1].dfl.requires_grad_(False)
    settings, batches = _batches(data, TUNING, seed)

    def loss(network: Any, batch: dict[str, Any]) -> Tensor:
        network.args, network.criterion = settings, None
        return network({**batch, "img": batch["img"].float() / 255})[0].sum()

    def score(network: Any) -> float:
        with tempfile.TemporaryDirectory() as folder:
            judged = YOLO(file)
            judged.model = copy.deepcopy(network)
            judged.model.args = {"task": "detect", "imgsz": SIZE}
            where = {"project": folder, "name": "val", "exist_ok": True}
            found = judged.val(data=data, imgsz=SIZE, batch=50, workers=0, plots=False, verbose=False, **where)
        return 100 * float(found.box.map50)

    def keep(network: Any) -> list[nn.Module]:
        head = network.model[-1]
        return [head.dfl, *(branch[-1] for branch in (*head.cv2, *head.cv3))]

    return Task(
        *("shapes YOLOv8n (mAP50)", model, torch.zeros(1, 3, SIZE, SIZE), list(Pictures(data, imgsz=SIZE))),
        loss=lambda m: sum((loss(m, b) for b in itertools.islice(batches, 4)), torch.zeros(())),
        score=score,
        tune=lambda m, rate: fit(m, loss, batches, TUNING, rate),
        rates=(3e-4, 3e-3),
        keep=keep,
        options={"forward_fn": without_features, "output_transform": raw_predictions},
        prepare=halved,
    )
