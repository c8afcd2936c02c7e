"""Units: the smallest sets of parameter slices that must go together, and why the others may not go."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prunus.coupling.pieces import Pieces, reachable, stretches
from prunus.coupling.products import breaking
from prunus.labels import Ids, marks
from prunus.ledger import Freeze, Ledger

_NONE: Ids = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Units:
    """Every fine atom as a candidate for removal, and what its removal takes.

    ``stay[f]`` is the freeze that keeps fine atom ``f`` (-1: it may go).
    ``base[f]`` is the number of its first unit; its units are numbered along its pieces. Only those of fine atoms that
    are ``free`` may be chosen.
    ``taken[k]`` is a piece that goes as a whole when coarse atom ``taker[k]`` goes.
    """

    pieces: Pieces
    freezes: tuple[Freeze, ...]
    stay: Ids
    free: NDArray[np.bool_]
    base: Ids
    width: Ids
    taker: Ids
    taken: Ids
    total: int

    @cached_property
    def takes(self) -> dict[int, Ids]:
        """For each coarse atom, the pieces that go as a whole with it."""
        fines, first = np.unique(self.taker, return_index=True)
        return dict(zip(fines.tolist(), np.split(self.taken, first[1:]), strict=True)) if fines.size else {}

    @cached_property
    def of_atom(self) -> Ids:
        """The unit of every atom."""
        pieces = self.pieces
        return np.repeat(self.base[pieces.fine] - pieces.start, pieces.length) + np.arange(int(pieces.length.sum()))

    def unit_of(self, positions: Ids) -> Ids:
        """The unit of each atom (-1 where it may not be chosen)."""
        piece = self.pieces.of(positions)
        fine = self.pieces.fine[piece]
        return np.where(self.free[fine], self.base[fine] + positions - self.pieces.start[piece], -1)

    def fine_of(self, unit: Ids) -> Ids:
        """The fine atom of each unit."""
        return self._order[np.searchsorted(self._sorted, unit, side="right") - 1]

    @cached_property
    def _order(self) -> Ids:
        return np.argsort(self.base, kind="stable")

    @cached_property
    def _sorted(self) -> Ids:
        return self.base[self._order]

    def takers_of(self, pieces: Ids) -> Ids:
        """The coarse units that take each of ``pieces`` (a unit once for each)."""
        return self.takings(pieces)[1]

    def takings(self, pieces: Ids) -> tuple[Ids, Ids]:
        """Every pair of a place in ``pieces`` and a coarse unit that takes the piece there."""
        if self.taker.size == 0 or not self._is_taken[pieces].any():
            return _NONE, _NONE
        taken, takers = self._by_piece
        first = np.searchsorted(taken, pieces)
        count = np.searchsorted(taken, pieces, side="right") - first
        return np.repeat(np.arange(len(pieces)), count), takers[stretches(first, count)]

    @cached_property
    def _by_piece(self) -> tuple[Ids, Ids]:
        free = self.free[self.taker]
        order = np.argsort(self.taken[free], kind="stable")
        return self.taken[free][order], self.base[self.taker[free]][order]

    @cached_property
    def taker_mark(self) -> Ids:
        """For each piece a number that is equal where the same coarse units take it (0: none does)."""
        mark = np.zeros(len(self.pieces.start), dtype=np.int64)
        random = marks(len(self.base), 0).view(np.int64)
        free = self.free[self.taker]
        np.add.at(mark, self.taken[free], random[self.taker[free]])
        return mark

    @cached_property
    def _is_taken(self) -> NDArray[np.bool_]:
        found = np.zeros(len(self.pieces.start), dtype=bool)
        found[self._by_piece[0]] = True
        return found

    def is_coarse(self, unit: int) -> bool:
        """Whether the unit takes whole rows (a head) rather than one position."""
        return bool(self.coarse[unit])

    @cached_property
    def coarse(self) -> NDArray[np.bool_]:
        """Which units take whole rows."""
        found = np.zeros(self.total, dtype=bool)
        found[self.base[self.taker]] = True
        return found


def find_units(ledger: Ledger, pieces: Pieces) -> Units:
    """Which fine atoms may go, and what each takes (atoms on no tensor that the model keeps are units too)."""
    freezes = (*ledger.freezes, *(g.freeze for g in ledger.guards), *(p.freeze for p in ledger.products))
    count = int(pieces.fine.max()) + 1
    stay_class = _frozen_classes(pieces, freezes, ledger)
    stay = np.full(count, len(freezes), dtype=np.int64)
    known = stay_class[pieces.classes]
    np.minimum.at(stay, pieces.fine[known >= 0], known[known >= 0])
    pinned, why = _frozen_pieces(pieces, freezes, hard=False)
    np.minimum.at(stay, pieces.fine[pinned], why)
    stay[stay == len(freezes)] = -1
    fines, classes = _reached(pieces, stay)
    for k, broken in enumerate(breaking(ledger.products, pieces, fines, classes), len(freezes) - len(ledger.products)):
        stay[broken] = k
    taker, taken = _takes(pieces, fines[stay[fines] < 0], classes[stay[fines] < 0])
    width = np.zeros(count, dtype=np.int64)
    width[pieces.fine] = pieces.length
    free = stay < 0
    free[pieces.fine[0]] = False  # atom 0 stands for nothing
    first = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(first, pieces.fine, pieces.start)
    order = np.argsort(first, kind="stable")
    base = np.zeros(count, dtype=np.int64)
    base[order] = np.cumsum(width[order]) - width[order]
    return Units(pieces, freezes, stay, free, base, width, taker, taken, int(width.sum()))


def _frozen_classes(pieces: Pieces, freezes: tuple[Freeze, ...], ledger: Ledger) -> Ids:
    """For each class the freeze that keeps it (-1: none): its own, or that of something which would go with it."""
    stay = np.full(int(pieces.classes.max()) + 1, len(freezes), dtype=np.int64)
    frozen, why = _frozen_pieces(pieces, freezes[: len(ledger.freezes)], hard=True)
    np.minimum.at(stay, pieces.classes[frozen], why)
    stay[stay == len(freezes)] = -1
    while True:
        spread = (stay[pieces.effect] >= 0) & (stay[pieces.cause] < 0)
        if spread.any():
            stay[pieces.cause[spread]] = stay[pieces.effect[spread]]
        elif not ledger.guards or not _guarded(pieces, ledger, stay):
            return stay


def _guarded(pieces: Pieces, ledger: Ledger, stay: Ids) -> bool:
    """Freeze what numbers an order that something else depends on; whether anything new was frozen.

    Something does if it stays, if the model keeps it, or if it tells the positions apart (they are in several pieces).
    """
    touched = np.zeros(int(pieces.fine.max()) + 1, dtype=bool)
    touched[pieces.fine[stay[pieces.classes] >= 0]] = True
    for start, count in ledger.kept:
        first, last = np.searchsorted(pieces.start, (start, start + count))
        touched[pieces.fine[first:last]] = True
    moved = False
    for k, guard in enumerate(ledger.guards):
        first, last = pieces.of(guard.effect[[0, -1]])
        if first != last or touched[pieces.fine[first]]:
            classes = pieces.classes[pieces.of(guard.cause.reshape(-1))]
            new = classes[stay[classes] < 0]
            stay[new] = len(ledger.freezes) + k
            moved = moved or bool(new.size)
    return moved


def _frozen_pieces(pieces: Pieces, freezes: tuple[Freeze, ...], *, hard: bool) -> tuple[Ids, Ids]:
    """Every piece that a freeze (or a pin) touches, and the number of that freeze."""
    chosen = [(k, f.ids.reshape(-1)) for k, f in enumerate(freezes) if f.hard is hard]
    if not chosen:
        return _NONE, _NONE
    why = np.repeat([k for k, _ in chosen], [ids.size for _, ids in chosen])
    return pieces.of(np.concatenate([ids for _, ids in chosen])), why


def _reached(pieces: Pieces, stay: Ids) -> tuple[Ids, Ids]:
    """Fine atoms that may go and take more than themselves, and each class that goes with them."""
    leads = np.zeros(int(pieces.classes.max()) + 1, dtype=bool)
    leads[pieces.cause] = True
    leading = np.flatnonzero(leads[pieces.classes] & (stay[pieces.fine] < 0))
    return reachable(pieces, pieces.fine[leading], pieces.classes[leading])


def _takes(pieces: Pieces, fines: Ids, classes: Ids) -> tuple[Ids, Ids]:
    """Fine atoms that take more than themselves, and each piece that goes as a whole with them, by their classes."""
    if fines.size == 0:
        return _NONE, _NONE
    count = int(pieces.classes.max()) + 1
    order = np.argsort(pieces.classes, kind="stable")
    first = np.searchsorted(pieces.classes[order], np.arange(count + 1))
    lengths = first[classes + 1] - first[classes]
    taken = order[stretches(first[classes], lengths)]
    taker = np.repeat(fines, lengths)
    other = pieces.fine[taken] != taker
    taker, taken = taker[other], taken[other]
    by = np.lexsort((taken, taker))
    return taker[by], taken[by]
