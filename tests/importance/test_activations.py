"""Criteria that look at activations, against values computed by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus as tp

X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])


def net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
        net[1].weight.copy_(torch.tensor([[3.0, -1.0]]))
    return net  # hidden units: (3, 2) and (2, 6)


def test_values_of_two_units(groups) -> None:
    model = net()
    calibration = tp.calibrate(model, X, collect=["activations"])
    group = groups(model, X)["0"]
    wanda = tp.importance.WandaImportance(calibration, normalizer=None)(group)
    assert wanda.tolist() == pytest.approx([3 * 6.5**0.5, 20**0.5])
    flap = tp.importance.FLAPImportance(calibration, normalizer=None)(group)
    assert flap.tolist() == pytest.approx([9 * 0.25, 1 * 4.0])
    activation = tp.importance.ActivationImportance(normalizer=None, calibration=calibration)(group)
    assert activation.tolist() == pytest.approx([6.5**0.5, 20**0.5])


def test_means_over_places_are_squared_sample_by_sample(groups) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1))
    x = torch.tensor([[1.0, -3.0], [5.0, 5.0]]).reshape(2, 1, 1, 2)  # mean sizes 2 and 5
    importance = tp.importance.ActivationImportance(normalizer=None)
    with pytest.raises(tp.InputError, match="knows no activations"):
        importance(groups(model, x)["0"])
    with importance.compute_importance(model):
        for one in x:
            model(one[None])
    assert importance(groups(model, x)["0"]).tolist() == pytest.approx([14.5**0.5, 2 * 14.5**0.5])


def test_nothing_was_run() -> None:
    importance = tp.importance.ActivationImportance()
    with pytest.raises(tp.InputError, match="not run inside"), importance.compute_importance(net()):
        pass


def test_all_readers_of_a_stream_are_summed(stream, batches, groups) -> None:
    x = torch.cat([images for images, _ in batches])
    calibration = tp.calibrate(stream, batches, collect=["activations"])
    found = tp.importance.WandaImportance(calibration, normalizer=None)(groups(stream, x)["stem"])
    seen = {}
    for name in ("conv1", "side", "head"):
        layer = getattr(stream, name)
        layer.register_forward_pre_hook(lambda m, i, name=name: seen.update({name: i[0]}))
    stream(x)
    wanted = torch.zeros(6)
    for name in ("conv1", "side"):
        rms = seen[name].square().mean(dim=(0, 2, 3)).sqrt()
        wanted += getattr(stream, name).weight.abs().sum(dim=(0, 2, 3)) * rms
    wanted += (stream.head.weight.abs() * seen["head"].square().mean(dim=0).sqrt()).reshape(3, 6, 4).sum(dim=(0, 2))
    assert torch.allclose(found, wanted, rtol=1e-4)


def test_each_group_of_a_convolution_has_inputs_of_its_own(groups) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 2, 1, groups=2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([[10.0, 20.0], [30.0, 40.0]]).reshape(2, 2, 1, 1))
    x = torch.tensor([2.0, -2.0]).reshape(2, 1, 1, 1)
    calibration = tp.calibrate(model, x, collect=["activations"])
    group = groups(model, x)["0"]  # channels 0 and 2, 1 and 3
    wanda = tp.importance.WandaImportance(calibration, normalizer=None)(group)
    assert wanda.tolist() == pytest.approx([10 * 2 + 30 * 6.0, 20 * 4 + 40 * 8.0])
    flap = tp.importance.FLAPImportance(calibration, normalizer=None)(group)
    assert flap.tolist() == pytest.approx([100 * 4 + 900 * 36.0, 400 * 16 + 1600 * 64.0])


def test_rows_count_where_nothing_reads(attention, groups) -> None:
    x = torch.randn(6, 5, 8)
    calibration = tp.calibrate(attention, x, collect=["activations"])
    found = tp.importance.WandaImportance(calibration, normalizer=None)(groups(attention, x)["q"])
    rms = x.square().mean(dim=(0, 1)).sqrt()
    wanted = (attention.q.weight.abs() * rms).sum(dim=1) + (attention.k.weight.abs() * rms).sum(dim=1)
    assert torch.allclose(found, wanted, rtol=1e-4)


class Shuffled(nn.Module):
    """A reader that multiplies by an expression of its weight: what it reads is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.read = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.make(x), self.read.weight * 1.0)


def test_weights_alone_count_where_no_input_was_seen(groups) -> None:
    model, x = Shuffled(), torch.randn(5, 3)
    calibration = tp.calibrate(model, x, collect=["activations"])
    assert "read.weight" not in calibration.readings
    for importance in (
        tp.importance.WandaImportance(calibration),
        tp.importance.FLAPImportance(calibration),
        tp.importance.ActivationImportance(calibration=calibration),
    ):
        found = importance(groups(model, x)["make"])
        assert found is not None
        assert len(set(found.tolist())) == 4


@pytest.mark.parametrize("kind", ["WandaImportance", "FLAPImportance"])
def test_prune_with_a_calibration(stream, batches, kind) -> None:
    importance = getattr(tp.importance, kind)(tp.calibrate(stream, batches))
    result = tp.prune(stream, batches[0][0], tp.Target(ratio=0.5), importance=importance)
    assert result.after.params < 0.5 * result.before.params
    with pytest.raises(tp.InputError, match="calibrate again"):
        tp.prune(stream, batches[0][0], tp.Target(ratio=0.5), importance=importance)
