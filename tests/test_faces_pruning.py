"""The pruner, the counter and the one verb: what they return, print and change, and one clear error for bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus as tp
from prunus.errors import InputError, NothingToPruneError, PrunusError, SurgeryError, TargetError

torchvision = pytest.importorskip("torchvision")

IMAGE = torch.zeros(1, 3, 32, 32)


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


class TestPruner:
    def test_five_steps_of_the_original_widths(self) -> None:
        """10, 20, ... 50 % of the widths at the start: the end is the published ResNet-18 at half of its channels."""
        torch.manual_seed(0)
        model = resnet18()
        pruner = tp.pruner.MagnitudePruner(
            model,
            IMAGE,
            importance=tp.importance.MagnitudeImportance(p=2),
            iterative_steps=5,
            pruning_ratio=0.5,
            ignored_layers=[model.fc],
        )
        widths = []
        for _ in range(5):
            pruner.step()
            widths.append((model.conv1.out_channels, model.layer4[1].conv1.out_channels))
            assert model(IMAGE).shape == (1, 1000)
        assert widths == [(57, 460), (51, 409), (44, 358), (38, 307), (32, 256)]
        assert tp.utils.count_ops_and_params(model, IMAGE)[1] == 3_055_880

    def test_steps_after_the_last_change_nothing(self) -> None:
        net = small()
        pruner = tp.pruner.MagnitudePruner(net, IMAGE, pruning_ratio=0.5, iterative_steps=2)
        for _ in range(4):
            pruner.step()
        assert (net[0].out_channels, net[3].out_channels, net[5].out_channels) == (4, 3, 4)

    def test_the_least_important_units_go(self) -> None:
        net = small()
        with torch.no_grad():
            for module in (net[0], net[1]):
                module.weight[[1, 4]] *= 1e-3
            net[3].weight[:, [1, 4]] *= 1e-3
        before = net[0].weight.detach().clone()
        tp.pruner.MagnitudePruner(net, IMAGE, pruning_ratio=0.25, ignored_layers=[net[3]]).step()
        assert torch.equal(net[0].weight, before[[0, 2, 3, 5, 6, 7]])

    def test_interactive_groups_are_pruned_by_the_caller(self) -> None:
        net = small()
        pruner = tp.pruner.MagnitudePruner(net, IMAGE, pruning_ratio=0.5)
        groups = pruner.step(interactive=True)
        assert groups is not None
        for group in groups:
            if group[0].dep.target.name == "0":
                group.prune()
        assert (net[0].out_channels, net[3].out_channels) == (4, 6)

    def test_ratios_by_module(self) -> None:
        net = small()
        tp.pruner.MagnitudePruner(net, IMAGE, pruning_ratio=0.5, pruning_ratio_dict={net[0]: 0.25}).step()
        assert (net[0].out_channels, net[3].out_channels) == (6, 3)

    def test_old_names(self) -> None:
        assert issubclass(tp.pruner.MagnitudePruner, tp.pruner.BasePruner)
        assert tp.pruner.MetaPruner is tp.pruner.BasePruner
        assert tp.importance.GroupNormImportance is tp.importance.MagnitudeImportance
        net = small()
        tp.pruner.MetaPruner(net, IMAGE, tp.importance.RandomImportance(), ch_sparsity=0.5).step()
        assert net[0].out_channels == 4

    def test_a_criterion_of_the_user(self) -> None:
        """Any callable that gives one score for each unit of a group."""
        net = small()
        before = net[0].weight.detach().clone()
        tp.pruner.MagnitudePruner(
            net, IMAGE, importance=lambda group: torch.arange(group.size).flip(0).float(), pruning_ratio=0.5
        ).step()
        assert torch.equal(net[0].weight, before[:4])


class TestCounting:
    def test_resnet18(self) -> None:
        macs, params = tp.utils.count_ops_and_params(resnet18(), torch.zeros(1, 3, 224, 224))
        assert f"{macs / 1e9:.2f} G, {params / 1e6:.2f} M" == "1.82 G, 11.69 M"


class TestPruneVerb:
    def test_result_table_plan_and_undo(self) -> None:
        net = small()
        before, dense = state(net), copy.deepcopy(net)
        result = tp.prune(net, IMAGE, tp.Target(macs=0.5))
        assert result.after.macs <= 0.5 * result.before.macs
        assert result.after.params == sum(p.numel() for p in net.parameters())
        text = str(result)
        for name in ("0.weight", "3.weight", "5.weight", "whole model"):
            assert name in text
        assert f"{result.before.params:,}" in text
        assert f"{result.after.params:,}" in text
        assert "8x3x3x3" in text
        tp.Plan.from_json(result.plan.to_json()).apply(dense)
        assert same(state(dense), state(net))
        result.undo()
        assert same(state(net), before)

    def test_ignored_layers_keep_their_outputs(self) -> None:
        net = small()
        tp.prune(net, IMAGE, tp.Target(ratio=0.5), ignored_layers=[net[0]])
        assert (net[0].out_channels, net[3].out_channels) == (8, 3)

    def test_outputs_and_inputs_keep_their_sizes(self) -> None:
        net = small()
        tp.prune(net, IMAGE, tp.Target(ratio=0.9))
        assert (net[0].in_channels, net[5].out_channels) == (3, 4)
        assert net[0].out_channels >= 1

    def test_the_optimizer_goes_on(self) -> None:
        """Momenta are cut with their parameters, which stay the objects that the optimiser holds."""
        net = small().train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        net(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        tp.prune(net, IMAGE, tp.Target(ratio=0.5), optimizer=optimizer)
        for parameter in net.parameters():
            assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
        optimizer.zero_grad()
        net(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()

    def test_a_target_out_of_reach_is_refused(self) -> None:
        net = small()
        before = state(net)
        with pytest.raises(TargetError, match="cannot be met"):
            tp.prune(net, IMAGE, tp.Target(macs=0.5), max_pruning_ratio=0.1)
        assert same(state(net), before)

    def test_nothing_to_remove_is_an_error(self) -> None:
        net = nn.Sequential(nn.Linear(3, 4))
        with pytest.raises(NothingToPruneError, match="output of the model"):
            tp.prune(net, torch.zeros(1, 3))
        net = small()
        with pytest.raises(NothingToPruneError, match="asked to leave"):
            tp.prune(net, IMAGE, ignored_layers=[net])
        with pytest.raises(NothingToPruneError):
            tp.pruner.MagnitudePruner(net, IMAGE, ignored_layers=[net])


def _graph(net: nn.Module) -> tp.DependencyGraph:
    return tp.DependencyGraph().build_dependency(net, IMAGE)


def _conv_group(net: Any, idxs: Any) -> Any:
    return _graph(net).get_pruning_group(net[0], tp.prune_conv_out_channels, idxs)


BAD: dict[str, tuple[Callable[[Any], Any], type[PrunusError], str]] = {
    "not a module": (lambda net: tp.prune("resnet18", IMAGE), InputError, "Module"),  # type: ignore[arg-type]
    "wrong channels": (lambda net: tp.prune(net, torch.zeros(1, 4, 32, 32)), InputError, "cannot run"),
    "wrong number of inputs": (lambda net: tp.prune(net, (IMAGE, IMAGE)), InputError, "cannot run"),
    "no input": (lambda net: tp.prune(net, None), InputError, "cannot run"),
    "unknown keyword": (lambda net: tp.prune(net, {"image": IMAGE}), InputError, "cannot run"),
    "no target": (lambda net: tp.prune(net, IMAGE, tp.Target()), InputError, "asks for nothing"),
    "target is a number": (lambda net: tp.prune(net, IMAGE, 0.5), InputError, "Target"),  # type: ignore[arg-type]
    "share above one": (lambda net: tp.prune(net, IMAGE, tp.Target(macs=1.5)), InputError, "between 0 and 1"),
    "share of zero": (lambda net: tp.prune(net, IMAGE, tp.Target(params=0.0)), InputError, "between 0 and 1"),
    "ratio of one": (lambda net: tp.prune(net, IMAGE, tp.Target(ratio=1.0)), InputError, "between 0 and 1"),
    "ratio and budget": (lambda net: tp.prune(net, IMAGE, tp.Target(ratio=0.5, macs=0.5)), InputError, "not both"),
    "cap of zero": (lambda net: tp.prune(net, IMAGE, max_pruning_ratio=0.0), InputError, "max_pruning_ratio"),
    "foreign ignored layer": (
        lambda net: tp.prune(net, IMAGE, ignored_layers=[nn.Linear(2, 2)]),
        InputError,
        "not part of the model",
    ),
    "ignored layer by a wrong name": (
        lambda net: tp.prune(net, IMAGE, ignored_layers=["nothing"]),
        InputError,
        "nothing in the model is called",
    ),
    "index out of range": (lambda net: _conv_group(net, [8]), InputError, "do not exist"),
    "negative index": (lambda net: _conv_group(net, [-1]), InputError, "do not exist"),
    "no index": (lambda net: _conv_group(net, []), InputError, "no positions"),
    "layer of another model": (
        lambda net: _graph(net).get_pruning_group(nn.Conv2d(3, 3, 1), tp.prune_conv_out_channels, [0]),
        InputError,
        "not part of the model",
    ),
    "no pruning function": (
        lambda net: _graph(net).get_pruning_group(net[0], torch.relu, [0]),
        InputError,
        "no pruning function",
    ),
    "ratio above one": (
        lambda net: tp.pruner.MagnitudePruner(net, IMAGE, pruning_ratio=1.5),
        InputError,
        "pruning_ratio",
    ),
    "no steps": (lambda net: tp.pruner.MagnitudePruner(net, IMAGE, iterative_steps=0), InputError, "iterative_steps"),
    "unknown normaliser": (
        lambda net: tp.prune(net, IMAGE, importance=tp.importance.MagnitudeImportance(normalizer="best")),
        InputError,
        "normalizer",
    ),
    "unknown reduction": (
        lambda net: tp.importance.MagnitudeImportance(group_reduction="best"),
        InputError,
        "group_reduction",
    ),
    "scores of the wrong length": (
        lambda net: tp.prune(net, IMAGE, importance=lambda group: torch.zeros(3)),
        InputError,
        "importance returned",
    ),
    "scores with NaN": (
        lambda net: tp.prune(net, IMAGE, importance=lambda group: torch.full((group.size,), float("nan"))),
        InputError,
        "NaN",
    ),
    "a frozen output": (
        lambda net: _graph(net).get_pruning_group(net[5], tp.prune_conv_out_channels, [0]).prune(),
        SurgeryError,
        "output of the model",
    ),
    "a frozen input": (
        lambda net: _graph(net).get_pruning_group(net[0], tp.prune_conv_in_channels, [0]).prune(),
        SurgeryError,
        "may not go",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_clear_error_and_leaves_the_model(name: str) -> None:
    call, error, words = BAD[name]
    net = small()
    before = state(net)
    with pytest.raises(error, match=words) as caught:
        call(net)
    assert len(str(caught.value)) > 15
    assert same(state(net), before)


def test_a_layer_that_did_not_run_is_named() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.spare = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    net = Spare()
    graph = tp.DependencyGraph().build_dependency(net, torch.zeros(1, 3))
    with pytest.raises(InputError, match="not used"):
        graph.get_pruning_group(net.spare, tp.prune_linear_out_channels, [0])
    assert [g[0].dep.target.name for g in graph.get_all_groups()] == ["a"]


def test_a_failure_in_the_middle_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error injected between two swaps leaves every bit as it was, and the next attempt succeeds."""
    from prunus import surgery

    net = small()
    before = state(net)
    graph = _graph(net)
    group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, [1, 2])

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(surgery, "_mirror_changes", fail)
        with pytest.raises(SurgeryError, match="taken back"):
            group.prune()
    assert same(state(net), before)
    group.prune()
    assert net[0].out_channels == 6


def test_a_group_that_the_criterion_leaves_alone_stays() -> None:
    def only_norms(group):
        scaled = any(isinstance(dep.layer, nn.BatchNorm2d) for dep, _ in group)
        return torch.rand(group.size) if scaled else None

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 3))
    for options in ({"global_pruning": True}, {}):
        pruned = copy.deepcopy(model)
        tp.prune(pruned, torch.randn(1, 3, 9, 9), tp.Target(ratio=0.5), importance=only_norms, **options)
        assert (pruned[0].out_channels, pruned[2].out_channels) == (4, 6)
    with pytest.raises(NothingToPruneError, match="leaves all of them alone"):
        tp.prune(model, torch.randn(1, 3, 9, 9), importance=lambda group: None)
