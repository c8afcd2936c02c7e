"""Calls: the ints among the arguments of the torch function that the model's code is calling."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from prunus.sizes import Size

_LIBRARIES = tuple(f"{Path(module).parent}{os.sep}" for module in (torch.__file__, __file__))


class PythonCall:
    """The call of a torch function in the model's code: finds the ints among its arguments."""

    __slots__ = ("args", "func", "kwargs", "matched")

    def __init__(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.func = func
        self.args = args
        self.kwargs = kwargs
        self.matched: tuple[int, ...] = ()  # slices of an index that were told to belong to an op

    def sizes(self, values: Sequence[int]) -> Sequence[Any] | None:
        """The ints that the code passed for ``values`` (-1 matches any), or None."""
        if len(values) == 1:
            ints = [a for a in (*self.args, *self.kwargs.values()) if _is_int(a) and a == values[0]]
            ints.sort(key=lambda a: not isinstance(a, Size))
            if ints:
                return [ints[0]]
        for found in self._sequences():
            if len(found) == len(values):
                plain = [v if isinstance(a, torch.Tensor) else a for a, v in zip(found, values, strict=True)]
                if all(v == -1 or a in (v, -1) for a, v in zip(plain, values, strict=True)):
                    return plain
        return None

    def named(self) -> Iterator[Size]:
        """Every size among the arguments that remembers its source, also in lists and in the slices of an index."""
        todo: list[Any] = [*self.args, *self.kwargs.values()]
        while todo:
            value = todo.pop()
            if type(value) is Size:
                yield value
            elif isinstance(value, (list, tuple)):
                todo.extend(value)
            elif isinstance(value, slice):
                todo += [value.start, value.stop]

    def mapped(self) -> Any | None:
        """How often `torch.vmap`, which is about to give back a result, repeats it where it is the same each time."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "_maybe_remove_batch_dim":
            frame = frame.f_back
        return frame.f_locals.get("batch_size") if frame is not None else None

    def pointwise(self) -> bool:
        """Whether the code called a pointwise function, which may look at a number's type but at no position."""
        packet = getattr(torch.ops.aten, getattr(self.func, "__name__", "").strip("_") or "alias", None)
        overloads = packet.overloads() if packet is not None else ()
        return any(torch.Tag.pointwise in getattr(packet, name).tags for name in overloads)

    def argument(self, value: int, name: str, position: int) -> Any | None:
        """The int that the code passed as the argument ``name`` (or at ``position``), or None."""
        given = self.kwargs.get(name, self.args[position] if len(self.args) > position else None)
        return given if _is_int(given) and given == value else None

    def _sequences(self) -> Iterator[Sequence[Any]]:
        for first in (0, 1, 2):
            tail = self.args[first:]
            if tail and all(map(_is_size, tail)):
                yield tail
        for a in (*self.args, *self.kwargs.values()):
            if isinstance(a, (list, tuple)) and a and all(map(_is_size, a)):
                yield a

    def bounds(self, start: int, end: int, size: int) -> tuple[Any, Any] | None:
        """Start and end of the slice ``start:end`` as the code wrote it."""
        if getattr(self.func, "__name__", "") == "narrow":
            first = self.kwargs.get("start", self.args[2] if len(self.args) > 2 else None)
            length = self.kwargs.get("length", self.args[-1])
            return (first, first + length) if _is_int(first) and _is_int(length) else None
        index = self.args[1] if len(self.args) > 1 else None
        for k, part in enumerate(index if isinstance(index, tuple) else (index,)):
            if isinstance(part, slice) and k not in self.matched and part.indices(size) == (start, end, 1):
                self.matched += (k,)
                return part.start, part.stop
        return None

    def place(self) -> str:
        """File and line of the innermost code outside torch and this package."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
            frame = frame.f_back
        return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_size(value: Any) -> bool:
    """An int, or a tensor that holds one."""
    return _is_int(value) or (isinstance(value, torch.Tensor) and value.dim() == 0 and not value.is_floating_point())


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
