"""A small detection data set that is drawn, not downloaded: coloured circles, squares and triangles in YOLO format.

It exists so that a detector can be trained, pruned and fine-tuned on a machine without a network, in minutes. It says
nothing about how hard real data is. The same arguments give the same set, and a set that was drawn once is reused.
"""

import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from prunus.errors import InputError

CLASSES = ("circle", "square", "triangle")
_EDITION = 1  # part of the folder name: raise it when the drawing changes, so that old pictures are not reused
_FEWEST_SHAPES, _MOST_SHAPES = 1, 4
_TILT = math.radians(15)  # most that a shape is turned away from upright
_CONTRAST = 160  # least sum of absolute differences between the colours of shape and ground, over red, green, blue

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


def cache_root() -> Path:
    """Return where sets are kept: ``$PRUNUS_CACHE``, else ``$XDG_CACHE_HOME/prunus``, else ``~/.cache/prunus``."""
    if chosen := os.environ.get("PRUNUS_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "prunus"


def shapes(root: Path | None = None, *, seed: int = 0, size: int = 160, train: int = 200, val: int = 50) -> Path:
    """Draw the set, or find it where it was drawn before, and return its ``data.yaml``.

    Args:
        root: Folder to keep sets in, each in a subfolder of its own; default :func:`cache_root`.
        seed: Other seeds give other pictures; default 0.
        size: Height and width of each picture in pixels, at least 32; default 160.
        train: Number of training pictures, at least 1; default 200.
        val: Number of validation pictures, at least 1; default 50.

    Raises:
        InputError: A size or a number is too small.

    Example:
        >>> data = shapes(seed=0, size=160)         # doctest: +SKIP
        >>> YOLO("yolov8n.yaml").train(data=data)   # doctest: +SKIP
    """
    if size < 32 or train < 1 or val < 1 or seed < 0:
        raise InputError(
            f"shapes(seed={seed}, size={size}, train={train}, val={val}): size must be at least 32 pixels, "
            "train and val at least 1 picture, seed at least 0"
        )
    root = cache_root() if root is None else Path(root)
    folder = root / f"shapes{_EDITION}-seed{seed}-{size}px-{train}+{val}"
    data = folder.resolve() / "data.yaml"
    if data.is_file():
        return data
    root.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
    try:
        generator = np.random.default_rng([_EDITION, seed])
        for split, count in (("train", train), ("val", val)):
            _write_split(draft, split, count, size, generator)
        names = "\n".join(f"  {number}: {name}" for number, name in enumerate(CLASSES))
        (draft / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames:\n{names}\n", encoding="utf-8")
        draft.chmod(0o755)
        _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return data


def _publish(draft: Path, folder: Path) -> None:
    """Move a finished set into place; where another process was faster, keep what that one drew."""
    try:
        draft.rename(folder)
    except OSError:
        if not (folder / "data.yaml").is_file():
            raise


def _write_split(folder: Path, split: str, count: int, size: int, generator: np.random.Generator) -> None:
    images, labels = folder / "images" / split, folder / "labels" / split
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for number in range(count):
        image, objects = _picture(size, generator)
        image.save(images / f"{number:05d}.jpg", quality=92)
        (labels / f"{number:05d}.txt").write_text(
            "".join(_label(kind, box, size) for kind, box in objects), encoding="utf-8"
        )


def _label(kind: int, box: Box, size: int) -> str:
    """Write one object as a line of YOLO's text format: class, centre x, centre y, width, height, in 0..1."""
    x0, y0, x1, y1 = (edge / size for edge in box)
    return f"{kind} {(x0 + x1) / 2:.6f} {(y0 + y1) / 2:.6f} {x1 - x0:.6f} {y1 - y0:.6f}\n"


def _picture(size: int, generator: np.random.Generator) -> tuple[Image.Image, list[tuple[int, Box]]]:
    """Draw one picture: a noisy grey gradient with one to four shapes that hardly overlap."""
    top, bottom = generator.integers(60, 196, 2)
    ground = np.linspace(top, bottom, size)[:, None, None] + generator.normal(0, 12, (size, size, 3))
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    objects: list[tuple[int, Box]] = []
    for _ in range(int(generator.integers(_FEWEST_SHAPES, _MOST_SHAPES + 1))):
        kind = int(generator.integers(len(CLASSES)))
        outline = _place(kind, size, [box for _, box in objects], generator)
        if outline is None:
            continue
        box = _bounds(outline)
        centre = ground[int((box[1] + box[3]) / 2), int((box[0] + box[2]) / 2)]
        draw.polygon(outline, fill=_colour(centre, generator))
        objects.append((kind, box))
    return image, objects


def _place(kind: int, size: int, taken: list[Box], generator: np.random.Generator) -> list[tuple[float, float]] | None:
    """Find a free place for a shape and return its outline in pixels, or None where the picture is full."""
    for _ in range(20):
        radius = generator.uniform(0.11, 0.26) * size
        x, y = generator.uniform(radius + 1, size - radius - 1, 2)
        turn = (0.0, math.pi / 4, -math.pi / 2)[kind] + generator.uniform(-_TILT, _TILT)
        corners = (48, 4, 3)[kind]
        outline = [
            (
                float(x + radius * math.cos(turn + 2 * math.pi * k / corners)),
                float(y + radius * math.sin(turn + 2 * math.pi * k / corners)),
            )
            for k in range(corners)
        ]
        if all(_overlap(_bounds(outline), box) < 0.1 for box in taken):
            return outline
    return None


def _bounds(outline: list[tuple[float, float]]) -> Box:
    xs, ys = [x for x, _ in outline], [y for _, y in outline]
    return min(xs), min(ys), max(xs), max(ys)


def _overlap(a: Box, b: Box) -> float:
    """Return the intersection of two boxes as a share of the smaller one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _colour(ground: np.ndarray, generator: np.random.Generator) -> tuple[int, int, int]:
    """Choose a colour that stands out from the ground."""
    while True:
        red, green, blue = (int(c) for c in generator.integers(0, 256, 3))
        if abs(red - ground[0]) + abs(green - ground[1]) + abs(blue - ground[2]) >= _CONTRAST:
            return red, green, blue
