"""Groups: all units with the same signature, and the index of each unit in every tensor that it cuts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prunus.coupling.bundles import Bundling, find_bundles
from prunus.coupling.families import Family
from prunus.coupling.folds import Fold, find_folds
from prunus.coupling.pieces import Pieces, cut_into_pieces, runs_of, stretches
from prunus.coupling.units import Units, find_units
from prunus.held import axes_of
from prunus.labels import Ids, distinct, marks
from prunus.sizes import Attribute, read_attribute
from prunus.tracing import Trace

_NONE: Ids = np.empty(0, dtype=np.int64)


class Slice(NamedTuple):
    """How the units of a group cut one dim of one held tensor: ``positions[u]`` are the positions of unit ``u``."""

    held: int
    dim: int
    positions: Ids


@dataclass(frozen=True)
class UnitGroup:
    """Units that cut the same dims of the same tensors, equally often."""

    coupling: Coupling
    fines: tuple[int, ...]

    @cached_property
    def units(self) -> Ids:
        """The numbers of the group's units, ascending."""
        own = self.coupling.units
        return np.sort(np.concatenate([own.base[f] + np.arange(own.width[f]) for f in self.fines]))

    @cached_property
    def coarse(self) -> bool:
        """Whether the units are rows (heads, groups of a convolution) rather than single positions."""
        return self.fines[0] in self.coupling.units.takes

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The dims that the group cuts, in the order in which the model uses them."""
        found, own = self.coupling, self.coupling.units
        parts = [found.pieces_of(f) for f in self.fines]
        whole = [own.takes.get(f, _NONE) for f in self.fines] if self.coarse else []
        piece = np.concatenate(parts + whole)
        base = np.repeat(own.base[[*self.fines, *self.fines][: len(parts + whole)]], [len(p) for p in parts + whole])
        moves = np.arange(len(piece)) < sum(map(len, parts))  # from unit to unit; a row takes all of what it takes
        real = found.axis_of_piece[piece] >= 0
        piece, base, moves = piece[real], base[real], moves[real]
        start, length, axis = found.pieces.start[piece], found.pieces.length[piece], found.axis_of_piece[piece]
        position, axis = stretches(start, length), np.repeat(axis, length)
        unit = np.repeat(base, length)
        unit += (position - np.repeat(start, length)) * np.repeat(moves, length)
        order = np.lexsort((position, unit, axis))
        axis, position = axis[order], position[order]
        cuts = []
        for k, index in runs_of(axis, position - found.axis_start[axis]):
            cuts.append(Slice(int(found.axis_held[k]), int(found.axis_dim[k]), index.reshape(len(self.units), -1)))
        return tuple(cuts)


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
    axis_of_piece: Ids  # -1: not on a held tensor
    kind: Ids  # of each fine atom: equal where units cut the same dims of the same tensors, equally often

    @property
    def families(self) -> tuple[Family, ...]:
        """What may be removed, by families of bundles."""
        return self.bundling.families

    @cached_property
    def consumers(self) -> frozenset[tuple[int, int]]:
        """``(held, dim)`` of every dim that a layer reads (a weight's input columns), rather than makes."""
        starts = {int(s): k for k, s in enumerate(self.axis_start)}
        chosen = [starts[s] for s in self.trace.ledger.only_read if s in starts]
        return frozenset((int(self.axis_held[k]), int(self.axis_dim[k])) for k in chosen)

    @cached_property
    def _pieces_of_fine(self) -> tuple[Ids, Ids]:
        order = np.argsort(self.pieces.fine, kind="stable")
        count = int(self.pieces.fine.max()) + 1
        return order, np.searchsorted(self.pieces.fine[order], np.arange(count + 1))

    def pieces_of(self, fine: int) -> Ids:
        """The pieces of a fine atom, in order."""
        order, first = self._pieces_of_fine
        return np.sort(order[first[fine] : first[fine + 1]])

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
        return tuple(UnitGroup(self, tuple(found)) for found in by_mark.values())

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
    return Coupling(trace, pieces, units, bundling, start, held, dim, axis, kind)


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
