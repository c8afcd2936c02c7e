"""Pictures of a data set as a model sees them, for repair without training."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset

from prunus.errors import InputError

MOST, BATCH = 256, 16
_PIXELS = MOST * 320 * 320  # all activations of all pictures wait at each layer: large pictures have to be fewer


class Pictures:
    """Training pictures of a detection set in batches of shape (16, 3, imgsz, imgsz), without augmentation.

    May be gone through several times.

    Args:
        data: path of a ``data.yaml``.
        imgsz: height and width in pixels that pictures are fitted into.
        count: how many, evenly spaced over the set; default 256, fewer above 320 pixels.
        device: where the batches go; default the CPU.

    Raises:
        InputError: the set has no training pictures.

    Example:
        >>> result = prune(yolo, Target(macs=0.5), data=Pictures("coco8.yaml", imgsz=640))  # doctest: +SKIP
    """

    def __init__(self, data: str, *, imgsz: int, count: int | None = None, device: torch.device | str = "cpu") -> None:
        info = check_det_dataset(data)
        settings = get_cfg(overrides={"task": "detect", "imgsz": imgsz, "cache": False, "rect": False})
        self._set = build_yolo_dataset(settings, info["train"], BATCH, info, mode="val", rect=False)
        if not len(self._set):
            raise InputError(f"{data} has no training pictures")
        wanted = max(BATCH, min(MOST, _PIXELS // imgsz**2)) if count is None else count
        wanted = min(wanted, len(self._set))
        self.numbers: Sequence[int] = [k * len(self._set) // wanted for k in range(wanted)]
        self._device = device

    def __len__(self) -> int:
        return (len(self.numbers) + BATCH - 1) // BATCH

    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, len(self.numbers), BATCH):
            pictures = [self._set[k]["img"] for k in self.numbers[first : first + BATCH]]
            yield torch.stack(pictures).to(self._device).float() / 255
