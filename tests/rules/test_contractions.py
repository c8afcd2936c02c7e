"""Contractions: linear, products, attention, convolutions."""

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
        lambda a, b, c: F.linear(a, b, c),
        [(2, 3), (4, 3), (4,)],
        "a0, b0 ; b1=a1 ; c0=b0",
        id="linear",
    ),
    pytest.param(
        lambda a, b: F.linear(a, b),
        [(2, 3), (4, 3)],
        "a0, b0 ; b1=a1",
        id="linear-nobias",
    ),
    pytest.param(
        lambda a, b: F.linear(a, b),
        [(2, 3), (3,)],
        "a0 ; b0=a1",
        id="linear-vec-w",
    ),
    pytest.param(
        lambda a, b: F.linear(torch.randn(2, 3), a, b),
        [(4, 3), (4,)],
        "-, a0 ; a1! ; b0=a0",
        id="linear-fixed-in",
    ),
    pytest.param(
        lambda a, b: a @ b,
        [(2, 3), (3, 4)],
        "a0, b1 ; b0=a1",
        id="matmul",
    ),
    pytest.param(
        lambda a, b: a @ b,
        [(2, 3), (3,)],
        "a0 ; b0=a1",
        id="matmul-vec",
    ),
    pytest.param(
        lambda a, b: a @ b,
        [(3,), (3, 4)],
        "b1 ; b0=a0",
        id="vec-mat",
    ),
    pytest.param(
        lambda a, b: a @ b,
        [(3,), (3,)],
        " ; b0=a0",
        id="dot",
    ),
    pytest.param(
        lambda a, b: a @ b,
        [(5, 2, 3), (3, 4)],
        "a0, a1, b1 ; b0=a2",
        id="matmul-batch",
    ),
    pytest.param(
        lambda a, b: a @ b,
        [(5, 2, 3), (5, 3, 4)],
        "a0, a1, b2 ; b0=a0 ; b1=a2",
        id="matmul-batch-both",
    ),
    pytest.param(
        lambda a, b: a @ b,
        [(1, 2, 3), (5, 3, 4)],
        "b0, a1, b2 ; b1=a2",
        id="matmul-bcast",
    ),
    pytest.param(
        lambda a, b: a.view(2, 2, 4).transpose(0, 1) @ b.view(2, 2, 4).permute(1, 2, 0),
        [(2, 8), (2, 8)],
        "{a1[0:4]}{a1[4:8]}, a0, b0 ; b1=a1 ; a1[0:4]~a1[4:8] ; a1[0:4]~a1[4:8]",
        id="matmul-heads",
    ),
    pytest.param(
        lambda a, b: torch.bmm(a, b),
        [(5, 2, 3), (5, 3, 4)],
        "a0, a1, b2 ; b0=a0 ; b1=a2",
        id="bmm",
    ),
    pytest.param(
        lambda a, b, c: torch.baddbmm(a, b, c),
        [(5, 2, 4), (5, 2, 3), (5, 3, 4)],
        "a0, a1, a2 ; b0=a0 ; b1=a1 ; c0=a0 ; c1=b2 ; c2=a2",
        id="baddbmm",
    ),
    pytest.param(
        lambda a, b, c: torch.baddbmm(a, b, c),
        [(1, 1, 4), (5, 2, 3), (5, 3, 4)],
        "b0, b1, a2 ; c0=b0 ; c1=b2 ; c2=a2",
        id="baddbmm-b",
    ),
    pytest.param(
        lambda a, b, c: torch.addmm(a, b, c),
        [(4,), (2, 3), (3, 4)],
        "b0, a0 ; c0=b1 ; c1=a0",
        id="addmm",
    ),
    pytest.param(
        lambda a, b, c: torch.addbmm(a, b, c),
        [(2, 4), (5, 2, 3), (5, 3, 4)],
        "a0, a1 ; b1=a0 ; c0=b0 ; c1=b2 ; c2=a1",
        id="addbmm",
    ),
    pytest.param(
        lambda a, b: torch.mv(a, b),
        [(2, 3), (3,)],
        "a0 ; b0=a1",
        id="mv",
    ),
    pytest.param(
        lambda a, b, c: torch.addmv(a, b, c),
        [(2,), (2, 3), (3,)],
        "a0 ; b0=a0 ; c0=b1",
        id="addmv",
    ),
    pytest.param(
        lambda a, b: torch.outer(a, b),
        [(2,), (3,)],
        "a0, b0",
        id="outer",
    ),
    pytest.param(
        lambda a, b: torch.einsum("ij,jk->ik", a, b),
        [(2, 3), (3, 4)],
        "a0, b1 ; b0=a1",
        id="einsum",
    ),
    pytest.param(
        lambda a, b: torch.einsum("ij,jk", a, b),
        [(2, 3), (3, 4)],
        "a0, b1 ; b0=a1",
        id="einsum-implicit",
    ),
    pytest.param(
        lambda a, b: torch.einsum("...ij,jk->...ik", a, b),
        [(5, 2, 3), (3, 4)],
        "a0, a1, b1 ; b0=a2",
        id="einsum-...",
    ),
    pytest.param(
        lambda a: torch.einsum("ii->i", a),
        [(3, 3)],
        "- ; a0! ; a1!",
        id="einsum-diag",
    ),
    pytest.param(
        lambda a, b: torch.einsum("bqhd,bkhd->bhqk", a, b),
        [(1, 2, 3, 4), (1, 2, 3, 4)],
        "-, a2, a1, b1 ; b2=a2 ; b3=a3",
        id="einsum-bhqk",
    ),
    pytest.param(
        lambda a: torch.einsum("ij->i", a),
        [(2, 3)],
        "a0",
        id="einsum-sum",
    ),
    pytest.param(
        lambda a, b: torch.einsum(a, [0, 1], b, [1, 2], [0, 2]),
        [(2, 3), (3, 4)],
        "a0, b1 ; b0=a1",
        id="einsum-sublist",
    ),
    pytest.param(
        lambda a, b, c: torch.einsum("ij,jk,kl->il", a, b, c),
        [(2, 3), (3, 4), (4, 5)],
        "a0, c1 ; b0=a1 ; c0=b1",
        id="einsum-3",
    ),
    pytest.param(
        lambda a, b: torch.tensordot(a, b, 1),
        [(2, 3), (3, 4)],
        "a0, b1 ; b0=a1",
        id="tensordot",
    ),
    pytest.param(
        lambda a, b: torch.inner(a, b),
        [(2, 3), (4, 3)],
        "a0, b0 ; b1=a1",
        id="inner",
    ),
    pytest.param(
        lambda a, b, c: torch.linalg.multi_dot([a, b, c]),
        [(2, 3), (3, 4), (4, 5)],
        "a0, c1 ; b0=a1 ; c0=b1",
        id="multi_dot",
    ),
    pytest.param(
        lambda a, b: F.cosine_similarity(a, b),
        [(2, 3), (2, 3)],
        "a0 ; b0=a0 ; b1=a1",
        id="cosine",
    ),
    pytest.param(
        lambda a, b, c: F.scaled_dot_product_attention(a, b, c),
        [(1, 2, 5, 4), (1, 2, 6, 4), (1, 2, 6, 3)],
        "-, a1, a2!, c3 ; a2! ; b1=a1 ; b2! ; b3=a3 ; c1=a1 ; c2=b2!",
        id="sdpa",
    ),
    pytest.param(
        lambda a, b, c: F.scaled_dot_product_attention(a, b, c, enable_gqa=True),
        [(1, 4, 5, 8), (1, 2, 6, 8), (1, 2, 6, 8)],
        "-, a1[0,0,2,2], a2!, c3 ; a1=a1[0,0,2,2] ; a2! ; b1=a1[0,2] ; b2! ; b3=a3 ; c1=a1[0,2] ; c2=b2!",
        id="sdpa-gqa",
    ),
    pytest.param(
        lambda a, b, c, d: F.scaled_dot_product_attention(a, b, c, attn_mask=d),
        [(1, 2, 5, 4), (1, 2, 6, 4), (1, 2, 6, 4), (2, 5, 6)],
        "-, a1, a2!, c3 ; a2! ; b1=a1 ; b2! ; b3=a3 ; c1=a1 ; c2=b2! ; d0=a1 ; d1=a2! ; d2=b2!",
        id="sdpa-mask",
    ),
    pytest.param(
        lambda a, b, c: F.scaled_dot_product_attention(a, b, c, attn_mask=torch.randn(5, 6)),
        [(1, 2, 5, 4), (1, 2, 6, 4), (1, 2, 6, 4)],
        "-, a1, a2!, c3 ; a2! ; b1=a1 ; b2! ; b3=a3 ; c1=a1 ; c2=b2!",
        id="sdpa-mask-kw-fixed",
    ),
    pytest.param(
        lambda a, b, c: F.scaled_dot_product_attention(a, b, c),
        [(2, 5, 4), (2, 6, 4), (2, 6, 3)],
        "a0, a1!, c2 ; a1! ; b0=a0 ; b1! ; b2=a2 ; c0=a0 ; c1=b1!",
        id="sdpa-3d",
    ),
    pytest.param(
        lambda a, b, c: F.scaled_dot_product_attention(a, b, c, attn_mask=torch.randn(2, 5, 6)),
        [(1, 2, 5, 4), (1, 2, 6, 4), (1, 2, 6, 4)],
        "-, a1!, a2!, c3 ; a1! ; a2! ; b1=a1! ; b2! ; b3=a3 ; c1=a1! ; c2=b2!",
        id="sdpa-mask-heads-fixed",
    ),
    pytest.param(
        lambda a, b, c: F.conv1d(a, b, c),
        [(1, 3, 5), (4, 3, 2), (4,)],
        "-, b0, - ; a2! ; b1=a1 ; b2! ; c0=b0",
        id="conv1d",
    ),
    pytest.param(
        lambda a, b: F.conv2d(a, b),
        [(3, 5, 5), (4, 3, 2, 2)],
        "b0, -, - ; a1! ; a2! ; b1=a0 ; b2! ; b3!",
        id="conv2d-unb",
    ),
    pytest.param(
        lambda a, b: F.conv3d(a, b),
        [(1, 2, 4, 4, 4), (3, 2, 2, 2, 2)],
        "-, b0, -, -, - ; a2! ; a3! ; a4! ; b1=a1 ; b2! ; b3! ; b4!",
        id="conv3d",
    ),
    pytest.param(
        lambda a, b: F.conv1d(a, b, padding="same"),
        [(1, 3, 5), (4, 3, 3)],
        "-, b0, - ; a2! ; b1=a1 ; b2!",
        id="conv-same",
    ),
    pytest.param(
        lambda a, b, c: F.conv_transpose1d(a, b, c),
        [(1, 3, 5), (3, 4, 2), (4,)],
        "-, b1, - ; a2! ; b0=a1 ; b2! ; c0=b1",
        id="convT",
    ),
    pytest.param(
        lambda a, b, c: F.conv1d(a, b, c, groups=2),
        [(1, 4, 5), (6, 2, 2), (6,)],
        "-, b0, - ; a1=a1[0:2]+a1[0:2] ; a2! ; b1=a1[0:2] ; b2! ; c0=b0 ; b0[0:3]~b0[3:6]",
        id="grouped",
    ),
    pytest.param(
        lambda a, b, c: F.conv1d(a, b, c, groups=4),
        [(1, 4, 5), (4, 1, 2), (4,)],
        "-, a1, - ; a2! ; b0=a1 ; b2! ; c0=a1",
        id="depthwise",
    ),
    pytest.param(
        lambda a, b, c: F.conv1d(a, b, c, groups=4),
        [(1, 4, 5), (8, 1, 2), (8,)],
        "-, b0, - ; a2! ; b2! ; c0=b0 ; b0[0:2]~b0[2:4]~b0[4:6]~b0[6:8]",
        id="dw-mult",
    ),
    pytest.param(
        lambda a: F.conv1d(torch.randn(1, 4, 5), a, groups=2),
        [(6, 2, 2)],
        "-, a0, - ; a1! ; a2! ; a0[0:3]~a0[3:6]",
        id="grouped-fixed-in",
    ),
]


@pytest.mark.parametrize(("function", "shapes", "expected"), GOLDEN)
def test_labels(golden, function, shapes, expected) -> None:
    """The output's labels, what is tied and what stays are exactly these (see conftest for the notation)."""
    assert golden(function, *shapes).text() == expected


NETWORKS = [
    pytest.param(
        lambda net: net.Net(lambda s, x: s.p(x) @ s.q(x).t(), p=nn.Linear(6, 8), q=nn.Linear(6, 8)),
        torch.randn(3, 6),
        8,
        1.0,
        id="matmul",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.o(torch.bmm(torch.bmm(s.q(x), s.k(x).transpose(1, 2)).softmax(-1), s.v(x))),
            q=nn.Linear(6, 8),
            k=nn.Linear(6, 8),
            v=nn.Linear(6, 8),
            o=nn.Linear(8, 6),
        ),
        torch.randn(2, 5, 6),
        16,
        0.973,
        id="bmm-attn",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.o(torch.baddbmm(s.b, s.q(x), s.w)),
            q=nn.Linear(6, 8),
            w=nn.Parameter(torch.randn(2, 8, 4)),
            b=nn.Parameter(torch.randn(1, 4)),
            o=nn.Linear(4, 3),
        ),
        torch.randn(2, 5, 6),
        12,
        0.978,
        id="baddbmm",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.o(torch.einsum("bni,oi->bno", s.q(x), s.w)),
            q=nn.Linear(6, 8),
            w=nn.Parameter(torch.randn(4, 8)),
            o=nn.Linear(4, 3),
        ),
        torch.randn(2, 5, 6),
        12,
        0.971,
        id="einsum",
    ),
    pytest.param(
        lambda net: net.attention("sdpa"),
        torch.randn(2, 5, 6),
        4,
        0.973,
        id="attn-sdpa",
    ),
    pytest.param(
        lambda net: net.attention("mask"),
        torch.randn(2, 5, 6),
        4,
        0.973,
        id="attn-mask",
    ),
    pytest.param(
        lambda net: net.attention("causal"),
        torch.randn(2, 5, 6),
        4,
        0.973,
        id="attn-causal",
    ),
    pytest.param(
        lambda net: net.attention("manual"),
        torch.randn(2, 5, 6),
        4,
        0.973,
        id="attn-manual",
    ),
    pytest.param(
        lambda net: net.attention("bh"),
        torch.randn(2, 5, 6),
        4,
        0.973,
        id="attn-bh",
    ),
    pytest.param(
        lambda net: net.attention("headscale"),
        torch.randn(2, 5, 6),
        4,
        0.973,
        id="attn-headscale",
    ),
    pytest.param(
        lambda net: net.attention("gqa", 4, 4, 2),
        torch.randn(2, 5, 6),
        4,
        0.982,
        id="attn-gqa",
    ),
    pytest.param(
        lambda net: net.attention("ri", 4, 4, 2),
        torch.randn(2, 5, 6),
        4,
        0.982,
        id="attn-ri",
    ),
    pytest.param(
        lambda net: net.attention("expand", 4, 4, 2),
        torch.randn(2, 5, 6),
        4,
        0.982,
        id="attn-expand",
    ),
    pytest.param(
        lambda net: nn.MultiheadAttention(8, 2, batch_first=True),
        (torch.randn(2, 5, 8),) * 3,
        0,
        0.0,
        id="mha",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.o(s.a(s.p(x), s.p(x), s.p(x), need_weights=False)[0]),
            p=nn.Linear(6, 8),
            a=nn.MultiheadAttention(8, 2, batch_first=True),
            o=nn.Linear(8, 3),
        ),
        torch.randn(2, 5, 6),
        12,
        0.992,
        id="mha-block",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.o(s.a(s.p(x), s.k(x), s.v(x))[0]),
            p=nn.Linear(6, 8),
            k=nn.Linear(6, 6),
            v=nn.Linear(6, 4),
            a=nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True),
            o=nn.Linear(8, 3),
        ),
        torch.randn(2, 5, 6),
        None,
        None,
        id="mha-kdim",
    ),
    pytest.param(
        lambda net: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        torch.randn(2, 5, 8),
        16,
        0.453,
        id="encoder-layer",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: (lambda qkv: s.o(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)))(
                s.p(x).reshape(x.shape[0], x.shape[1], 3, s.h, -1).permute(2, 0, 3, 1, 4)
            ),
            p=nn.Linear(6, 24),
            o=nn.Linear(8, 6),
            h=2,
        ),
        torch.randn(2, 5, 6),
        4,
        0.973,
        id="fused-qkv",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.p(x).relu()), p=nn.Conv1d(3, 8, 3, padding=1), q=nn.Conv1d(8, 4, 1)),
        torch.randn(2, 3, 6),
        8,
        0.966,
        id="conv1d",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.p(x).relu()), p=nn.Conv2d(3, 8, 3, padding=1), q=nn.Conv2d(8, 4, 1)),
        torch.randn(2, 3, 5, 5),
        8,
        0.985,
        id="conv2d",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.p(x).relu()), p=nn.Conv3d(3, 8, 3, padding=1), q=nn.Conv3d(8, 4, 1)),
        torch.randn(1, 3, 4, 4, 4),
        8,
        0.994,
        id="conv3d",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.p(x).relu()), p=nn.ConvTranspose2d(3, 8, 2, stride=2), q=nn.ConvTranspose2d(8, 4, 1)
        ),
        torch.randn(2, 3, 4, 4),
        8,
        0.971,
        id="conv-T",
    ),
    pytest.param(
        lambda net: net.cc(nn.Conv2d(8, 8, 3, padding=1, groups=2)),
        torch.randn(2, 3, 4, 4),
        8,
        0.989,
        id="grouped",
    ),
    pytest.param(
        lambda net: net.cc(nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), 12),
        torch.randn(2, 3, 4, 4),
        5,
        0.987,
        id="grouped-nobias",
    ),
    pytest.param(
        lambda net: net.cc(nn.Conv2d(8, 8, 3, padding=1, groups=8)),
        torch.randn(2, 3, 4, 4),
        8,
        0.973,
        id="depthwise",
    ),
    pytest.param(
        lambda net: net.cc(nn.Conv2d(8, 16, 3, padding=1, groups=8), 16),
        torch.randn(2, 3, 4, 4),
        2,
        0.985,
        id="dw-multiplier",
    ),
    pytest.param(
        lambda net: net.cc(nn.ConvTranspose2d(8, 8, 2, groups=2)),
        torch.randn(2, 3, 4, 4),
        8,
        0.98,
        id="grouped-T",
    ),
    pytest.param(
        lambda net: net.cc(nn.ConvTranspose2d(8, 8, 2, groups=2, bias=False)),
        torch.randn(2, 3, 4, 4),
        8,
        0.98,
        id="grouped-T-nobias",
    ),
    pytest.param(
        lambda net: net.cc(nn.ConvTranspose2d(8, 8, 2, groups=8)),
        torch.randn(2, 3, 4, 4),
        8,
        0.963,
        id="dw-T",
    ),
    pytest.param(
        lambda net: net.cc(nn.ConvTranspose2d(8, 16, 2, groups=8), 16),
        torch.randn(2, 3, 4, 4),
        2,
        0.978,
        id="dw-T-mult",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.p(x)), p=nn.Conv2d(3, 6, 3, groups=3), q=nn.Conv2d(6, 4, 1)),
        torch.randn(2, 3, 4, 4),
        2,
        0.955,
        id="dw-first",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.p(x)), p=nn.Conv2d(4, 8, 3, groups=2), q=nn.Conv2d(8, 4, 1)),
        torch.randn(2, 4, 4, 4),
        4,
        0.979,
        id="grouped-first",
    ),
    pytest.param(
        lambda net: net.cc(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=4))
        ),
        torch.randn(2, 3, 4, 4),
        None,
        None,
        id="two-grouped",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.p(x)), p=nn.ConvTranspose2d(4, 8, 3, groups=2), q=nn.Conv2d(8, 4, 1)),
        torch.randn(2, 4, 4, 4),
        4,
        0.979,
        id="grouped-T-first",
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


class Blurred(nn.Module):
    """Each channel is a picture of its own for one small kernel: channels are a part of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 5, 1)
        self.register_buffer("kernel", torch.rand(1, 1, 3, 3))

    def forward(self, x):
        x = self.first(x)
        alone = x.reshape(-1, 1, *x.shape[2:])
        return self.last(F.conv2d(alone, self.kernel, padding=1).view(x.shape))


def test_a_convolution_over_channels_as_a_batch_costs_what_is_left_of_them(oracle) -> None:
    found = oracle(Blurred(), torch.randn(2, 3, 8, 8))
    assert "first.weight:0" not in found.frozen


class ShiftedInTime(nn.Module):
    """A convolution along the first dim, whose batch is a dim that may shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 5)
        self.weight, self.bias = nn.Parameter(torch.randn(3, 1, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        hidden = torch.conv_tbc(self.first(x)[:, :, None], self.weight, self.bias, 1)
        return self.last(hidden.mean(2))


def test_a_convolution_in_time_over_channels_as_a_batch_costs_what_is_left_of_them(oracle) -> None:
    found = oracle(ShiftedInTime(), torch.randn(7, 4))
    assert "first.weight:0" not in found.frozen
