"""Ties as intervals say of each position what they were made of."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.ledger import Ledger
from prunus.ties import LEFT_IS_ONE, MANY, MANY_TO_MANY, ONE_TO_ONE, RIGHT_IS_ONE, tie_kinds, tie_runs


def positions(runs) -> set[tuple[int, int, int]]:
    """Every pair of atoms that runs tie, and how."""
    return {(a + k, b + k, kind) for a, b, length, kind in runs for k in range(length)}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(50, 80)), min_size=1, max_size=40), st.sampled_from([1, 12]))
def test_runs_tie_what_was_given(pairs, times) -> None:
    """Few runs, and so many that those which repeat are dropped."""
    left, right = np.array(pairs * times).T
    runs = tie_runs(left, right, np.array([ONE_TO_ONE]))
    assert positions(runs) == {(a, b, ONE_TO_ONE) for a, b in pairs}


def test_many_runs_that_repeat_are_told_once() -> None:
    """A pattern that comes again and again takes as many runs as one of it."""
    left, right = np.tile([1, 5, 9], MANY), np.tile([101, 107, 103], MANY)
    kinds = np.array([RIGHT_IS_ONE])
    assert sorted(map(tuple, tie_runs(left, right, kinds))) == [(1, 101, 1, 2), (5, 107, 1, 2), (9, 103, 1, 2)]


ROWS = np.arange(1, 9).reshape(4, 2)


@pytest.mark.parametrize(
    ("left", "right", "kinds"),
    [
        (ROWS, ROWS + 20, [ONE_TO_ONE]),
        (ROWS, np.tile([21, 22], (4, 1)), [RIGHT_IS_ONE]),
        (np.tile([21, 22], (4, 1)), ROWS, [LEFT_IS_ONE]),
        (ROWS[[0, 0, 0]], ROWS[[1, 1, 1]] + 20, [ONE_TO_ONE]),
        (ROWS[[0, 0, 1]], ROWS[[2, 3, 2]] + 20, [MANY_TO_MANY, LEFT_IS_ONE, RIGHT_IS_ONE]),
        (ROWS[[1, 0]], ROWS[[0, 1]] + 20, [ONE_TO_ONE, ONE_TO_ONE]),
    ],
)
def test_kind_of_rows(left, right, kinds) -> None:
    """A row that meets several is one to many, in whatever order the rows come."""
    assert tie_kinds(left, right).tolist() == kinds


def test_a_ledger_tells_ties_and_freezes_at_any_time() -> None:
    """What comes after a first look is there at the next one; a row that loses an atom to a freeze is frozen too."""
    ledger = Ledger()
    a, b = ledger.fresh(4), ledger.fresh(4)
    rows = ledger.rows(b.reshape(2, 2))
    ledger.tie(a, b)
    ledger.freeze(a[:1], "first")
    assert ledger.ties.left.tolist() == [a[0]]
    assert ledger.frozen()[[*a, *b, *rows]].tolist() == [True, *[False] * 9]
    c = ledger.fresh(2000)
    ledger.tie(a[:2], c[:2])
    ledger.pin(c, "not hard")
    ledger.freeze(b[2:3], "second")
    assert ledger.ties.right.tolist() == [b[0], c[0]]
    frozen = ledger.frozen()
    assert frozen[[*a, *b, *rows]].tolist() == [True, *[False] * 5, True, False, False, True]
    assert not frozen[c].any()
