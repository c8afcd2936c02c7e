"""Groups: all units with the same signature, and the index of each unit in every tensor that it cuts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prunus.coupling.bundles import Bundling, find_bundles
from prunus.coupling.families import Family
from prunus.coupling.folds import Fold, find_folds
from prunus.coupling.pieces import Pieces, cut_into_pieces, stretches
from prunus.coupling.units import Units, find_units
from prunus.held import axes_of
from prunus.labels import Ids, distinct, marks
from prunus.sizes import Attribute, read_attribute
from prunus.tracing import Trace


class Slice(NamedTuple):
    """How the units of a group cut one dim of one held tensor: ``positions[u]`` are the positions of unit ``u``."""

    held: int
    dim: int
    positions: Ids


@dataclass(frozen=True)
class UnitGroup:
    """Units that cut the same dims of the same tensors, equally often."""

    coupling: Coupling
    fines: tuple[int, ...]  # by their first units
    number: int

    @cached_property
    def units(self) -> Ids:
        """The numbers of the group's units, ascending."""
        own = self.coupling.units
        return np.concatenate([np.arange(own.base[f], own.base[f] + own.width[f]) for f in self.fines])

    @cached_property
    def coarse(self) -> bool:
        """Whether the units are rows (heads, groups of a convolution) rather than single positions."""
        return self.fines[0] in self.coupling.units.takes

    @property
    def slices(self) -> tuple[Slice, ...]:
        """The dims that the group cuts, in the order in which the model uses them."""
        return self.coupling.slices[self.number]


@dataclass(frozen=True)
class Coupling:
    """Everything the engine knows about a traced model."""

    trace: Trace
    pieces: Pieces
    units: Units
    bundling: Bundling
    axis_start: Ids
    axis_held: Ids
    axis_dim: Ids
    axis_end: Ids
    axis_of_piece: Ids  # -1: not on a held tensor
    kind: Ids  # of each fine atom: equal where units cut the same dims of the same tensors, equally often

    @property
    def families(self) -> tuple[Family, ...]:
        """What may be removed, by families of bundles."""
        return self.bundling.families

    @cached_property
    def consumers(self) -> frozenset[tuple[int, int]]:
        """``(held, dim)`` of every dim that a layer reads (a weight's input columns), rather than makes."""
        axes = zip(self.axis_held.tolist(), self.axis_dim.tolist(), strict=True)
        by_start = dict(zip(self.axis_start.tolist(), axes, strict=True))
        return frozenset(by_start[s] for s in self.trace.ledger.only_read if s in by_start)

    @cached_property
    def _pieces_of_fine(self) -> tuple[Ids, Ids]:
        order = np.argsort(self.pieces.fine, kind="stable")
        count = int(self.pieces.fine.max()) + 1
        return order, np.searchsorted(self.pieces.fine[order], np.arange(count + 1))

    @cached_property
    def movable(self) -> NDArray[np.bool_]:
        """Which units are in a family, that is, may go."""
        return self.family_of_unit >= 0

    @cached_property
    def removable(self) -> NDArray[np.bool_]:
        """Which units may go, by themselves or with a row that holds them."""
        found = self.movable.copy()
        found[self.unit_of_atom[self.atoms_of(np.flatnonzero(found))]] = True
        return found

    @cached_property
    def family_of_unit(self) -> Ids:
        """The index of each unit's family (-1: it may not go)."""
        found = np.full(self.units.total, -1, dtype=np.int64)
        for k, family in enumerate(self.families):
            found[family.units] = k
        return found

    @cached_property
    def groups(self) -> tuple[UnitGroup, ...]:
        """All units that may go, by signature, in the order in which the model uses them."""
        own = self.units
        by_mark: dict[int, list[int]] = {}
        fines = np.flatnonzero(own.free)
        for f in fines[np.argsort(own.base[fines], kind="stable")].tolist():
            if self.movable[own.base[f]] and self.kind[f] != 0:
                by_mark.setdefault(int(self.kind[f]), []).append(f)
        return tuple(UnitGroup(self, tuple(found), k) for k, found in enumerate(by_mark.values()))

    @cached_property
    def slices(self) -> tuple[tuple[Slice, ...], ...]:
        """The dims that each group cuts, in the order in which the model uses them."""
        own, group = self.units, self._group_of_fine
        moved = np.flatnonzero((group[self.pieces.fine] >= 0) & (self.axis_of_piece >= 0))
        piece, fine = moved, self.pieces.fine[moved]
        if own.taken.size:
            goes = (group[own.taker] >= 0) & (self.axis_of_piece[own.taken] >= 0)
            piece, fine = np.concatenate((piece, own.taken[goes])), np.concatenate((fine, own.taker[goes]))
        if not piece.size:
            return ((),) * len(self.groups)
        axis, group = self.axis_of_piece[piece], group[fine]
        start, length = self.pieces.start[piece], self.pieces.length[piece]
        order = np.lexsort((start, own.base[fine], axis, group))
        fine, axis, group, start, length = fine[order], axis[order], group[order], start[order], length[order]
        position = stretches(start - self.axis_start[axis], length)
        same = (axis[1:] == axis[:-1]) & (group[1:] == group[:-1])
        if (same & (fine[1:] == fine[:-1]) & (own.width[fine[1:]] > 1)).any():
            moves = order < len(moved)  # from unit to unit; a row takes all of what it takes
            cut = np.cumsum(np.append(0, ~same)) * own.total
            key = np.repeat(cut + own.base[fine] - moves * (start - self.axis_start[axis]), length)
            key += position * np.repeat(moves, length)
            position = position[np.argsort(key, kind="stable")]
        last = np.flatnonzero(np.append(~same, True))
        ends, axis = [0, *np.cumsum(length)[last].tolist()], axis[last]
        found: list[list[Slice]] = [[] for _ in self.groups]
        sizes = [len(one.units) for one in self.groups]
        places = zip(group[last].tolist(), self.axis_held[axis].tolist(), self.axis_dim[axis].tolist(), strict=True)
        for (k, held, dim), (begin, end) in zip(places, pairwise(ends), strict=True):
            found[k].append(Slice(held, dim, position[begin:end].reshape(sizes[k], -1)))
        return tuple(map(tuple, found))

    @cached_property
    def _group_of_fine(self) -> Ids:
        """The index of each fine atom's group (-1: it may not go)."""
        found = np.full(len(self.units.base), -1, dtype=np.int64)
        for group in self.groups:
            found[list(group.fines)] = group.number
        return found

    @property
    def unit_of_atom(self) -> Ids:
        """The number of each atom's unit."""
        return self.units.of_atom

    @cached_property
    def group_of_unit(self) -> Ids:
        """The index of each unit's group (-1: it may not go)."""
        found = np.full(self.units.total, -1, dtype=np.int64)
        for k, group in enumerate(self.groups):
            found[group.units] = k
        return found

    def groups_of(self, units: Ids) -> list[tuple[int, UnitGroup]]:
        """The groups that some units belong to, with their indices."""
        return [(k, self.groups[k]) for k in distinct(self.group_of_unit[units]).tolist() if k >= 0]

    def atoms_of(self, units: Ids) -> Ids:
        """Every atom that goes with a set of units, ascending."""
        if units.size < self.units.total // 16:
            return self._atoms_of_few(units)
        chosen = np.zeros(self.units.total, dtype=bool)
        chosen[units] = True
        gone = chosen[self.unit_of_atom]
        for f, taken in self.units.takes.items():
            if chosen[self.units.base[f]]:
                for piece in taken.tolist():
                    start = self.pieces.start[piece]
                    gone[start : start + self.pieces.length[piece]] = True
        return np.flatnonzero(gone)

    def without(self, alive: NDArray[np.bool_], units: Ids) -> NDArray[np.bool_]:
        """Which of the ``alive`` atoms are left when ``units`` go."""
        left = alive.copy()
        left[self.atoms_of(units)] = False
        return left

    def _atoms_of_few(self, units: Ids) -> Ids:
        """The same without looking at every atom of the model."""
        own, pieces = self.units, self.pieces
        units = distinct(units)
        fine = own.fine_of(units)
        begins = np.flatnonzero(np.concatenate(([True], fine[1:] != fine[:-1])))[: units.size]
        fines, many = fine[begins], np.diff(np.concatenate((begins, [units.size])))
        order, first = self._pieces_of_fine
        count = first[fines + 1] - first[fines]
        piece, run = order[stretches(first[fines], count)], np.repeat(np.arange(fines.size), count)
        by = np.argsort(piece, kind="stable")
        piece, run = piece[by], run[by]
        shift = np.repeat(pieces.start[piece] - own.base[fines[run]], many[run])
        atoms = shift + units[stretches(begins[run], many[run])]
        taken = [own.takes[f] for f in fines.tolist() if f in own.takes]
        if not taken:
            return atoms
        whole = distinct(np.concatenate(taken))
        return distinct(np.concatenate((atoms, stretches(pieces.start[whole], pieces.length[whole]))))

    @cached_property
    def folds(self) -> tuple[Fold, ...]:
        """Products with a power of a size, and what can make up for its change."""
        return find_folds(self.trace)

    @cached_property
    def by_rows(self) -> Coupling:
        """The same units, bundled so that sizes follow whole rows (heads) where they can follow either."""
        bundling = find_bundles(
            self.trace.ledger, self.units, self.kind, lambda a: read_attribute(self.trace.model, a), rows_first=True
        )
        return replace(self, bundling=bundling)

    @cached_property
    def batched(self) -> NDArray[np.bool_]:
        """Coarse units over which a contraction is batched: heads, experts, groups of a convolution."""
        found = np.zeros(self.units.total, dtype=bool)
        for ids in self.trace.ledger.batched:
            found[self.unit_of_atom[ids.reshape(-1)]] = True
        return found & self.units.coarse

    def alive_units(self, alive: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which units are left, given the atoms that are."""
        if alive.all():
            return np.ones(self.units.total, dtype=bool)
        found = np.zeros(self.units.total, dtype=bool)
        found[self.unit_of_atom[alive]] = True
        return found


def couple(trace: Trace) -> Coupling:
    """Pieces, units, bundles and groups of a traced model."""
    pieces = cut_into_pieces(trace.ledger)
    start, held, dim, end = axes_of(trace.held)
    axis = start.searchsorted(pieces.start, side="right") - 1
    axis[pieces.start >= np.append(end, 0)[axis]] = -1  # the entry behind the last is for those before all axes
    units = find_units(trace.ledger, pieces)
    kind = _kinds(pieces, units, axis, len(start))

    def read(attribute: Attribute) -> int:
        return read_attribute(trace.modules[attribute.path], Attribute("", attribute.name, attribute.item))

    bundling = find_bundles(trace.ledger, units, kind, read)
    return Coupling(trace, pieces, units, bundling, start, held, dim, end, axis, kind)


def _kinds(pieces: Pieces, units: Units, axis: Ids, axes: int) -> Ids:
    """A signature for each fine atom: a sum of random numbers, one for each dim that it cuts."""
    random = marks(2 * axes, 0).view(np.int64).reshape(axes, 2)
    mark = np.zeros(len(units.base), dtype=np.int64)
    real = axis >= 0
    np.add.at(mark, pieces.fine[real], random[axis[real], 0])
    if units.taken.size:
        on = axis[units.taken] >= 0
        np.add.at(mark, units.taker[on], random[axis[units.taken[on]], 1] * pieces.length[units.taken[on]])
    return mark
