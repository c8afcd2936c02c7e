"""Views: permutes, splits, merges and what comes back together."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

import prunus

GOLDEN = [
    pytest.param(
        lambda a: a.permute(2, 0, 1),
        [(2, 3, 4)],
        "a2, a0, a1",
        id="permute",
    ),
    pytest.param(
        lambda a: a.permute(-1, 0, 1),
        [(2, 3, 4)],
        "a2, a0, a1",
        id="permute-neg",
    ),
    pytest.param(
        lambda a: a.transpose(0, -1),
        [(2, 3, 4)],
        "a2, a1, a0",
        id="transpose",
    ),
    pytest.param(
        lambda a: a.t(),
        [(2, 3)],
        "a1, a0",
        id="t",
    ),
    pytest.param(
        lambda a: a.mT,
        [(2, 3, 4)],
        "a0, a2, a1",
        id="mT",
    ),
    pytest.param(
        lambda a: a.T,
        [(2, 3)],
        "a1, a0",
        id="T",
    ),
    pytest.param(
        lambda a: a.t(),
        [(3,)],
        "a0",
        id="t-1d",
    ),
    pytest.param(
        lambda a: a.movedim(0, -1),
        [(2, 3, 4)],
        "a1, a2, a0",
        id="movedim",
    ),
    pytest.param(
        lambda a: a.movedim((0, 1), (2, 0)),
        [(2, 3, 4)],
        "a1, a2, a0",
        id="movedim2",
    ),
    pytest.param(
        lambda a: a.unsqueeze(1),
        [(2, 3)],
        "a0, -, a1",
        id="unsqueeze",
    ),
    pytest.param(
        lambda a: a.unsqueeze(-1),
        [(2, 3)],
        "a0, a1, -",
        id="unsqueeze--1",
    ),
    pytest.param(
        lambda a: a[:, None],
        [(2, 3)],
        "a0, -, a1",
        id="None-index",
    ),
    pytest.param(
        lambda a: a.squeeze(),
        [(2, 1, 3)],
        "a0, a2",
        id="squeeze",
    ),
    pytest.param(
        lambda a: a.squeeze(1),
        [(2, 1, 3)],
        "a0, a2",
        id="squeeze-dim",
    ),
    pytest.param(
        lambda a: a.squeeze(0),
        [(2, 1, 3)],
        "a0, -, a2",
        id="squeeze-no",
    ),
    pytest.param(
        lambda a: a.expand(5, 3),
        [(1, 3)],
        "-, a1",
        id="expand",
    ),
    pytest.param(
        lambda a: a.expand(5, 2, 3),
        [(2, 3)],
        "-, a0, a1",
        id="expand-new-dim",
    ),
    pytest.param(
        lambda a, b: a.expand_as(b),
        [(1, 3), (4, 3)],
        "b0, a1 ; b1=a1",
        id="expand_as",
    ),
    pytest.param(
        lambda a, b: a.expand(b.shape[0], -1),
        [(1, 3), (4, 2)],
        "new4, a1",
        id="expand-derived",
    ),
    pytest.param(
        lambda a: a.broadcast_to(4, 3),
        [(1, 3)],
        "-, a1",
        id="broadcast_to",
    ),
    pytest.param(
        lambda a: a.view(2, 4),
        [(8,)],
        "{a0[0:4]}{a0[4:8]}, (a0[0:4] / a0[4:8])@0 ; a0[0:4]~a0[4:8]",
        id="split-view",
    ),
    pytest.param(
        lambda a: a.unflatten(0, (2, 4)),
        [(8,)],
        "{a0[0:4]}{a0[4:8]}, (a0[0:4] / a0[4:8])@0 ; a0[0:4]~a0[4:8]",
        id="unflatten",
    ),
    pytest.param(
        lambda a: a.view(2, 4).flatten(),
        [(8,)],
        "a0 ; a0[0:4]~a0[4:8]",
        id="split-then-flatten",
    ),
    pytest.param(
        lambda a: a.view(2, 4).t().reshape(8),
        [(8,)],
        "a0[0,0,1,1,2,2,3,3] ; a0=a0[0:4]+a0[0:4] ; a0[0:4]~a0[0:4]",
        id="shuffle",
    ),
    pytest.param(
        lambda a: a.flatten(),
        [(2, 3)],
        "new6!",
        id="merge-2-labelled",
    ),
    pytest.param(
        lambda a: a.reshape(2, 3),
        [(2, 3)],
        "a0, a1",
        id="reshape-same",
    ),
    pytest.param(
        lambda a: a.reshape(2, 1, 3),
        [(2, 3)],
        "a0, -, a1",
        id="reshape-1s",
    ),
    pytest.param(
        lambda a: a.view(2, 3, 2),
        [(12,)],
        (
            "{{a0[0:2]}{a0[2:4]}{a0[4:6]}}{{a0[6:8]}{a0[8:10]}{a0[10:12]}}, ({a0[0:2]}{a0[2:4]}{a0[4:6]} / "
            "{a0[6:8]}{a0[8:10]}{a0[10:12]})@0, (a0[0:2] / a0[2:4] / a0[4:6] / a0[6:8] / a0[8:10] / "
            "a0[10:12])@0,1 ; a0[0:2]~a0[2:4]~a0[4:6]~a0[6:8]~a0[8:10]~a0[10:12] ; "
            "{a0[0:2]}{a0[2:4]}{a0[4:6]}~{a0[6:8]}{a0[8:10]}{a0[10:12]}"
        ),
        id="three-way",
    ),
    pytest.param(
        lambda a: a.view(2, 3, 2).flatten(1),
        [(12,)],
        (
            "{{a0[0:2]}{a0[2:4]}{a0[4:6]}}{{a0[6:8]}{a0[8:10]}{a0[10:12]}}, (a0[0:6] / a0[6:12])@0 ; "
            "a0[0:2]~a0[2:4]~a0[4:6]~a0[6:8]~a0[8:10]~a0[10:12] ; "
            "{a0[0:2]}{a0[2:4]}{a0[4:6]}~{a0[6:8]}{a0[8:10]}{a0[10:12]}"
        ),
        id="three-way-merge-last",
    ),
    pytest.param(
        lambda a: a.view(2, 3, 2).flatten(0, 1),
        [(12,)],
        (
            "{a0[0:2]}{a0[2:4]}{a0[4:6]}{a0[6:8]}{a0[8:10]}{a0[10:12]}, (a0[0:2] / a0[2:4] / a0[4:6] / "
            "a0[6:8] / a0[8:10] / a0[10:12])@0 ; a0[0:2]~a0[2:4]~a0[4:6]~a0[6:8]~a0[8:10]~a0[10:12] ; "
            "{a0[0:2]}{a0[2:4]}{a0[4:6]}~{a0[6:8]}{a0[8:10]}{a0[10:12]}"
        ),
        id="three-way-merge-first",
    ),
    pytest.param(
        lambda a, b: a.view_as(b),
        [(6,), (2, 3)],
        "b0, (a0[0:3] / a0[0:3])@0 ; a0=a0[0:3]+a0[0:3] ; b1=a0[0:3] ; a0[0:3]~a0[0:3]",
        id="view_as",
    ),
    pytest.param(
        lambda a: a.view(2, 6).view(2, 3, 2).view(6, 2),
        [(12,)],
        (
            "{a0[0:2]}{a0[2:4]}{a0[4:6]}{a0[6:8]}{a0[8:10]}{a0[10:12]}, (a0[0:2] / a0[2:4] / a0[4:6] / "
            "a0[6:8] / a0[8:10] / a0[10:12])@0 ; a0[0:6]~a0[6:12] ; "
            "a0[0:2]~a0[2:4]~a0[4:6]~a0[6:8]~a0[8:10]~a0[10:12]"
        ),
        id="resplit",
    ),
    pytest.param(
        lambda a: a.squeeze((0, 2)),
        [(1, 3, 1)],
        "a1",
        id="squeeze-multi",
    ),
    pytest.param(
        lambda a: (a[:, :, None] * torch.ones(4)).flatten(1),
        [(2, 3)],
        "a0, a1[0,0,0,0,1,1,1,1,2,2,2,2]",
        id="flatten-batch*C",
    ),
    pytest.param(
        lambda a: a.t().contiguous(),
        [(2, 3)],
        "a1, a0",
        id="contiguous",
    ),
]


@pytest.mark.parametrize(("function", "shapes", "expected"), GOLDEN)
def test_labels(golden, function, shapes, expected) -> None:
    """The output's labels, what is tied and what stays are exactly these (see conftest for the notation)."""
    assert golden(function, *shapes).text() == expected


NETWORKS = [
    pytest.param(
        lambda net: net.lin(lambda s, x: x.view(x.shape[0], 2, -1).transpose(1, 2).reshape(x.shape[0], -1)),
        torch.randn(3, 6),
        4,
        0.957,
        id="shuffle",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)),
        torch.randn(3, 6),
        4,
        0.957,
        id="shuffle-flatten",
    ),
    pytest.param(
        lambda net: net.lin(
            lambda s, x: x.view(x.shape[0], s.g, x.shape[1] // s.g).transpose(1, 2).reshape(x.shape[0], -1), g=2
        ),
        torch.randn(3, 6),
        4,
        0.957,
        id="shuffle-attr",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.view(x.shape[0], -1, s.g).transpose(1, 2).reshape(x.shape[0], -1), g=2),
        torch.randn(3, 6),
        2,
        0.957,
        id="shuffle-groups--1",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.view(x.shape[0], 2, 4).flatten(1)),
        torch.randn(3, 6),
        0,
        0.0,
        id="split-heads-literal",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.view(x.shape[0], -1, s.d).flatten(1), d=4),
        torch.randn(3, 6),
        4,
        0.957,
        id="split-heads-attr-d",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.view(x.shape[0], s.h, s.d).flatten(1), d=4, h=2),
        torch.randn(3, 6),
        4,
        0.957,
        id="split-heads-attr-both",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.view(x.shape[0], 2, -1).sum(1), m2=4),
        torch.randn(3, 6),
        4,
        0.947,
        id="heads-sum",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x.view(x.shape[0], 2, -1).softmax(1).flatten(1)),
        torch.randn(3, 6),
        4,
        0.957,
        id="heads-softmax",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.p(x).flatten(1)), p=nn.Conv2d(3, 8, 1), q=nn.Linear(32, 4)),
        torch.randn(2, 3, 2, 2),
        8,
        0.976,
        id="flatten-hw",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.p(x).view(-1, s.n)), p=nn.Conv2d(3, 8, 1), q=nn.Linear(32, 4), n=32),
        torch.randn(2, 3, 2, 2),
        8,
        0.976,
        id="flatten-hw-attr",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.p(x).view(-1, 32)), p=nn.Conv2d(3, 8, 1), q=nn.Linear(32, 4)),
        torch.randn(2, 3, 2, 2),
        0,
        0.0,
        id="flatten-hw-literal",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.p(x).permute(0, 2, 3, 1).flatten(1)), p=nn.Conv2d(3, 8, 1), q=nn.Linear(32, 4)
        ),
        torch.randn(2, 3, 2, 2),
        8,
        0.976,
        id="flatten-hw-permuted",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.r((s.p(x)[:, :, None] * s.q(x)[:, None, :]).flatten(1)),
            p=nn.Linear(6, 4),
            q=nn.Linear(6, 3),
            r=nn.Linear(12, 5),
        ),
        torch.randn(3, 6),
        7,
        0.956,
        id="product-flatten",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.r((s.p(x)[:, :, None] * s.q(x)[:, None, :]).flatten(1).view(x.shape[0], -1, 3)),
            p=nn.Linear(6, 4),
            q=nn.Linear(6, 3),
            r=nn.Linear(3, 5),
        ),
        torch.randn(3, 6),
        None,
        None,
        id="product-back--1",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.r(
                (s.p(x)[:, :, None] * s.q(x)[:, None, :]).flatten(1).view(x.shape[0], -1, 6).transpose(1, 2)
            ),
            p=nn.Linear(6, 4),
            q=nn.Linear(6, 3),
            r=nn.Linear(2, 5),
        ),
        torch.randn(3, 6),
        None,
        None,
        id="product-resplit",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.r(x @ s.w.view(-1, 4)), w=nn.Parameter(torch.randn(4, 6)), r=nn.Linear(4, 3)
        ),
        torch.randn(3, 6),
        None,
        None,
        id="param-product-view",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x[:, :, None].expand(-1, -1, 2).reshape(x.shape[0], -1), m2=16),
        torch.randn(3, 6),
        8,
        0.968,
        id="expand-reshape",
    ),
    pytest.param(
        lambda net: net.lin(lambda s, x: x[:, None, :].expand(-1, 2, -1).reshape(x.shape[0], -1), m2=16),
        torch.randn(3, 6),
        8,
        0.968,
        id="expand-reshape--1",
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


class RotatedPart(nn.Module):
    """The last positions of every head are turned as complex numbers, seen in the memory of the whole head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.still, self.turned = 2, 6, 4
        self.q, self.out = nn.Linear(6, 20), nn.Linear(20, 4)
        self.register_buffer("angles", torch.polar(torch.ones(5, 1, 2), torch.rand(5, 1, 2)))

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.heads, self.still + self.turned)
        still, turned = torch.split(q, [self.still, self.turned], dim=-1)
        turned = torch.view_as_complex(turned.view(n, t, self.heads, -1, 2)) * self.angles
        return self.out(torch.cat([still, torch.view_as_real(turned).flatten(3)], dim=-1).flatten(2))


@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.5])
def test_complex_numbers_in_a_wider_row_keep_it_even(oracle, ratio) -> None:
    """An odd number of positions before them, or in the whole row, and they cannot be viewed."""
    model = RotatedPart()
    oracle(model, torch.randn(2, 5, 6), ratio)
    prunus.prune(model, torch.randn(2, 5, 6), prunus.Target(ratio=ratio))
    assert model.still < 6
    assert model.still % 2 == 0


class GroupedOutput(nn.Module):
    """Queries share one head of keys and values; heads times dims are cut anew into groups, each with its matrix."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.heads, self.groups = 4, groups
        self.q, self.kv, self.out = nn.Linear(6, 32), nn.Linear(6, 8), nn.Linear(groups * 6, 4)
        self.weight = nn.Parameter(torch.randn(groups * 6, 32 // groups))

    def forward(self, x):
        n, t, _ = x.shape
        q, kv = self.q(x).view(n, t, self.heads, -1).transpose(1, 2), self.kv(x)[:, None]
        y = ((q @ kv.transpose(2, 3)).softmax(-1) @ kv).transpose(1, 2)
        y = y.reshape(n * t, self.groups, -1).transpose(0, 1)
        weight = self.weight.view(self.groups, -1, y.shape[-1]).transpose(1, 2)
        return self.out(torch.bmm(y, weight).transpose(0, 1).reshape(n, t, -1))


@pytest.mark.parametrize(("groups", "bundles"), [(2, 14), (4, 14), (8, 10)])
def test_merged_dims_cut_anew_in_other_places_do_not_go_by_these(oracle, groups, bundles) -> None:
    """A group that is half a head, or two heads, never goes; what the heads share does, as many as the cut allows."""
    found = oracle(GroupedOutput(groups), torch.randn(2, 5, 6))
    assert "kv.weight:0" not in found.frozen
    assert found.bundles == bundles


class LearnedQueries(nn.Module):
    """Queries that are parameters: their number is a dim that could shrink too, and views merge it with the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(10, 12), nn.Linear(12, 4)
        self.queries = nn.Parameter(torch.randn(1, 6, 12))
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x):
        x = self.embed(x)
        pooled, _ = self.attention(self.queries.expand(len(x), -1, -1), x, x)
        return self.head(pooled.mean(1))


def test_a_dim_merged_with_a_part_of_another_stays_and_keeps_no_other(oracle) -> None:
    found = oracle(LearnedQueries(), torch.randn(3, 5, 10))
    assert found.frozen == {"embed.weight:1", "queries:1", "head.weight:0", "head.bias:0"}


class MergedTwice(nn.Module):
    """Two matrices of low rank, each from two dims that a view merges."""

    def __init__(self, down: tuple[int, int], up: tuple[int, int]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.down, self.up = nn.Parameter(torch.randn(*down, 6)), nn.Parameter(torch.randn(6, *up))

    def forward(self, x):
        return self.head((self.embed(x) @ self.down.flatten(end_dim=1).T) @ self.up.flatten(start_dim=1).T)


@pytest.mark.parametrize(
    ("down", "up", "stay"), [((4, 8), (4, 8), False), ((4, 8), (8, 4), False), ((4, 6), (6, 4), True)]
)
def test_merged_dims_stay_the_product_of_what_is_left_of_each(oracle, down, up, stay) -> None:
    """Every eighth of 32 positions is an index of (4, 8), and half of an index of (8, 4): it goes with the other half.

    Of 24 positions every sixth is one of (4, 6), and nothing that a removal from (6, 4) could take.
    """
    found = oracle(MergedTwice(down, up), torch.randn(7, 5))
    assert found.frozen >= ({"down:0", "down:1", "up:1", "up:2"} if stay else set())
    assert stay or found.frozen.isdisjoint({"down:0", "down:1", "up:1", "up:2"})


class PixelsToChannels(nn.Module):
    """Four neighbours in a square become one position of four times the width; a table adds places to all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = 4
        self.embed, self.places, self.head = nn.Linear(5, 6), nn.Embedding(16, 6), nn.Linear(24, 3)

    def forward(self, x):
        x = self.embed(x)
        n, t, c = x.shape
        x = x + self.places(torch.full((n, 64 // self.patch), 2))
        x = x.view(n, 4, 4, c).view(n, 4, 2, c * 2).permute(0, 2, 1, 3)
        return self.head(x.reshape(n, 2, 2, c * 4).permute(0, 2, 1, 3).reshape(n, t // 4, c * 4))


def test_a_dim_that_stays_merged_with_another_one_does_not_keep_it(oracle) -> None:
    found = oracle(PixelsToChannels(), torch.randn(2, 16, 5))
    assert "embed.weight:0" not in found.frozen
    assert "head.weight:1" not in found.frozen


class GroupDeviation(nn.Module):
    """Channels are divided by the deviation of their group, which is repeated by a shape that the code read."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.first(x)
        n, c, h, w = x.shape
        grouped = x.reshape(n, self.groups, c // self.groups, h, w)
        deviation = grouped.var((2, 3, 4), unbiased=False, keepdim=True).add(1e-5).sqrt()
        return self.last(x / deviation.expand(grouped.shape).reshape(n, c, h, w))


@pytest.mark.parametrize("groups", [1, 4, 8, 16])
def test_a_value_of_each_row_is_repeated_along_it(oracle, groups) -> None:
    """A dim that grows to the size of a row goes along with that row, so that both can be merged into channels."""
    found = oracle(GroupDeviation(groups), torch.randn(2, 3, 5, 5))
    assert found.frozen == {"first.weight:1", "last.weight:0", "last.bias:0"}


class Diffusion(nn.Module):
    """Features of every node, mixed by a matrix of nodes, with a state that holds nodes times features in one dim."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes, self.width = 5, 8
        self.register_buffer("mix", torch.rand(5, 5))
        self.gates, self.head = nn.Linear(2 * (3 + 8), 2 * 8), nn.Linear(8, 2)

    def forward(self, x):
        state = torch.zeros(len(x), self.nodes * self.width)
        for _ in range(2):
            y = torch.cat([x, state.view(-1, self.nodes, self.width)], 2)
            y = torch.stack([y, self.mix @ y], 3).flatten(2)
            keep, new = self.gates(y).chunk(2, dim=2)
            keep, new = (part.reshape(len(x), self.nodes * self.width) for part in (keep.sigmoid(), new.tanh()))
            state = keep * state + (1 - keep) * new
        return self.head(state.view(-1, self.nodes, self.width))


def test_a_dim_that_stays_merges_like_one_without_a_label(oracle) -> None:
    """The number of nodes stays, as the inputs have it: features may still go from a dim of nodes times features."""
    found = oracle(Diffusion(), torch.randn(3, 5, 3))
    assert found.frozen == {"mix:0", "mix:1", "gates.weight:1", "head.weight:0", "head.bias:0"}
