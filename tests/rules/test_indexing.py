"""Look-ups by number."""

# ruff: noqa: PLC3002 - the cases are one-liners
from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus

GOLDEN = [
    pytest.param(
        lambda a: F.embedding(torch.tensor([0, 1]), a),
        [(5, 3)],
        "-, a1 ; a0!",
        id="embedding",
    ),
    pytest.param(
        lambda a: a.index_select(0, torch.tensor([0, 1])),
        [(5, 3)],
        "-, a1 ; a0!",
        id="index_select",
    ),
    pytest.param(
        lambda a: a[torch.tensor([0, 1])],
        [(5, 3)],
        "-, a1 ; a0!",
        id="index",
    ),
    pytest.param(
        lambda a: a[:, torch.tensor([0, 1])],
        [(5, 3)],
        "a0, - ; a1!",
        id="index-2",
    ),
    pytest.param(
        lambda a: a[torch.tensor([0, 1]), torch.tensor([0, 1])],
        [(5, 3)],
        "- ; a0! ; a1!",
        id="index-both",
    ),
    pytest.param(
        lambda a: a[torch.tensor([0, 1]), :, torch.tensor([0, 1])],
        [(5, 3, 4)],
        "-, a1 ; a0! ; a2!",
        id="index-apart",
    ),
    pytest.param(
        lambda a: a[:, None, torch.tensor([0, 1])],
        [(5, 3)],
        "a0, -, - ; a1!",
        id="index-none",
    ),
    pytest.param(
        lambda a: a[torch.tensor([True, False, True])],
        [(3, 2)],
        "new2!, a1 ; a0!",
        id="bool-mask",
    ),
    pytest.param(
        lambda a, b: torch.where(a > 0, a, b),
        [(2, 3), (3,)],
        "a0, a1 ; b0=a1",
        id="where",
    ),
    pytest.param(
        lambda a: a.masked_fill(torch.tensor([True, False, True]), 0),
        [(2, 3)],
        "a0, a1! ; a1!",
        id="masked_fill",
    ),
    pytest.param(
        lambda a: F.one_hot(a.argmax(1), 3),
        [(2, 3)],
        "a0, a1",
        id="one_hot",
    ),
    pytest.param(
        lambda a, b: (lambda z: (z.__setitem__(slice(0, 2), b), z)[1])(a.clone()),
        [(4, 3), (2, 3)],
        "a0, a1 ; b0=a0[0:2] ; b1=a1",
        id="setitem",
    ),
    pytest.param(
        lambda a, b: (lambda z: (z.__setitem__((slice(None), slice(0, 2)), b), z)[1])(a.clone()),
        [(4, 3), (4, 2)],
        "a0, a1 ; b0=a0 ; b1=a1[0:2]",
        id="setitem-chan",
    ),
    pytest.param(
        lambda a: a[torch.tensor(1)],
        [(3, 4)],
        "a1 ; a0!",
        id="index-0d",
    ),
    pytest.param(
        lambda a, b: a * b[torch.arange(2)],
        [(2, 3), (8, 3)],
        "a0!, b1 ; a0! ; a1=b1 ; b0!",
        id="rope-cache",
    ),
]


@pytest.mark.parametrize(("function", "shapes", "expected"), GOLDEN)
def test_labels(golden, function, shapes, expected) -> None:
    """The output's labels, what is tied and what stays are exactly these (see conftest for the notation)."""
    assert golden(function, *shapes).text() == expected


NETWORKS = [
    pytest.param(
        lambda net: net.Net(lambda s, i: s.q(s.e(i)), e=nn.Embedding(10, 8), q=nn.Linear(8, 4)),
        torch.tensor([[1, 2], [3, 4]]),
        8,
        0.966,
        id="embedding",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, i: F.linear(s.q(s.e(i) + s.pe[: i.shape[1]]), s.e.weight),
            e=nn.Embedding(10, 8),
            pe=nn.Parameter(torch.randn(6, 8)),
            q=nn.Linear(8, 8),
        ),
        torch.tensor([[1, 2], [3, 4]]),
        12,
        1.0,
        id="emb-pos-tied",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x[:, s.ix], ix=torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])),
        torch.randn(3, 6),
        0,
        0.0,
        id="index-chan",
    ),
]


@pytest.mark.parametrize(("build", "inputs", "bundles", "share"), NETWORKS)
def test_network(oracle, networks, build, inputs, bundles, share) -> None:
    """Symmetry, silence, cost, replay and undo hold around the op, and as much can be removed as expected."""
    if bundles == 0:
        with pytest.raises(prunus.NothingToPruneError):
            oracle(build(networks), inputs)
        return
    if bundles is None:  # it must be sound; how much can be removed is open
        with contextlib.suppress(prunus.NothingToPruneError):
            oracle(build(networks), inputs)
        return
    found = oracle(build(networks), inputs)
    assert (found.bundles, round(found.share, 3)) == (bundles, share)
