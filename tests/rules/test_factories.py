"""New tensors of derived sizes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import prunus

GOLDEN = [
    pytest.param(
        lambda a: torch.cat([a, torch.zeros(2, a.shape[1])]),
        [(4, 3)],
        "a0+new2?!, a1",
        id="zeros-attr",
    ),
    pytest.param(
        lambda a: a.new_zeros(a.shape) + a,
        [(4, 3)],
        "a0, a1",
        id="new_zeros",
    ),
    pytest.param(
        lambda a: torch.zeros(4, 3) + a,
        [(4, 3)],
        "a0!, a1! ; a0! ; a1!",
        id="zeros-literal",
    ),
    pytest.param(
        lambda a: torch.ones(a.size(0), a.size(1)) * a,
        [(4, 3)],
        "a0, a1",
        id="ones-sizes",
    ),
    pytest.param(
        lambda a: a * torch.arange(a.shape[0]),
        [(4,)],
        "a0! ; a0!",
        id="arange-derived",
    ),
    pytest.param(
        lambda a: a @ torch.eye(a.shape[1]),
        [(4, 3)],
        "a0, a1",
        id="eye",
    ),
    pytest.param(
        lambda a: torch.full((a.shape[0],), 1.0) + a,
        [(4,)],
        "a0",
        id="full",
    ),
    pytest.param(
        lambda a: torch.zeros(size=(a.shape[0],)) + a,
        [(4,)],
        "a0",
        id="zeros-size-kw",
    ),
    pytest.param(
        lambda a: torch.zeros((a.shape[0],)) + a,
        [(4,)],
        "a0",
        id="empty-tuple",
    ),
]


@pytest.mark.parametrize(("function", "shapes", "expected"), GOLDEN)
def test_labels(golden, function, shapes, expected) -> None:
    """The output's labels, what is tied and what stays are exactly these (see conftest for the notation)."""
    assert golden(function, *shapes).text() == expected


NETWORKS = [
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(torch.cat([s.p(x), torch.zeros(x.shape[0], s.c)], -1)),
            p=nn.Linear(6, 8),
            c=2,
            q=nn.Linear(10, 3),
        ),
        torch.randn(3, 6),
        10,
        0.966,
        id="zeros-cat",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.p(x) + x.new_zeros(x.shape[0], s.c)), p=nn.Linear(6, 8), c=8, q=nn.Linear(8, 3)
        ),
        torch.randn(3, 6),
        8,
        0.964,
        id="new_zeros-add",
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
