"""Units: the smallest sets of parameter slices that must go together, and why the others may not go."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from prunus.coupling.pieces import Pieces, Relation, reachable, runs_of
from prunus.coupling.products import breaking
from prunus.labels import Ids, marks
from prunus.ledger import Freeze, Ledger

_NONE: Ids = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Units:
    """Every fine atom as a candidate for removal, and what its removal takes.

    ``stay[f]`` is the freeze that keeps fine atom ``f`` (-1: it may go).
    ``base[f]`` is the number of its first unit; its units are numbered along its pieces, those of fine atoms one behind
    the other. Only those of fine atoms that are ``free`` may be chosen.
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
        return dict(runs_of(self.taker, self.taken))

    @cached_property
    def of_atom(self) -> Ids:
        """The unit of every atom."""
        pieces = self.pieces
        found = (self.base[pieces.fine] - pieces.start).repeat(pieces.length)
        found += np.arange(found.size)
        return found

    def unit_of(self, positions: Ids, piece: Ids | None = None) -> Ids:
        """The unit of each atom, whose pieces may be given (-1 where it may not be chosen)."""
        piece = self.pieces.of(positions) if piece is None else piece
        fine = self.pieces.fine[piece]
        return np.where(self.free[fine], self.base[fine] + positions - self.pieces.start[piece], -1)

    def fine_of(self, unit: Ids) -> Ids:
        """The fine atom of each unit."""
        return self.base.searchsorted(unit, side="right") - 1

    def takings(self, pieces: Ids) -> tuple[Ids, Ids]:
        """Every pair of a place in ``pieces`` and a coarse unit that takes the piece there."""
        return self._takers.follow(np.arange(len(pieces)), pieces)

    @cached_property
    def _takers(self) -> Relation:
        """The coarse units that take each piece."""
        free = self.free[self.taker]
        return Relation(self.taken[free], self.base[self.taker[free]], len(self.pieces.start))

    @cached_property
    def taker_mark(self) -> Ids:
        """For each piece a number that is equal where the same coarse units take it (0: none does)."""
        mark = np.zeros(len(self.pieces.start), dtype=np.int64)
        random = marks(len(self.base), 0).view(np.int64)
        free = self.free[self.taker]
        np.add.at(mark, self.taken[free], random[self.taker[free]])
        return mark

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
    stay = np.full(count, len(freezes))
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
    ends = width.cumsum()
    return Units(pieces, freezes, stay, free, ends - width, width, taker, taken, int(ends[-1]))


def _frozen_classes(pieces: Pieces, freezes: tuple[Freeze, ...], ledger: Ledger) -> Ids:
    """For each class the freeze that keeps it (-1: none): its own, or that of something which would go with it."""
    stay = np.full(pieces.class_count, -1)
    frozen, why = _frozen_pieces(pieces, freezes[: len(ledger.freezes)], hard=True)
    stay[pieces.classes[frozen[::-1]]] = why[::-1]  # the first of several freezes, as the last entry counts
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
    leads = np.zeros(pieces.class_count, dtype=bool)
    leads[pieces.cause] = True
    leading = np.flatnonzero(leads[pieces.classes] & (stay[pieces.fine] < 0))
    if not leading.size:
        return _NONE, _NONE
    return reachable(pieces, pieces.fine[leading], pieces.classes[leading])


def _takes(pieces: Pieces, fines: Ids, classes: Ids) -> tuple[Ids, Ids]:
    """Fine atoms that take more than themselves, and each piece that goes as a whole with them, by their classes."""
    if fines.size == 0:
        return _NONE, _NONE
    count = pieces.class_count
    taker, taken = Relation(pieces.classes, np.arange(len(pieces.classes)), count).follow(fines, classes)
    other = pieces.fine[taken] != taker
    taker, taken = taker[other], taken[other]
    by = np.lexsort((taken, taker))
    return taker[by], taken[by]
