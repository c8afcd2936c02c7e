"""Criteria that look at gradients, against values computed by hand and sample by sample."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus as tp

X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])


def net() -> nn.Sequential:
    """Linear, so that gradients are easy: the loss of a sample is its only output."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
        net[1].weight.copy_(torch.tensor([[3.0, -1.0]]))
    return net


# hidden units of the samples: (3, 2) and (2, 6); gradients of the first layer are (3 x, -x), of the second the units
def calibrated(model: nn.Module) -> tp.Calibration:
    return tp.calibrate(model, [X[:1], X[1:]], lambda out, targets: out.mean())


def group(groups, model: nn.Module) -> tp.Group:
    return groups(model, X)["0"]


def test_first_order_change(groups) -> None:
    model = net()
    # mean x is (2, 0.5), mean units (2.5, 4): rows |1 * 6| + |1 * 1.5| and |2 * -2|, columns |3 * 2.5| and |-1 * 4|
    by_calibration = tp.importance.TaylorImportance("sum", None, calibration=calibrated(model))
    assert by_calibration(group(groups, model)).tolist() == pytest.approx([7.5 + 7.5, 4 + 4])
    for x in (X[:1], X[1:]):
        (model(x).mean() / 2).backward()
    assert tp.importance.TaylorImportance("sum", None)(group(groups, model)).tolist() == pytest.approx([15.0, 8.0])


def test_first_order_change_with_signs(groups) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 1] = -1.0
    found = tp.importance.TaylorImportance("first", None, True, calibration=calibrated(model))
    assert found(group(groups, model)).tolist() == pytest.approx([6 - 1.5, 4.0])


def test_second_order_change_counts_every_sample(groups) -> None:
    model = net()
    # squares of rows: 9 * (1 + 9) / 2 and 9 * (4 + 1) / 2, then (1 + 9) / 2; of columns: (9 + 4) / 2 and (4 + 36) / 2
    wanted = [(1 * 45 + 1 * 22.5 + 9 * 6.5) / 2, (4 * 5 + 0 + 1 * 20) / 2]
    by_calibration = tp.importance.HessianImportance("sum", None, calibration=calibrated(model))
    assert by_calibration(group(groups, model)).tolist() == pytest.approx(wanted)
    by_hand = tp.importance.HessianImportance("sum", None)
    for loss in model(X)[:, 0]:
        model.zero_grad()
        loss.backward(retain_graph=True)
        by_hand.accumulate_grad(model)
    assert by_hand(group(groups, model)).tolist() == pytest.approx(wanted)
    by_hand.zero_grad()
    by_hand.accumulate_grad(model)  # the last sample alone
    assert by_hand(group(groups, model)).tolist() == pytest.approx([(81 + 9 + 9 * 4) / 2, (4 * 9 + 36) / 2])


def test_one_mask_for_all_layers_of_a_group(groups) -> None:
    model = net()
    # the gradient of a mask on a unit is what it adds to the output: (9, -2) and (6, -6)
    fisher = tp.importance.FisherImportance(calibrated(model), normalizer=None)
    assert fisher(group(groups, model)).tolist() == pytest.approx([(81 + 36) / 4, (4 + 36) / 4])
    first = tp.importance.FisherImportance(calibrated(model), p=1, normalizer=None)
    assert first(group(groups, model)).tolist() == pytest.approx([7.5, 4.0])


def test_masks_are_summed_over_all_readers_before_squares(stream, batches, groups) -> None:
    """Against a mask that is really there."""
    calibration = tp.calibrate(stream, batches, F.cross_entropy)
    found = tp.importance.FisherImportance(calibration, normalizer=None)(groups(stream, batches[0][0])["stem"])
    squares = torch.zeros(6)
    for images, classes in batches:
        for x, y in zip(images, classes, strict=True):
            mask = torch.ones(6, requires_grad=True)
            handles = [
                layer.register_forward_pre_hook(lambda m, i, mask=mask: (i[0] * mask[:, None, None],))
                for layer in (stream.conv1, stream.side)
            ]
            flat = mask.repeat_interleave(4)
            handles.append(stream.head.register_forward_pre_hook(lambda m, i, flat=flat: (i[0] * flat,)))
            loss = F.cross_entropy(stream(x[None]), y[None])
            squares += torch.autograd.grad(loss, mask)[0].square()
            for handle in handles:
                handle.remove()
    assert torch.allclose(found, squares / (2 * 24), rtol=1e-4)


def test_groups_that_nothing_reads_have_masks_where_they_are_made(groups, attention) -> None:
    """Queries against keys: the gradient of a mask over either is the same."""
    x = torch.randn(6, 5, 8)
    calibration = tp.calibrate(attention, x)
    found = tp.importance.FisherImportance(calibration, normalizer=None)(groups(attention, x)["q"])
    made: list[torch.Tensor] = []
    attention.k.register_forward_hook(lambda m, i, o: made.append(o))
    total = torch.zeros(8)
    signs = torch.Generator().manual_seed(0)
    for one in x:
        out = attention(one[None])
        loss = (out * (torch.randint(0, 2, out.shape, generator=signs) * 2 - 1)).sum()
        total += (torch.autograd.grad(loss, made[-1])[0] * made[-1]).sum(dim=(0, 1)).detach().square()
    assert torch.allclose(found, total / 12, rtol=1e-3)


class TestKroneckerFactors:
    @pytest.fixture
    def model(self) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, groups=1))

    def test_rows_and_columns(self, model, groups) -> None:
        x, y = torch.randn(6, 2, 4, 4), torch.randn(6, 3, 2, 2)
        calibration = tp.calibrate(model, [(x, y)], F.mse_loss)
        found = tp.importance.OBDCImportance(None, None, calibration=calibration)(groups(model, x)["0"])
        rows = F.unfold(x, 3, padding=1).movedim(1, 2).flatten(0, 1)
        hidden = model[0](x)
        columns = F.unfold(F.relu(hidden), 3).movedim(1, 2).flatten(0, 1)
        out = model(x)
        gradients = torch.autograd.grad(F.mse_loss(model[2](F.relu(hidden)), y) * 6, hidden)[0]
        made = gradients.square().sum(dim=(0, 2, 3)) / 6
        last = torch.autograd.grad(F.mse_loss(leaf := out.detach().requires_grad_(), y) * 6, leaf)[0]
        outs = last.square().sum(dim=(0, 2, 3)) / 6
        moments, weight = rows.T @ rows / len(rows), model[0].weight.flatten(1)
        wanted = made * ((weight @ moments) * weight).sum(dim=1) / 2
        assert torch.allclose(found[0], wanted, rtol=1e-3)
        blocks = (columns.T @ columns / len(columns)).reshape(4, 9, 4, 9)
        for j in range(4):
            own = model[2].weight.detach()[:, j].flatten(1)
            cost = (outs * ((own @ blocks[j, :, j]) * own).sum(dim=1)).sum() / 2
            assert found[1, j].item() == pytest.approx(cost.item(), rel=1e-3)

    def test_older_scripts(self, model, groups) -> None:
        x, y = torch.randn(6, 2, 4, 4), torch.randn(6, 3, 2, 2)
        importance = tp.importance.OBDCImportance(num_classes=3)
        with pytest.raises(tp.InputError, match="knows no statistics"):
            importance(groups(model, x)["0"])
        with pytest.raises(tp.InputError, match="call _prepare_model"):
            importance.step()
        importance._prepare_model(model, None)
        for part in (slice(0, 3), slice(3, 6)):
            F.mse_loss(model(x[part]), y[part]).backward()
            importance.step()
        importance._rm_hooks(model)
        found = importance(groups(model, x)["0"])
        calibration = tp.calibrate(model, [(x, y)], F.mse_loss)
        assert torch.allclose(
            found, tp.importance.OBDCImportance(calibration=calibration)(groups(model, x)["0"]), rtol=1e-3
        )
        assert not any(m._forward_hooks for m in model.modules())
        importance._clear_buffer()
        with pytest.raises(tp.InputError, match="knows no statistics"):
            importance(groups(model, x)["0"])


@pytest.mark.parametrize("kind", ["GroupTaylorImportance", "GroupHessianImportance"])
def test_gradients_are_cut_with_the_weights(kind) -> None:
    """Two steps after one backward pass; what was accumulated by hand has to be accumulated again."""
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
    importance = getattr(tp.importance, kind)()
    pruner = tp.pruner.MetaPruner(model, X, importance, iterative_steps=2, pruning_ratio=0.5)
    model(X).sum().backward()
    for width in (6, 4):
        if kind == "GroupHessianImportance":
            importance.zero_grad()
            importance.accumulate_grad(model)
        pruner.step()
        assert model[0].out_features == width


def test_weights_in_recurrent_kernels_count_by_their_diagonal(groups) -> None:
    model = nn.LSTM(3, 4, batch_first=True)
    x = torch.randn(6, 5, 3)
    calibration = tp.calibrate(model, x, forward_fn=lambda m, i: m(i)[0][:, -1, :2])
    member = tp.importance.Member("weight_hh_l0", model.weight_hh_l0, model, 1, torch.arange(4)[:, None], True)
    found = tp.importance.OBDCImportance(calibration=calibration).slices(member)
    hessian = tp.importance.HessianImportance(calibration=calibration).slices(member)
    assert found is not None
    assert torch.equal(found, hessian)
    assert float(found.min()) > 0


class TestErrors:
    def test_gradients_are_missing(self, groups) -> None:
        model = net()
        for importance in (tp.importance.TaylorImportance(), tp.importance.HessianImportance()):
            with pytest.raises(tp.InputError, match=r"0\.weight .* have no gradients"):
                tp.prune(model, X, importance=importance)
        assert model[0].out_features == 2
        with pytest.raises(tp.InputError, match="no parameter has a gradient"):
            tp.importance.HessianImportance().accumulate_grad(model)

    def test_the_model_was_pruned_since(self, groups) -> None:
        model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
        calibration = calibrated(model)
        importance = tp.importance.HessianImportance()
        model(X).sum().backward()
        importance.accumulate_grad(model)
        tp.prune(model, X, tp.Target(ratio=0.5), importance=tp.importance.TaylorImportance(calibration=calibration))
        assert model[0].out_features == 2
        with pytest.raises(tp.InputError, match="calibrate again"):
            tp.importance.FisherImportance(calibration)(groups(model, X)["0"])
        with pytest.raises(tp.InputError, match="accumulate again"):
            importance(groups(model, X)["0"])

    def test_signs_without_a_loss_and_samples_that_share_rows(self) -> None:
        with pytest.raises(tp.InputError, match="signs of gradients"):
            tp.importance.TaylorImportance(multivariable=True, calibration=tp.calibrate(net(), X))
        with pytest.raises(tp.InputError, match="kept fewer apart"):
            tp.importance.FisherImportance(tp.calibrate(net(), X, keep=1), p=1)


def test_without_labels_gradients_are_those_of_random_projections(groups) -> None:
    model = net()
    calibration = tp.calibrate(model, X)
    found = tp.importance.TaylorImportance("first", None, calibration=calibration)(group(groups, model))
    rms = X.square().mean(dim=0).sqrt()
    assert found.tolist() == pytest.approx([3 * float(rms.sum()), 2 * float(rms[0])])
