"""Joins and cuts."""

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
        lambda a: a.chunk(2, 0),
        [(6,)],
        "a0[0:3] | a0[3:6] ; a0[0:3]~a0[3:6]",
        id="chunk",
    ),
    pytest.param(
        lambda a: (lambda x, y: x + y)(*a.chunk(2, 0)),
        [(6,)],
        "a0[0:3] ; a0=a0[0:3]+a0[0:3] ; a0[0:3]~a0[0:3]",
        id="chunk-add",
    ),
    pytest.param(
        lambda a: a.chunk(2, 0),
        [(5,)],
        "a0[0:3]! | a0[3:5]! ; a0!",
        id="chunk-uneven",
    ),
    pytest.param(
        lambda a: a.split(3, 0),
        [(6,)],
        "a0[0:3] | a0[3:6]",
        id="split-literal",
    ),
    pytest.param(
        lambda a: a.split([2, 4], 0),
        [(6,)],
        "a0[0:2] | a0[2:6]",
        id="split-sizes",
    ),
    pytest.param(
        lambda a: a.split(4, 0),
        [(6,)],
        "a0[0:4]! | a0[4:6]! ; a0!",
        id="split-uneven",
    ),
    pytest.param(
        lambda a: a.tensor_split(3),
        [(6,)],
        "a0[0:2] | a0[2:4] | a0[4:6] ; a0[0:2]~a0[2:4]~a0[4:6]",
        id="tensor_split",
    ),
    pytest.param(
        lambda a: a.tensor_split([2]),
        [(6,)],
        "a0[0:2]! | a0[2:6]! ; a0!",
        id="tensor_split-idx",
    ),
    pytest.param(
        lambda a: a.unbind(0),
        [(2, 3)],
        "a1 | a1 ; a0!",
        id="unbind",
    ),
    pytest.param(
        lambda a: a.view(3, 4).unbind(0),
        [(12,)],
        "a0[0:4] | a0[4:8] | a0[8:12] ; a0[0:4]~a0[4:8]~a0[8:12]",
        id="unbind-after-split",
    ),
    pytest.param(
        lambda a: a.select(0, 1),
        [(2, 3)],
        "a1 ; a0!",
        id="select",
    ),
    pytest.param(
        lambda a: a[:, 1],
        [(2, 3)],
        "a0 ; a1!",
        id="index-int",
    ),
    pytest.param(
        lambda a: a[-1],
        [(2, 3)],
        "a1 ; a0!",
        id="select--1",
    ),
    pytest.param(
        lambda a: a[1:3],
        [(4,)],
        "a0[1:3]",
        id="slice",
    ),
    pytest.param(
        lambda a: a[::2],
        [(4,)],
        "a0[0,2] ; a0=a0[0,0,2,2]",
        id="slice-step",
    ),
    pytest.param(
        lambda a: a[1::3],
        [(4,)],
        "a0[1:2]! ; a0!",
        id="slice-step-uneven",
    ),
    pytest.param(
        lambda a: a[:, :2],
        [(3, 4)],
        "a0, a1[0:2]",
        id="slice-other",
    ),
    pytest.param(
        lambda a: a[: a.shape[0] // 2],
        [(4,)],
        "a0[0:2]",
        id="slice-derived",
    ),
    pytest.param(
        lambda a: a[-2:],
        [(4,)],
        "a0[2:4]",
        id="slice-neg",
    ),
    pytest.param(
        lambda a: a[:-1],
        [(4,)],
        "a0[0:3]",
        id="slice--a",
    ),
    pytest.param(
        lambda a: a[0:],
        [(4,)],
        "a0",
        id="slice-full",
    ),
    pytest.param(
        lambda a: a[..., 1:],
        [(3, 4)],
        "a0, a1[1:4]",
        id="slice-ellipsis",
    ),
    pytest.param(
        lambda a: a.narrow(0, 1, 2),
        [(4,)],
        "a0[1:3]",
        id="narrow",
    ),
    pytest.param(
        lambda a: a.narrow(dim=0, start=1, length=2),
        [(4,)],
        "a0[1:3]",
        id="narrow-kw",
    ),
    pytest.param(
        lambda a, b: torch.cat([a, b]),
        [(2,), (3,)],
        "a0+b0",
        id="cat",
    ),
    pytest.param(
        lambda a, b: torch.cat([a, b]),
        [(2, 4), (3, 4)],
        "a0+b0, a1 ; b1=a1",
        id="cat-other-dim",
    ),
    pytest.param(
        lambda a: torch.cat([a, a]),
        [(3,)],
        "a0+a0",
        id="cat-same",
    ),
    pytest.param(
        lambda a: torch.cat([a, torch.ones(2)]),
        [(3,)],
        "a0+new2?!",
        id="cat-fixed",
    ),
    pytest.param(
        lambda a: torch.cat([a, torch.ones(2, 4)]),
        [(3, 4)],
        "a0+new2?!, a1! ; a1!",
        id="cat-fixed-other",
    ),
    pytest.param(
        lambda a: torch.cat([torch.empty(0), a]),
        [(3,)],
        "a0",
        id="cat-empty",
    ),
    pytest.param(
        lambda a, b: torch.cat([a, b], -1),
        [(2, 3), (2, 4)],
        "a0, a1+b1 ; b0=a0",
        id="cat--1",
    ),
    pytest.param(
        lambda a, b: torch.cat([a, b], -1),
        [(3, 1), (3, 1)],
        "a0, - ; b0=a0",
        id="cat-1s",
    ),
    pytest.param(
        lambda a, b: torch.stack([a, b]),
        [(3,), (3,)],
        "-, (a0 / b0)@0 ; a0~b0",
        id="stack",
    ),
    pytest.param(
        lambda a, b: torch.stack([a, b], -1),
        [(3,), (3,)],
        "(a0 / b0)@1, - ; a0~b0",
        id="stack--1",
    ),
    pytest.param(
        lambda a, b: torch.stack([a, b]).flatten(),
        [(3,), (3,)],
        "a0+b0 ; a0~b0",
        id="stack-flatten",
    ),
    pytest.param(
        lambda a, b: torch.stack([a, b], -1).flatten(),
        [(3,), (3,)],
        "a0[0,0,1,1,2,2] ; b0=a0 ; a0~a0",
        id="stack--1-flatten",
    ),
    pytest.param(
        lambda a: torch.stack([a, torch.ones(3)]),
        [(3,)],
        "-, a0! ; a0!",
        id="stack-fixed",
    ),
    pytest.param(
        lambda a, b: torch.stack([a, b]).sum(0),
        [(3,), (3,)],
        "a0 ; b0=a0 ; a0~a0",
        id="stack-sum",
    ),
    pytest.param(
        lambda a, b: torch.hstack([a, b]),
        [(3,), (2,)],
        "a0+b0",
        id="hstack",
    ),
    pytest.param(
        lambda a, b: torch.vstack([a, b]),
        [(3,), (3,)],
        "-, a0 ; b0=a0",
        id="vstack",
    ),
    pytest.param(
        lambda a: a.flip(0),
        [(4,)],
        "a0[3,2,1]+a0[0:1]",
        id="flip",
    ),
    pytest.param(
        lambda a: a + a.flip(0),
        [(4,)],
        "a0[0,1,1]+a0[0:1] ; a0=a0[0,1,1]+a0[0:1]",
        id="flip-add",
    ),
    pytest.param(
        lambda a: a.roll(1, 0),
        [(4, 3)],
        "a0!, a1 ; a0!",
        id="roll",
    ),
    pytest.param(
        lambda a: a.roll(1),
        [(4,)],
        "a0! ; a0!",
        id="roll-all",
    ),
    pytest.param(
        lambda a: F.pad(a, (0, 1)),
        [(3, 4)],
        "a0, - ; a1!",
        id="pad",
    ),
    pytest.param(
        lambda a: F.pad(a, (0, 0, 1, 1)),
        [(3, 4)],
        "-, a1 ; a0!",
        id="pad-other",
    ),
    pytest.param(
        lambda a: F.pad(a, (0, -1)),
        [(3, 4)],
        "a0, - ; a1!",
        id="pad-neg",
    ),
    pytest.param(
        lambda a: F.pad(a, (1, 1), mode="reflect"),
        [(3, 4)],
        "a0, - ; a1!",
        id="pad-mode",
    ),
    pytest.param(
        lambda a: F.pad(a, (1, 1), mode="circular"),
        [(3, 4)],
        "a0, - ; a1!",
        id="pad-circ",
    ),
    pytest.param(
        lambda a: a.repeat(2),
        [(3,)],
        "a0+a0",
        id="repeat",
    ),
    pytest.param(
        lambda a: a.repeat(2, 1),
        [(3,)],
        "-, a0",
        id="repeat-2d",
    ),
    pytest.param(
        lambda a: a.repeat(1, 2),
        [(2, 3)],
        "a0, a1+a1",
        id="repeat-both",
    ),
    pytest.param(
        lambda a: a.tile((2,)),
        [(3,)],
        "a0+a0",
        id="tile",
    ),
    pytest.param(
        lambda a, b: a.repeat(b.shape[0], 1),
        [(1, 3), (4, 5)],
        "new4, a1",
        id="repeat-new-derived",
    ),
    pytest.param(
        lambda a: a.repeat_interleave(2, 0),
        [(3,)],
        "a0[0,0,1,1,2,2]",
        id="repeat_interleave",
    ),
    pytest.param(
        lambda a, b: a.repeat_interleave(2, 0) + b,
        [(3,), (6,)],
        "a0[0,0,1,1,2,2] ; b0=a0[0,0,1,1,2,2]",
        id="ri-add",
    ),
    pytest.param(
        lambda a: a.repeat_interleave(2),
        [(2, 3)],
        "- ; a0! ; a1!",
        id="ri-none",
    ),
    pytest.param(
        lambda a: a.repeat_interleave(2, 0),
        [(3,)],
        "a0[0,0,1,1,2,2]",
        id="repeat_interleave",
    ),
    pytest.param(
        lambda a: a.flip(0),
        [(4,)],
        "a0[3,2,1]+a0[0:1]",
        id="flip",
    ),
]


@pytest.mark.parametrize(("function", "shapes", "expected"), GOLDEN)
def test_labels(golden, function, shapes, expected) -> None:
    """The output's labels, what is tied and what stays are exactly these (see conftest for the notation)."""
    assert golden(function, *shapes).text() == expected


NETWORKS = [
    pytest.param(
        lambda net: net.lin(lambda s, x: x.relu()),
        torch.randn(3, 6),
        8,
        0.957,
        id="mlp",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: (lambda a, b: a * b.sigmoid())(*x.chunk(2, -1)), m2=4),
        torch.randn(3, 6),
        4,
        0.947,
        id="chunk",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: torch.cat(x.chunk(2, -1)[::-1], -1)),
        torch.randn(3, 6),
        4,
        0.957,
        id="chunk-cat",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: torch.cat(x.split([s.c, s.d], -1)[::-1], -1), c=2, d=6),
        torch.randn(3, 6),
        8,
        0.957,
        id="split-attr",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: (lambda a, b: a + b)(*x.split(s.c, -1)), c=4, m2=4),
        torch.randn(3, 6),
        4,
        0.947,
        id="split-attr-eq",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: (lambda a, b: a + b)(*x.split(4, -1)), m2=4),
        torch.randn(3, 6),
        0,
        0.0,
        id="split-literal",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: torch.cat(x.split(s.c, -1)[::-1], -1), c=[2, 6]),
        torch.randn(3, 6),
        8,
        0.957,
        id="split-list-attr",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: torch.cat(x.split(s.c, -1)[::-1], -1), c=(2, 4, 2)),
        torch.randn(3, 6),
        8,
        0.957,
        id="split-list-uneven3",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: torch.cat([x[:, : s.c], x[:, s.c :] * 2], -1), c=4),
        torch.randn(3, 6),
        8,
        0.957,
        id="slice-attr",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :], m2=4),
        torch.randn(3, 6),
        4,
        0.947,
        id="slice-derived",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x[:, :4], m2=4),
        torch.randn(3, 6),
        4,
        0.368,
        id="slice-literal",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x[:, -s.c :], c=4, m2=4),
        torch.randn(3, 6),
        8,
        0.947,
        id="slice-neg-attr",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.narrow(1, 0, s.c), c=4, m2=4),
        torch.randn(3, 6),
        8,
        0.947,
        id="narrow-attr",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.narrow(1, length=s.c, start=2), c=4, m2=4),
        torch.randn(3, 6),
        None,
        None,
        id="narrow-kw-swapped",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.narrow(1, s.c, s.c), c=4, m2=4),
        torch.randn(3, 6),
        4,
        0.947,
        id="narrow-start-attr",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: (lambda a, b: a * b)(*x.view(-1, 2, 4).unbind(1)), m2=4),
        torch.randn(3, 6),
        0,
        0.0,
        id="unbind-heads",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: (lambda a, b: a * b)(*x.view(x.shape[0], 2, -1).unbind(1)), m2=4),
        torch.randn(3, 6),
        4,
        0.947,
        id="unbind-heads--1",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x[:, 3:4] * x),
        torch.randn(3, 6),
        4,
        0.478,
        id="select",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: torch.stack([x, x * 2], 1).sum(1)),
        torch.randn(3, 6),
        8,
        0.957,
        id="stack",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.r(torch.stack([s.p(x), s.q(x)], 1).sum(1)),
            p=nn.Linear(6, 8),
            q=nn.Linear(6, 8),
            r=nn.Linear(8, 4),
        ),
        torch.randn(3, 6),
        8,
        0.973,
        id="stack-two",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.r(torch.stack([s.p(x), s.q(x)], 1).flatten(1)),
            p=nn.Linear(6, 8),
            q=nn.Linear(6, 8),
            r=nn.Linear(16, 4),
        ),
        torch.randn(3, 6),
        8,
        0.978,
        id="stack-flat",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.r(torch.stack([s.p(x), s.q(x)], -1).flatten(1)),
            p=nn.Linear(6, 8),
            q=nn.Linear(6, 8),
            r=nn.Linear(16, 4),
        ),
        torch.randn(3, 6),
        8,
        0.978,
        id="stack-1-flat",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.flip(-1)),
        torch.randn(3, 6),
        8,
        0.957,
        id="flip",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x + x.flip(-1)),
        torch.randn(3, 6),
        4,
        0.957,
        id="flip-add",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.roll(1, -1)),
        torch.randn(3, 6),
        0,
        0.0,
        id="roll",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: F.pad(x, (0, 2)), m2=10),
        torch.randn(3, 6),
        0,
        0.0,
        id="pad",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.repeat(1, 2), m2=16),
        torch.randn(3, 6),
        8,
        0.968,
        id="repeat",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.repeat_interleave(2, -1), m2=16),
        torch.randn(3, 6),
        8,
        0.968,
        id="repeat_interleave",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.r(s.p(x).repeat_interleave(2, -1) + s.q(x)),
            p=nn.Linear(6, 4),
            q=nn.Linear(6, 8),
            r=nn.Linear(8, 4),
        ),
        torch.randn(3, 6),
        4,
        0.967,
        id="ri-add",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q((lambda y: torch.cat([y, s.m(y)], -1))(s.p(x))),
            p=nn.Linear(6, 8),
            m=nn.Linear(8, 4),
            q=nn.Linear(12, 3),
        ),
        torch.randn(3, 6),
        12,
        0.977,
        id="dense-cat",
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


class Interleaved(nn.Module):
    """Rotary positions that turn neighbouring positions of a head, picked out with steps of two."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 4)
        self.register_buffer("angles", torch.rand(5, 4))

    def turned(self, x):
        pairs = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        angles = self.angles.repeat_interleave(2, dim=-1)
        return x * angles.cos() + pairs * angles.sin()

    def forward(self, x):
        n, t, _ = x.shape
        q, k, v = (p(x).view(n, t, 2, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = (self.turned(q) @ self.turned(k).transpose(2, 3)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, t, -1))


def test_positions_picked_by_steps_go_with_their_run(oracle) -> None:
    model = Interleaved()
    found = oracle(model, torch.randn(2, 5, 6))
    assert found.frozen == {"q.weight:1", "k.weight:1", "v.weight:1", "angles:0", "out.weight:0", "out.bias:0"}
    prunus.prune(model, torch.randn(2, 5, 6), prunus.Target(ratio=0.5))
    assert [p.out_features for p in (model.q, model.k, model.v)] == [8, 8, 8]
    assert model.angles.shape == (5, 2)
