"""Pointwise ops, broadcasting and in-place ops."""

# ruff: noqa: PLC3002, PLW0108 - the cases are one-liners
from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus

GOLDEN = [
    pytest.param(
        lambda a, b: a + b,
        [(2, 3), (3,)],
        "a0, a1 ; b0=a1",
        id="add",
    ),
    pytest.param(
        lambda a, b: a + b,
        [(2, 3), (2, 1)],
        "a0, a1 ; b0=a0",
        id="add-1s",
    ),
    pytest.param(
        lambda a, b: a + b,
        [(2, 1), (1, 3)],
        "a0, b1",
        id="add-outer",
    ),
    pytest.param(
        lambda a: a + torch.randn(3),
        [(2, 3)],
        "a0, a1! ; a1!",
        id="add-fixed",
    ),
    pytest.param(
        lambda a: a + 1,
        [(2, 3)],
        "a0, a1",
        id="add-scalar",
    ),
    pytest.param(
        lambda a, b: a.clone().mul_(b),
        [(2, 3), (3,)],
        "a0, a1 ; b0=a1",
        id="mul_",
    ),
    pytest.param(
        lambda a: F.relu_(a.clone()),
        [(2, 3)],
        "a0, a1",
        id="relu_",
    ),
    pytest.param(
        lambda a: F.hardswish(a.clone(), inplace=True),
        [(2, 3)],
        "a0, a1",
        id="hardswish_",
    ),
    pytest.param(
        lambda a, b: F.prelu(a, b),
        [(2, 3, 4), (3,)],
        "a0, a1, a2 ; b0=a1",
        id="prelu",
    ),
    pytest.param(
        lambda a, b: F.prelu(a, b),
        [(2, 3, 4), (1,)],
        "a0, a1, a2",
        id="prelu-1",
    ),
    pytest.param(
        lambda a, b: a.clamp(min=b),
        [(2, 3), (3,)],
        "a0, a1 ; b0=a1",
        id="clamp-t",
    ),
    pytest.param(
        lambda a, b: torch.lerp(a, b, 0.5),
        [(3,), (3,)],
        "a0 ; b0=a0",
        id="lerp",
    ),
    pytest.param(
        lambda a, b, c: torch.addcmul(a, b, c),
        [(2, 3), (3,), (2, 1)],
        "a0, a1 ; b0=a1 ; c0=a0",
        id="addcmul",
    ),
    pytest.param(
        lambda a: F.dropout(a, 0.5, True),
        [(2, 3)],
        "a0, a1",
        id="dropout",
    ),
    pytest.param(
        lambda a: F.gelu(a),
        [(2, 3)],
        "a0, a1",
        id="gelu",
    ),
    pytest.param(
        lambda a: F.dropout2d(a, 0.5, True),
        [(2, 3, 4)],
        "a0, a1, a2",
        id="dropout2d",
    ),
    pytest.param(
        lambda a, b: (a > 0) & (b > 0),
        [(3,), (3,)],
        "a0 ; b0=a0",
        id="logical",
    ),
    pytest.param(
        lambda a: torch.zeros_like(a),
        [(3,)],
        "a0",
        id="zeros_like",
    ),
    pytest.param(
        lambda a, b: torch.rand_like(a) + b,
        [(3,), (3,)],
        "a0 ; b0=a0",
        id="rand_like",
    ),
    pytest.param(
        lambda a, b: a.view(2, 4) + b,
        [(8,), (4,)],
        "{a0[0:4]}{a0[0:4]}, (a0[0:4] / a0[0:4])@0 ; a0=a0[0:4]+a0[0:4] ; b0=a0[0:4] ; a0[0:4]~a0[0:4]",
        id="heads+ctx",
    ),
    pytest.param(
        lambda a, b: a.view(2, 4) + b.view(2, 4),
        [(8,), (8,)],
        "{a0[0:4]}{a0[4:8]}, (a0[0:4] / a0[4:8])@0 ; b0=a0 ; a0[0:4]~a0[4:8] ; a0[0:4]~a0[4:8]",
        id="ctx+ctx",
    ),
    pytest.param(
        lambda a, b: a.view(2, 4) * b,
        [(8,), (2, 1)],
        "b0, (a0[0:4] / a0[4:8])@0 ; a0[0:4]~a0[4:8]",
        id="mul-bcast-rows",
    ),
    pytest.param(
        lambda a, b: a.clone().copy_(b),
        [(2, 3), (3,)],
        "a0, a1 ; b0=a1",
        id="copy_",
    ),
    pytest.param(
        lambda a: F.threshold(a, 0, 0),
        [(3,)],
        "a0",
        id="threshold",
    ),
    pytest.param(
        lambda a, b: torch.maximum(a, b),
        [(3,), (3,)],
        "a0 ; b0=a0",
        id="maximum",
    ),
]


@pytest.mark.parametrize(("function", "shapes", "expected"), GOLDEN)
def test_labels(golden, function, shapes, expected) -> None:
    """The output's labels, what is tied and what stays are exactly these (see conftest for the notation)."""
    assert golden(function, *shapes).text() == expected


NETWORKS = [
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q((lambda y: y.add_(s.b).relu_().mul_(2))(s.p(x))),
            p=nn.Linear(6, 8),
            b=nn.Parameter(torch.randn(8)),
            q=nn.Linear(8, 3),
        ),
        torch.randn(3, 6),
        8,
        0.967,
        id="inplace",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q((lambda y: (y[:, : s.c].add_(1), y)[1])(s.p(x))), p=nn.Linear(6, 8), c=4, q=nn.Linear(8, 3)
        ),
        torch.randn(3, 6),
        8,
        0.964,
        id="inplace-slice",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.m(s.m(s.p(x)).relu())), p=nn.Linear(6, 8), m=nn.Linear(8, 8), q=nn.Linear(8, 3)
        ),
        torch.randn(3, 6),
        8,
        0.981,
        id="shared",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q((lambda y: y + s.m(y).relu())(s.p(x))),
            p=nn.Linear(6, 8),
            m=nn.Linear(8, 8),
            q=nn.Linear(8, 3),
        ),
        torch.randn(3, 6),
        8,
        0.981,
        id="residual",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: F.glu(x), m2=4),
        torch.randn(3, 6),
        4,
        0.947,
        id="glu",
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


# --- by hand
def test_filling_a_buffer_by_slices(oracle, networks) -> None:
    """A tensor of derived size that is filled part by part follows the parts."""

    def fill(s, x):
        y = torch.zeros(x.shape[0], s.c + s.d)
        y[:, : s.c] = s.p(x)
        y[:, s.c :] = s.r(x)
        return s.q(y)

    net = networks.Net(fill, p=nn.Linear(6, 4), r=nn.Linear(6, 4), c=4, d=4, q=nn.Linear(8, 3))
    assert oracle(net, torch.randn(3, 6)).bundles == 8
