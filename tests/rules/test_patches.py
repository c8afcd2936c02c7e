"""Patches, shuffles and reads at computed places; transforms; matrices."""

# ruff: noqa: PLW0108 - the cases are one-liners
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus

GOLDEN = [
    pytest.param(
        lambda a: F.pixel_unshuffle(a, 2),
        [(1, 2, 4, 4)],
        "-, a1[0,0,0,0,1,1,1,1], -, - ; a2! ; a3!",
        id="pixel_unshuffle",
    ),
    pytest.param(lambda a: F.unfold(a, 2), [(1, 2, 3, 3)], "-, a1[0,0,0,0,1,1,1,1], - ; a2! ; a3!", id="im2col"),
    pytest.param(
        lambda a: F.fold(a, (3, 3), 2),
        [(1, 8, 4)],
        "-, a1[0,4], -, - ; a1=a1[0,0,0,0,4,4,4,4] ; a2!",
        id="col2im",
    ),
    pytest.param(lambda a: a.unfold(1, 2, 1), [(3, 4)], "a0, -, - ; a1!", id="unfold"),
    pytest.param(lambda a: a.as_strided((3, 2), (1, 3)), [(2, 3)], "a1, a0", id="as_strided"),
    pytest.param(lambda a: a.as_strided((2, 2, 3), (6, 3, 1)), [(4, 3)], "-, -, a1 ; a0!", id="as_strided-cut"),
    pytest.param(lambda a: a.as_strided((3, 2, 3), (3, 3, 1)), [(4, 3)], "-, -, a1 ; a0!", id="as_strided-windows"),
    pytest.param(lambda a: a.as_strided((4, 2), (3, 1)), [(4, 3)], "a0, - ; a1!", id="as_strided-part"),
    pytest.param(lambda a: a.as_strided((4, 3), (3, 0)), [(4, 3)], "-, - ; a0! ; a1!", id="as_strided-repeat"),
    pytest.param(lambda a: a.as_strided((3,), (4,)), [(4, 3)], "- ; a0! ; a1!", id="as_strided-diagonal"),
    pytest.param(lambda a: a[:, 1:].as_strided((4, 2), (3, 1)), [(4, 3)], "-, - ; a0! ; a1=a1?!", id="as_strided-gap"),
    pytest.param(lambda a: a[1:].as_strided((3, 3), (3, 1), 0), [(4, 3)], "-, - ; a0=a0?! ; a1!", id="as_strided-at-0"),
    pytest.param(lambda a: torch.rot90(a, 1, (1, 2)), [(2, 3, 4)], "a0, -, - ; a1! ; a2!", id="rot90"),
    pytest.param(
        lambda a, b: F.grid_sample(a, b, align_corners=False),
        [(2, 3, 4, 4), (2, 5, 6, 2)],
        "a0, a1, b1, b2 ; a2! ; a3! ; b0=a0 ; b3!",
        id="grid_sample",
    ),
    pytest.param(
        lambda a: F.affine_grid(a, (3, 1, 4, 4), align_corners=False),
        [(3, 2, 3)],
        "a0, -, -, - ; a1! ; a2!",
        id="affine",
    ),
    pytest.param(lambda a: torch.fft.rfft(a).real, [(3, 8)], "a0, - ; a1!", id="rfft"),
    pytest.param(lambda a: torch.fft.fft2(a, dim=(0, 1)).abs(), [(3, 4, 5)], "-, -, a2 ; a0! ; a1!", id="fft2"),
    pytest.param(
        lambda a: torch.fft.irfft2(torch.fft.rfft2(a)), [(2, 3, 4, 4)], "a0, a1, -, - ; a2! ; a3!", id="irfft2"
    ),
    pytest.param(lambda a: torch.view_as_real(torch.complex(a, a)), [(3, 4)], "a0, a1, -", id="view_as_real"),
    pytest.param(
        lambda a, b: torch.view_as_complex(a) * torch.polar(b.abs(), b),
        [(3, 4, 2), (4,)],
        "a0, a1 ; a2! ; b0=a1",
        id="rotary",
    ),
    pytest.param(lambda a: torch.linalg.inv(a), [(3, 4, 4)], "a0, -, - ; a1! ; a2!", id="inv"),
    pytest.param(lambda a, b: torch.linalg.solve(a, b), [(4, 4), (4, 2)], "-, - ; a0! ; a1! ; b0! ; b1!", id="solve"),
    pytest.param(lambda a, b: torch.cdist(a, b), [(3, 5), (4, 5)], "a0, b0 ; b1=a1", id="cdist"),
    pytest.param(lambda a, b, c: torch.addr(a, b, c), [(3, 4), (3,), (4,)], "a0, a1 ; b0=a0 ; c0=a1", id="addr"),
    pytest.param(lambda a, b: torch.linalg.cross(a, b), [(5, 3), (5, 3)], "a0, - ; a1! ; b0=a0 ; b1!", id="cross"),
    pytest.param(
        lambda a, b, c: F.bilinear(a, b, c),
        [(2, 3), (2, 4), (5, 3, 4)],
        "a0, c0 ; b0=a0 ; c1=a1 ; c2=b1",
        id="bilinear",
    ),
    pytest.param(lambda a: torch.renorm(a, 2, 0, 1.0), [(3, 4)], "a0, a1", id="renorm"),
    pytest.param(lambda a, b: F.mse_loss(a, b), [(3, 4), (3, 4)], " ; b0=a0 ; b1=a1", id="loss"),
    pytest.param(lambda a, b: a.slice_scatter(b, 1, 0, 2), [(3, 4), (3, 2)], "a0, - ; a1! ; b0=a0 ; b1!", id="scatter"),
    pytest.param(
        lambda a: a.chunk(4),
        [(4, 3)],
        "a0[0:1]!, a1 | a0[1:2]!, a1 | a0[2:3]!, a1 | a0[3:4]!, a1 ; a0!",
        id="chunk-of-ones",
    ),
]


@pytest.mark.parametrize(("function", "shapes", "expected"), GOLDEN)
def test_labels(golden, function, shapes, expected) -> None:
    """The output's labels, what is tied and what stays are exactly these (see conftest for the notation)."""
    found = golden(function, *shapes)
    assert found.text() == expected
    assert not found.trace.unsupported


def fold_unfold(s, x):
    y = s.p(x)
    return s.q(F.fold(F.unfold(y, 2, stride=2), y.shape[-2:], 2, stride=2))


def local_attention(s, x):
    """Each position looks at its neighbours."""
    y = s.p(x)
    b, c, h, w = y.shape
    near = F.unfold(y, 3, padding=1).view(b, c, 9, h * w)
    score = (y.flatten(2).unsqueeze(2) * near).sum(1, keepdim=True).softmax(2)
    return s.q((score * near).sum(2).view(b, c, h, w))


def sliding(s, x, literal=False):
    """Attention within windows that overlap by half, seen in the memory of the whole sequence; its heads come first."""
    b, t, _ = x.shape
    q, k, v = (
        f(x).view(b, t, s.heads, -1).transpose(1, 2).reshape(b * s.heads, t // 4, 4, -1) for f in (s.q, s.k, s.v)
    )

    def windows(y):
        size, stride = list(y.shape), [96, 16, 8, 1] if literal else list(y.stride())
        size[1] = size[1] * 2 - 1
        stride[1] = 2 * stride[2] if literal else stride[1] // 2
        return y.as_strided(size, stride)

    y = ((windows(q) @ windows(k).transpose(-1, -2)).softmax(-1) @ windows(v))[:, ::2]
    return s.o(y.reshape(b, s.heads, t, -1).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("batch", "literal", "bundles"), [(2, False, 16), (1, False, 16), (2, True, 2)])
def test_windows_slide_over_a_sequence(oracle, networks, batch, literal, bundles) -> None:
    """Widths pass where the strides are computed from the tensor, also if its dims lie in memory in another order."""
    layers = {name: nn.Linear(6, 16) for name in "qkv"}
    model = networks.Net(lambda s, x: sliding(s, x, literal), **layers, o=nn.Linear(16, 4), heads=2)
    assert oracle(model, torch.randn(batch, 12, 6)).bundles == bundles


def warp(s, x):
    y = s.p(x)
    grid = F.affine_grid(torch.eye(2, 3)[None].expand(len(x), -1, -1), (len(x), 1, 4, 4), align_corners=False)
    return s.q(F.grid_sample(y, grid + 0.1, align_corners=False))


def spectral(s, x):
    y = s.p(x)
    return s.q(torch.fft.irfft2(torch.fft.rfft2(y) * torch.view_as_complex(s.w), s=y.shape[-2:]) + y)


def unpooled(s, x):
    y, where = F.max_pool2d(s.p(x), 2, return_indices=True)
    return s.q(F.max_unpool2d(y, where, 2))


CONVS = {"p": lambda: nn.Conv2d(3, 8, 1), "q": lambda: nn.Conv2d(8, 4, 1)}

NETWORKS = [
    pytest.param(fold_unfold, {}, 8, id="fold-unfold"),
    pytest.param(local_attention, {}, 8, id="local-attention"),
    pytest.param(warp, {}, 8, id="grid-sample"),
    pytest.param(spectral, {"w": lambda: nn.Parameter(torch.randn(8, 4, 3, 2))}, 8, id="fourier"),
    pytest.param(unpooled, {}, 8, id="unpool"),
    pytest.param(
        lambda s, x: s.q(F.pixel_unshuffle(s.p(x), 2)), {"q": lambda: nn.Conv2d(32, 4, 1)}, 8, id="pixel-unshuffle"
    ),
    pytest.param(
        lambda s, x: s.q(F.pixel_unshuffle(F.pixel_shuffle(s.p(x), 2), 2)), {}, 2, id="pixel-shuffle-and-back"
    ),
    pytest.param(lambda s, x: s.q(F.channel_shuffle(s.p(x), 2)), {}, 4, id="channel-shuffle-literal"),
    pytest.param(lambda s, x: s.q(s.s(s.p(x))), {"s": lambda: nn.ChannelShuffle(2)}, 4, id="channel-shuffle"),
    pytest.param(lambda s, x: s.q(F.fractional_max_pool2d(s.p(x), 2, 2)), {}, 0, id="fractional-pool"),
    pytest.param(lambda s, x: s.q(F.lp_pool2d(s.p(x), 2, 2)), {}, 8, id="lp-pool"),
    pytest.param(
        lambda s, x: s.q(F.adaptive_avg_pool3d(s.p(x)[:, :, None], (1, 2, 2))[:, :, 0]), {}, 8, id="adaptive-3d"
    ),
]


@pytest.mark.parametrize(("forward", "members", "bundles"), NETWORKS)
def test_network(oracle, networks, forward, members, bundles) -> None:
    """Symmetry, silence, cost, replay and undo hold around the op, and as much can be removed as expected."""
    made = {name: make() for name, make in {**CONVS, **members}.items()}
    model = networks.Net(forward, **made)
    inputs = torch.randn(2, 3, 4, 4)
    if bundles == 0:
        with pytest.raises(prunus.NothingToPruneError):
            oracle(model, inputs)
    else:
        assert oracle(model, inputs).bundles == bundles


VISION = [
    pytest.param(1, 1, True, 16, id="plain"),
    pytest.param(2, 1, True, 8, id="groups"),
    pytest.param(8, 1, False, 8, id="depthwise"),
    pytest.param(1, 2, True, 12, id="offset-groups"),
    pytest.param(4, 2, False, 4, id="both"),
]


@pytest.mark.parametrize(("groups", "offset_groups", "masked", "bundles"), VISION)
def test_deformable_convolution(oracle, networks, groups, offset_groups, masked, bundles) -> None:
    """Channels pass like in any convolution; the layers that make offsets and masks keep their outputs."""
    ops = pytest.importorskip("torchvision.ops")

    def forward(s, x):
        y = s.a(x)
        return s.o(s.d(y, s.offset(y), s.mask(y).sigmoid() if masked else None).relu())

    model = networks.Net(
        forward,
        a=nn.Conv2d(3, 8, 1),
        offset=nn.Conv2d(8, 18 * offset_groups, 3, padding=1),
        mask=nn.Conv2d(8, 9 * offset_groups, 3, padding=1),
        d=ops.DeformConv2d(8, 8, 3, padding=1, groups=groups),
        o=nn.Conv2d(8, 4, 1),
    )
    if not masked:
        del model.mask
    assert oracle(model, torch.randn(2, 3, 6, 6)).bundles == bundles


@pytest.mark.parametrize(("op", "width", "bundles"), [("roi_align", 8, 8), ("roi_pool", 8, 8), ("ps_roi_align", 18, 2)])
def test_boxes(oracle, networks, op, width, bundles) -> None:
    """Channels pass through what is read in boxes."""
    function = getattr(pytest.importorskip("torchvision.ops"), op)
    boxes = torch.tensor([[0, 0.0, 0, 4, 4], [1, 1.0, 1, 5, 5]])
    model = networks.Net(
        lambda s, x: s.q(function(s.p(x), boxes, 3).flatten(1)),
        p=nn.Conv2d(3, width, 1),
        q=nn.Linear(9 * (width // 9 if op[0] == "p" else width), 4),
    )
    assert oracle(model, torch.randn(2, 3, 6, 6)).bundles == bundles
