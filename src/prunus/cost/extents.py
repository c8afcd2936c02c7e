"""How many atoms survive in many rows at once: one pass of numpy for all sizes of a traced model."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prunus.labels import Ids, Labelled


class Extents:
    """Sizes of labelled dims, for any set of atoms that are alive.

    Register the dims with :meth:`dim` (or whole tensors with :meth:`shape`), which give places; :meth:`sizes` then
    gives a vector with the present size at every place. The size of a dim whose label has a context (the head dims of
    each head) is that of its first row that is not gone altogether, as everywhere in Prunus.
    """

    def __init__(self) -> None:
        self._places: dict[object, int] = {}
        self._rows: list[Ids] = []
        self._owner: list[int] = []  # the place that each row belongs to
        self._fixed: list[int] = []  # by place: its size, -1 for one that has rows
        self._ids: dict[int, Ids] = {}  # by place; ids are known by identity, and must not go while they are
        self._flat: tuple[Ids, Ids, Ids] | None = None

    def dim(self, ids: Ids | None, size: int) -> int:
        """The place of a dim: of the atoms ``ids``, or of a fixed ``size``."""
        key: object = size if ids is None else (id(ids), "ids")
        found = self._places.get(key)
        if found is None:
            found = self._places[key] = len(self._fixed)
            self._flat = None
            if ids is None:
                self._fixed.append(size)
            else:
                self._ids[found] = ids
                rows = ids.reshape(-1, ids.shape[-1])
                self._rows.extend(rows)
                self._owner.extend([found] * len(rows))
                self._fixed.append(-1)
        return found

    def ids(self, place: int) -> Ids | None:
        """The atoms of the dim at a place; None for a fixed size."""
        return self._ids.get(place)

    def shape(self, tensor: Labelled) -> tuple[int, ...]:
        """The places of the dims of a tensor."""
        return tuple(
            self.dim(None if label is None else label.ids, size)
            for label, size in zip(tensor.dims, tensor.shape, strict=True)
        )

    def sizes(self, alive: NDArray[np.bool_]) -> Ids:
        """The present size at every place."""
        if self._flat is None:
            lengths = np.array([len(row) for row in self._rows], dtype=np.int64)
            atoms = np.concatenate(self._rows) if self._rows else np.empty(0, dtype=np.int64)
            self._flat = atoms, np.cumsum(lengths) - lengths, np.array(self._owner, dtype=np.int64)
        atoms, starts, owner = self._flat
        sizes = np.array(self._fixed, dtype=np.int64)
        sizes[sizes < 0] = 0
        if atoms.size:
            counts = np.add.reduceat(alive[atoms].astype(np.int64), starts)
            there = np.flatnonzero(counts)[::-1]  # the first row that is left is written last
            sizes[owner[there]] = counts[there]
        return sizes
