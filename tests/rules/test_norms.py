"""Norms of all kinds."""

# ruff: noqa: PLW0108 - the cases are one-liners
from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus

GOLDEN = [
    pytest.param(
        lambda a, b, c, d, e: F.batch_norm(a, b, c, d, e),
        [(2, 3, 5), (3,), (3,), (3,), (3,)],
        "a0, a1, a2 ; b0=a1 ; c0=a1 ; d0=a1 ; e0=a1",
        id="bn",
    ),
    pytest.param(
        lambda a, b, c: F.batch_norm(a, b, c),
        [(2, 3), (3,), (3,)],
        "a0, a1 ; b0=a1 ; c0=a1",
        id="bn-none",
    ),
    pytest.param(
        lambda a, b, c: F.instance_norm(a, None, None, b, c),
        [(2, 3, 5), (3,), (3,)],
        "a0, a1, a2 ; b0=a1 ; c0=a1",
        id="in",
    ),
    pytest.param(
        lambda a, b, c: F.layer_norm(a, (3,), b, c),
        [(2, 3), (3,), (3,)],
        "a0, a1 ; b0=a1 ; c0=a1",
        id="ln",
    ),
    pytest.param(
        lambda a, b: F.layer_norm(a, (3, 4), b),
        [(2, 3, 4), (3, 4)],
        "a0, a1, a2 ; b0=a1 ; b1=a2",
        id="ln-2d",
    ),
    pytest.param(
        lambda a, b: F.rms_norm(a, (3,), b),
        [(2, 3), (3,)],
        "a0, a1 ; b0=a1",
        id="rms",
    ),
    pytest.param(
        lambda a, b, c: F.group_norm(a, 2, b, c),
        [(1, 4, 5), (4,), (4,)],
        "-, a1, a2 ; b0=a1 ; c0=a1 ; a1[0:2]~a1[2:4]",
        id="gn",
    ),
    pytest.param(
        lambda a: F.group_norm(a, 1),
        [(1, 4, 5)],
        "-, a1, a2",
        id="gn-1",
    ),
    pytest.param(
        lambda a: F.group_norm(a, 4),
        [(1, 4, 5)],
        "-, a1, a2",
        id="gn-C",
    ),
    pytest.param(
        lambda a: F.local_response_norm(a, 2),
        [(1, 4, 5)],
        "-, a1!, a2! ; a1! ; a2!",
        id="lrn",
    ),
    pytest.param(
        lambda a: F.normalize(a, dim=1),
        [(2, 3)],
        "a0, a1",
        id="normalize",
    ),
]


@pytest.mark.parametrize(("function", "shapes", "expected"), GOLDEN)
def test_labels(golden, function, shapes, expected) -> None:
    """The output's labels, what is tied and what stays are exactly these (see conftest for the notation)."""
    assert golden(function, *shapes).text() == expected


NETWORKS = [
    pytest.param(
        lambda net: net.cc(nn.BatchNorm2d(8)),
        torch.randn(2, 3, 4, 4),
        8,
        0.952,
        id="norm-bn",
    ),
    pytest.param(
        lambda net: net.cc(nn.BatchNorm2d(8, affine=False)),
        torch.randn(2, 3, 4, 4),
        8,
        0.941,
        id="norm-bn_na",
    ),
    pytest.param(
        lambda net: net.cc(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
        torch.randn(2, 3, 4, 4),
        8,
        0.952,
        id="norm-inorm",
    ),
    pytest.param(
        lambda net: net.cc(nn.InstanceNorm2d(8)),
        torch.randn(2, 3, 4, 4),
        8,
        0.941,
        id="norm-inorm_na",
    ),
    pytest.param(
        lambda net: net.cc(nn.GroupNorm(2, 8)),
        torch.randn(2, 3, 4, 4),
        4,
        0.952,
        id="norm-gn",
    ),
    pytest.param(
        lambda net: net.cc(nn.GroupNorm(1, 8)),
        torch.randn(2, 3, 4, 4),
        8,
        0.952,
        id="norm-gn1",
    ),
    pytest.param(
        lambda net: net.cc(nn.GroupNorm(8, 8)),
        torch.randn(2, 3, 4, 4),
        8,
        0.952,
        id="norm-gn8",
    ),
    pytest.param(
        lambda net: net.cc(nn.GroupNorm(2, 8, affine=False)),
        torch.randn(2, 3, 4, 4),
        4,
        0.941,
        id="norm-gn_na",
    ),
    pytest.param(
        lambda net: net.cc(nn.PReLU(8)),
        torch.randn(2, 3, 4, 4),
        8,
        0.947,
        id="norm-prelu",
    ),
    pytest.param(
        lambda net: net.cc(nn.PReLU()),
        torch.randn(2, 3, 4, 4),
        8,
        0.928,
        id="norm-prelu1",
    ),
    pytest.param(
        lambda net: net.cc(nn.LayerNorm([8, 4, 4])),
        torch.randn(2, 3, 4, 4),
        8,
        0.988,
        id="norm-ln_chw",
    ),
    pytest.param(
        lambda net: net.cc(nn.Dropout2d()),
        torch.randn(2, 3, 4, 4),
        8,
        0.941,
        id="norm-drop",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: s.l(x), l=nn.LayerNorm(8)),
        torch.randn(3, 6),
        8,
        0.963,
        id="vec-ln",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: s.l(x), l=nn.LayerNorm(8, elementwise_affine=False)),
        torch.randn(3, 6),
        8,
        0.957,
        id="vec-ln_na",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: s.l(x), l=nn.RMSNorm(8)),
        torch.randn(3, 6),
        8,
        0.96,
        id="vec-rms",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: s.l(x), l=nn.BatchNorm1d(8)),
        torch.randn(3, 6),
        8,
        0.963,
        id="vec-bn1",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.l(s.p(x) + s.w)),
            p=nn.Linear(6, 8),
            w=nn.Parameter(torch.randn(8)),
            l=nn.LayerNorm(8, bias=False),
            q=nn.Linear(8, 4),
        ),
        torch.randn(3, 6),
        8,
        0.963,
        id="ln-square",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.p(x)), p=torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), q=nn.Linear(8, 4)
        ),
        torch.randn(3, 6),
        8,
        0.96,
        id="weight_norm",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.p(x)),
            p=torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)),
            q=nn.Linear(8, 4),
        ),
        torch.randn(3, 6),
        8,
        0.957,
        id="spectral_norm",
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
