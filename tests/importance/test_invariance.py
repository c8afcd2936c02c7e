"""Rescaling that leaves the network's function as it is leaves scores as they are."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus as tp


@torch.no_grad()
def scale_rows(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Another scale for what a convolution makes; the statistics of the norm follow."""
    k = torch.rand(conv.out_channels) * 3 + 0.2
    conv.weight.mul_(k[:, None, None, None])
    if conv.bias is not None:
        conv.bias.mul_(k)
    norm.running_mean.mul_(k)
    norm.running_var.add_(norm.eps).mul_(k.square()).sub_(norm.eps)


def rescaled(net: nn.Module) -> nn.Module:
    """The same function: rows before norms, and norms before ReLU against what reads them."""
    net = copy.deepcopy(net)
    for conv, norm in (("stem", "norm0"), ("conv1", "norm1"), ("deep", "norm2"), ("grouped", "norm3")):
        scale_rows(getattr(net, conv), getattr(net, norm))
    with torch.no_grad():
        k = torch.rand(6) * 3 + 0.2  # the stream: both norms that add to it, and all that read it
        for norm in (net.norm0, net.norm3):
            norm.weight.mul_(k)
            norm.bias.mul_(k)
        net.conv1.weight.div_(k[:, None, None])
        net.side.weight.div_(k[:, None, None])
        net.head.weight.div_(k.repeat_interleave(4))
        k = torch.rand(8) * 3 + 0.2
        net.norm1.weight.mul_(k)
        net.norm1.bias.mul_(k)
        net.deep.weight.div_(k[:, None, None, None])
        k = torch.rand(8) * 3 + 0.2
        net.norm2.weight.mul_(k)
        net.norm2.bias.mul_(k)
        net.grouped.weight.div_(k.reshape(2, 4).repeat_interleave(3, dim=0)[:, :, None, None])
    return net


CRITERIA = {
    "shares": lambda c: tp.importance.InvariantMagnitudeImportance(),
    "taylor": lambda c: tp.importance.TaylorImportance(calibration=c),
    "taylor with signs": lambda c: tp.importance.TaylorImportance(multivariable=True, calibration=c),
    "hessian": lambda c: tp.importance.HessianImportance(calibration=c),
    "fisher": tp.importance.FisherImportance,
    "obd-c": lambda c: tp.importance.OBDCImportance(calibration=c),
    "output error": tp.importance.OutputErrorImportance,
    "output error, each alone": lambda c: tp.importance.OutputErrorImportance(c, steps=0),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_do_not_change(stream, batches, groups, name) -> None:
    other = rescaled(stream)
    x = batches[0][0]
    assert torch.allclose(stream(x), other(x), atol=1e-4)
    make = CRITERIA[name]
    found, again = (
        {n: make(tp.calibrate(net, batches, F.cross_entropy))(g) for n, g in groups(net, x).items()}
        for net in (stream, other)
    )
    assert found.keys() == again.keys()
    assert len(found) == 2
    for group, scores in found.items():
        assert torch.allclose(scores, again[group], rtol=1e-2, atol=1e-3 * float(scores.max())), group
    plain = tp.importance.MagnitudeImportance()
    assert any(not torch.allclose(plain(g), plain(groups(other, x)[n]), rtol=0.1) for n, g in groups(stream, x).items())


@pytest.mark.parametrize("kind", ["WandaImportance", "FLAPImportance"])
def test_activation_scores_follow_columns_not_rows(groups, kind) -> None:
    """Norms against readers; rows of the readers themselves do count."""
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    other = copy.deepcopy(net)
    scale_rows(other[0], other[1])
    with torch.no_grad():
        k = torch.rand(6) + 0.5
        other[1].weight.mul_(k)
        other[1].bias.mul_(k)
        other[3].weight.div_(k[:, None, None])
    x = torch.randn(8, 2, 5, 5)
    found, again = (
        getattr(tp.importance, kind)(tp.calibrate(n, x, collect=["activations"]))(groups(n, x)["0"])
        for n in (net, other)
    )
    assert torch.allclose(found, again, rtol=1e-3, atol=1e-4)
