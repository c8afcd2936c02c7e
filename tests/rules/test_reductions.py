"""Reductions, softmax and its kin."""

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
        lambda a: a.sum(1),
        [(2, 3)],
        "a0",
        id="sum",
    ),
    pytest.param(
        lambda a: a.sum(),
        [(2, 3)],
        "",
        id="sum-all",
    ),
    pytest.param(
        lambda a: a.mean(1, keepdim=True),
        [(2, 3)],
        "a0, -",
        id="mean-keep",
    ),
    pytest.param(
        lambda a: a.mean((0, 2)),
        [(2, 3, 4)],
        "a1",
        id="mean-dims",
    ),
    pytest.param(
        lambda a: a.max(),
        [(2, 3)],
        "",
        id="max-all",
    ),
    pytest.param(
        lambda a, b: torch.max(a, b),
        [(3,), (3,)],
        "a0 ; b0=a0",
        id="maximum",
    ),
    pytest.param(
        lambda a: a.amax(-1),
        [(2, 3)],
        "a0",
        id="amax",
    ),
    pytest.param(
        lambda a: a.var(1),
        [(2, 3)],
        "a0",
        id="var",
    ),
    pytest.param(
        lambda a: torch.var(a, 1, unbiased=False),
        [(2, 3)],
        "a0",
        id="var-unbiased",
    ),
    pytest.param(
        lambda a: torch.var_mean(a, 1),
        [(2, 3)],
        "a0 | a0",
        id="var_mean",
    ),
    pytest.param(
        lambda a: a.norm(dim=1),
        [(2, 3)],
        "a0",
        id="norm",
    ),
    pytest.param(
        lambda a: a.norm(2, 1),
        [(2, 3)],
        "a0",
        id="norm-p",
    ),
    pytest.param(
        lambda a: torch.linalg.vector_norm(a, 2, 1),
        [(2, 3)],
        "a0",
        id="vnorm",
    ),
    pytest.param(
        lambda a: a.norm(),
        [(2, 3)],
        "",
        id="norm-all",
    ),
    pytest.param(
        lambda a: a.logsumexp(1),
        [(2, 3)],
        "a0",
        id="logsumexp",
    ),
    pytest.param(
        lambda a: a.prod(1),
        [(2, 3)],
        "a0",
        id="prod",
    ),
    pytest.param(
        lambda a: (a > 0).any(1),
        [(2, 3)],
        "a0",
        id="any",
    ),
    pytest.param(
        lambda a: torch.aminmax(a, dim=1),
        [(2, 3)],
        "a0 | a0",
        id="aminmax",
    ),
    pytest.param(
        lambda a: a.std(1, keepdim=True),
        [(2, 3)],
        "a0, -",
        id="std-keep",
    ),
    pytest.param(
        lambda a: a.view(2, 4).sum(0),
        [(8,)],
        "a0[0:4] ; a0=a0[0:4]+a0[0:4] ; a0[0:4]~a0[0:4]",
        id="sum-ctx",
    ),
    pytest.param(
        lambda a: a.mean(keepdim=True, dim=(0, 1)),
        [(2, 3)],
        "-, -",
        id="mean-keep-all",
    ),
    pytest.param(
        lambda a: torch.std_mean(a, 1),
        [(2, 3)],
        "a0 | a0",
        id="std_mean",
    ),
    pytest.param(
        lambda a: torch.linalg.matrix_norm(a),
        [(5, 2, 3)],
        "a0",
        id="matrix_norm",
    ),
    pytest.param(
        lambda a: a.sum([]),
        [(2, 3)],
        "",
        id="sum-empty",
    ),
    pytest.param(
        lambda a: torch.sum(a, dim=[0], keepdim=True),
        [(2, 3)],
        "-, a1",
        id="sum-kw",
    ),
    pytest.param(
        lambda a: a.sum(dim=-1, dtype=torch.float64),
        [(2, 3)],
        "a0",
        id="bool-sum-dim",
    ),
    pytest.param(
        lambda a: a.var(correction=0),
        [(2, 3)],
        "",
        id="var-correction",
    ),
    pytest.param(
        lambda a: a.var(dim=0, correction=0),
        [(2, 3)],
        "a1",
        id="var-dim-corr",
    ),
    pytest.param(
        lambda a: a.softmax(1),
        [(2, 3)],
        "a0, a1",
        id="softmax",
    ),
    pytest.param(
        lambda a: a.softmax(1, dtype=torch.float64),
        [(2, 3)],
        "a0, a1",
        id="softmax-dtype",
    ),
    pytest.param(
        lambda a: a.log_softmax(0),
        [(2, 3)],
        "a0, a1",
        id="log_softmax",
    ),
    pytest.param(
        lambda a: F.softmin(a, 1),
        [(2, 3)],
        "a0, a1",
        id="softmin",
    ),
    pytest.param(
        lambda a: a.cumsum(1),
        [(2, 3)],
        "a0, - ; a1!",
        id="cumsum",
    ),
    pytest.param(
        lambda a: a.sort(1),
        [(2, 3)],
        "a0, - | a0, - ; a1!",
        id="sort",
    ),
    pytest.param(
        lambda a: a.sort(),
        [(2, 3)],
        "a0, - | a0, - ; a1!",
        id="sort-default",
    ),
    pytest.param(
        lambda a: a.sort(stable=True, dim=0),
        [(2, 3)],
        "-, a1 | -, a1 ; a0!",
        id="sort-stable",
    ),
    pytest.param(
        lambda a: a.argsort(0),
        [(2, 3)],
        "-, a1 ; a0!",
        id="argsort",
    ),
    pytest.param(
        lambda a: a.argmax(1),
        [(2, 3)],
        "a0",
        id="argmax",
    ),
    pytest.param(
        lambda a: a.argmax(),
        [(2, 3)],
        " ; a0! ; a1!",
        id="argmax-all",
    ),
    pytest.param(
        lambda a: a.topk(2, 1),
        [(2, 3)],
        "a0, - | a0, -",
        id="topk",
    ),
    pytest.param(
        lambda a: a.topk(2),
        [(2, 3)],
        "a0, - | a0, -",
        id="topk-default",
    ),
    pytest.param(
        lambda a: a.kthvalue(2, 1),
        [(2, 3)],
        "a0 | a0 ; a1!",
        id="kthvalue",
    ),
    pytest.param(
        lambda a: a.median(1),
        [(2, 3)],
        "a0 | a0 ; a1!",
        id="median",
    ),
    pytest.param(
        lambda a: a.median(),
        [(2, 3)],
        " ; a0! ; a1!",
        id="median-all",
    ),
    pytest.param(
        lambda a: a.quantile(0.5, dim=1),
        [(2, 3)],
        "a0 ; a1!",
        id="quantile",
    ),
    pytest.param(
        lambda a: a.cummax(1),
        [(2, 3)],
        "a0, - | a0, - ; a1!",
        id="cummax",
    ),
    pytest.param(
        lambda a: a.mode(1),
        [(2, 3)],
        "a0 | a0 ; a1!",
        id="mode",
    ),
    pytest.param(
        lambda a: a.diff(dim=1),
        [(2, 3)],
        "a0, a1[0,0]! ; a1=a1[0,0,0]!",
        id="diff",
    ),
    pytest.param(
        lambda a: a.logcumsumexp(0),
        [(2, 3)],
        "-, a1 ; a0!",
        id="logcumsumexp",
    ),
]


@pytest.mark.parametrize(("function", "shapes", "expected"), GOLDEN)
def test_labels(golden, function, shapes, expected) -> None:
    """The output's labels, what is tied and what stays are exactly these (see conftest for the notation)."""
    assert golden(function, *shapes).text() == expected


NETWORKS = [
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.p(x).mean((2, 3))), p=nn.Conv2d(3, 8, 1), q=nn.Linear(8, 4)),
        torch.randn(2, 3, 4, 4),
        8,
        0.941,
        id="mean-pool",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q((lambda y: y * s.b(s.a(y.mean((2, 3), keepdim=True)).relu()).sigmoid())(s.p(x))),
            p=nn.Conv2d(3, 8, 1),
            a=nn.Conv2d(8, 4, 1),
            b=nn.Conv2d(4, 8, 1),
            q=nn.Conv2d(8, 4, 1),
        ),
        torch.randn(2, 3, 4, 4),
        12,
        0.972,
        id="se",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q((lambda y: y * y.mean(1, keepdim=True))(s.p(x))),
            p=nn.Conv2d(3, 8, 1),
            q=nn.Conv2d(8, 4, 1),
        ),
        torch.randn(2, 3, 4, 4),
        8,
        0.941,
        id="channel-mean",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: F.normalize(x, dim=-1)),
        torch.randn(3, 6),
        8,
        0.957,
        id="std/normalize",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(x).max(1).values, q=nn.Linear(6, 8)),
        torch.randn(3, 6),
        8,
        1.0,
        id="max-logits",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.e(s.q(x).max(1).indices), q=nn.Linear(6, 8), e=nn.Embedding(8, 4)),
        torch.randn(3, 6),
        8,
        1.0,
        id="max-indices",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(x).topk(2)[0], q=nn.Linear(6, 8)),
        torch.randn(3, 6),
        8,
        1.0,
        id="topk",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.view(x.shape[0], 2, -1).softmax(-1).flatten(1)),
        torch.randn(3, 6),
        4,
        0.957,
        id="heads-softmax-1",
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


class Spread(nn.Module):
    """Divides by the spread over its channels, as a norm of its own."""

    def __init__(self, spread) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.spread = spread

    def forward(self, x):
        y = self.first(x)
        return self.second(y / (self.spread(y) + 1))


@pytest.mark.parametrize(
    ("spread", "least"),
    [
        (lambda y: y.std(-1, keepdim=True), 2),
        (lambda y: torch.var_mean(y, -1, keepdim=True)[0], 2),
        (lambda y: y.var(-1, correction=2, keepdim=True), 3),
        (lambda y: y.std(-1, unbiased=False, keepdim=True), 1),
        (lambda y: y.var(), 1),  # over the batch too
    ],
)
def test_a_spread_keeps_as_many_positions_as_it_divides_by(spread, least) -> None:
    model, x = Spread(spread), torch.randn(3, 6)
    prunus.prune(model, x, prunus.Target(ratio=0.99))
    assert model.first.out_features == least
    assert torch.isfinite(model(x)).all()
