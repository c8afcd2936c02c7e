"""How many atoms survive in many rows at once: one pass of numpy for all sizes of a traced model."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from prunus.coupling import Coupling
from prunus.labels import Ids, Labelled
from prunus.plan import Alive


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
        self._runs: list[tuple[int, int, int]] = []  # place, first atom, number: of rows that count up by one
        self._flat: tuple[Ids, Ids, Ids, Ids, Ids] | None = None

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
                self._fixed.append(-1)
                if ids.ndim == 1 and ids.size and int(ids[-1] - ids[0]) + 1 == ids.size and (np.diff(ids) == 1).all():
                    self._runs.append((found, int(ids[0]), ids.size))
                else:
                    rows = ids.reshape(-1, ids.shape[-1])
                    self._rows.extend(rows)
                    self._owner.extend([found] * len(rows))
        return found

    def run(self, start: int, size: int) -> int:
        """The place of a dim with the atoms from ``start`` on (-1: none, a fixed size)."""
        if start < 0:
            return self.dim(None, size)
        found = self._places.get((start, size))
        if found is None:
            found = self._places[start, size] = len(self._fixed)
            self._flat = None
            self._fixed.append(-1)
            self._runs.append((found, start, size))
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
            runs = np.array(self._runs, dtype=np.int64).reshape(-1, 3).T
            owner = np.array(self._owner, dtype=np.int64)
            self._flat = atoms, np.cumsum(lengths) - lengths, owner, runs[0], np.stack((runs[1], runs[1] + runs[2]))
        atoms, starts, owner, places, ends = self._flat
        sizes = np.array(self._fixed, dtype=np.int64)
        sizes[sizes < 0] = 0
        if atoms.size:
            counts = np.add.reduceat(alive[atoms].astype(np.int64), starts)
            there = np.flatnonzero(counts)[::-1]  # the first row that is left is written last
            sizes[owner[there]] = counts[there]
        if places.size:
            before = np.concatenate(([0], np.cumsum(alive)))
            sizes[places] = before[ends[1]] - before[ends[0]]
        return sizes


class PlanCost:
    """Multiply-adds and parameters with any set of atoms: what :func:`prunus.plan.footprint` counts, faster.

    Args:
        coupling: a traced model.

    Example:
        >>> import torch, prunus
        >>> model = torch.nn.Linear(8, 4)
        >>> graph = prunus.DependencyGraph().build_dependency(model, torch.randn(1, 8))
        >>> PlanCost(graph.coupling)(graph.alive)
        (32, 36)
    """

    def __init__(self, coupling: Coupling) -> None:
        self._extents = Extents()
        one = self._extents.dim(None, 1)
        terms = coupling.trace.ledger.macs
        held = [h for h in coupling.trace.held if h.places[0].kind == "parameter"]
        self._following = [h for h in held if h.follows]
        macs = [[one, *(self._extents.dim(ids, ids.shape[-1]) for ids in term.rows)] for term in terms]
        params = [
            [one, *(self._extents.run(start, n) for start, n in zip(h.starts, h.shape, strict=True))]
            for h in held
            if not h.follows
        ]
        self._factors = np.array([term.factor for term in terms], dtype=np.int64)
        self._macs, self._params = _flat(macs), _flat(params)

    def __call__(self, alive: Alive) -> tuple[int, int]:
        """Multiply-adds and parameters with only the ``alive`` atoms."""
        sizes = self._extents.sizes(alive)
        macs = int((_products(self._macs, sizes) * self._factors).sum())
        params = int(_products(self._params, sizes).sum())
        return macs, params + sum(prod(h.left(alive)) for h in self._following)


def _flat(shapes: list[list[int]]) -> tuple[Ids, Ids]:
    """Places of many shapes in one array, and where each begins."""
    lengths = np.array([len(shape) for shape in shapes], dtype=np.int64)
    return np.array([k for shape in shapes for k in shape], dtype=np.int64), np.cumsum(lengths) - lengths


def _products(flat: tuple[Ids, Ids], sizes: Ids) -> Ids:
    places, starts = flat
    return np.multiply.reduceat(sizes[places], starts) if starts.size else np.empty(0, dtype=np.int64)
