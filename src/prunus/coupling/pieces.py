"""Pieces: the longest stretches of atoms that nothing tells apart, and what ties them.

Ties are kept as intervals. Wherever one of them, a freeze, a row or a tie begins or ends, the line of atoms is cut;
cuts travel through ties until both ends of each tie are cut at the same places. From then on a piece behaves like a
single atom, whatever its length: a plain network of a million channels has a few hundred pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from prunus.labels import Ids, distinct, marks
from prunus.ledger import Ledger, Rows
from prunus.ties import LEFT_IS_ONE, MANY_TO_MANY, ONE_TO_ONE, RIGHT_IS_ONE, TieTable

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

    @cached_property
    def class_count(self) -> int:
        """The number of classes."""
        return int(self.classes.max()) + 1

    def of(self, positions: Ids) -> Ids:
        """The piece that holds each atom."""
        return _holding(self.start, positions)


def cut_into_pieces(ledger: Ledger) -> Pieces:
    """Pieces, classes, fine atoms and implications of everything that was recorded."""
    ties = ledger.ties
    start = _cuts(ledger, ties).nonzero()[0]
    start, length = start[:-1], start[1:] - start[:-1]
    left, right, kind, step = _piece_ties(ties, start)
    rows = [Rows(_holding(start, r.coarse), _holding(start, r.fine), r.split) for r in ledger.rows_of]
    while True:
        single = kind == ONE_TO_ONE
        classes = components(len(start), left[single], right[single])
        same = _equal_rows(rows, classes)
        if not len(same):
            break
        left, right = np.concatenate((left, same[:, 0])), np.concatenate((right, same[:, 1]))
        kind = np.concatenate((kind, np.full(len(same), ONE_TO_ONE)))
        step = np.concatenate((step, np.full(len(same), -1)))
    fine = classes if single.all() else components(len(start), left, right)
    cause, effect = _implications(left, right, kind, rows, classes)
    return Pieces(start, length, left, right, kind, step, classes, fine, cause, effect)


def components(count: int, left: Ids, right: Ids) -> Ids:
    """The component of each of ``count`` nodes, numbered by their first nodes.

    Roots are hooked to smaller roots until none is left to hook; the graphs are small and many, and the conversions of
    a general library would take most of the time.
    """
    root = np.arange(count)
    while left.size:
        a, b = root[left], root[right]
        apart = a != b
        if not apart.any():
            return ((root == np.arange(count)).cumsum() - 1)[root]
        np.minimum.at(root, np.maximum(a, b)[apart], np.minimum(a, b)[apart])
        while ((above := root[root]) != root).any():
            root = above
    return root


def stretches(start: Ids, length: Ids) -> Ids:
    """The numbers ``start[k], start[k] + 1, ...`` (``length[k]`` of them), one stretch behind the other."""
    ends = length.cumsum()
    return np.arange(ends[-1] if ends.size else 0) + (start - ends + length).repeat(length)


def runs_of(keys: Ids, values: Ids) -> Iterator[tuple[int, Ids]]:
    """Each key and its values, for keys in ascending order."""
    if keys.size:
        begins = [0, *(np.flatnonzero(keys[1:] != keys[:-1]) + 1).tolist(), len(keys)]
        for begin, end in pairwise(begins):
            yield keys.item(begin), values[begin:end]


def _holding(start: Ids, positions: Ids) -> Ids:
    """The number of the piece that holds each atom, given where pieces begin."""
    return start.searchsorted(positions, side="right") - 1


def _cuts(ledger: Ledger, ties: TieTable) -> NDArray[np.bool_]:
    """True where a piece begins, and behind the last one."""
    line = bytearray(ledger.size + 1)
    cut = np.frombuffer(line, dtype=bool)
    cut[[0, 1, -1]] = True
    cut[ledger.starts] = True
    for begin in (ties.left, ties.right):
        cut[begin] = True
        cut[begin + ties.length] = True
    groups = (ledger.freezes, ledger.requirements, ledger.balances, ledger.limits)
    rows_of = {id(item.ids): item.ids for items in groups for item in items}
    guarded = (ids for g in ledger.guards for ids in (g.cause, g.effect))
    _cut_rows(cut, [*rows_of.values(), *(r.fine for r in ledger.rows_of), *guarded])
    for rows in ledger.rows_of:
        cut[rows.coarse] = cut[rows.coarse + 1] = True
    _travel(line, cut, ties)
    return cut


def _cut_rows(cut: NDArray[np.bool_], arrays: Iterable[Ids]) -> None:
    """Cut where a consecutive stretch of a row (the last axis of an array) begins or ends."""
    found = [ids for ids in arrays if ids.size]
    if not found:
        return
    flat = np.concatenate([ids.reshape(-1) for ids in found])
    widths = np.repeat([ids.shape[-1] for ids in found], [ids.size // ids.shape[-1] for ids in found])
    broken = flat[1:] - flat[:-1] != 1
    broken[widths[:-1].cumsum() - 1] = True
    cut[flat[1:][broken]] = cut[flat[:1]] = True
    cut[flat[:-1][broken] + 1] = cut[flat[-1] + 1] = True


def _travel(line: bytearray, cut: NDArray[np.bool_], ties: TieTable) -> None:
    """Carry cuts through ties until both ends of each are cut alike; ``cut`` is the memory of ``line``."""
    inside = np.stack((ties.left, ties.left, ties.right, ties.right))
    inside[::2] += 1
    inside[1::2] += ties.length
    rounds, moved = 0, True
    while moved:
        rounds, moved = rounds + 1, False
        bounds = cut.nonzero()[0].searchsorted(inside)
        crossed = (bounds[::2] < bounds[1::2]).any(axis=0)
        for begin, end, other, last in inside[:, crossed].T.tolist():
            if line[begin:end] != line[other:last]:  # of bytes, as an array takes ten times as long for a few
                both = True if rounds > ROUNDS else cut[begin:end] | cut[other:last]
                cut[begin:end] = cut[other:last] = both
                moved = True


def _piece_ties(ties: TieTable, start: Ids) -> tuple[Ids, Ids, Ids, Ids]:
    """Each tie as ties between the pieces that it covers."""
    first = start.searchsorted(ties.left)
    count = start.searchsorted(ties.left + ties.length) - first
    other = start.searchsorted(ties.right)
    left, right = stretches(first, count), stretches(other, count)
    return left, right, ties.kind.repeat(count), ties.step.repeat(count)


def _equal_rows(rows_of: Sequence[Rows], classes: Ids) -> Ids:
    """Pairs of coarse pieces whose rows (of pieces) are the same classes, and which are not one class yet."""
    if not rows_of:
        return np.empty((0, 2), dtype=np.int64)
    numbers = marks(int(classes.max()) + 1, 0)
    marked = []
    for coarse, fine, split in rows_of:
        members = np.sort(classes[fine], axis=1)
        number = numbers[members]
        number[:, 1:][members[:, 1:] == members[:, :-1]] = 0
        mark = number.sum(axis=1)
        if split:  # a row of rows is what is in them
            numbers[classes[coarse]] = mark
        marked.append(mark)
    every = np.concatenate([rows.coarse for rows in rows_of])
    first_with: dict[int, int] = {}
    first = [first_with.setdefault(m, k) for k, m in enumerate(np.concatenate(marked).tolist())]
    pairs = np.stack((every[first], every), axis=1)
    return pairs[classes[pairs[:, 0]] != classes[pairs[:, 1]]]


def _implications(left: Ids, right: Ids, kind: Ids, rows_of: Sequence[Rows], classes: Ids) -> tuple[Ids, Ids]:
    """Pairs of classes: the one side of a tie takes the many, a coarse atom its row."""
    if not rows_of and not kind.any():
        return left[:0], left[:0]
    down = (kind == LEFT_IS_ONE) | (kind == MANY_TO_MANY)
    up = (kind == RIGHT_IS_ONE) | (kind == MANY_TO_MANY)
    cause, effect = [classes[left[down]], classes[right[up]]], [classes[right[down]], classes[left[up]]]
    for rows in rows_of:
        cause.append(classes[rows.coarse].repeat(rows.fine.shape[1]))
        effect.append(classes[rows.fine.reshape(-1)])
    if len(rows_of) > 1:
        outer, inner = _contained(rows_of, classes)
        cause.append(outer)
        effect.append(inner)
    first, second = np.concatenate(cause), np.concatenate(effect)
    count = int(classes.max()) + 1
    apart = first != second
    pairs = distinct(first[apart] * count + second[apart])
    return pairs // count, pairs % count


def _contained(rows_of: Sequence[Rows], classes: Ids) -> tuple[Ids, Ids]:
    """Classes of coarse atoms whose row holds the whole row of another one, and of that other one."""
    coarse = classes[np.concatenate([rows.coarse for rows in rows_of])]
    length = np.repeat([rows.fine.shape[1] for rows in rows_of], [len(rows.coarse) for rows in rows_of])
    number = np.arange(len(coarse)).repeat(length)
    count = int(classes.max()) + 1
    members = classes[np.concatenate([rows.fine.reshape(-1) for rows in rows_of])]
    held = distinct(number * count + members)  # pairs (row, class)
    row, member = np.divmod(held, count)
    length = np.bincount(row)
    holders, content, own = Relation(member, row, count), Relation(row, member, len(coarse)), None
    inside = np.zeros(count, dtype=bool)
    inside[member] = True
    if inside[coarse].any():  # what a row holds may be rows themselves
        own = Relation(coarse, np.arange(len(coarse)), count)
    while True:
        if own is not None:
            row, member = content.follow(*own.follow(*np.divmod(held, count)))
            held = distinct(np.concatenate((held, row * count + member)))
        outer, inner = holders.follow(*np.divmod(held, count))
        pairs, times = np.unique(outer * len(coarse) + inner, return_counts=True)
        outer, inner = np.divmod(pairs, len(coarse))
        whole = (times == length[inner]) & (coarse[outer] != coarse[inner])
        outer, inner = outer[whole], coarse[inner[whole]]
        grown = held if own is None else distinct(np.concatenate((held, outer * count + inner)))
        if grown.size == held.size:
            return coarse[outer], inner
        held = grown


class Relation:
    """Which numbers belong to each key (below ``count``)."""

    def __init__(self, keys: Ids, values: Ids, count: int) -> None:
        order = keys.argsort(kind="stable")
        self._values = values[order]
        self._first = keys[order].searchsorted(np.arange(count + 1))

    def follow(self, sources: Ids, keys: Ids) -> tuple[Ids, Ids]:
        """Each source with each of the numbers that belong to its key."""
        first = self._first[keys]
        many = self._first[keys + 1] - first
        return sources.repeat(many), self._values[stretches(first, many)]


def reachable(pieces: Pieces, source: Ids, first: Ids) -> tuple[Ids, Ids]:
    """All pairs of a source and a class that goes with it: ``first[k]`` goes with ``source[k]``, and so on.

    The pairs are in order.
    """
    count = pieces.class_count
    effects = Relation(pieces.cause, pieces.effect, count)
    frontier = reached = distinct(source * count + first)
    while frontier.size:
        source, effect = effects.follow(*np.divmod(frontier, count))
        found = distinct(source * count + effect)
        frontier = found[~np.isin(found, reached, assume_unique=True)] if found.size else found
        reached = np.concatenate((reached, frontier))
    source, effect = np.divmod(np.sort(reached), count)
    return source, effect
