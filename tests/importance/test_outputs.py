"""The error after compensation, against least squares solved from scratch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus as tp
from prunus.importance.elimination import Consumer, eliminate, inverse_of


def least_error(rows: torch.Tensor, weight: torch.Tensor, gone: list[int], each: torch.Tensor) -> float:
    """Half the weighted mean square error of the best affine map without some columns."""
    kept = [k for k in range(rows.shape[1]) if k not in gone]
    wanted = rows @ weight.T
    known = torch.cat((rows[:, kept], torch.ones(len(rows), 1, dtype=rows.dtype)), dim=1)
    solution = torch.linalg.lstsq(known, wanted).solution
    return float(((known @ solution - wanted).square().mean(dim=0) * each).sum() / 2)


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(20, 2, 7, 7)


def patches_of(model: nn.Sequential, images: torch.Tensor) -> torch.Tensor:
    return F.unfold(F.relu(model[0](images)), 3).movedim(1, 2).flatten(0, 1).detach().double()


@pytest.mark.parametrize("weighted", [False, True])
def test_each_point_of_the_curve_is_the_least_error(model, images, groups, weighted) -> None:
    calibration = tp.calibrate(model, images, lambda out, y: out.square().sum())
    importance = tp.importance.OutputErrorImportance(calibration, weighted=weighted, ridge=0.0)
    curve = importance.curve(groups(model, images)["0"])
    rows, weight = patches_of(model, images), model[2].weight.detach().flatten(1).double()
    each = torch.ones(4, dtype=torch.float64)
    if weighted:
        each = 4 * model(images).detach().double().square().sum(dim=(0, 2, 3)) / 20
    for count in range(1, 7):
        gone = [9 * j + k for j in curve.order[:count].tolist() for k in range(9)]
        assert float(curve.errors[count - 1]) == pytest.approx(least_error(rows, weight, gone, each), rel=2e-3)


def test_the_cheapest_goes_first_whatever_went_before(model, images, groups) -> None:
    calibration = tp.calibrate(model, images)
    importance = tp.importance.OutputErrorImportance(calibration, weighted=False, ridge=0.0)
    group = groups(model, images)["0"]
    order = importance.curve(group).order.tolist()
    rows, weight, each = patches_of(model, images), model[2].weight.detach().flatten(1).double(), torch.ones(4)
    for count in range(3):
        errors = {
            j: least_error(rows, weight, [9 * i + k for i in (*order[:count], j) for k in range(9)], each)
            for j in order[count:]
        }
        assert order[count] == min(errors, key=errors.__getitem__)
    scores = importance(group)
    assert scores is not None
    assert scores.argsort().tolist() == order
    assert all(a < b for a, b in pairwise(scores[order].tolist()))


def test_of_two_units_that_can_stand_in_for_each_other_one_is_free(groups) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(0.5)  # none is dead
        model[0].weight[3] = 2 * model[0].weight[1]
        model[0].bias[3] = 2 * model[0].bias[1]
        model[2].weight[:, [1, 3]] = 5.0
    x = torch.randn(200, 3)
    group = groups(model, x)["0"]
    calibration = tp.calibrate(model, x)
    found = tp.importance.OutputErrorImportance(calibration, weighted=False, ridge=1e-6)(group)
    pair = found[[1, 3]]
    assert float(pair.min()) < 1e-2 * float(pair.max())
    alone = tp.importance.OutputErrorImportance(calibration, weighted=False, steps=0, ridge=1e-6)(group)
    assert float(alone[[1, 3]].max()) < 1e-2 * float(alone[[0, 2]].min())


def test_errors_of_all_readers_add_up(stream, batches, groups) -> None:
    calibration = tp.calibrate(stream, batches, F.cross_entropy)
    group = groups(stream, batches[0][0])["stem"]
    found = tp.importance.OutputErrorImportance(calibration, steps=0, ridge=1e-4)(group)
    x = torch.cat([images for images, _ in batches])
    seen = {}
    for name in ("conv1", "side", "head"):
        getattr(stream, name).register_forward_pre_hook(lambda m, i, name=name: seen.update({name: i[0].detach()}))
    stream(x)
    wanted = torch.zeros(6, dtype=torch.float64)
    for name, kernel, padding in (("conv1", 3, 1), ("side", 1, 0), ("head", 0, 0)):
        weight = getattr(stream, name).weight.detach()
        rows = F.unfold(seen[name], kernel, padding=padding).movedim(1, 2).flatten(0, 1) if kernel else seen[name]
        energy = calibration.readings[f"{name}.weight"].energy / calibration.samples
        covariance = rows.double().T.cov(correction=0)
        inverse = torch.linalg.inv(covariance + 1e-4 * covariance.diag().diag())
        own = weight[0].numel() // 6
        for j in range(6):
            columns = slice(j * own, (j + 1) * own)
            w = weight.flatten(1)[:, columns].double()
            wanted[j] += (energy * ((w @ torch.linalg.inv(inverse[columns, columns])) * w).sum(dim=1)).sum() / 2
    assert torch.allclose(found.double(), wanted, rtol=1e-2)


def test_groups_of_a_convolution_are_solved_apart(stream, batches, groups) -> None:
    """What a grouped convolution reads: a unit is a channel of each group."""
    calibration = tp.calibrate(stream, batches)
    group = groups(stream, batches[0][0])["conv1"]
    curve = tp.importance.OutputErrorImportance(calibration, weighted=False, ridge=0.0).curve(group)
    seen = []
    stream.grouped.register_forward_pre_hook(lambda m, i: seen.append(i[0].detach()))
    stream(torch.cat([images for images, _ in batches]))
    rows = seen[0].movedim(1, -1).flatten(0, 2).double()
    weight = stream.grouped.weight.detach().flatten(1).double()
    for count in range(1, 4):
        gone = curve.order[:count].tolist()
        wanted = sum(
            least_error(rows[:, 4 * g : 4 * g + 4], weight[3 * g : 3 * g + 3], gone, torch.ones(3)) for g in range(2)
        )
        assert float(curve.errors[count - 1]) == pytest.approx(wanted, rel=1e-3)


def test_readers_without_second_moments_count_by_masks_or_energy(groups) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(30, 3)
    calibration = tp.calibrate(model, x, max_gram=3)
    group = groups(model, x)["0"]
    weighted = tp.importance.OutputErrorImportance(calibration)(group)
    assert torch.allclose(weighted, tp.importance.FisherImportance(calibration, normalizer=None)(group), rtol=1e-4)
    plain = tp.importance.OutputErrorImportance(calibration, weighted=False)(group)
    energy = model[1].weight.square().sum(dim=0) * model[0](x).square().mean(dim=0) / 2
    assert torch.allclose(plain, energy, rtol=1e-4)


def test_queries_and_keys_count_by_masks(attention, groups) -> None:
    x = torch.randn(6, 5, 8)
    calibration = tp.calibrate(attention, x)
    by_group = groups(attention, x)
    for name in ("q", "v"):
        found = tp.importance.OutputErrorImportance(calibration)(by_group[name])
        assert found is not None
        assert bool((found > 0).all())
    fisher = tp.importance.FisherImportance(calibration, normalizer=None)(by_group["q"])
    assert torch.allclose(tp.importance.OutputErrorImportance(calibration)(by_group["q"]), fisher, rtol=1e-4)


def test_few_steps_give_the_same_joint_error_of_everything() -> None:
    rows = torch.randn(50, 12, dtype=torch.float64)
    covariance = rows.T.cov(correction=0)[None]
    weight = torch.randn(1, 3, 12, dtype=torch.float64)
    consumer = Consumer(weight, inverse_of(covariance, 0.0), torch.arange(12)[:, None])
    nothing = torch.zeros(12, dtype=torch.float64)
    totals = [eliminate([consumer], nothing, steps)[1].sum() for steps in (1, 5, 12)]
    whole = ((weight @ covariance) * weight).sum() / 2
    assert all(float(total) == pytest.approx(float(whole), rel=1e-6) for total in totals)
    order, added = eliminate([consumer], nothing, 5)
    assert sorted(order.tolist()) == list(range(12))
    assert bool((added >= 0).all())


@pytest.mark.parametrize("rows", [3, 30])
def test_dead_inputs_and_few_rows_do_no_harm(rows, groups) -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[2].zero_()
        model[0].bias[2] = -1.0
    x = torch.randn(rows, 3)
    found = tp.importance.OutputErrorImportance(tp.calibrate(model, x))(groups(model, x)["0"])
    assert found is not None
    assert bool(torch.isfinite(found).all())
    assert int(found.argmin()) == 2 or float(found[2]) <= 1e-6 * float(found.max())


def test_bad_arguments() -> None:
    calibration = tp.calibrate(nn.Linear(2, 2), torch.randn(3, 2))
    for arguments in ({"steps": -1}, {"ridge": -1.0}):
        with pytest.raises(tp.InputError, match="must be at least 0"):
            tp.importance.OutputErrorImportance(calibration, **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_types(groups, dtype) -> None:
    """Sums are in float32 at least, so that large activations of half precision do no harm."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).to(dtype)
    x = torch.randn(16, 4).to(dtype) * 1e3
    calibration = tp.calibrate(model, x)
    assert calibration.gradients["0.weight"].square.dtype is torch.float32
    group = groups(model, x)["0"]
    for importance in (
        tp.importance.OutputErrorImportance(calibration),
        tp.importance.FisherImportance(calibration),
        tp.importance.HessianImportance(calibration=calibration),
        tp.importance.OBDCImportance(calibration=calibration),
        tp.importance.FLAPImportance(calibration),
        tp.importance.InvariantMagnitudeImportance(),
    ):
        found = importance(group)
        assert found is not None
        assert found.dtype is torch.float32
        assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize(
    "make",
    [
        tp.importance.OutputErrorImportance,
        tp.importance.FisherImportance,
        tp.importance.WandaImportance,
        lambda c: tp.importance.OBDCImportance(calibration=c),
    ],
)
def test_whole_heads(attention, make) -> None:
    """The head whose values are zero is the one to go."""
    with torch.no_grad():
        for layer in (attention.q, attention.k, attention.v):
            layer.weight[4:] = 0
            layer.bias[4:] = 0
    x = torch.randn(6, 5, 8)
    importance = make(tp.calibrate(attention, x))
    kept = attention.out.weight[:, :4].clone()
    result = tp.prune(
        attention, x, tp.Target(ratio=0.5), importance=importance, prune_num_heads=True, prune_head_dims=False
    )
    assert result.after.params < result.before.params
    assert attention.heads == 1
    assert torch.equal(attention.out.weight, kept)
