"""Pieces: the longest stretches of atoms that nothing tells apart, and what ties them.

Ties are kept as intervals. Wherever one of them, a freeze, a row or a tie begins or ends, the line of atoms is cut;
cuts travel through ties until both ends of each tie are cut at the same places. From then on a piece behaves like a
single atom, whatever its length: a plain network of a million channels has a few hundred pieces.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunus.labels import Ids, distinct, marks
from prunus.ledger import Ledger
from prunus.ties import LEFT_IS_ONE, MANY_TO_MANY, ONE_TO_ONE, RIGHT_IS_ONE

ROUNDS = 64  # after so many rounds of travelling cuts, what still moves is cut at every position


@dataclass(frozen=True)
class Pieces:
    """The line of atoms cut into pieces, and the ties between them.

    ``classes`` are components over one-to-one ties (one coordinate of one thing), ``fine`` over all ties.
    ``cause -> effect`` are pairs of classes: if the first goes, the second goes.
    """

    start: Ids
    length: Ids
    left: Ids
    right: Ids
    kind: Ids
    step: Ids
    classes: Ids
    fine: Ids
    cause: Ids
    effect: Ids

    def of(self, positions: Ids) -> Ids:
        """The piece that holds each atom."""
        return np.searchsorted(self.start, positions, side="right") - 1


def cut_into_pieces(ledger: Ledger) -> Pieces:
    """Pieces, classes, fine atoms and implications of everything that was recorded."""
    cut = _cuts(ledger)
    start = np.flatnonzero(cut[:-1])
    length = np.diff(np.concatenate((start, [ledger.size])))
    left, right, kind, step = _piece_ties(ledger, start)
    single = kind == ONE_TO_ONE
    classes = components(len(start), left[single], right[single])
    draft = Pieces(start, length, left, right, kind, step, classes, classes, classes, classes)
    same = _equal_rows(ledger, draft)
    while len(same):
        left, right = np.concatenate((left, same[:, 0])), np.concatenate((right, same[:, 1]))
        kind = np.concatenate((kind, np.full(len(same), ONE_TO_ONE)))
        step = np.concatenate((step, np.full(len(same), -1)))
        single = kind == ONE_TO_ONE
        classes = components(len(start), left[single], right[single])
        draft = Pieces(start, length, left, right, kind, step, classes, classes, classes, classes)
        same = _equal_rows(ledger, draft)
    fine = components(len(start), left, right)
    cause, effect = _implications(ledger, draft)
    return Pieces(start, length, left, right, kind, step, classes, fine, cause, effect)


def components(count: int, left: Ids, right: Ids) -> Ids:
    """The component of each of ``count`` nodes, numbered by their first nodes.

    Roots are hooked to smaller roots until none is left to hook; the graphs are small and many, and the conversions of
    a general library would take most of the time.
    """
    root = np.arange(count)
    while True:
        a, b = root[left], root[right]
        apart = a != b
        if not apart.any():
            return (np.cumsum(root == np.arange(count)) - 1)[root]
        np.minimum.at(root, np.maximum(a, b)[apart], np.minimum(a, b)[apart])
        while not np.array_equal(above := root[root], root):
            root = above


def stretches(start: Ids, length: Ids) -> Ids:
    """The numbers ``start[k], start[k] + 1, ...`` (``length[k]`` of them), one stretch behind the other."""
    return np.arange(int(length.sum())) + np.repeat(start - np.cumsum(length) + length, length)


def _cuts(ledger: Ledger) -> NDArray[np.bool_]:
    """True where a piece begins."""
    cut = np.zeros(ledger.size + 1, dtype=bool)
    cut[0] = cut[1] = cut[ledger.size] = True
    cut[ledger.starts] = True
    ties = ledger.ties
    for begin in (ties.left, ties.right):
        cut[begin] = True
        cut[begin + ties.length] = True
    groups = (ledger.freezes, ledger.requirements, ledger.balances, ledger.limits)
    rows_of = {id(item.ids): item.ids for items in groups for item in items}
    guarded = (ids for g in ledger.guards for ids in (g.cause, g.effect))
    _cut_rows(cut, [*rows_of.values(), *(r.fine for r in ledger.rows_of), *guarded])
    for rows in ledger.rows_of:
        cut[rows.coarse] = cut[rows.coarse + 1] = True
    _travel(cut, ties.left, ties.right, ties.length)
    return cut


def _cut_rows(cut: NDArray[np.bool_], arrays: Iterable[Ids]) -> None:
    """Cut where a consecutive stretch of a row (the last axis of an array) begins or ends."""
    found = [ids for ids in arrays if ids.size]
    if not found:
        return
    flat = np.concatenate([ids.reshape(-1) for ids in found])
    widths = np.repeat([ids.shape[-1] for ids in found], [ids.size // ids.shape[-1] for ids in found])
    ends = np.cumsum(widths)
    cut[flat[ends - widths]] = True
    cut[flat[ends - 1] + 1] = True
    broken = flat[1:] - flat[:-1] != 1
    broken[ends[:-1] - 1] = False
    cut[flat[1:][broken]] = True
    cut[flat[:-1][broken] + 1] = True


def _travel(cut: NDArray[np.bool_], left: Ids, right: Ids, length: Ids) -> None:
    """Carry cuts through ties until both ends of each are cut alike."""
    long = length > 1
    ties = np.stack((left[long], right[long], length[long]), axis=1)
    for round_ in range(ROUNDS + 1):
        at = np.flatnonzero(cut)
        a, b, n = ties.T
        bounds = np.searchsorted(at, np.stack((a + n, a + 1, b + n, b + 1)))
        moved = False
        for start, other, size in ties[(bounds[0] > bounds[1]) | (bounds[2] > bounds[3])].tolist():
            here, there = cut[start + 1 : start + size], cut[other + 1 : other + size]
            both = here | there
            if round_ == ROUNDS and not np.array_equal(here, there):
                both[:] = True
            if both.sum() > here.sum() or both.sum() > there.sum():
                here[:] = both
                there[:] = both
                moved = True
        if not moved:
            return
    _travel(cut, left, right, length)


def _piece_ties(ledger: Ledger, start: Ids) -> tuple[Ids, Ids, Ids, Ids]:
    """Each tie as ties between the pieces that it covers."""
    ties = ledger.ties
    first = np.searchsorted(start, ties.left)
    count = np.searchsorted(start, ties.left + ties.length) - first
    other = np.searchsorted(start, ties.right)
    left, right = stretches(first, count), stretches(other, count)
    return left, right, np.repeat(ties.kind, count), np.repeat(ties.step, count)


def _equal_rows(ledger: Ledger, pieces: Pieces) -> Ids:
    """Pairs of coarse pieces whose rows are the same classes, and which are not one class yet."""
    if not ledger.rows_of:
        return np.empty((0, 2), dtype=np.int64)
    numbers = marks(int(pieces.classes.max()) + 1, 0)
    found, marked = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.uint64)]
    for rows in ledger.rows_of:
        coarse = pieces.of(rows.coarse)
        members = np.sort(pieces.classes[pieces.of(rows.fine)], axis=1)
        number = numbers[members]
        number[:, 1:][members[:, 1:] == members[:, :-1]] = 0
        mark = number.sum(axis=1)
        if rows.split:  # a row of rows is what is in them
            numbers[pieces.classes[coarse]] = mark
        found.append(coarse)
        marked.append(mark)
    every = np.concatenate(found)
    _, first, which = np.unique(np.concatenate(marked), return_index=True, return_inverse=True)
    pairs = np.stack((every[first[which]], every), axis=1)
    return pairs[pieces.classes[pairs[:, 0]] != pieces.classes[pairs[:, 1]]]


def _implications(ledger: Ledger, pieces: Pieces) -> tuple[Ids, Ids]:
    """Pairs of classes: the one side of a tie takes the many, a coarse atom its row."""
    classes = pieces.classes
    down = (pieces.kind == LEFT_IS_ONE) | (pieces.kind == MANY_TO_MANY)
    up = (pieces.kind == RIGHT_IS_ONE) | (pieces.kind == MANY_TO_MANY)
    cause = [classes[pieces.left[down]], classes[pieces.right[up]]]
    effect = [classes[pieces.right[down]], classes[pieces.left[up]]]
    for rows in ledger.rows_of:
        members = pieces.of(rows.fine)
        cause.append(np.repeat(classes[pieces.of(rows.coarse)], members.shape[1]))
        effect.append(classes[members.reshape(-1)])
    for outer, inner in _contained(ledger, pieces):
        cause.append(outer)
        effect.append(inner)
    first, second = np.concatenate(cause), np.concatenate(effect)
    count = int(classes.max()) + 1
    apart = first != second
    pairs = distinct(first[apart] * count + second[apart])
    return pairs // count, pairs % count


def _contained(ledger: Ledger, pieces: Pieces) -> list[tuple[Ids, Ids]]:
    """Classes of coarse atoms whose row holds the whole row of another one, and of that other one."""
    if len(ledger.rows_of) < 2:
        return []
    members = [pieces.classes[pieces.of(r.fine)] for r in ledger.rows_of]
    coarse = np.concatenate([pieces.classes[pieces.of(r.coarse)] for r in ledger.rows_of])
    number = np.repeat(np.arange(len(coarse)), np.concatenate([np.full(len(m), m.shape[1]) for m in members]))
    count = int(pieces.classes.max()) + 1
    held = distinct(number * count + np.concatenate([m.reshape(-1) for m in members]))  # pairs (row, class)
    row, member = np.divmod(held, count)
    length = np.bincount(row)
    holders, content, rows_of = _Relation(member, row, count), _Relation(row, member, len(coarse)), None
    if np.isin(coarse, member).any():  # what a row holds may be rows themselves
        rows_of = _Relation(coarse, np.arange(len(coarse)), count)
    while True:
        if rows_of is not None:
            inside = content.follow(*rows_of.follow(*np.divmod(held, count)))
            held = distinct(np.concatenate((held, inside[0] * count + inside[1])))
        outer, inner = holders.follow(*np.divmod(held, count))
        pairs, times = np.unique(outer * len(coarse) + inner, return_counts=True)
        outer, inner = np.divmod(pairs, len(coarse))
        whole = (times == length[inner]) & (coarse[outer] != coarse[inner])
        outer, inner = outer[whole], coarse[inner[whole]]
        grown = distinct(np.concatenate((held, outer * count + inner)))
        if rows_of is None or grown.size == held.size:
            return [(coarse[outer], inner)]
        held = grown


class _Relation:
    """Which numbers belong to each key (below ``count``)."""

    def __init__(self, keys: Ids, values: Ids, count: int) -> None:
        order = np.argsort(keys, kind="stable")
        self._values = values[order]
        self._first = np.searchsorted(keys[order], np.arange(count + 1))

    def follow(self, sources: Ids, keys: Ids) -> tuple[Ids, Ids]:
        """Each source with each of the numbers that belong to its key."""
        first = self._first[keys]
        many = self._first[keys + 1] - first
        return np.repeat(sources, many), self._values[stretches(first, many)]


def reachable(pieces: Pieces, source: Ids, first: Ids) -> tuple[Ids, Ids]:
    """All pairs of a source and a class that goes with it: ``first[k]`` goes with ``source[k]``, and so on.

    The pairs are in order.
    """
    count = int(pieces.classes.max()) + 1
    effects = _Relation(pieces.cause, pieces.effect, count)
    frontier = reached = distinct(source * count + first)
    while frontier.size:
        source, effect = effects.follow(*np.divmod(frontier, count))
        frontier = np.setdiff1d(source * count + effect, reached)
        reached = np.concatenate((reached, frontier))
    source, found = np.divmod(np.sort(reached), count)
    return source, found
