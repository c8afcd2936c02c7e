"""The graph under the names that users know: one group by hand, all groups, what they print, cut and refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus as tp
from prunus.errors import InputError, SurgeryError

torchvision = pytest.importorskip("torchvision")

IMAGE = torch.zeros(1, 3, 32, 32)

# everything that must go with output channels of ResNet-18's first convolution, and nothing else
FIRST_GROUP = {
    ("conv1", "prune_conv_out_channels"),
    ("bn1", "prune_batchnorm_out_channels"),
    ("layer1.0.conv2", "prune_conv_out_channels"),
    ("layer1.0.bn2", "prune_batchnorm_out_channels"),
    ("layer1.1.conv2", "prune_conv_out_channels"),
    ("layer1.1.bn2", "prune_batchnorm_out_channels"),
    ("layer1.0.conv1", "prune_conv_in_channels"),
    ("layer1.1.conv1", "prune_conv_in_channels"),
    ("layer2.0.conv1", "prune_conv_in_channels"),
    ("layer2.0.downsample.0", "prune_conv_in_channels"),
}
ROOTS = [
    *("conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.conv2", "layer2.1.conv1"),
    *("layer3.0.conv1", "layer3.0.conv2", "layer3.1.conv1", "layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1"),
]


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(weights=None).eval()


def small() -> nn.Sequential:
    """Two groups: 8 channels, then 6."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)
    ).eval()


def state(model: nn.Module) -> dict[str, Any]:
    """Every bit of a model: tensors, and every plain attribute of every module."""
    tensors = {name: (tensor.clone(), tensor.shape) for name, tensor in model.state_dict().items()}
    attributes = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str, tuple, bool))
    }
    return {"tensors": tensors, "attributes": attributes}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one["attributes"] != other["attributes"] or list(one["tensors"]) != list(other["tensors"]):
        return False
    return all(torch.equal(t, other["tensors"][name][0]) for name, (t, _) in one["tensors"].items())


@pytest.fixture
def model() -> nn.Module:
    return resnet18()


@pytest.fixture
def graph(model: nn.Module) -> tp.DependencyGraph:
    return tp.DependencyGraph().build_dependency(model, example_inputs=IMAGE)


class TestOneGroupByHand:
    def test_members_are_exactly_the_coupled_layers(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        group = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[2, 6, 9])
        assert {(dep.target.name, dep.handler.__name__) for dep, _ in group} == FIRST_GROUP
        assert len(group) == len(FIRST_GROUP)
        assert all(idxs == [2, 6, 9] for _, idxs in group)

    def test_the_root_comes_first_and_items_name_modules(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        group = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[2, 6, 9])
        dep, idxs = group[0]
        assert dep.target.module is model.conv1
        assert dep.handler is tp.prune_conv_out_channels
        assert idxs == [2, 6, 9]
        assert all(d.target.module is model.get_submodule(d.target.name) for d, _ in group)
        assert all(item.root_idxs == [0, 1, 2] for item in group)

    def test_pruning_cuts_every_layer_once(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        group = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[2, 6, 9])
        assert graph.check_pruning_group(group)
        before = model.conv1.weight.detach().clone()
        group.prune()
        keep = [k for k in range(64) if k not in (2, 6, 9)]
        assert torch.equal(model.conv1.weight, before[keep])
        assert (model.conv1.out_channels, model.bn1.num_features) == (61, 61)
        assert (model.layer2[0].conv1.in_channels, model.layer2[0].downsample[0].in_channels) == (61, 61)
        assert (model.layer2[0].conv1.out_channels, model.layer2[0].downsample[0].out_channels) == (128, 128)
        assert model(IMAGE).shape == (1, 1000)

    def test_a_part_of_the_group_can_be_cut(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        group = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[2, 6, 9])
        before = model.conv1.weight.detach().clone()
        group.prune(idxs=[6])
        assert torch.equal(model.conv1.weight, before[[k for k in range(64) if k != 6]])
        assert model(IMAGE).shape == (1, 1000)

    def test_it_can_be_asked_from_the_layer_that_reads(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        """The inputs of layer2.0.conv1 are the outputs of conv1: the same group, with another root."""
        group = graph.get_pruning_group(model.layer2[0].conv1, tp.prune_conv_in_channels, idxs=[5])
        assert {(dep.target.name, dep.handler.__name__) for dep, _ in group} == FIRST_GROUP
        assert group[0].dep.target.name == "layer2.0.conv1"

    @pytest.mark.parametrize("idxs", [(1, 4), torch.tensor([1, 4]), range(1, 5, 3)])
    def test_indices_may_be_any_sequence(self, graph: tp.DependencyGraph, model: nn.Module, idxs: Any) -> None:
        group = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=idxs)
        assert group[0].idxs == [1, 4]

    def test_a_flattened_channel_is_several_columns(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 5))
        graph = tp.DependencyGraph().build_dependency(net, torch.zeros(1, 3, 5, 5))
        group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, [1])
        by_name = {dep.target.name: idxs for dep, idxs in group}
        assert by_name == {"0": [1], "2": list(range(9, 18))}

    def test_the_last_channel_is_refused(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        group = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=list(range(64)))
        assert not graph.check_pruning_group(group)
        before = state(model)
        with pytest.raises(SurgeryError, match="last position"):
            group.prune()
        assert same(state(model), before)

    def test_undo_restores_model_and_graph(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        before = state(model)
        receipt = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[2, 6, 9]).prune()
        assert len(graph.pruning_history()) == 1
        receipt.undo()
        assert same(state(model), before)
        assert graph.pruning_history() == []
        again = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[63])
        again.prune()
        assert model.conv1.out_channels == 63

    def test_later_groups_count_positions_as_they_are_now(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        before = model.conv1.weight.detach().clone()
        graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[0, 1]).prune()
        graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[0, 1]).prune()
        assert torch.equal(model.conv1.weight, before[4:])


class TestDetails:
    def test_says_what_triggers_what(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        group = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[2, 6, 9])
        text = group.details()
        assert str(group) == text
        lines = [line for line in text.splitlines() if "=>" in line]
        assert "Pruning Root" in lines[0]
        assert sum("Pruning Root" in line for line in lines) == 1
        assert lines[0].count("conv1") == 2
        for name, handler in FIRST_GROUP:
            named = [line for line in lines if f"=> {handler} on {name} (" in line]
            assert len(named) == 1, name
            assert "idxs=[2, 6, 9]" in named[0]
        assert any("=> relu" in line for line in lines)
        assert any("=> add" in line for line in lines)
        assert any(line.split("=>")[0].strip().startswith("[") for line in lines)

    def test_long_index_lists_are_shortened(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        group = graph.get_pruning_group(model.layer4[0].conv1, tp.prune_conv_out_channels, list(range(300)))
        assert max(map(len, group.details().splitlines())) < 500
        assert "len(idxs)=300" in group.details()


class TestAllGroups:
    def test_each_group_once_in_forward_order_with_all_indices(
        self, graph: tp.DependencyGraph, model: nn.Module
    ) -> None:
        groups = list(graph.get_all_groups(ignored_layers=[model.conv1], root_module_types=[nn.Conv2d, nn.Linear]))
        assert [g[0].dep.target.name for g in groups] == ROOTS[1:]
        groups = list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
        assert [g[0].dep.target.name for g in groups] == ROOTS
        for group in groups:
            assert group[0].idxs == list(range(group[0].dep.target.module.out_channels))
        members = [(d.target.name, d.handler.__name__) for g in groups for d, _ in g]
        assert len(members) == len(set(members))

    def test_ignored_layers_leave_out_what_would_cut_them(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        """The ignored conv is a member of conv1's group, not its root."""
        names = [g[0].dep.target.name for g in graph.get_all_groups(ignored_layers=[model.layer1[1].conv2])]
        assert names == ROOTS[1:]

    def test_an_ignored_block_covers_the_layers_inside(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        names = [g[0].dep.target.name for g in graph.get_all_groups(ignored_layers=[model.layer4])]
        assert names == ROOTS[:9]

    def test_root_types_choose_the_roots(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        graph = tp.DependencyGraph().build_dependency(net, torch.zeros(1, 3, 3, 3))

        def roots(types: list[type]) -> list[str]:
            return [g[0].dep.target.name for g in graph.get_all_groups(root_module_types=types)]

        assert roots([nn.Conv2d]) == ["0"]
        assert roots([nn.Linear]) == ["2"]
        assert roots([nn.Conv2d, nn.Linear]) == ["0", "2"]

    def test_pruning_while_iterating(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        for group in graph.get_all_groups(ignored_layers=[model.fc], root_module_types=[nn.Conv2d, nn.Linear]):
            idxs = group[0].idxs
            assert graph.check_pruning_group(group) is False  # all of them would empty the layer
            group.prune(idxs=idxs[: len(idxs) // 2])
        assert model(IMAGE).shape == (1, 1000)
        assert sum(p.numel() for p in model.parameters()) == 3_055_880
        assert len(graph.pruning_history()) == len(ROOTS)

    def test_history_replays_on_a_fresh_copy(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        """The plans, merged or one by one, through JSON too, give the same model bit for bit."""
        fresh, merged = copy.deepcopy(model), copy.deepcopy(model)
        for group in graph.get_all_groups():
            group.prune(idxs=group[0].idxs[::3])
        history = graph.pruning_history()
        for plan in history:
            tp.Plan.from_json(plan.to_json()).apply(fresh)
        whole = history[0]
        for plan in history[1:]:
            whole = whole.then(plan)
        whole.apply(merged)
        assert same(state(fresh), state(model))
        assert same(state(merged), state(model))


class TestBuildDependency:
    def test_as_two_statements(self) -> None:
        net = small()
        graph = tp.DependencyGraph()
        returned = graph.build_dependency(net, example_inputs=IMAGE)
        assert returned is graph
        graph.get_pruning_group(net[0], tp.prune_conv_out_channels, [0]).prune()
        assert net[0].out_channels == 7

    def test_tuple_list_and_dict_inputs(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.out = nn.Linear(3, 8), nn.Linear(5, 8), nn.Linear(8, 2)

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return self.out(self.a(x) + self.b(y))

        x, y = torch.zeros(2, 3), torch.zeros(2, 5)
        for inputs in ((x, y), [x, y], {"x": x, "y": y}, {"y": y, "x": x}):
            net = Two()
            graph = tp.DependencyGraph().build_dependency(net, inputs)
            group = graph.get_pruning_group(net.b, tp.prune_linear_out_channels, [1])
            assert {dep.target.name for dep, _ in group} == {"a", "b", "out"}
            group.prune()
            assert net(x, y).shape == (2, 2)

    def test_forward_fn_and_output_transform(self) -> None:
        """Only what the transform picks has to keep its size."""

        class Features(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

            def forward(self, x: Tensor, scale: float) -> dict[str, Tensor]:
                hidden = self.a(x) * scale
                return {"hidden": hidden, "logits": self.b(hidden)}

        net, x = Features(), torch.zeros(1, 3)

        def run(model: nn.Module, inputs: Tensor) -> Any:
            return model(inputs, scale=2.0)

        kept = tp.DependencyGraph().build_dependency(net, x, forward_fn=run)
        assert list(kept.get_all_groups()) == []
        graph = tp.DependencyGraph().build_dependency(
            net, x, forward_fn=run, output_transform=lambda out: out["logits"]
        )
        assert [g[0].dep.target.name for g in graph.get_all_groups()] == ["a"]

    def test_ignored_layers_are_kept_for_good(self) -> None:
        net = small()
        graph = tp.DependencyGraph().build_dependency(net, IMAGE, ignored_layers=[net[0]])
        assert [g[0].dep.target.name for g in graph.get_all_groups()] == ["3"]
        group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, [0])
        assert not graph.check_pruning_group(group)
        with pytest.raises(SurgeryError, match="asked to leave"):
            group.prune()
        assert net[0].out_channels == 8

    def test_before_it_is_built_the_graph_says_so(self) -> None:
        with pytest.raises(InputError, match="build_dependency"):
            list(tp.DependencyGraph().get_all_groups())

    def test_widths(self, graph: tp.DependencyGraph, model: nn.Module) -> None:
        assert graph.get_out_channels(model.conv1) == 64
        assert graph.get_in_channels(model.layer2[0].conv1) == 64
        graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [1]).prune()
        assert graph.get_out_channels(model.conv1) == 63
        assert graph.get_in_channels(model.layer2[0].conv1) == 63
        assert graph.is_out_channel_pruning_fn(tp.prune_conv_out_channels)
        assert not graph.is_in_channel_pruning_fn(tp.prune_conv_out_channels)
