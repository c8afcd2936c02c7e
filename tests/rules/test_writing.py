"""Writes by number, and the look-ups whose index has dims of its own."""

# ruff: noqa: PLC3002 - the cases are one-liners
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

I5 = torch.tensor([0, 1, 1, 0, 2])
MASK = torch.tensor([True, False, True, True, False])


def _set(target, index, values):
    target = target.clone()
    target[index] = values
    return target


GOLDEN = [
    pytest.param(
        lambda a: a.new_zeros(3, a.shape[1]).scatter_add(0, I5.view(-1, 1).expand_as(a), a),
        [(5, 4)],
        "-, a1 ; a0!",
        id="scatter_add-expand_as",
    ),
    pytest.param(
        lambda a: a.new_zeros(3, a.shape[1]).scatter_add_(0, I5.view(-1, 1).expand(-1, a.shape[1]), a),
        [(5, 4)],
        "-, a1 ; a0!",
        id="scatter_add-expand",
    ),
    pytest.param(
        lambda a: a.new_zeros(3, a.shape[1]).scatter_add(0, I5.view(-1, 1).repeat(1, a.shape[1]), a),
        [(5, 4)],
        "-, a1 ; a0!",
        id="scatter_add-repeat",
    ),
    pytest.param(
        lambda a: a.new_zeros(3, 4).scatter_reduce(0, I5.view(-1, 1).expand_as(a), a, "amax", include_self=False),
        [(5, 4)],
        "-, a1! ; a0! ; a1!",
        id="scatter_reduce-literal",
    ),
    pytest.param(
        lambda a, b: a.scatter(0, I5[:3].view(-1, 1).expand_as(b), b),
        [(5, 4), (3, 4)],
        "a0!, b1 ; a0! ; a1=b1 ; b0!",
        id="scatter-src",
    ),
    pytest.param(
        lambda a: a.scatter(1, torch.tensor([[0], [1], [2]]), 1.0),
        [(3, 4)],
        "a0!, a1! ; a0! ; a1!",
        id="scatter-value",
    ),
    pytest.param(
        lambda a: a.gather(0, torch.randint(0, 5, (3, 4))),
        [(5, 4)],
        "-, a1! ; a0! ; a1!",
        id="gather-fixed-index",
    ),
    pytest.param(
        lambda a: a.gather(0, torch.tensor([0, 2, 1]).view(-1, 1).expand(3, a.shape[1])),
        [(5, 4)],
        "-, a1 ; a0!",
        id="gather-expand",
    ),
    pytest.param(
        lambda a: a.gather(0, torch.zeros(2, 2, dtype=torch.long)),
        [(5, 4)],
        "-, - ; a0! ; a1!",
        id="gather-part",
    ),
    pytest.param(
        lambda a: torch.take_along_dim(a, torch.tensor([[0], [1]]), 0),
        [(5, 4)],
        "-, a1 ; a0!",
        id="take_along_dim",
    ),
    pytest.param(
        lambda a, b: a.index_add(0, I5, b),
        [(3, 4), (5, 4)],
        "a0!, a1 ; a0! ; b0! ; b1=a1",
        id="index_add",
    ),
    pytest.param(
        lambda a, b: a.clone().index_copy_(0, torch.tensor([0, 2]), b),
        [(3, 4), (2, 4)],
        "a0!, a1 ; a0! ; b0! ; b1=a1",
        id="index_copy",
    ),
    pytest.param(
        lambda a, b: a.index_reduce(0, I5, b, "amax"),
        [(3, 4), (5, 4)],
        "a0!, a1 ; a0! ; b0! ; b1=a1",
        id="index_reduce",
    ),
    pytest.param(
        lambda a: a.index_fill(0, torch.tensor([0, 2]), 0.0),
        [(3, 4)],
        "a0!, a1 ; a0!",
        id="index_fill",
    ),
    pytest.param(
        lambda a, b: _set(a, I5, b),
        [(3, 4), (5, 4)],
        "a0!, a1 ; a0! ; b0! ; b1=a1",
        id="index_put",
    ),
    pytest.param(
        lambda a, b: _set(a, (slice(None), torch.tensor([0, 2])), b),
        [(3, 4), (3, 2)],
        "a0, a1! ; a1! ; b0=a0 ; b1!",
        id="index_put-second",
    ),
    pytest.param(
        lambda a, b: _set(a, MASK, b),
        [(5, 4), (4,)],
        "a0!, a1 ; a0! ; b0=a1",
        id="index_put-mask",
    ),
    pytest.param(
        lambda a: _set(a, a > 0, 0.0),
        [(5, 4)],
        "a0, a1",
        id="index_put-mask-of-itself",
    ),
    pytest.param(
        lambda a: a[a > 0].sum(),
        [(5, 4)],
        "",
        id="mask-summed",
    ),
    pytest.param(
        lambda a, b: a[a > -9] * b,
        [(5, 4), (20,)],
        "b0! ; a0! ; a1! ; b0!",
        id="mask-meets-kept",
    ),
    pytest.param(
        lambda a, b: a.masked_scatter(MASK.view(-1, 1).expand_as(a), b),
        [(5, 4), (3, 4)],
        "a0!, a1 ; a0! ; b0! ; b1=a1",
        id="masked_scatter-even",
    ),
    pytest.param(
        lambda a, b: a.masked_scatter(a > 0, b),
        [(5, 4), (5, 4)],
        "a0!, a1! ; a0! ; a1! ; b0! ; b1!",
        id="masked_scatter-uneven",
    ),
    pytest.param(
        lambda a: F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), a, mode="mean"),
        [(5, 4)],
        "-, a1 ; a0!",
        id="embedding_bag",
    ),
    pytest.param(
        lambda a: torch.segment_reduce(a, "sum", lengths=torch.tensor([2, 3])),
        [(5, 4)],
        "-, a1 ; a0!",
        id="segment_reduce",
    ),
    pytest.param(
        lambda a: a * torch.bucketize(a.detach(), torch.tensor([-1.0, 0.0, 1.0])),
        [(5, 4)],
        "a0, a1",
        id="bucketize",
    ),
    pytest.param(
        lambda a: torch.searchsorted(a, torch.randn(5, 2)),
        [(5, 4)],
        "a0!, - ; a0! ; a1!",
        id="searchsorted",
    ),
    pytest.param(
        lambda a: torch.unique(a.detach()),
        [(5, 4)],
        "- ; a0! ; a1!",
        id="unique",
    ),
    pytest.param(
        lambda a: (a > 0).nonzero(),
        [(5, 4)],
        "- ; a0! ; a1!",
        id="nonzero",
    ),
    pytest.param(
        lambda a: a.repeat_interleave(torch.tensor([1, 2, 0, 1, 1]), 0),
        [(5, 4)],
        "-, a1 ; a0!",
        id="repeat_interleave-tensor",
    ),
    pytest.param(
        lambda a: a.diagonal(dim1=1, dim2=2),
        [(2, 3, 3)],
        "a0, a1 ; a2=a1",
        id="diagonal",
    ),
    pytest.param(
        torch.diag_embed,
        [(2, 3)],
        "a0, a1, a1",
        id="diag_embed",
    ),
    pytest.param(
        lambda a: a.tril(),
        [(2, 3, 3)],
        "a0, a1!, a2! ; a1! ; a2!",
        id="tril",
    ),
    pytest.param(
        lambda a: torch.tensor(a.tolist()),
        [(3,)],
        "- ; a0!",
        id="tolist",
    ),
    pytest.param(
        lambda a: torch.randn(2, 4).index_select(0, torch.tensor([0, 1, 1])) @ a,
        [(4, 3)],
        "-, a1 ; a0!",
        id="unlabelled",
    ),
]


@pytest.mark.parametrize(("function", "shapes", "expected"), GOLDEN)
def test_labels(golden, function, shapes, expected) -> None:
    """The output's labels, what is tied and what stays are exactly these (see conftest for the notation)."""
    assert golden(function, *shapes).text() == expected


def _messages(reduce):
    """A layer of a graph network: rows gathered, reduced at their targets."""

    def forward(s, x, source, target):
        h = s.p(x)
        index = target.view(-1, 1).expand_as(h[source])
        out = h.new_zeros(h.shape).scatter_reduce(0, index, h[source], reduce, include_self=False)
        return s.q(s.n(out).relu() + h)

    return lambda net: net.Net(forward, p=nn.Linear(6, 8), n=nn.BatchNorm1d(8), q=nn.Linear(8, 4))


EDGES = (torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 1, 0, 4, 2, 3]))

NETWORKS = [
    *[pytest.param(_messages(how), EDGES, 8, 0.963, id=f"messages-{how}") for how in ("sum", "mean", "amax")],
    pytest.param(
        lambda net: net.Net(
            lambda s, x, m: s.q(s.p(x).masked_scatter(m.unsqueeze(-1).expand_as(s.p(x)), s.v(x))),
            p=nn.Linear(6, 8),
            v=nn.Linear(6, 8),
            q=nn.Linear(8, 4),
        ),
        (torch.randn(5, 6), MASK),
        8,
        0.973,
        id="masked_scatter",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x, m: s.q(_set(s.p(x), m, s.v(x)[m])), p=nn.Linear(6, 8), v=nn.Linear(6, 8), q=nn.Linear(8, 4)
        ),
        (torch.randn(5, 6), MASK),
        8,
        0.973,
        id="index_put",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: (lambda y: s.q(y) if y[y > -99].numel() == y.numel() else y)(s.p(x)),
            p=nn.Linear(6, 8),
            q=nn.Linear(8, 4),
        ),
        torch.randn(5, 6),
        8,
        0.957,
        id="picked-and-only-counted",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.b[: s.b.numel() // 2] * s.p(x)), b=nn.Parameter(torch.randn(16)), p=nn.Linear(6, 8),
            q=nn.Linear(8, 4),
        ),
        torch.randn(5, 6),
        8,
        0.963,
        id="numel-halved",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: F.pad(x, (0, s.c - x.shape[-1])) if x.shape[-1] < s.c else x, c=8),
        torch.randn(3, 6),
        8,
        0.957,
        id="compared-with-attribute",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("build", "inputs", "bundles", "share"), NETWORKS)
def test_network(oracle, networks, build, inputs, bundles, share) -> None:
    """Symmetry, silence, cost, replay and undo hold around the op, and as much can be removed as expected."""
    found = oracle(build(networks), inputs)
    assert (found.bundles, round(found.share, 3)) == (bundles, share)
