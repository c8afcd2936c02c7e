"""Pieces: cuts travel through ties, and what nothing tells apart stays in one piece."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from prunus.coupling.pieces import components, cut_into_pieces
from prunus.ledger import Ledger


def test_whole_axes_stay_whole() -> None:
    """Two tied axes of a million positions are two pieces and one class."""
    ledger = Ledger()
    a, b = ledger.fresh(10**6), ledger.fresh(10**6)
    ledger.tie(a, b)
    pieces = cut_into_pieces(ledger)
    assert pieces.start.tolist() == [0, 1, 10**6 + 1]
    assert pieces.classes[1] == pieces.classes[2] != pieces.classes[0]


def test_a_cut_travels_through_a_chain_of_ties() -> None:
    """A freeze of a part of the first axis cuts the last axis at the same place."""
    ledger = Ledger()
    axes = [ledger.fresh(10) for _ in range(5)]
    for one, other in itertools.pairwise(axes):
        ledger.tie(one, other)
    ledger.freeze(axes[0][:3], "a part")
    pieces = cut_into_pieces(ledger)
    assert pieces.start.tolist() == [0, *(1 + 10 * k + part for k in range(5) for part in (0, 3))]
    assert len(np.unique(pieces.fine[1:])) == 2


def test_shifted_self_tie_ends() -> None:
    """Tying an axis to itself shifted by one makes every position one thing, and ends."""
    ledger = Ledger()
    a = ledger.fresh(200)
    ledger.tie(a[1:], a[:-1])
    pieces = cut_into_pieces(ledger)
    assert len(pieces.start) == 201
    assert len(np.unique(pieces.fine[1:])) == 1


def test_shift_by_more_than_one_leaves_residues() -> None:
    """Tied to itself shifted by 3, an axis has three components."""
    ledger = Ledger()
    a = ledger.fresh(60)
    ledger.tie(a[3:], a[:-3])
    pieces = cut_into_pieces(ledger)
    fine = pieces.fine[pieces.of(a)]
    assert len(np.unique(fine)) <= 3
    alike = {int(pieces.fine[pieces.of(a[k : k + 1])][0]) for k in (0, 3, 6)}
    assert len(alike) == 1


def test_reversed_tie_pairs_positions() -> None:
    """An axis tied to its flip is tied in pairs."""
    ledger = Ledger()
    a = ledger.fresh(6)
    ledger.tie(a, a[::-1])
    pieces = cut_into_pieces(ledger)
    assert len(np.unique(pieces.fine[pieces.of(a)])) == 3


def test_many_to_one_ties_join_fine_atoms_but_not_classes() -> None:
    """Rotary positions join d over the heads, but each head's d stays a class of its own; the one side causes it."""
    ledger = Ledger()
    one, many = ledger.fresh(3), ledger.fresh(6)
    ledger.tie(np.broadcast_to(one, (2, 3)), many.reshape(2, 3))
    pieces = cut_into_pieces(ledger)
    classes, fine = pieces.classes[pieces.of(many)], pieces.fine[pieces.of(many)]
    assert classes[0] != classes[3]
    assert fine[0] == fine[3]
    caused = set(zip(pieces.cause.tolist(), pieces.effect.tolist(), strict=True))
    top = int(pieces.classes[pieces.of(one[:1])][0])
    assert {(top, int(classes[0])), (top, int(classes[3]))} <= caused
    assert (int(classes[0]), top) not in caused


def test_equal_rows_share_a_coarse_atom() -> None:
    """Rows whose classes are the same are one row, also through ties."""
    ledger = Ledger()
    q, k = ledger.fresh(6), ledger.fresh(6)
    heads, others = ledger.rows(q.reshape(2, 3)), ledger.rows(k.reshape(2, 3))
    ledger.tie(q, k)
    pieces = cut_into_pieces(ledger)
    assert pieces.classes[pieces.of(heads)].tolist() == pieces.classes[pieces.of(others)].tolist()


def test_rows_of_equal_rows_share_too() -> None:
    """Equality climbs: rows of rows that became equal are equal."""
    ledger = Ledger()
    q, k = ledger.fresh(8), ledger.fresh(8)
    top_q = ledger.rows(ledger.rows(q.reshape(2, 2, 2)))
    top_k = ledger.rows(ledger.rows(k.reshape(2, 2, 2)))
    ledger.tie(q, k)
    pieces = cut_into_pieces(ledger)
    assert pieces.classes[pieces.of(top_q)].tolist() == pieces.classes[pieces.of(top_k)].tolist()


def test_of() -> None:
    """Each atom is found in its piece."""
    ledger = Ledger()
    a = ledger.fresh(5)
    ledger.fresh(2)
    pieces = cut_into_pieces(ledger)
    assert pieces.of(a).tolist() == [1] * 5
    assert pieces.length.tolist() == [1, 5, 2]


@pytest.mark.parametrize("seed", range(20))
def test_components_are_those_of_scipy(seed: int) -> None:
    """On random graphs of every density, numbered alike."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 400))
    edges = random.integers(0, count, size=(2, int(random.integers(0, 2 * count))))
    graph = coo_matrix((np.ones(edges.shape[1]), tuple(edges)), shape=(count, count))
    assert components(count, *edges).tolist() == connected_components(graph, directed=False)[1].tolist()


def test_components_without_edges() -> None:
    """Every node is its own component."""
    empty = np.empty(0, dtype=np.int64)
    assert components(3, empty, empty).tolist() == [0, 1, 2]


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.lists(st.integers(0, 5), min_size=1, max_size=6)), max_size=4
    ),
    st.integers(0, 2**32 - 1),
)
def test_fine_atoms_are_the_components_of_positions(recorded, seed) -> None:
    """Whatever is tied, pieces give the same components as a union over single positions."""
    ledger = Ledger()
    axes = [ledger.fresh(6) for _ in range(3)]
    random = np.random.default_rng(seed)
    parent = list(range(ledger.size))

    def root(k: int) -> int:
        while parent[k] != k:
            k = parent[k]
        return k

    for a, b, index in recorded:
        left, right = axes[a][index], axes[b][random.permutation(6)[: len(index)]]
        ledger.tie(left, right)
        for x, y in zip(left.tolist(), right.tolist(), strict=True):
            parent[root(x)] = root(y)
    pieces = cut_into_pieces(ledger)
    positions = np.arange(1, ledger.size)
    piece = pieces.of(positions)
    found = list(zip(pieces.fine[piece].tolist(), (positions - pieces.start[piece]).tolist(), strict=True))
    for x in range(len(positions)):
        for y in range(x):
            assert (found[x] == found[y]) == (root(x + 1) == root(y + 1))
