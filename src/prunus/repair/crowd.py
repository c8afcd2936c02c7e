"""How many batches wait together at each layer: as many as its rows ask for, or as many as memory has room for.

All that wait hold their activations. Early layers have large maps, and a few samples give them all the rows that a fit
needs; late layers have small ones, and need every sample. So batches join late: each runs through the layers that are
solved already when the first layer that needs it is reached, and no pass is run twice for that. Where maps grow again
(decoders), batches leave.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

ROOM = 256 << 20  # bytes that waiting batches may hold together in any case


@dataclass(frozen=True)
class Place:
    """One batch at one layer.

    Args:
        held: bytes that it holds while it waits there.
        needed: how many batches the layer needs.
        same: layers with the same number (calls of one layer) get equally many batches.
    """

    held: int
    needed: int = 0
    same: int | None = None


def crowds(places: Sequence[Place], total: int, least: int, room: int) -> list[int]:
    """How many of ``total`` batches wait at each place.

    Where it falls, batches leave; where it rises after that, they run once more from the beginning. That is done only
    where it at least doubles the number, and all of it takes no longer than running all batches once more.

    Args:
        places: in the order in which they are reached.
        total: how many batches there are.
        least: so many wait everywhere.
        room: bytes that those that wait may hold together from there on, and twice as many at a place that needs them.

    Example:
        >>> crowds([Place(100, 2), Place(30), Place(50), Place(10, 8), Place(200)], total=9, least=1, room=120)
        [2, 2, 2, 8, 1]
    """
    fit = [room // max(p.held, 1) for p in places]
    asked = [max(least, min(p.needed, 2 * room // max(p.held, 1))) for p in places]
    most: dict[int, int] = {}
    for place, n in zip(places, asked, strict=True):
        if place.same is not None:
            most[place.same] = max(n, most.get(place.same, 0))
    asked = [n if p.same is None else most[p.same] for p, n in zip(places, asked, strict=True)]
    onward = list(accumulate(reversed(fit), min))[::-1]
    found, here, highest, spare = [], 0, 0, total
    for need, free, here_fit in zip(asked, onward, fit, strict=True):
        here = min(here, max(need, 2 * here_fit))
        more = min(total, max(need, free))
        again = max(0, min(more, highest) - here)
        if more > here and again <= spare and (not again or more >= 2 * here):
            here, spare = more, spare - again
        highest = max(highest, here)
        found.append(here)
    return found


@dataclass
class Alive:
    """Follows the bytes of what a run has made and still holds."""

    _known: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)

    def note(self, arguments: Iterable[Tensor], results: Iterable[Tensor]) -> int:
        """Note what an op made, and give the bytes that are held now."""
        theirs = {_memory(t) for t in arguments if t.layout is torch.strided}
        for tensor in results:
            if tensor.layout is torch.strided and _memory(tensor) not in theirs:
                storage = tensor.untyped_storage()
                self._known[_memory(tensor)] = StorageWeakRef(storage), storage.nbytes()
        self._known = {k: v for k, v in self._known.items() if not v[0].expired()}
        return sum(n for _, n in self._known.values())


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


SLACK = 64 << 20


class Heap:
    """Gives freed memory back to the system now and then: the C library keeps what the threads of runs have freed."""

    def __init__(self) -> None:
        self._low = 0

    def tidy(self) -> None:
        """Give it back if the process has grown."""
        now = _resident()
        if now > self._low + SLACK:
            trim()
            now = _resident()
            self._low = now
        self._low = min(now, self._low)


def trim() -> None:
    """Give all freed memory back, where the C library can."""
    free = getattr(_library(), "malloc_trim", None)
    if free is not None:
        free(0)


def _resident() -> int:
    """Bytes of the process in memory; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


@cache
def _library() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
