"""The pruner's steps: one plan each, scopes, caps, widths, interactive groups, and what users read and do by hand."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import prunus as tp

IMAGE = torch.zeros(1, 3, 32, 32)


def chain(*widths: int, seed: int = 0) -> nn.Sequential:
    """Convolutions of these widths, and one of 4 at the end."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in zip((3, *widths), (*widths, 4), strict=True):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def widths_of(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


def pruner_of(model: nn.Module, **options: Any) -> tp.pruner.BasePruner:
    return tp.pruner.BasePruner(model, IMAGE, **options)


class TestOnePlan:
    def test_for_each_step(self) -> None:
        model = chain(8, 8, 8)
        pruner = pruner_of(model, iterative_steps=2)
        pruner.step()
        pruner.step()
        assert len(pruner.pruning_history()) == 2
        assert {r.tensor for r in pruner.pruning_history()[0].removals} >= {"0.weight", "2.weight", "4.weight"}
        assert widths_of(model) == [4, 4, 4, 4]

    def test_is_what_the_groups_one_by_one_give(self) -> None:
        one, other = chain(8, 12, 16), chain(8, 12, 16)
        pruner_of(one, pruning_ratio=0.4).step()
        for group in pruner_of(other, pruning_ratio=0.4).step(interactive=True) or ():
            group.prune()
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    def test_cuts_the_state_of_the_optimizer(self) -> None:
        model = chain(8, 8)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.randn(1, 3, 8, 8)).sum().backward()
        optimizer.step()
        pruner_of(model).step(optimizer=optimizer)
        assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())

    def test_choices_repeat_and_ties_go_by_index(self) -> None:
        model = chain(8, 8)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.5)
            model[0].bias.copy_(torch.arange(8.0))
        pruner_of(model, global_pruning=True).step()
        assert model[0].bias.tolist() == list(range(8 - model[0].out_channels, 8))
        runs = []
        for _ in range(2):
            one = chain(16, 16)
            pruner_of(one, global_pruning=True).step()
            runs.append(one.state_dict())
        assert all(torch.equal(a, runs[1][name]) for name, a in runs[0].items())


class TestShares:
    def test_by_name_pattern_type_and_the_most_specific_key(self) -> None:
        model = torchvision.models.resnet18()
        pruner_of(
            model, pruning_ratio=0.5, pruning_ratio_dict={"layer3.*.conv1": 0.25, model.layer2: 0.75, "layer2.1": 0.0}
        ).step()
        assert (model.layer3[0].conv1.out_channels, model.layer4[0].conv1.out_channels) == (192, 256)
        assert (model.layer2[0].conv1.out_channels, model.layer2[1].conv1.out_channels) == (32, 128)

    def test_names_in_a_compiled_model(self) -> None:
        model = chain(8, 8)
        pruner_of(torch.compile(model), pruning_ratio_dict={"0": 0.25}).step()
        assert widths_of(model) == [6, 4, 4]

    def test_of_one_type(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 900, 16), nn.Linear(16, 2))
        pruner_of(model, pruning_ratio_dict={nn.Linear: 0.25}).step()
        assert (model[0].out_channels, model[2].out_features) == (4, 12)

    def test_a_tuple_is_a_scope_when_all_compete(self) -> None:
        """layer1 and layer2 share 0.4 between them, layer3 has 0.2 of its own, the rest has 0.5."""
        model = torchvision.models.resnet18()
        pruner_of(
            model,
            importance=lambda group: torch.rand(group.size),
            global_pruning=True,
            pruning_ratio=0.5,
            pruning_ratio_dict={(model.layer1, model.layer2): 0.4, model.layer3: 0.2},
            ignored_layers=[model.fc, model.conv1],
        ).step()
        first = [model.layer1[k].conv1.out_channels for k in (0, 1)]
        second = [model.layer2[k].conv1.out_channels for k in (0, 1)] + [model.layer2[0].conv2.out_channels]
        third = [model.layer3[k].conv1.out_channels for k in (0, 1)] + [model.layer3[0].conv2.out_channels]
        assert sum(first) + sum(second) == int(0.6 * (2 * 64 + 3 * 128))
        assert sum(third) == int(0.8 * 3 * 256)
        assert len(set(third)) > 1

    def test_within_one_form_when_isomorphic(self) -> None:
        """Weak layers with a batch norm do not compete with strong ones without."""
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3),
            nn.Conv2d(8, 4, 3),
        )
        with torch.no_grad():
            for k in (0, 2):
                model[k].weight.mul_(1e-3)
                model[k + 1].weight.mul_(1e-3)
            model[4].weight.mul_(100)
        plain = tp.importance.MagnitudeImportance(normalizer=None)
        other = copy.deepcopy(model)
        pruner_of(model, importance=plain, isomorphic=True).step()
        widths = widths_of(model)
        assert widths[2] == 4 and widths[0] + widths[1] == 8
        pruner_of(other, importance=plain, global_pruning=True).step()
        assert widths_of(other)[2] > 4

    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_the_cap_holds_after_every_step(self, step: int) -> None:
        model = chain(10, 20, 40)
        with torch.no_grad():
            model[0].weight.mul_(1e-3)
        pruner = pruner_of(
            model,
            importance=tp.importance.MagnitudeImportance(normalizer=None),
            global_pruning=True,
            pruning_ratio=0.5,
            iterative_steps=3,
            max_pruning_ratio=0.6,
            max_pruning_ratio_dict={"4": 0.25},
        )
        for _ in range(step):
            pruner.step()
        first, second, third, _ = widths_of(model)
        assert first >= 4 and second >= 8 and third >= 30

    def test_minimum_widths(self) -> None:
        model = chain(16, 16, 16)
        pruner_of(model, pruning_ratio=0.9, min_width={"0": 12, nn.Conv2d: 6}).step()
        assert widths_of(model) == [12, 6, 6, 4]
        model = chain(16, 8)
        pruner_of(model, pruning_ratio=0.9, min_width=10).step()
        assert widths_of(model) == [10, 8, 4]

    def test_a_minimum_width_holds_where_heads_go_too(self) -> None:
        model = torchvision.models.VisionTransformer(32, 8, 1, 4, 64, 96, num_classes=10)
        pruner_of(model, pruning_ratio=0.8, prune_num_heads=True, min_width=12).step()
        attention = model.encoder.layers[0].self_attention
        assert (attention.num_heads, attention.embed_dim) == (1, 12)

    def test_widths_are_multiples_in_every_layer_that_was_cut(self) -> None:
        model = torchvision.models.VisionTransformer(32, 8, 2, 4, 96, 160, num_classes=10)
        pruner_of(model, pruning_ratio=0.37, round_to=16, ignored_layers=["heads"]).step()
        widths = {m.out_features for m in model.modules() if isinstance(m, nn.Linear)} - {10}
        assert widths == {64, 96}
        assert {m.embed_dim for m in model.modules() if isinstance(m, nn.MultiheadAttention)} == {64}
        assert model(IMAGE).shape == (1, 10)

    def test_heads_alone(self) -> None:
        """Nothing else goes with a share of 0, and heads have their own."""
        model = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 96, num_classes=10)
        pruner = pruner_of(model, pruning_ratio=0.0, prune_num_heads=True, head_pruning_ratio=0.5)
        pruner.step()
        attention = model.encoder.layers[0].self_attention
        assert (attention.num_heads, attention.head_dim, attention.embed_dim) == (2, 16, 32)
        assert model.encoder.layers[0].mlp[0].out_features == 96
        assert pruner.get_target_head_pruning_ratio(attention) == 0.5

    @pytest.mark.parametrize("side", ["out", "in", "old name"])
    def test_channel_groups_stay_equally_wide(self, side: str) -> None:
        """What the operations do not show: these channels are four groups. Those of other layers are not concerned."""
        model = chain(16, 15)
        with torch.no_grad():
            model[0].weight[:8].mul_(0.01)
            model[0].bias.copy_(torch.arange(16.0))
        given: dict[str, dict[str, Any]] = {
            "out": {"out_channel_groups": {model[0]: 4}},
            "in": {"in_channel_groups": {model[2]: 4}},
            "old name": {"channel_groups": {"0": 4}},
        }
        pruner_of(model, pruning_ratio=0.5, **given[side]).step()
        assert [sum(4 * k <= b < 4 * k + 4 for b in model[0].bias.tolist()) for k in range(4)] == [2, 2, 2, 2]
        assert model[2].out_channels == 7


class TestInteractive:
    def test_prune_skip_or_change_the_positions(self) -> None:
        model = chain(8, 8, 8)
        seen = []
        for group in pruner_of(model).step(interactive=True) or ():
            dep, idxs = group[0]
            seen.append((dep.target.module, dep.handler, len(idxs)))
            if dep.target.module is model[2]:
                group.prune(idxs=[0, 2, 6])
            elif dep.target.module is model[4]:
                group.prune()
        assert seen == [(model[k], tp.prune_conv_out_channels, 4) for k in (0, 2, 4)]
        assert widths_of(model) == [8, 5, 4, 4]

    def test_what_was_skipped_is_made_up_for_by_the_next_step(self) -> None:
        model = chain(8)
        pruner = pruner_of(model, iterative_steps=2)
        assert len(list(pruner.step(interactive=True) or ())) == 1
        pruner.step()
        assert widths_of(model) == [4, 4]

    def test_groups_kept_as_a_list(self) -> None:
        model = chain(8, 8, 8)
        for group in reversed(list(pruner_of(model).step(interactive=True) or ())):
            group.prune()
        assert widths_of(model) == [4, 4, 4, 4]

    def test_a_group_that_no_longer_fits_changes_nothing(self) -> None:
        """Positions inside heads, chosen as if all heads stayed, after heads went: one error, and no half cut."""
        model = torchvision.models.VisionTransformer(32, 8, 2, 4, 64, 96, num_classes=10).eval()
        heads, *_, last = list(pruner_of(model, prune_num_heads=True).step(interactive=True) or ())
        heads.prune()
        before = model(IMAGE)
        for group in (heads, last):
            with suppress(tp.PrunusError):
                group.prune().undo()
            assert torch.equal(model(IMAGE), before)

    def test_the_root_is_what_makes_the_channels(self) -> None:
        model = torchvision.models.resnet18()
        roots = [group[0].dep for group in pruner_of(model).step(interactive=True) or ()]
        assert all(root.handler is tp.prune_conv_out_channels for root in roots)
        assert roots[0].target.module is model.conv1


class TestByHand:
    def test_ratio_and_positions_of_one_layer(self) -> None:
        model = chain(8, 8)
        with torch.no_grad():
            model[0].weight[[1, 6]] = 0
            model[2].weight[:, [1, 6]] = 0
            model[0].bias.copy_(torch.arange(8.0))
        pruner = pruner_of(model)
        pruner.manual_prune_width(model[0], tp.prune_conv_out_channels, 0.25)
        assert model[0].bias.tolist() == [0, 2, 3, 4, 5, 7]
        pruner.manual_prune_width(model[2], tp.prune_conv_in_channels, [0])
        assert model[0].bias.tolist() == [2, 3, 4, 5, 7]
        for bad in (1.0, -0.5, 0.01, [9]):
            with pytest.raises(tp.InputError):
                pruner.manual_prune_width(model[0], tp.prune_conv_out_channels, bad)
        assert widths_of(model) == [5, 8, 4]

    def test_what_scripts_read(self) -> None:
        model = chain(8, 6)
        pruner = pruner_of(model, iterative_steps=2, pruning_ratio_dict={model[2]: 0.25}, max_pruning_ratio=0.4)
        pruner.step()
        assert pruner.layer_init_out_ch[model[0]] == 8 and pruner.layer_init_in_ch[model[2]] == 8
        assert pruner.get_target_pruning_ratio(model[0]) == 0.25
        assert pruner.get_target_pruning_ratio(model[0], 2) == 0.4
        assert pruner.get_target_pruning_ratio(model[2], 2) == 0.25
        assert pruner.estimate_importance(next(iter(pruner.DG.get_all_groups()))).shape == (6,)
        pruner.reset()
        assert pruner.current_step == 0

    def test_a_criterion_that_gives_none_leaves_the_group_alone(self) -> None:
        model = chain(8, 8)

        def importance(group: Any) -> Tensor | None:
            first = group[0].dep.target.module
            return None if first is model[0] else torch.arange(float(group.size))

        pruner_of(model, importance=importance).step()
        assert widths_of(model) == [8, 4, 4]

    def test_a_schedule_that_removes_nothing_says_so(self) -> None:
        model = chain(8, 8)
        with pytest.warns(UserWarning, match="no step removed anything"):
            pruner_of(model, importance=lambda group: None).step()
        with pytest.warns(UserWarning, match="no step removed anything"):
            pruner_of(model, pruning_ratio=0.01, max_pruning_ratio=0.1).step()
        assert widths_of(model) == [8, 8, 4]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "share of one": ({"pruning_ratio": 1.0}, "pruning_ratio=1.0"),
    "negative share": ({"pruning_ratio": -0.1}, "pruning_ratio=-0.1"),
    "share that is no number": ({"pruning_ratio": "half"}, "pruning_ratio='half'"),
    "nan": ({"pruning_ratio": float("nan")}, "pruning_ratio=nan"),
    "old name": ({"ch_sparsity": 1.5}, "pruning_ratio=1.5"),
    "share of a layer": ({"pruning_ratio_dict": {"0": 1.0}}, r"pruning_ratio_dict\[0\]=1.0"),
    "unknown layer": ({"pruning_ratio_dict": {"conv9": 0.5}}, "nothing in the model is called 'conv9'"),
    "layer of another model": ({"pruning_ratio_dict": {nn.Linear(2, 2): 0.5}}, "not part of the model"),
    "a layer in a tuple": ({"pruning_ratio_dict": {("0", nn.Linear(2, 2)): 0.5}}, "not part of the model"),
    "parameter of another model": ({"pruning_ratio_dict": {nn.Parameter(torch.ones(2)): 0.5}}, "not part of the model"),
    "key that is no layer": ({"pruning_ratio_dict": {3: 0.5}}, "is no module"),
    "cap of zero": ({"max_pruning_ratio": 0.0}, "max_pruning_ratio"),
    "cap of a layer": ({"max_pruning_ratio_dict": {"0": 1.5}}, "max_pruning_ratio_dict"),
    "steps": ({"iterative_steps": 0}, "iterative_steps=0"),
    "half a step": ({"iterative_steps": 1.5}, "iterative_steps=1.5"),
    "rounding": ({"round_to": 0}, "round_to=0"),
    "minimum": ({"min_width": 0}, "min_width=0"),
    "minimum of a layer": ({"min_width": {"0": -1}}, "min_width"),
    "number of heads": ({"num_heads": {"0": 0}}, "num_heads"),
    "heads of an unknown layer": ({"num_heads": {"attn": 2}}, "num_heads"),
    "share of heads of an unknown layer": ({"head_pruning_ratio_dict": {"attn": 0.5}}, "head_pruning_ratio_dict"),
    "channel groups": ({"out_channel_groups": {"0": 0}}, "out_channel_groups"),
    "channel groups that do not divide": ({"out_channel_groups": {"0": 3}}, "do not divide"),
    "criterion": ({"importance": 2}, "importance=2"),
    "ignored layer": ({"ignored_layers": ["conv9"]}, "ignored_layers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_clear_error_before_anything(name: str) -> None:
    options, words = BAD[name]
    model = chain(8, 8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tp.InputError, match=words) as caught:
        pruner_of(model, **options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("scores", [float("nan"), None])
def test_scores_that_cannot_be_change_nothing(scores: float | None) -> None:
    model = chain(8, 8)
    pruner = pruner_of(model, importance=lambda group: torch.full((group.size if scores else 3,), scores or 0.0))
    with pytest.raises(tp.InputError, match="importance returned"):
        pruner.step()
    assert widths_of(model) == [8, 8, 4]
    assert (pruner.pruning_history(), pruner.current_step) == ([], 0)
