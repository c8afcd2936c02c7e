"""Pooling and resampling."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus

GOLDEN = [
    pytest.param(
        lambda a: F.max_pool1d(a, 2),
        [(1, 3, 4)],
        "-, a1, - ; a2!",
        id="max_pool",
    ),
    pytest.param(
        lambda a: F.max_pool2d(a, 2, return_indices=True),
        [(1, 3, 4, 4)],
        "-, a1, -, - | -, a1, -, - ; a2! ; a3!",
        id="max_pool-idx",
    ),
    pytest.param(
        lambda a: F.avg_pool2d(a, 2),
        [(1, 3, 4, 4)],
        "-, a1, -, - ; a2! ; a3!",
        id="avg_pool",
    ),
    pytest.param(
        lambda a: F.adaptive_avg_pool2d(a, 1),
        [(1, 3, 4, 4)],
        "-, a1, -, - ; a2! ; a3!",
        id="adaptive",
    ),
    pytest.param(
        lambda a: F.adaptive_avg_pool2d(a, 2),
        [(1, 3, 4, 4)],
        "-, a1, -, - ; a2! ; a3!",
        id="adaptive-out",
    ),
    pytest.param(
        lambda a: F.adaptive_max_pool2d(a, 2),
        [(1, 3, 4, 4)],
        "-, a1, -, - ; a2! ; a3!",
        id="adaptive-max",
    ),
    pytest.param(
        lambda a: F.interpolate(a, scale_factor=2),
        [(1, 3, 4, 4)],
        "-, a1, -, - ; a2! ; a3!",
        id="up-nearest",
    ),
    pytest.param(
        lambda a: F.interpolate(a, scale_factor=2, mode="bilinear"),
        [(1, 3, 4, 4)],
        "-, a1, -, - ; a2! ; a3!",
        id="up-bilinear",
    ),
    pytest.param(
        lambda a: F.interpolate(a, scale_factor=2, mode="linear"),
        [(1, 3, 4)],
        "-, a1, - ; a2!",
        id="up-1d",
    ),
    pytest.param(
        lambda a: F.lp_pool2d(a, 2, 2),
        [(1, 3, 4, 4)],
        "-, a1, -, - ; a2! ; a3!",
        id="lp_pool",
    ),
    pytest.param(
        lambda a: F.max_pool2d(a, 2),
        [(3, 4, 4)],
        "a0, -, - ; a1! ; a2!",
        id="pool-unbatched",
    ),
    pytest.param(
        lambda a: F.avg_pool1d(a, 2),
        [(1, 3, 4)],
        "-, a1, - ; a2!",
        id="avg_pool1d-over-C",
    ),
]


@pytest.mark.parametrize(("function", "shapes", "expected"), GOLDEN)
def test_labels(golden, function, shapes, expected) -> None:
    """The output's labels, what is tied and what stays are exactly these (see conftest for the notation)."""
    assert golden(function, *shapes).text() == expected


NETWORKS = [
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(
                F.adaptive_avg_pool2d(
                    F.interpolate(F.max_pool2d(s.p(x), 2) + F.avg_pool2d(s.p(x), 2), scale_factor=2.0, mode="bilinear"),
                    1,
                ).flatten(1)
            ),
            p=nn.Conv2d(3, 8, 1),
            q=nn.Linear(8, 4),
        ),
        torch.randn(2, 3, 4, 4),
        8,
        0.941,
        id="pools",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(F.adaptive_avg_pool2d(s.p(x), 2).flatten(1)), p=nn.Conv2d(3, 8, 1), q=nn.Linear(32, 4)
        ),
        torch.randn(2, 3, 4, 4),
        8,
        0.976,
        id="adaptive-2x2-flat",
    ),
    pytest.param(
        lambda net: net.cc(nn.PixelShuffle(2), 2),
        torch.randn(2, 3, 4, 4),
        2,
        0.909,
        id="pixel-shuffle",
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
