"""Labels: what is known about each dimension of a tensor, and the ledger of what was learnt about them.

Every position along every dimension of a parameter or buffer is an *atom*, an integer. A :class:`Label` says which
atom each position of an activation's dimension stems from. A position may depend on other dimensions (after
``(B, N, H*D) -> (B, N, H, D)`` position ``d`` of head ``h`` is not position ``d`` of head ``h'``): those are the
label's *context*. A dimension without a label may not change its size; a dimension of size 1 constrains nothing.

The :class:`Ledger` collects what rules say about atoms: which live or die together (ties), which must stay (freezes),
which only go as part of a row (pins), which form rows (a head), which rows must stay equally long (balance), and
which sizes the model's code asks for (requirements). It knows numpy and integers, nothing of torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int64]

NEAR = 32  # steps between the computing of a number from a size and its use
SAME = 1e-12

ONE_TO_ONE, LEFT_IS_ONE, RIGHT_IS_ONE, MANY_TO_MANY = 0, 1, 2, 3


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


def surviving(alive: NDArray[np.bool_], ids: Ids) -> int:
    """How many atoms survive in a row of ``ids``: the first row that is not gone altogether."""
    if ids.ndim == 1:
        return int(np.count_nonzero(alive[ids]))
    counts = np.count_nonzero(alive[ids.reshape(-1, ids.shape[-1])], axis=1)
    left = counts[counts > 0]
    return int(left[0]) if left.size else 0


Dims: TypeAlias = "tuple[Label | None, ...]"


def settle(label: Label) -> Label:
    """The label without the context dims along which its ids do not vary."""
    ids, context = label
    for axis in reversed(range(len(context))):
        first = ids.take([0], axis=axis)
        if ids.shape[axis] == 1 or bool((ids == first).all()):
            ids = first.squeeze(axis)
            context = context[:axis] + context[axis + 1 :]
    return Label(ids, context)


class Labelled:
    """What a rule sees of a tensor: its shape, the labels of its dims, and the step that made it."""

    __slots__ = ("dims", "labelled", "shape", "source")

    def __init__(self, shape: tuple[int, ...], dims: Dims, source: int = -1) -> None:
        self.shape = shape
        self.dims = dims
        self.source = source
        self.labelled = dims.count(None) < len(dims)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)


def unlabelled(shape: Iterable[int], source: int = -1) -> Labelled:
    """A tensor of which nothing is known: its sizes may not change."""
    shape = tuple(shape)
    return Labelled(shape, (None,) * len(shape), source)


class Freeze(NamedTuple):
    """Atoms that must stay (``hard``) or that cannot go by themselves, only with their row (a pin)."""

    ids: Ids
    reason: str
    step: int
    hard: bool


class Rows(NamedTuple):
    """``coarse[r]`` takes all of ``fine[r]`` with it."""

    coarse: Ids
    fine: Ids


class Balance(NamedTuple):
    """The rows of ``ids`` (shape ``(rows, length)``) must keep equally many atoms."""

    ids: Ids
    reason: str
    step: int


class Imply(NamedTuple):
    """If ``cause[i]`` goes, ``effect[i]`` goes."""

    cause: Ids
    effect: Ids


class Requirement(NamedTuple):
    """The code asks for ``asked`` positions (an int, possibly one that knows its source) in each row of ``ids``."""

    asked: Any
    ids: Ids
    step: int
    place: str


class MacTerm(NamedTuple):
    """``factor`` times the product of the surviving lengths of ``rows``: multiply-adds of one step."""

    factor: int
    rows: tuple[Ids, ...]
    step: int


class Number(NamedTuple):
    """Before ``step``, a size (``expression``, then ``size``) was turned into a number that is computed with."""

    step: int
    expression: Any
    size: int


class Scale(NamedTuple):
    """Step ``step`` multiplies ``operand`` by ``size ** power``.

    The size is the length of the rows ``of``, or of a dim that the code sizes by the expression ``of``.
    """

    step: int
    operand: Labelled
    of: Any
    power: float


@dataclass(frozen=True)
class TieTable:
    """All ties as intervals: position ``k < length`` of ``left + k`` is tied to ``right + k``."""

    left: Ids
    right: Ids
    length: Ids
    step: Ids
    kind: Ids


class Ledger:
    """Everything that rules record while a model is traced."""

    def __init__(self) -> None:
        self.size = 1  # atom 0 is never handed out: it stands for "frozen"
        self.step = -1
        self.freezes: list[Freeze] = []
        self.rows_of: list[Rows] = []
        self.balances: list[Balance] = []
        self.implications: list[Imply] = []
        self.requirements: list[Requirement] = []
        self.macs: list[MacTerm] = []
        self.contracted: list[Ids] = []  # dims summed over by a contraction
        self.passed: list[Ids] = []  # dims of operands that a contraction or look-up hands on
        self.batched: list[Ids] = []  # dims over which a contraction is batched: heads, experts
        self.averaged: list[Ids] = []  # dims over which a norm, mean or attention scale averages
        self.numbers: list[Number] = []  # sizes that entered a computed number, such as an attention scale
        self.scales: list[Scale] = []  # products with a power of a size
        self.evaluated = 0  # how many steps the run in eval mode had (one in training mode may follow)
        self.matched: set[int] = set()  # those of `numbers` that are known to have entered a scale, and nothing else
        self.uniform: set[int] = set()  # ids (by object) of dims along which all values are equal
        self._ties: list[tuple[int, int, int, int, int]] = []
        self._seen: set[tuple[int, int, int]] = set()
        self._spans: dict[int, tuple[Ids, int]] = {}
        self.starts: list[int] = [0]  # first atom of every run handed out
        self._coarse: dict[tuple[tuple[int, ...], bytes], Ids] = {}

    def fresh(self, count: int) -> Ids:
        """New consecutive atoms."""
        ids: Ids = np.arange(self.size, self.size + count, dtype=np.int64)
        self._spans[id(ids)] = (ids, self.size)
        self.starts.append(self.size)
        self.size += count
        return ids

    def tie(self, left: Ids, right: Ids) -> None:
        """Positions that live or die together; ``left`` and ``right`` have one shape."""
        if left is right or left.size == 0:
            return
        a, b = self._spans.get(id(left)), self._spans.get(id(right))
        if a is not None and b is not None:
            self._add(a[1], b[1], left.size, ONE_TO_ONE)
            return
        runs = _runs(left.reshape(-1), right.reshape(-1))
        if len(runs) == 1:
            left_start, right_start, length = runs[0].tolist()
            self._add(left_start, right_start, length, ONE_TO_ONE)
            return
        kinds = _overlaps(runs[:, 0], runs[:, 2]) * LEFT_IS_ONE + _overlaps(runs[:, 1], runs[:, 2]) * RIGHT_IS_ONE
        for (start, other, length), kind in zip(runs.tolist(), kinds.tolist(), strict=True):
            self._add(start, other, length, kind)

    def _add(self, left: int, right: int, length: int, kind: int) -> None:
        key = (left, right, length)
        if left != right and key not in self._seen:
            self._seen.add(key)
            self._ties.append((left, right, length, self.step, kind))

    def couple(self, a: Label, b: Label) -> None:
        """Tie two labels of one dim, position by position, over the union of their contexts."""
        if a.ids is b.ids:
            return
        if a.context == b.context:
            self.tie(a.ids, b.ids)
            return
        context = a.context + tuple(c for c in b.context if c not in a.context)
        left, right = np.broadcast_arrays(a.over(context), b.over(context))
        self.tie(left, right)

    def freeze(self, ids: Ids, reason: str) -> None:
        """These atoms stay, and whoever asks is told why."""
        self.freezes.append(Freeze(ids, reason, self.step, True))

    def pin(self, ids: Ids, reason: str) -> None:
        """These atoms cannot be chosen by themselves, but may go with a row that holds them."""
        self.freezes.append(Freeze(ids, reason, self.step, False))

    def rows(self, fine: Ids) -> Ids:
        """One coarse atom for each row of ``fine`` (its last axis); the same rows always get the same atoms."""
        key = (fine.shape, fine.tobytes())
        coarse = self._coarse.get(key)
        if coarse is None:
            rows = fine.reshape(-1, fine.shape[-1])
            which = np.arange(len(rows))
            if len(np.unique(rows[:, 0])) < len(rows):
                rows, which = np.unique(rows, axis=0, return_inverse=True)
            own = self.fresh(len(rows))
            self.rows_of.append(Rows(own, rows))
            coarse = self._coarse[key] = own[which].reshape(fine.shape[:-1])
        return coarse

    def belong(self, coarse: Ids, fine: Ids) -> None:
        """``fine[r]`` goes when the existing atom ``coarse[r]`` goes."""
        self.rows_of.append(Rows(coarse.reshape(-1), fine.reshape(coarse.size, -1)))

    def balance(self, fine: Ids, reason: str) -> None:
        """The rows of ``fine`` (its last axis) must keep equal counts."""
        if fine.size > fine.shape[-1] > 1:
            self.balances.append(Balance(fine.reshape(-1, fine.shape[-1]), reason, self.step))

    def imply(self, cause: Ids, effect: Ids) -> None:
        """If ``cause[i]`` goes, ``effect[i]`` goes (any shapes that broadcast)."""
        cause, effect = np.broadcast_arrays(cause, effect)
        self.implications.append(Imply(cause.reshape(-1), effect.reshape(-1)))

    def require(self, asked: Any, ids: Ids, place: str = "") -> None:
        """The model's code sizes the dim whose rows are ``ids`` with ``asked``."""
        self.requirements.append(Requirement(asked, ids, self.step, place))

    def scale(self, operand: Labelled, of: Any, power: float) -> None:
        """The step multiplies ``operand`` by a power of a size; see :class:`Scale`."""
        self.scales.append(Scale(self.step, operand, of, power))

    def match(self, value: float, operand: Labelled, sign: float) -> None:
        """If ``value``, by which the step multiplies, is the root of a size (or its inverse) just computed: a scale."""
        for k in range(len(self.numbers) - 1, -1, -1):
            number = self.numbers[k]
            if self.step - number.step > NEAR:
                return
            for power in (0.5, -0.5):
                if abs(value * float(number.size) ** -power - 1) < SAME:
                    self.matched.add(k)
                    self.scale(operand, number.expression, sign * power)
                    return

    def count_macs(self, factor: int, rows: Iterable[Ids]) -> None:
        """The step does ``factor * prod(len(row))`` multiply-adds."""
        self.macs.append(MacTerm(factor, tuple(rows), self.step))

    @property
    def only_read(self) -> set[int]:
        """First atoms of the dims that a layer reads (a weight's input columns) and never makes."""
        return {ids.item(0) for ids in self.contracted} - {ids.item(0) for ids in self.passed}

    @property
    def ties(self) -> TieTable:
        """All ties so far."""
        table = np.array(self._ties, dtype=np.int64).reshape(-1, 5).T
        return TieTable(*table)


def _runs(left: Ids, right: Ids) -> Ids:
    """Rows ``(start, start, length)`` of the maximal stretches in which both sides count up by one; no row twice."""
    if left.size == 1:
        return np.array([[left[0], right[0], 1]], dtype=np.int64)
    breaks = np.flatnonzero((left[1:] - left[:-1] != 1) | (right[1:] - right[:-1] != 1)) + 1
    if breaks.size == 0:
        return np.array([[left[0], right[0], left.size]], dtype=np.int64)
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [left.size])))
    runs = np.stack((left[starts], right[starts], lengths), axis=1)
    grows = (runs[1:, :2] > runs[:-1, :2]).all(axis=0)
    return runs if grows.any() else np.unique(runs, axis=0)


def _overlaps(starts: Ids, lengths: Ids) -> Ids:
    """1 for each interval that shares a position with another one."""
    if (starts[1:] >= starts[:-1] + lengths[:-1]).all():
        return np.zeros(len(starts), dtype=np.int64)
    order = np.argsort(starts, kind="stable")
    begin, end = starts[order], starts[order] + lengths[order]
    reach = np.maximum.accumulate(end)
    clash = np.zeros(len(starts), dtype=np.int64)
    behind = begin[1:] < reach[:-1]
    clash[order[1:][behind]] = 1
    ahead = np.minimum.accumulate(begin[::-1])[::-1]
    clash[order[:-1][end[:-1] > ahead[1:]]] = 1
    return clash
