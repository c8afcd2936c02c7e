"""Selection: shares, scopes, caps, minimum widths and rounding over rankings, without a model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.coupling import Family
from prunus.selection import Policy, Ranking, choose, choose_each, rank


def together(family: Family) -> int:
    """All families compete."""
    return 0


def families(*sizes: int, lanes: int = 1, least: int = 1) -> tuple[list[Family], int]:
    """Families with consecutive units, and how many units there are."""
    found, start = [], 0
    for size in sizes:
        parts = tuple(np.arange(start + k * size, start + (k + 1) * size) for k in range(lanes))
        found.append(Family(parts, coarse=False, least=least))
        start += size * lanes
    return found, start


def ranked(sizes: list[int], scores: np.ndarray | None = None, **options: int) -> list[Ranking]:
    found, total = families(*sizes, **options)
    scores = np.arange(total, dtype=float) if scores is None else scores
    return [rank(f, scores, np.ones(total, dtype=bool)) for f in found]


def left(rankings: list[Ranking], policy: Policy) -> list[int]:
    return [
        len(r) - len(gone) // r.table.shape[1] for r, gone in zip(rankings, choose_each(rankings, policy), strict=True)
    ]


def test_each_family_loses_its_share_of_the_least_important() -> None:
    scores = np.array([3.0, 0.0, 2.0, 1.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    rankings = ranked([4, 6], scores)
    assert choose(rankings, Policy(lambda f: 0.5)).tolist() == [1, 3, 9, 8, 7]
    assert left(rankings, Policy(lambda f: 0.5 if f.count == 4 else None)) == [2, 6]


def test_ties_go_by_position() -> None:
    rankings = ranked([4, 4], np.zeros(8))
    assert choose(rankings, Policy(lambda f: 0.5)).tolist() == [0, 1, 4, 5]
    assert choose(rankings, Policy(lambda f: 0.25, scope_of=together)).tolist() == [0, 1]


def test_one_threshold_for_all_that_compete() -> None:
    rankings = ranked([4, 4, 4])  # scores rise from the first family to the last
    assert left(rankings, Policy(lambda f: 0.5, scope_of=together)) == [1, 1, 4]
    assert left(rankings, Policy(lambda f: 0.5, cap=0.75, scope_of=together)) == [1, 1, 4]
    assert left(rankings, Policy(lambda f: 0.5, cap=0.5, scope_of=together)) == [2, 2, 2]


def test_scopes_compete_within_themselves() -> None:
    rankings = ranked([4, 4, 4, 4])
    names = {id(r.family): name for r, name in zip(rankings, "abab", strict=True)}
    policy = Policy(lambda f: 0.5, scope_of=lambda f: names[id(f)])
    assert left(rankings, policy) == [1, 1, 3, 3]


def test_a_cap_and_a_minimum_for_one_family() -> None:
    rankings = ranked([8, 8])
    first = rankings[0].family
    policy = Policy(
        lambda f: 0.75, cap_of=lambda f: 0.25 if f is first else None, least_of=lambda f: 1 if f is first else 5
    )
    assert left(rankings, policy) == [6, 5]
    assert left(rankings, Policy(lambda f: 0.9, least_of=lambda f: 100)) == [8, 8]


def test_rounding_is_to_the_nearest_and_looks_at_every_width() -> None:
    rankings = ranked([64])
    assert left(rankings, Policy(lambda f: 0.4, round_to=8)) == [40]
    assert left(rankings, Policy(lambda f: 0.45, round_to=8)) == [32]
    wide = [Ranking(r.family, r.table, r.scores, (1, 12)) for r in rankings]
    assert left(wide, Policy(lambda f: 0.45, round_to=8)) == [32]
    twelve = [Ranking(r.family, r.table, r.scores, (12, 24)) for r in rankings]
    assert left(twelve, Policy(lambda f: 0.45, round_to=8)) == [36]


def test_rounding_takes_nothing_from_a_family_that_keeps_all() -> None:
    rankings = ranked([30, 30])
    first = rankings[0].family
    assert left(rankings, Policy(lambda f: 0.0 if f is first else 0.5, round_to=8)) == [30, 16]


def test_rounding_never_breaks_the_cap() -> None:
    assert left(ranked([30]), Policy(lambda f: 0.5, cap=0.5, round_to=8)) == [16]
    assert left(ranked([30]), Policy(lambda f: 0.5, cap=0.4, round_to=8)) == [24]
    assert left(ranked([9]), Policy(lambda f: 0.9, round_to=8)) == [8]
    assert left(ranked([5]), Policy(lambda f: 0.9, round_to=8)) == [5]


def test_nothing_is_offered() -> None:
    assert choose([], Policy(lambda f: 0.5, scope_of=together)).tolist() == []
    gone = [rank(f, np.zeros(4), np.zeros(4, dtype=bool)) for f in families(4)[0]]
    assert len(gone[0]) == 0
    assert choose(gone, Policy(lambda f: 0.5, round_to=8)).tolist() == []


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    lanes=st.integers(1, 3),
    least=st.integers(1, 3),
    share=st.floats(0, 0.99),
    cap=st.floats(0.01, 1),
    round_to=st.sampled_from([None, 2, 8]),
    compete=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_holds_for_any_policy(
    sizes: list[int], lanes: int, least: int, share: float, cap: float, round_to: int | None, compete: bool, seed: int
) -> None:
    """Caps, minima and multiples hold; no more goes than the share; the same choice every time."""
    scores = np.random.default_rng(seed).integers(0, 5, sum(sizes) * lanes).astype(float)
    rankings = ranked(sizes, scores, lanes=lanes, least=least)
    policy = Policy(lambda f: share, cap, round_to, together if compete else None)
    kept = left(rankings, policy)
    for ranking, n in zip(rankings, kept, strict=True):
        count = ranking.family.count
        assert n >= min(count, max(1, least))
        assert count - n <= count * cap + 1e-9
        assert n == count or round_to is None or (n * lanes) % round_to == 0
    if round_to is None:
        assert sum(kept) >= sum(sizes) * (1 - share) - (1 if compete else len(sizes))
    assert np.array_equal(choose(rankings, policy), choose(rankings, policy))


def test_one_threshold_over_many_is_exact() -> None:
    """Of 200,000 channels in 100 families exactly half stay."""
    rankings = ranked([2000] * 100, np.random.default_rng(0).random(200_000))
    kept = left(rankings, Policy(lambda f: 0.5, scope_of=together))
    assert sum(kept) == 100_000


@pytest.mark.parametrize("round_to", [1, None])
def test_no_rounding(round_to: int | None) -> None:
    assert left(ranked([30]), Policy(lambda f: 0.5, round_to=round_to)) == [15]
