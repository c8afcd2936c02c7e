"""Labels and the ledger: what is recorded, and in which form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.labels import Label, Labelled, Survivors, first_row, settle, surviving, unlabelled
from prunus.ledger import Ledger
from prunus.ties import LEFT_IS_ONE, MANY_TO_MANY, ONE_TO_ONE, RIGHT_IS_ONE


def ties(ledger: Ledger) -> list[tuple[int, int, int, int]]:
    """(left, right, length, kind) of every tie."""
    table = ledger.ties
    columns = (table.left, table.right, table.length, table.kind)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def test_fresh_atoms_are_consecutive_and_never_zero() -> None:
    """Atom 0 stands for frozen and is never handed out."""
    ledger = Ledger()
    assert ledger.fresh(3).tolist() == [1, 2, 3]
    assert ledger.fresh(2).tolist() == [4, 5]
    assert ledger.size == 6
    assert ledger.starts == [0, 1, 4]


def test_whole_axis_tie_is_one_interval() -> None:
    """A million positions tied to a million positions are one entry."""
    ledger = Ledger()
    a, b = ledger.fresh(10**6), ledger.fresh(10**6)
    ledger.tie(a, b)
    assert ties(ledger) == [(1, 10**6 + 1, 10**6, ONE_TO_ONE)]


def test_tie_of_parts_is_cut_into_runs() -> None:
    """Stretches that count up together are one interval each."""
    ledger = Ledger()
    a, b = ledger.fresh(6), ledger.fresh(6)
    ledger.tie(a, np.concatenate((b[3:], b[:3])))
    assert ties(ledger) == [(1, 10, 3, ONE_TO_ONE), (4, 7, 3, ONE_TO_ONE)]


def test_the_same_tie_is_recorded_once() -> None:
    """Repeats, ties of a thing to itself and ties of nothing add nothing."""
    ledger = Ledger()
    a, b = ledger.fresh(4), ledger.fresh(4)
    for _ in range(3):
        ledger.tie(a, b)
    ledger.tie(a, a)
    ledger.tie(a[:0], b[:0])
    ledger.tie(a, a.copy())
    assert ties(ledger) == [(1, 5, 4, ONE_TO_ONE)]


def test_broadcast_makes_many_to_one() -> None:
    """The side that is repeated is the one side: rotary positions against every head."""
    ledger = Ledger()
    one, many = ledger.fresh(3), ledger.fresh(6)
    ledger.tie(np.broadcast_to(one, (2, 3)), many.reshape(2, 3))
    assert ties(ledger) == [(1, 4, 3, LEFT_IS_ONE), (1, 7, 3, LEFT_IS_ONE)]


def test_the_one_side_may_be_on_the_right() -> None:
    """The kind tells which side is repeated."""
    ledger = Ledger()
    one, many = ledger.fresh(2), ledger.fresh(4)
    ledger.tie(many.reshape(2, 2), np.broadcast_to(one, (2, 2)))
    assert {kind for *_, kind in ties(ledger)} == {RIGHT_IS_ONE}


def test_repeats_inside_a_row_are_one_thing() -> None:
    """Copies that lie in one dim (a flattened channel, grouped queries) go together: no row can take only some."""
    ledger = Ledger()
    one, many = ledger.fresh(2), ledger.fresh(4)
    ledger.tie(many, np.repeat(one, 2))
    assert {kind for *_, kind in ties(ledger)} == {ONE_TO_ONE}


def test_rows_that_meet_several_on_both_sides_are_many_to_many() -> None:
    """Every row of one side against every row of the other."""
    ledger = Ledger()
    a, b = ledger.fresh(4).reshape(2, 2), ledger.fresh(4).reshape(2, 2)
    ledger.tie(a[[0, 0, 1, 1]], b[[0, 1, 0, 1]])
    assert {kind for *_, kind in ties(ledger)} == {MANY_TO_MANY}


def test_a_stronger_tie_of_the_same_things_counts() -> None:
    """A tie over heads does not hide a later one that is one-to-one."""
    ledger = Ledger()
    one, many = ledger.fresh(3), ledger.fresh(6)
    ledger.tie(np.broadcast_to(one, (2, 3)), many.reshape(2, 3))
    ledger.tie(one, many[:3])
    assert (1, 4, 3, ONE_TO_ONE) in ties(ledger)


@pytest.mark.parametrize("fixed", [True, False])
def test_united_rows_live_together(fixed) -> None:
    """Of a fixed number of rows none goes alone; otherwise something stands for all of them."""
    ledger = Ledger()
    ids = ledger.fresh(6).reshape(2, 3)
    one = ledger.unite(ids, 0, fixed)
    assert ties(ledger) == ([(1, 4, 3, ONE_TO_ONE)] if fixed else [(7, 1, 3, LEFT_IS_ONE), (7, 4, 3, LEFT_IS_ONE)])
    assert one.tolist() == ([1, 2, 3] if fixed else [7, 8, 9])


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=12))
def test_runs_cover_exactly_the_pairs(pairs) -> None:
    """Whatever is tied, the intervals hold the given pairs and no others."""
    ledger = Ledger()
    a, b = ledger.fresh(8), ledger.fresh(8)
    left, right = (np.array(side) for side in zip(*pairs, strict=True))
    ledger.tie(a[left], b[right])
    covered = {(x + k, y + k) for x, y, n, _ in ties(ledger) for k in range(n)}
    assert covered == {(int(a[i]), int(b[j])) for i, j in pairs}


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=8, unique=True))
def test_kind_counts_partners(pairs) -> None:
    """If no row has two partners every kind is one-to-one; if one has, some kind says so."""
    ledger = Ledger()
    a, b = ledger.fresh(12).reshape(6, 2), ledger.fresh(12).reshape(6, 2)
    left, right = (np.array(side) for side in zip(*pairs, strict=True))
    ledger.tie(a[left], b[right])
    unique = len(set(left.tolist())) == len(pairs) and len(set(right.tolist())) == len(pairs)
    assert all(kind == ONE_TO_ONE for *_, kind in ties(ledger)) == unique


def test_couple_broadcasts_over_contexts() -> None:
    """Two labels of one dim are tied over the union of their contexts."""
    ledger = Ledger()
    rows, vector = ledger.fresh(6).reshape(2, 3), ledger.fresh(3)
    ledger.couple(Label(rows, (1,)), Label(vector))
    assert ties(ledger) == [(1, 7, 3, RIGHT_IS_ONE), (4, 7, 3, RIGHT_IS_ONE)]


def test_couple_lines_up_different_contexts() -> None:
    """A label over dims (0, 1) meets one over dim 1: the second is repeated over dim 0."""
    ledger = Ledger()
    both, one = ledger.fresh(8).reshape(2, 2, 2), ledger.fresh(4).reshape(2, 2)
    ledger.couple(Label(both, (0, 1)), Label(one, (1,)))
    covered = {(x + k, y + k) for x, y, n, _ in ties(ledger) for k in range(n)}
    assert covered == {(1, 9), (2, 10), (3, 11), (4, 12), (5, 9), (6, 10), (7, 11), (8, 12)}


def test_the_same_rows_get_the_same_coarse_atoms() -> None:
    """Two views of one split share their heads; other rows get others."""
    ledger = Ledger()
    ids = ledger.fresh(12)
    first = ledger.rows(ids.reshape(3, 4))
    again = ledger.rows(ids.reshape(3, 4).copy())
    other = ledger.rows(ids.reshape(4, 3))
    assert first is again
    assert first.tolist() == [13, 14, 15]
    assert other.tolist() == [16, 17, 18, 19]
    assert len(ledger.rows_of) == 2


def test_rows_of_rows_keep_their_shape() -> None:
    """Coarse atoms of a label with context have the context's shape."""
    ledger = Ledger()
    coarse = ledger.rows(ledger.fresh(12).reshape(2, 3, 2))
    assert coarse.shape == (2, 3)
    assert ledger.rows_of[0].fine.shape == (6, 2)


def test_balance_needs_two_rows() -> None:
    """One row is always as long as itself."""
    ledger = Ledger()
    ids = ledger.fresh(6)
    ledger.balance(ids.reshape(1, 6), "alone")
    assert ledger.balances == []
    ledger.balance(ids.reshape(2, 3), "halves")
    assert ledger.balances[0].ids.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_freeze_is_hard_and_pin_is_not() -> None:
    """A pinned atom may go with its row, a frozen one may not; both keep reason and step."""
    ledger = Ledger()
    ids = ledger.fresh(2)
    ledger.step = 7
    ledger.freeze(ids, "output")
    ledger.pin(ids, "part of a row")
    assert [(f.reason, f.step, f.hard) for f in ledger.freezes] == [("output", 7, True), ("part of a row", 7, False)]


def test_settle_drops_contexts_along_which_nothing_varies() -> None:
    """Ids repeated along a context do not depend on it."""
    ids = np.broadcast_to(np.arange(4), (3, 2, 4))
    assert settle(Label(ids, (0, 2))).context == ()
    varying = np.arange(8).reshape(1, 2, 4).repeat(3, axis=0)
    settled = settle(Label(varying, (0, 2)))
    assert settled.context == (2,)
    assert settled.ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_over_puts_contexts_in_the_asked_order() -> None:
    """Axes follow the asked context dims, with size 1 for those the label does not depend on."""
    label = Label(np.arange(24).reshape(2, 3, 4), (5, 1))
    assert label.over((1, 5)).shape == (3, 2, 4)
    assert label.over((0, 1, 5)).shape == (1, 3, 2, 4)
    assert np.array_equal(label.over((5, 1)), label.ids)


def test_rename_moves_contexts() -> None:
    """After a permute the contexts are counted in the new dims."""
    label = Label(np.zeros((2, 3), dtype=np.int64), (0,))
    assert label.rename({0: 3}).context == (3,)
    plain = Label(np.arange(3))
    assert plain.rename({0: 3}) is plain


def test_size_and_row() -> None:
    """The size is that of the dim; the row is the first one."""
    label = Label(np.arange(6).reshape(2, 3), (0,))
    assert label.size == 3
    assert label.row.tolist() == [0, 1, 2]
    assert first_row(np.arange(4)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("gone", "left"),
    [([], 3), ([0], 2), ([0, 1, 2], 3), ([0, 1, 2, 4], 2), ([0, 1, 2, 3, 4, 5], 0)],
)
def test_surviving_skips_rows_that_are_gone(gone, left) -> None:
    """The length of a head is that of a head that is still there."""
    alive = np.ones(6, dtype=bool)
    alive[gone] = False
    assert surviving(alive, np.arange(6).reshape(2, 3)) == left


def test_surviving_of_one_row() -> None:
    """Without a context it is a plain count."""
    alive = np.array([True, False, True, True])
    assert surviving(alive, np.arange(4)) == 3


def test_unlabelled_knows_its_shape_only() -> None:
    """A tensor of which nothing is known has a shape and no labels."""
    tensor = unlabelled((2, 3))
    assert (tensor.shape, tensor.ndim, tensor.labelled, tensor.dims) == ((2, 3), 2, False, (None, None))
    assert Labelled((2,), (Label(np.array([1, 2])),)).labelled


def test_empty_ledger_has_an_empty_table() -> None:
    """No ties are no rows, not an error."""
    assert Ledger().ties.left.shape == (0,)


def test_survivors_count_as_the_function_does_and_each_row_once() -> None:
    alive = np.array([False, True, True, False, False, True])
    count = Survivors(alive)
    rows = [np.arange(6), np.arange(6).reshape(2, 3), np.empty(0, dtype=np.int64), np.array([[0, 3], [1, 4]])]
    expected = [surviving(alive, ids) for ids in rows]
    assert [count(ids) for ids in rows] == expected == [3, 2, 0, 1]
    alive[:] = False
    assert [count(ids) for ids in rows] == expected
