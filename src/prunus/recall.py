"""Recall: what functions with an ``lru_cache`` remember must neither hide where a size came from, nor keep it.

A size that remembers its source equals the plain int. A cached function that is asked with one would answer what it was
asked before, with other sizes or plain ints in the answer, and would go on to do so when tracing is over.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from prunus.sizes import Size

_CACHED = functools._lru_cache_wrapper
_SOURCES = (ModuleType, FunctionType, type, _CACHED)
_METHODS = (staticmethod, classmethod)
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "prunus"}  # packages whose caches know nothing of models
IMPORTS = 2  # how many imports away from the code of the model's modules cached functions are looked for


class _Place(NamedTuple):
    """Where a cached function is found: in a module or class, under a name."""

    home: Any
    name: str
    value: Any


class Recall:
    """The cached functions near a model, found once.

    Args:
        modules: the modules of a model.
        forward_fn: code that runs the model.
    """

    def __init__(self, modules: Iterable[nn.Module], forward_fn: Callable[..., Any] | None = None) -> None:
        classes = {kind for kind in {type(m) for m in modules} for kind in kind.__mro__ if _is_near(kind.__module__)}
        self._places = [p for home in (*classes, *_near({*classes, forward_fn})) for p in _places(home)]

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let the functions compute what they are asked with sizes; afterwards all is as it was.

        Tensors that they make meanwhile are not remembered: they know no gradients.
        """
        tired: list[Any] = []
        try:
            for place in self._places:
                setattr(place.home, place.name, _fresh(place.value, tired))
            yield
        finally:
            for place in self._places:
                setattr(place.home, place.name, place.value)
            for cached in tired:
                cached.cache_clear()


def _is_near(name: str | None) -> bool:
    return name is not None and name.partition(".")[0] not in _FOREIGN


def _near(things: Iterable[Any]) -> list[ModuleType]:
    """The Python modules in which things are defined, and those from which these import."""
    found: dict[str, ModuleType] = {}
    new = _homes(things)
    for _ in range(IMPORTS + 1):
        new = {name: home for name, home in new.items() if name not in found}
        found.update(new)
        new = _homes(value for home in new.values() for value in vars(home).values())
    return list(found.values())


def _homes(things: Iterable[Any]) -> dict[str, ModuleType]:
    """The modules among things, and those in which functions and classes are defined."""
    names = {
        thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
        for thing in things
        if isinstance(thing, _SOURCES)
    }
    return {n: sys.modules[n] for n in names if isinstance(n, str) and _is_near(n) and n in sys.modules}


def _places(home: Any) -> list[_Place]:
    """The cached functions that a module or a class holds."""
    found = [_Place(home, name, value) for name, value in vars(home).items()]
    return [p for p in found if isinstance(_inner(p.value), _CACHED) and hasattr(_inner(p.value), "__wrapped__")]


def _inner(value: Any) -> Any:
    return value.__func__ if isinstance(value, _METHODS) else value


def _fresh(value: Any, tired: list[Any]) -> Any:
    """A stand-in for a cached function, which notes in ``tired`` the caches that tensors went to."""
    cached = _inner(value)

    @functools.wraps(cached)
    def answer(*args: Any, **kwargs: Any) -> Any:
        if _has_size(args) or _has_size(tuple(kwargs.values())):
            return cached.__wrapped__(*args, **kwargs)
        known = cached.cache_info().misses
        result = cached(*args, **kwargs)
        if cached.cache_info().misses != known and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result)):
            tired.append(cached)
        return result

    return type(value)(answer) if isinstance(value, _METHODS) else answer


def _has_size(values: tuple[Any, ...]) -> bool:
    return any(type(v) is Size or (isinstance(v, tuple) and _has_size(v)) for v in values)
