"""Criteria that look at weights alone, against values computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus as tp

IMAGE = torch.zeros(1, 1, 2, 2)


def chain() -> nn.Sequential:
    """One channel in, two in the middle, one out: small enough for values by hand."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1))
        net[0].bias.fill_(0.5)
        net[1].weight.copy_(torch.tensor([-3.0, 0.5]))
        net[1].bias.copy_(torch.tensor([0.0, 1.0]))
        net[2].weight.copy_(torch.tensor([2.0, 4.0]).reshape(1, 2, 1, 1))
    return net


def group_of(net: nn.Module, inputs: torch.Tensor = IMAGE, root: nn.Module | None = None) -> tp.Group:
    graph = tp.DependencyGraph().build_dependency(net, inputs)
    root = net[0] if root is None else root  # type: ignore[index]
    return next(g for g in graph.get_all_groups() if g[0][0].target.module is root)


def close(found: torch.Tensor | None, wanted: list[float] | list[list[float]]) -> bool:
    assert found is not None
    return bool(torch.allclose(found, torch.tensor(wanted), rtol=1e-5, atol=1e-7))


class TestMagnitude:
    # squares of (conv, norm, reader): channel 0: 1, 9, 4; channel 1: 4, 0.25, 16
    @pytest.mark.parametrize(
        ("reduction", "wanted"),
        [
            ("mean", [14 / 3, 20.25 / 3]),
            ("sum", [14.0, 20.25]),
            ("max", [9.0, 16.0]),
            ("prod", [36.0, 16.0]),
            ("first", [1.0, 4.0]),
            ("gate", [4.0, 16.0]),
            (None, [[1.0, 4.0], [9.0, 0.25], [4.0, 16.0]]),
        ],
    )
    def test_reductions(self, reduction, wanted) -> None:
        importance = tp.importance.MagnitudeImportance(2, reduction, None)
        assert close(importance(group_of(chain())), wanted)

    def test_absolute_values_and_biases(self) -> None:
        plain = tp.importance.MagnitudeImportance(p=1, group_reduction="sum", normalizer=None)
        biased = tp.importance.MagnitudeImportance(p=1, group_reduction="sum", normalizer=None, bias=True)
        assert close(plain(group_of(chain())), [6.0, 6.5])
        assert close(biased(group_of(chain())), [6.5, 8.0])

    def test_only_the_target_types_count(self) -> None:
        importance = tp.importance.MagnitudeImportance(2, "sum", None, target_types=[nn.Conv2d])
        assert close(importance(group_of(chain())), [5.0, 20.0])
        assert tp.importance.MagnitudeImportance(target_types=[nn.Linear])(group_of(chain())) is None

    def test_all_columns_of_a_flattened_channel_count(self) -> None:
        net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 1)).eval()
        with torch.no_grad():
            net[0].weight.fill_(0)
            net[2].weight.copy_(torch.arange(8.0).reshape(1, 8))
        found = tp.importance.MagnitudeImportance(1, "sum", None)(group_of(net))
        assert close(found, [0.0 + 1 + 2 + 3, 4.0 + 5 + 6 + 7])

    def test_inputs_of_a_grouped_convolution(self) -> None:
        net = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 2, 1, groups=2, bias=False)).eval()
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1, 1))
            net[1].weight.copy_(torch.tensor([[10.0, 20.0], [30.0, 40.0]]).reshape(2, 2, 1, 1))
        found = tp.importance.MagnitudeImportance(1, "sum", None)(group_of(net))  # channels 0 and 2 go together
        assert close(found, [1.0 + 3 + 10 + 30, 2.0 + 4 + 20 + 40])


SCORES = torch.tensor([3.0, 1.0, 4.0, 2.0])


class TestNormalizers:
    @pytest.mark.parametrize(
        ("how", "wanted"),
        [
            (None, [3.0, 1.0, 4.0, 2.0]),
            ("mean", [1.2, 0.4, 1.6, 0.8]),
            ("sum", [0.3, 0.1, 0.4, 0.2]),
            ("max", [0.75, 0.25, 1.0, 0.5]),
            ("standarization", [2 / 3, 0.0, 1.0, 1 / 3]),
            ("gaussian", [0.4472136, -1.3416408, 1.3416408, -0.4472136]),
            ("lamp", [3 / 7, 1 / 10, 1.0, 2 / 9]),
            ("sentinel_1", [0.75, 0.25, 1.0, 0.5]),
            ("sentinel_3", [1.5, 0.5, 2.0, 1.0]),
            ("sentinel_9", [3.0, 1.0, 4.0, 2.0]),
            ("sentinel_0.5", [1.0, 1 / 3, 4 / 3, 2 / 3]),
            (lambda s: s * 2, [6.0, 2.0, 8.0, 4.0]),
        ],
    )
    def test_values(self, how, wanted) -> None:
        assert close(tp.importance.normalize(SCORES, how), wanted)

    @pytest.mark.parametrize("how", ["best", "sentinel_", "sentinel_x"])
    def test_an_unknown_one_is_refused_at_once(self, how) -> None:
        with pytest.raises(tp.InputError, match="choose one of"):
            tp.importance.MagnitudeImportance(normalizer=how)


class TestOthers:
    def test_scales_of_batch_norms(self) -> None:
        assert close(tp.importance.BNScaleImportance(normalizer=None)(group_of(chain())), [3.0, 0.5])
        net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)).eval()
        assert tp.importance.BNScaleImportance()(group_of(net)) is None

    def test_lamp(self) -> None:
        found = tp.importance.LAMPImportance()(group_of(chain()))
        assert close(found, [14 / 34.25, 1.0])

    def test_distances_to_all_other_units(self) -> None:
        net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]]))
            net[1].weight.copy_(torch.tensor([[1.0, 2.0, 4.0]]))
        group = group_of(net, torch.zeros(1, 2))
        importance = tp.importance.FPGMImportance(normalizer=None, group_reduction="first")
        assert close(importance(group), [5 + 4.0, 5 + 3.0, 4 + 3.0])
        both = tp.importance.FPGMImportance(p=1, normalizer=None, group_reduction="sum")
        assert close(both(group), [7 + 4 + 1 + 3.0, 7 + 3 + 1 + 2.0, 4 + 3 + 3 + 2.0])

    def test_random_scores_come_from_torchs_generator(self) -> None:
        group, importance = group_of(chain()), tp.importance.RandomImportance()
        torch.manual_seed(7)
        found = importance(group)
        torch.manual_seed(7)
        assert torch.equal(found, importance(group))
        assert found.shape == (2,)

    def test_shares_of_the_outputs_energy(self) -> None:
        # energy read: 9 + 0 and 0.25 + 1; columns 2^2 and 4^2 of the only output
        found = tp.importance.InvariantMagnitudeImportance(None)(group_of(chain()))
        assert close(found, [36 / (36 + 20), 20 / (36 + 20)])


def test_a_group_without_units_is_refused() -> None:
    class Empty:
        size = 0
        parts = ()

    for importance in (tp.importance.MagnitudeImportance(), tp.importance.RandomImportance()):
        with pytest.raises(tp.InputError, match="no units"):
            importance(Empty())


def test_criteria_of_users_say_what_is_missing() -> None:
    class Half(tp.importance.Importance):
        pass

    class Slices(tp.importance.LayerwiseImportance):
        pass

    with pytest.raises(NotImplementedError, match="Half does not implement"):
        Half()(group_of(chain()))
    with pytest.raises(NotImplementedError, match=r"Slices does not implement slices"):
        Slices()(group_of(chain()))


def test_a_users_layerwise_criterion() -> None:
    class Largest(tp.importance.LayerwiseImportance):
        def slices(self, member: tp.importance.Member) -> torch.Tensor:
            rows = member.tensor.detach().abs().movedim(member.dim, 0)
            return rows.reshape(len(rows), -1).amax(dim=1)[member.index].amax(dim=1)

    assert close(Largest("sum", None)(group_of(chain())), [1 + 3 + 2.0, 2 + 0.5 + 4.0])


def test_scores_of_a_whole_group_are_in_the_order_of_its_indices() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(1, 3))
    score = tp.importance.MagnitudeImportance(normalizer=None)
    ascending, shuffled = (
        score(graph.get_pruning_group(model[0], tp.prune_linear_out_channels, idxs))
        for idxs in ([0, 1, 2, 3], [2, 0, 3, 1])
    )
    assert len(ascending.unique()) == 4
    assert torch.equal(shuffled, ascending[[2, 0, 3, 1]])
