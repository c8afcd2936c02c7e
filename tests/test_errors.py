"""The tree of errors, as drawn at the top of its file."""

from __future__ import annotations

import inspect
import re

import pytest

from prunus import errors


def classes() -> dict[str, type[Exception]]:
    return {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind)}


def test_all_names_are_exported() -> None:
    assert sorted(errors.__all__) == sorted(classes())


def test_one_root_catches_everything() -> None:
    assert all(issubclass(kind, errors.PrunusError) for kind in classes().values())
    assert errors.PrunusError.__base__ is Exception


def test_the_drawing_shows_every_class() -> None:
    drawn = set(re.findall(r"^    [├└─ ]*(\w+Error)\b", errors.__doc__ or "", flags=re.MULTILINE))
    assert drawn == set(classes())


@pytest.mark.parametrize("kind", classes().values())
def test_every_class_says_when_it_is_raised(kind) -> None:
    assert len(kind.__doc__) > 40
    with pytest.raises(errors.PrunusError, match="conv1: why; what to do"):
        raise kind("conv1: why; what to do")
