"""The ledger: everything that rules say about atoms while a model is traced.

Which live or die together (ties), which must stay (freezes), which only go as part of a row (pins), which form rows (a
head), which rows must stay equally long (balance), and which sizes the model's code asks for (requirements). It knows
numpy and integers, nothing of torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prunus.labels import Ids, Label, Labelled, distinct, distinct_rows
from prunus.ties import LEFT_IS_ONE, ONE_TO_ONE, RIGHT_IS_ONE, TieTable, tie_kinds, tie_runs

NEAR = 32  # steps between the computing of a number from a size and its use
SAME = 1e-12


class Freeze(NamedTuple):
    """Atoms that must stay (``hard``) or that cannot go by themselves, only with their row (a pin)."""

    ids: Ids
    reason: str
    step: int
    hard: bool


class Rows(NamedTuple):
    """``coarse[r]`` takes all of ``fine[r]`` with it; ``split``: it is nothing but that row."""

    coarse: Ids
    fine: Ids
    split: bool = True


class Product(NamedTuple):
    """Position ``k`` of merged dims is one position of each, ``factors[k]``: it goes with any of them, and only so."""

    cells: Ids
    factors: Ids
    freeze: Freeze


class Balance(NamedTuple):
    """The rows of ``ids`` (shape ``(rows, length)``) must keep equally many atoms."""

    ids: Ids
    reason: str
    step: int


class Guard(NamedTuple):
    """``effect`` numbers a dim in an order that depends on how ``cause`` is numbered.

    Nothing of ``effect`` ever goes. Where it meets something that stays or that the model keeps, ``cause`` must stay.
    """

    cause: Ids
    effect: Ids
    freeze: Freeze


class Limit(NamedTuple):
    """Each row of ``ids`` must keep at least ``least`` positions, and a multiple of ``multiple``."""

    ids: Ids
    least: int
    multiple: int
    reason: str


class Requirement(NamedTuple):
    """The code asks for ``asked`` positions (an int, possibly one that knows its source) in each row of ``ids``."""

    asked: Any
    ids: Ids
    step: int
    place: str


class Cut(NamedTuple):
    """Positions ``first`` to ``last`` of a dim with the atoms ``ids``, seen in the memory of the whole."""

    ids: Ids
    first: int
    last: int


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


class Ledger:
    """Everything that rules record while a model is traced."""

    def __init__(self) -> None:
        self.keys_allowed = True  # whether sizes that remember their source may be keys of dicts and caches
        self.size = 1  # atom 0 is never handed out: it stands for "frozen"
        self.step = -1
        self.freezes: list[Freeze] = []
        self.rows_of: list[Rows] = []
        self.products: list[Product] = []  # dims that a view merged
        self.balances: list[Balance] = []
        self.aligned: list[Balance] = []
        self.requirements: list[Requirement] = []
        self.whole_rows: list[Ids] = []  # rows tied to one thing: of each goes the same as of the others, or all
        self.parts: list[Ids] = []  # stretches that the code cuts out, which may not become empty
        self.cuts: list[Cut] = []  # stretches of a dim that were viewed in place
        self.macs: list[MacTerm] = []
        self.contracted: list[Ids] = []  # dims summed over by a contraction
        self.paired: list[Ids] = []  # dims summed over where neither factor is a tensor that the model keeps
        self.passed: list[Ids] = []  # dims of operands that a contraction or look-up hands on
        self.batched: list[Ids] = []  # dims over which a contraction is batched: heads, experts
        self.averaged: list[Ids] = []  # dims over which a norm, mean or attention scale averages
        self.numbers: list[Number] = []  # sizes that entered a computed number, such as an attention scale
        self.scales: list[Scale] = []  # products with a power of a size
        self.evaluated = 0  # how many steps the run in eval mode had (one in training mode may follow)
        self.matched: set[int] = set()  # those of `numbers` that are known to have entered a scale, and nothing else
        self.uniform: set[int] = set()  # ids (by object) of dims along which all values are equal
        self._line: Ids = np.arange(1 << 10)  # runs are cut from it
        self._lines = {id(self._line): self._line}  # this one, and those that were outgrown
        self.kept: list[tuple[int, int]] = []  # first atom and number of those on tensors that the model keeps
        self.guards: list[Guard] = []
        self.limits: list[Limit] = []
        self.equal: list[tuple[Any, Any]] = []  # attributes that the code compared, and that were equal
        self.unequal: dict[tuple[Any, Any], tuple[int, int]] = {}  # sizes that the code compared, and that differed
        self.meaning: dict[int, tuple[str, Ids, Ids]] = {}  # ids (by object) -> see mean()
        self._ties: list[tuple[int, int, int, int, int]] = []
        self._table: Ids = np.empty((5, 0), dtype=np.int64)  # of ties, as far as somebody has looked at them
        self._frozen = np.zeros(0, dtype=bool)  # of the first `_looked_at` freezes
        self._looked_at = 0
        self._seen: set[tuple[int, int, int, int]] = set()
        self.starts: list[int] = [0]  # first atom of every run handed out
        self._merged: list[tuple[int, int, Rows]] = []  # those of `rows_of` that an existing atom takes, least, largest
        self._coarse: dict[tuple[tuple[int, ...], bytes], Ids] = {}

    def fresh(self, count: int) -> Ids:
        """New consecutive atoms."""
        if self.size + count > len(self._line):
            self._line = np.arange(2 * (self.size + count))
            self._lines[id(self._line)] = self._line
        ids: Ids = self._line[self.size : self.size + count]
        self.starts.append(self.size)
        self.size += count
        return ids

    def _counts_up(self, ids: Ids) -> bool:
        """Whether ids are seen to count up by one from the first to the last, as they were handed out."""
        return ids.flags.c_contiguous and id(ids.base) in self._lines

    def tie(self, left: Ids, right: Ids) -> None:
        """Positions that live or die together; ``left`` and ``right`` have one shape."""
        if left is right or left.size == 0:
            return
        if self._counts_up(left) and self._counts_up(right):
            self._add(left.item(0), right.item(0), left.size, ONE_TO_ONE)
            return
        kinds = tie_kinds(left, right)
        found = set(kinds.tolist())
        for kind, many in ((LEFT_IS_ONE, right), (RIGHT_IS_ONE, left)):
            if kind in found:
                self.whole_rows.append(many.reshape(-1, many.shape[-1]))
        for start, other, length, kind in tie_runs(left.reshape(-1), right.reshape(-1), kinds):
            self._add(start, other, length, kind)

    def unite(self, ids: Ids, axis: int, fixed: bool) -> Ids:
        """Rows along ``axis`` live together, position by position; gives what stands for all of them.

        Where the number of rows is ``fixed`` no row can go without the others; where it is not (heads), the position
        that stands for all stays when one row goes.
        """
        rows = ids.transpose(axis, *(d for d in range(ids.ndim) if d != axis))
        if fixed:
            self.tie(rows[:-1], rows[1:])
            return rows[0]
        one = self.fresh(rows[0].size).reshape(rows[0].shape)
        self.tie(np.broadcast_to(one, rows.shape), rows)
        return one

    def _add(self, left: int, right: int, length: int, kind: int) -> None:
        key = (left, right, length, kind)
        if left != right and key not in self._seen:
            self._seen.add(key)
            self._ties.append((left, right, length, self.step, kind))

    def couple(self, a: Label, b: Label) -> None:
        """Tie two labels of one dim, position by position, over the union of their contexts."""
        if a.context == b.context:
            self.tie(a.ids, b.ids)
            return
        context = a.context + tuple(c for c in b.context if c not in a.context)
        left, right = a.over(context), b.over(context)
        shape = np.broadcast(left, right).shape
        self.tie(*(ids if ids.shape == shape else np.broadcast_to(ids, shape) for ids in (left, right)))

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
            rows, which = fine.reshape(-1, fine.shape[-1]), None
            if not self._counts_up(fine) and distinct(rows[:, 0]).size < len(rows):
                rows, which = distinct_rows(rows)
            own = self.fresh(len(rows))
            self.rows_of.append(Rows(own, rows))
            if self._merged:
                self._pin_foreign(own, rows)
            coarse = self._coarse[key] = (own if which is None else own[which]).reshape(fine.shape[:-1])
        return coarse

    def known_rows(self, fine: Ids) -> Ids | None:
        """The coarse atoms of rows that were made before."""
        return self._coarse.get((fine.shape, fine.tobytes()))

    def _pin_foreign(self, coarse: Ids, rows: Ids) -> None:
        """Rows of merged dims in which the positions that go with one atom of either are not together cannot go."""
        first = rows[:, 0]
        inside = np.zeros(len(rows), dtype=bool)
        known: set[bytes] = set()
        least, largest = int(first.min()), int(first.max())
        for low, high, item in self._merged:
            if high >= least and low <= largest and (here := np.isin(first, item.fine)).any():
                inside |= here
                known.update(np.sort(row).tobytes() for row in item.fine if len(row) == rows.shape[-1])
        if not inside.any():
            return
        foreign = [bool(i) and np.sort(row).tobytes() not in known for i, row in zip(inside, rows, strict=True)]
        if any(foreign):
            self.pin(coarse[np.array(foreign)], "it is a part of two dimensions that were merged, and goes with either")

    def belong(self, coarse: Ids, fine: Ids) -> None:
        """``fine[r]`` goes when the existing atom ``coarse[r]`` goes."""
        self.rows_of.append(Rows(coarse.reshape(-1), fine.reshape(coarse.size, -1), split=False))
        self._merged.append((int(fine.min()), int(fine.max()), self.rows_of[-1]))

    def multiply(self, cells: Ids, factors: Ids, reason: str) -> None:
        """``cells[k]`` goes with each atom of ``factors[k]``, and with nothing that takes none of them."""
        self.products.append(Product(cells, factors, Freeze(factors.reshape(-1), reason, self.step, True)))

    def balance(self, fine: Ids, reason: str) -> None:
        """The rows of ``fine`` (its last axis) must keep equal counts; a row of one position goes as a whole only."""
        if fine.size > fine.shape[-1] == 1:
            self.pin(fine, reason)
        elif fine.size > fine.shape[-1]:
            self.balances.append(Balance(fine.reshape(-1, fine.shape[-1]), reason, self.step))

    def align(self, fine: Ids, reason: str) -> None:
        """The rows of ``fine`` share one numbering: part of a row goes only with the same part of every row."""
        if fine.size > fine.shape[-1] > 1:
            self.aligned.append(Balance(fine.reshape(-1, fine.shape[-1]), reason, self.step))

    def arrange(self, cause: Ids, count: int, reason: str) -> Ids:
        """Atoms for a dim of fixed size whose order depends on the numbering of ``cause``."""
        effect = self.fresh(count)
        self.freezes.append(Freeze(effect, reason, self.step, False))
        self.guards.append(Guard(cause, effect, Freeze(cause, reason, self.step, True)))
        return effect

    def limit(self, ids: Ids, reason: str, *, least: int = 1, multiple: int = 1) -> None:
        """Each row of ``ids`` must keep at least so many positions, and a multiple of so many."""
        self.limits.append(Limit(ids, least, multiple, reason))

    def keep_even(self, coarse: Ids, reason: str) -> None:
        """Rows of two that were cut out of something wider begin at even places of it, and it stays of even length."""
        atom = coarse.item(0)
        fine = [r.fine.reshape(-1)[:1] for r in self.rows_of if r.coarse.item(0) <= atom <= r.coarse.reshape(-1)[-1]]
        for ids, first, last in self.cuts:
            if any(np.isin(f, ids[..., first:last]).all() for f in fine):
                self.limit(ids, reason, multiple=2)
                if first:
                    self.limit(ids[..., :first], reason, multiple=2)

    def mean(self, ids: Ids, what: str, of: Ids) -> None:
        """Note that ``ids`` (as an object) is ``what`` of the positions ``of``: "order", "counts", "ends"."""
        self.meaning[id(ids)] = (what, of, ids)

    def means(self, ids: Ids, what: str) -> Ids | None:
        """The positions of which ``ids`` is ``what``."""
        found = self.meaning.get(id(ids))
        return found[1] if found is not None and found[0] == what else None

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

    def frozen(self) -> NDArray[np.bool_]:
        """Which atoms rules have frozen so far: themselves, or a part of the row that goes with them."""
        known = self._frozen
        if known.size < self.size:
            known = self._frozen = np.concatenate((known, np.zeros(2 * self.size - known.size, dtype=bool)))
        for item in self.freezes[self._looked_at :]:
            known[item.ids] |= item.hard
        self._looked_at = len(self.freezes)
        for rows in self.rows_of:
            known[rows.coarse] |= known[rows.fine].any(axis=1)
        return known

    @property
    def ties(self) -> TieTable:
        """All ties so far."""
        known = self._table.shape[1]
        if known < len(self._ties):
            new = np.array(self._ties[known:], dtype=np.int64).T
            self._table = np.concatenate((self._table, new), axis=1)
        return TieTable(*self._table)
