"""Labels: what is known about each dimension of a tensor.

Every position along every dimension of a parameter or buffer is an *atom*, an integer. A :class:`Label` says which
atom each position of an activation's dimension stems from. A position may depend on other dimensions (after
``(B, N, H*D) -> (B, N, H, D)`` position ``d`` of head ``h`` is not position ``d`` of head ``h'``): those are the
label's *context*. A dimension without a label may not change its size; a dimension of size 1 constrains nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int64]


class Label(NamedTuple):
    """The atoms along one dimension: ``ids.shape == (*sizes of the context dims, size of the dim)``."""

    ids: Ids
    context: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """The length of the labelled dimension."""
        return int(self.ids.shape[-1])

    @property
    def row(self) -> Ids:
        """The atoms of one row (the first one, where the label has a context)."""
        return first_row(self.ids)

    def rename(self, where: dict[int, int] | Sequence[int]) -> Label:
        """The same label after its context dims moved to ``where[dim]``."""
        return Label(self.ids, tuple(where[c] for c in self.context)) if self.context else self

    def over(self, context: Sequence[int]) -> Ids:
        """The ids with one axis for each of ``context`` (size 1: it does not depend on it), then the dim."""
        order = [self.context.index(c) for c in context if c in self.context]
        ids = self.ids.transpose(*order, len(self.context))
        index = tuple(slice(None) if c in self.context else None for c in context)
        return ids[index + (slice(None),)] if index else ids  # noqa: RUF005 - Python 3.10 has no star here


def first_row(ids: Ids) -> Ids:
    """The first row of ids with any number of leading axes."""
    return ids if ids.ndim == 1 else ids.reshape(-1, ids.shape[-1])[0]


def marks(count: int, seed: int) -> NDArray[np.uint64]:
    """Numbers that look random and are the same each time: sums of different ones of them are different.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
    """
    found = np.arange(1 + (seed << 32), 1 + (seed << 32) + count, dtype=np.uint64)
    found *= np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found ^= found >> np.uint64(shift)
        found *= np.uint64(factor)
    return found ^ (found >> np.uint64(31))


def distinct(ids: Ids) -> Ids:
    """The different ones among ids, ascending.

    Example:
        >>> distinct(np.array([3, 1, 3]))
        array([1, 3])
    """
    ordered = np.sort(ids)
    if ordered.size < 2 or ordered[0] == ordered[-1]:
        return ordered[:1]
    first = np.empty(ordered.size, dtype=bool)
    first[0] = True
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]


def distinct_rows(rows: Ids) -> tuple[Ids, Ids]:
    """The different ones among rows, ascending, and for each row which of them it is.

    Example:
        >>> found, which = distinct_rows(np.array([[3, 4], [1, 2], [3, 4]]))
        >>> found.tolist(), which.tolist()
        ([[1, 2], [3, 4]], [1, 0, 1])
    """
    _, first, which = np.unique(rows[:, 0], return_index=True, return_inverse=True)
    found = rows[first]
    if (found[which] == rows).all():  # those that begin alike are alike
        return found, which
    found, which = np.unique(rows, axis=0, return_inverse=True)
    return found, which


def surviving(alive: NDArray[np.bool_], ids: Ids) -> int:
    """How many atoms survive in a row of ``ids``: the first row that is not gone altogether."""
    first = int(np.count_nonzero(alive[first_row(ids)])) if ids.size else 0
    if first or ids.ndim == 1:
        return first
    counts = np.count_nonzero(alive[ids.reshape(-1, ids.shape[-1])], axis=1)
    left = counts[counts > 0]
    return int(left[0]) if left.size else 0


class Survivors:
    """How many atoms survive in a row of ids, of which those that come again are counted once."""

    __slots__ = ("_alive", "_found")

    def __init__(self, alive: NDArray[np.bool_]) -> None:
        self._alive = alive
        self._found: dict[int, tuple[Ids, int]] = {}  # by identity, as long as the ids are held

    def __call__(self, ids: Ids) -> int:
        """See :func:`surviving`."""
        found = self._found.get(id(ids))
        if found is None:
            found = self._found[id(ids)] = ids, surviving(self._alive, ids)
        return found[1]


Dims: TypeAlias = "tuple[Label | None, ...]"


class Numbered(tuple):  # type: ignore[type-arg]
    """The labels of a tensor whose *values* are numbers of positions: of the dim with the label ``numbers``."""

    numbers: Label

    def __new__(cls, dims: Dims, numbers: Label) -> Numbered:
        """``dims``, and what the values number."""
        self = super().__new__(cls, dims)
        self.numbers = numbers
        return self


def varies(ids: Ids, axis: int) -> bool:
    """Whether ids differ along an axis.

    Example:
        >>> ids = np.array([[1, 2], [1, 2]])
        >>> varies(ids, 0), varies(ids, 1)
        (False, True)
    """
    rows = ids.swapaxes(0, axis)
    return rows[0].item(0) != rows[-1].item(0) or bool((rows[1:] != rows[0]).any())


def settle(label: Label) -> Label:
    """The label without the context dims along which its ids do not vary."""
    ids, context = label
    for axis in reversed(range(len(context))):
        if not varies(ids, axis):
            ids = ids.take([0], axis=axis).squeeze(axis)
            context = context[:axis] + context[axis + 1 :]
    return Label(ids, context)


class Labelled:
    """What a rule sees of a tensor: its shape, the labels of its dims, and the step that made it.

    ``hollow``: its values were not computed.
    """

    __slots__ = ("dims", "hollow", "labelled", "numbers", "shape", "source")

    def __init__(self, shape: tuple[int, ...], dims: Dims, source: int = -1, hollow: bool = False) -> None:
        self.hollow = hollow
        self.shape = shape
        self.dims = dims
        self.source = source
        self.numbers: Label | None = None if type(dims) is tuple else dims.numbers  # type: ignore[attr-defined]
        self.labelled = dims.count(None) < len(dims) or self.numbers is not None

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)


def unlabelled(shape: Iterable[int], source: int = -1) -> Labelled:
    """A tensor of which nothing is known: its sizes may not change."""
    shape = tuple(shape)
    return Labelled(shape, (None,) * len(shape), source)


def in_memory(shape: Sequence[int], strides: Sequence[int]) -> list[int] | None:
    """The dims (none of size 1) of a tensor that fills its memory without gaps, innermost first; None for others."""
    order = sorted((d for d, n in enumerate(shape) if n != 1), key=lambda d: strides[d])
    inside = 1
    for d in order:
        if strides[d] != inside:
            return None
        inside *= int(shape[d])
    return order
