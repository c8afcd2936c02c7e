"""Ties: which atoms of two dims meet, as intervals, and whether one meets several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from prunus.labels import Ids, distinct_rows

ONE_TO_ONE, LEFT_IS_ONE, RIGHT_IS_ONE, MANY_TO_MANY = 0, 1, 2, 3
MANY = 256  # runs of a tie that are worth sorting, to drop those that repeat


@dataclass(frozen=True)
class TieTable:
    """All ties as intervals: position ``k < length`` of ``left + k`` is tied to ``right + k``."""

    left: Ids
    right: Ids
    length: Ids
    step: Ids
    kind: Ids


def tie_runs(left: Ids, right: Ids, kinds: Ids) -> list[Any]:
    """Rows ``(start, start, length, kind)`` of maximal stretches in which both sides count up by one.

    Example:
        >>> tie_runs(np.array([1, 2, 5]), np.array([7, 8, 9]), np.array([ONE_TO_ONE]))
        [(1, 7, 2, 0), (5, 9, 1, 0)]
    """
    broken = left[1:] - left[:-1] != 1
    broken |= right[1:] - right[:-1] != 1
    starts = np.concatenate(([0], broken.nonzero()[0] + 1))
    if starts.size < MANY:
        begins = starts.tolist()
        each = zip(begins, [*begins[1:], left.size], strict=True)
        return [(left.item(k), right.item(k), end - k, kinds.item(k * kinds.size // left.size)) for k, end in each]
    lengths = np.diff(np.concatenate((starts, [left.size])))
    a, b = left[starts], right[starts]
    rows = np.stack((_pairs(a, b), a, b, lengths, kinds[starts * kinds.size // left.size]), axis=1)
    found: list[Any] = distinct_rows(rows)[0][:, 1:].tolist()
    return found


def _pairs(a: Ids, b: Ids) -> Ids:
    """A number for each pair, ascending with both."""
    return a * (int(b.max()) + 1) + b


def tie_kinds(left: Ids, right: Ids) -> Ids:
    """The kind of tie of each row (or of all): a row that meets several others (a broadcast over heads) is one to many.

    Example:
        >>> tie_kinds(np.array([[1, 2], [3, 4]]), np.array([[7, 8], [7, 8]])).tolist() == [RIGHT_IS_ONE]
        True
    """
    if left.ndim == 1 or left.size == left.shape[-1]:
        return np.array([ONE_TO_ONE])
    a, b = left[..., 0].reshape(-1), right[..., 0].reshape(-1)
    a_grows, b_grows = bool((a[1:] > a[:-1]).all()), bool((b[1:] > b[:-1]).all())
    if a_grows and b_grows:
        return np.array([ONE_TO_ONE])
    if b_grows and (a == a[0]).all():
        return np.array([LEFT_IS_ONE])
    if a_grows and (b == b[0]).all():
        return np.array([RIGHT_IS_ONE])
    _, first = np.unique(_pairs(a, b), return_index=True)
    if first.size == 1:
        return np.array([ONE_TO_ONE])
    kinds = np.zeros(a.size, dtype=np.int64)
    for own, kind in ((a, LEFT_IS_ONE), (b, RIGHT_IS_ONE)):
        values, counts = np.unique(own[first], return_counts=True)
        if len(values) < first.size:
            kinds += kind * (counts[np.searchsorted(values, own)] > 1)
    return kinds
