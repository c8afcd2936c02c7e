"""The generated detection set: repeatable, correctly labelled, reused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prunus.errors import InputError
from prunus.integrations import shapes as module
from prunus.integrations.shapes import CLASSES, cache_root, shapes


def digest(folder: Path) -> str:
    """Hash the names and the contents of all files below a folder."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return total.hexdigest()


def labels(file: Path) -> np.ndarray:
    """Read one label file as rows of class, centre x, centre y, width, height."""
    return np.loadtxt(file, ndmin=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes(tmp_path_factory.mktemp("sets"), seed=3, size=96, train=12, val=5).parent


def test_same_arguments_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    """Two sets that are drawn independently from one seed are equal in every byte; another seed differs."""
    assert digest(shapes(tmp_path, seed=3, size=96, train=12, val=5).parent) == digest(folder)
    assert digest(shapes(tmp_path, seed=4, size=96, train=12, val=5).parent) != digest(folder)


def test_layout_is_what_ultralytics_reads(folder: Path) -> None:
    """Each picture has the asked size and a label file of the same name, in numbers as asked."""
    for split, count in (("train", 12), ("val", 5)):
        pictures = sorted((folder / "images" / split).iterdir())
        texts = sorted((folder / "labels" / split).iterdir())
        assert [p.stem for p in pictures] == [t.stem for t in texts]
        assert len(pictures) == count
        assert all(Image.open(picture).size == (96, 96) for picture in pictures)
    content = (folder / "data.yaml").read_text()
    assert "train: images/train" in content
    assert "path:" not in content  # the folder can be moved


def test_boxes_lie_in_the_picture_and_all_classes_occur(folder: Path) -> None:
    """Every row has a known class and a box inside the picture that is at least 10 pixels wide and high."""
    rows = np.concatenate([labels(file) for file in sorted((folder / "labels").rglob("*.txt"))])
    assert set(rows[:, 0]) == set(range(len(CLASSES)))
    assert (rows[:, 1:3] - rows[:, 3:5] / 2 >= 0).all()
    assert (rows[:, 1:3] + rows[:, 3:5] / 2 <= 1).all()
    assert (rows[:, 3:5] * 96 >= 10).all()


def test_boxes_fit_the_shapes_tightly(folder: Path) -> None:
    """Colour occurs inside the boxes only, and reaches to within two pixels of each edge of each box."""
    checked = 0
    for text in sorted((folder / "labels" / "train").iterdir()):
        picture = Image.open(folder / "images" / "train" / f"{text.stem}.jpg")
        pixels = np.asarray(picture).astype(int)
        coloured = pixels.max(axis=2) - pixels.min(axis=2) > 60
        outside = coloured.copy()
        for _, x, y, width, height in labels(text):
            x0, x1 = int(96 * (x - width / 2)), int(np.ceil(96 * (x + width / 2)))
            y0, y1 = int(96 * (y - height / 2)), int(np.ceil(96 * (y + height / 2)))
            outside[max(y0 - 2, 0) : y1 + 3, max(x0 - 2, 0) : x1 + 3] = False
            inside = coloured[y0 : y1 + 1, x0 : x1 + 1]
            if inside.mean() > 0.4:  # a grey shape cannot be told from the ground by colour
                columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
                assert max(columns[0], rows[0]) <= 3
                assert columns[-1] >= inside.shape[1] - 5
                assert rows[-1] >= inside.shape[0] - 5
                checked += 1
        assert not outside.any()
    assert checked >= 10


def test_a_drawn_set_is_reused(folder: Path) -> None:
    """A second call with the same arguments writes nothing."""
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert shapes(folder.parent, seed=3, size=96, train=12, val=5) == folder / "data.yaml"
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_a_cut_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where drawing fails in the middle, no half of a set stays behind to be taken for a whole one."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_label", fail)
    with pytest.raises(KeyboardInterrupt):
        shapes(tmp_path, size=64, train=2, val=1)
    assert list(tmp_path.iterdir()) == []


def test_cache_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PRUNUS_CACHE wins over XDG_CACHE_HOME, which wins over the home folder."""
    monkeypatch.delenv("PRUNUS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == Path.home() / ".cache" / "prunus"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "prunus"
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "own"))
    assert shapes(size=32, train=1, val=1).is_relative_to((tmp_path / "own").resolve())


@pytest.mark.parametrize("wrong", [{"size": 16}, {"train": 0}, {"val": 0}, {"seed": -1}])
def test_useless_arguments_are_refused(wrong: dict[str, int], tmp_path: Path) -> None:
    """Too small a number is named in the message, and nothing is written."""
    with pytest.raises(InputError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        shapes(tmp_path, **wrong)
    assert list(tmp_path.iterdir()) == []
