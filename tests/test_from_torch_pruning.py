"""What users of Torch-Pruning 1.6 have in their scripts, with the import changed: names, signatures and snippets.

The snippets are ours; each does what one in the README, the examples or the notebooks there does.
"""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import prunus as tp

IMAGE = torch.randn(1, 3, 64, 64)
NEEDED = inspect.Parameter.empty
ANY = object()

BASE: list[tuple[str, Any]] = [
    ("global_pruning", False),
    ("pruning_ratio", 0.5),
    ("pruning_ratio_dict", None),
    ("max_pruning_ratio", 1.0),
    ("iterative_steps", 1),
    ("iterative_pruning_ratio_scheduler", ANY),
    ("ignored_layers", None),
    ("round_to", None),
    ("isomorphic", False),
    ("in_channel_groups", ANY),
    ("out_channel_groups", ANY),
    ("num_heads", ANY),
    ("prune_num_heads", False),
    ("prune_head_dims", True),
    ("head_pruning_ratio", 0.0),
    ("head_pruning_ratio_dict", None),
    ("customized_pruners", None),
    ("unwrapped_parameters", None),
    ("root_module_types", ANY),
    ("forward_fn", None),
    ("output_transform", None),
    ("channel_groups", ANY),
    ("ch_sparsity", None),
    ("ch_sparsity_dict", None),
]
FIRST: list[tuple[str, Any]] = [("model", NEEDED), ("example_inputs", NEEDED), ("importance", ANY)]
DRAWING: list[tuple[str, Any]] = [
    ("DG", NEEDED), ("save_as", NEEDED), ("title", ANY), ("figsize", (16, 16)), ("dpi", 200), ("cmap", None)
]  # fmt: skip
TIMING: list[tuple[str, Any]] = [
    ("model", NEEDED), ("example_inputs", NEEDED), ("repeat", 300), ("warmup", 50), ("run_fn", None)
]  # fmt: skip

SCORES: list[tuple[Any, Any]] = [("group_reduction", "mean"), ("normalizer", "mean"), ("bias", False)]
TYPES: list[tuple[Any, Any]] = [("target_types", ANY)]
DATA = [SCORES[2], *TYPES, ("calibration", None)]
SIGNATURES: dict[str, list[tuple[str, Any]]] = {
    "pruner.BasePruner": [*FIRST, *BASE],
    "pruner.MetaPruner": [*FIRST, *BASE],
    "pruner.MagnitudePruner": [*FIRST, *BASE],
    "pruner.GroupNormPruner": [*FIRST, ("reg", 1e-4), ("alpha", 4), *BASE],
    "pruner.GrowingRegPruner": [*FIRST, ("reg", 1e-5), ("delta_reg", 1e-5), *BASE],
    "pruner.BNScalePruner": [*FIRST, ("reg", 1e-5), ("group_lasso", False), *BASE],
    "pruner.BasePruner.step": [("self", NEEDED), ("interactive", False)],
    "pruner.BasePruner.manual_prune_width": [
        ("self", NEEDED),
        ("layer", NEEDED),
        ("pruning_fn", NEEDED),
        ("pruning_ratios_or_idxs", NEEDED),
    ],
    "pruner.BasePruner.estimate_importance": [("self", NEEDED), ("group", NEEDED)],
    "pruner.BasePruner.pruning_history": [("self", NEEDED)],
    "pruner.BasePruner.load_pruning_history": [("self", NEEDED), ("pruning_history", NEEDED)],
    "pruner.BasePruner.get_target_pruning_ratio": [("self", NEEDED), ("module", NEEDED), ("step", -1)],
    "pruner.BasePruner.get_target_head_pruning_ratio": [("self", NEEDED), ("module", NEEDED)],
    "pruner.BasePruner.reset": [("self", NEEDED)],
    "pruner.BasePruner.update_regularizer": [("self", NEEDED)],
    "pruner.BasePruner.regularize": [("self", NEEDED), ("model", ANY), ("loss", ANY)],
    "pruner.GroupNormPruner.regularize": [("self", NEEDED), ("model", ANY), ("alpha", ANY), ("bias", False)],
    "pruner.GrowingRegPruner.regularize": [("self", NEEDED), ("model", ANY), ("bias", False)],
    "pruner.GrowingRegPruner.update_reg": [("self", NEEDED)],
    "pruner.BNScalePruner.regularize": [("self", NEEDED), ("model", ANY), ("reg", None), ("bias", False)],
    "importance.MagnitudeImportance": [("p", 2), *SCORES, *TYPES],
    "importance.GroupMagnitudeImportance": [("p", 2), *SCORES, *TYPES],
    "importance.BNScaleImportance": [*SCORES[:2]],
    "importance.LAMPImportance": [("p", 2), SCORES[0], ("normalizer", "lamp"), SCORES[2]],
    "importance.FPGMImportance": [("p", 2), *SCORES],
    "importance.GroupTaylorImportance": [*SCORES[:2], ("multivariable", False), *DATA],
    "importance.TaylorImportance": [*SCORES[:2], ("multivariable", False), *DATA],
    "importance.GroupHessianImportance": [*SCORES[:2], *DATA],
    "importance.HessianImportance": [*SCORES[:2], *DATA],
    "importance.GroupHessianImportance.accumulate_grad": [("self", NEEDED), ("model", NEEDED)],
    "importance.OBDCImportance": [*SCORES, *TYPES, ("num_classes", 100), ("calibration", None)],
    "importance.RandomImportance": [],
    "importance.ActivationImportance": [("p", 2), ("group_reduction", ANY), *SCORES[1:], *TYPES, ("calibration", None)],
    "importance.ActivationImportance.compute_importance": [("self", NEEDED), ("model", NEEDED)],
    "importance.GroupHessianImportance.zero_grad": [("self", NEEDED)],
    "importance.OBDCImportance.step": [("self", NEEDED)],
    "importance.Importance.__call__": [("self", NEEDED), ("group", NEEDED)],
    "scheduler.linear_scheduler": [("pruning_ratio", NEEDED), ("steps", NEEDED)],
    "DependencyGraph.build_dependency": [
        ("self", NEEDED),
        ("model", NEEDED),
        ("example_inputs", NEEDED),
        ("forward_fn", None),
        ("output_transform", None),
        ("unwrapped_parameters", None),
        ("customized_pruners", None),
        ("ignored_layers", ANY),
        ("ignored_params", ANY),
        ("verbose", True),
    ],
    "DependencyGraph.register_customized_layer": [
        ("self", NEEDED),
        ("layer_type_or_instance", NEEDED),
        ("layer_pruner", NEEDED),
    ],
    "DependencyGraph.get_pruning_group": [
        ("self", NEEDED),
        ("module", NEEDED),
        ("pruning_fn", NEEDED),
        ("idxs", NEEDED),
    ],
    "DependencyGraph.get_all_groups": [("self", NEEDED), ("ignored_layers", ANY), ("root_module_types", ANY)],
    "DependencyGraph.check_pruning_group": [("self", NEEDED), ("group", NEEDED)],
    "DependencyGraph.get_pruner_of_module": [("self", NEEDED), ("module", NEEDED)],
    "DependencyGraph.get_out_channels": [("self", NEEDED), ("module_or_node", NEEDED)],
    "DependencyGraph.get_in_channels": [("self", NEEDED), ("module_or_node", NEEDED)],
    "DependencyGraph.is_out_channel_pruning_fn": [("self", NEEDED), ("fn", NEEDED)],
    "DependencyGraph.is_in_channel_pruning_fn": [("self", NEEDED), ("fn", NEEDED)],
    "DependencyGraph.pruning_history": [("self", NEEDED)],
    "DependencyGraph.load_pruning_history": [("self", NEEDED), ("pruning_history", NEEDED)],
    "Group.prune": [("self", NEEDED), ("idxs", None), ("record_history", True)],
    "Group.details": [("self", NEEDED)],
    "Group.exec": [("self", NEEDED)],
    "Group.has_pruning_op": [("self", NEEDED), ("dep", NEEDED), ("idxs", NEEDED)],
    "Dependency.is_triggered_by": [("self", NEEDED), ("pruning_fn", NEEDED)],
    "BasePruningFunc": [("pruning_dim", 1)],
    "BasePruningFunc.check": [("self", NEEDED), ("layer", NEEDED), ("idxs", NEEDED), ("to_output", NEEDED)],
    "BasePruningFunc.__call__": [
        ("self", NEEDED),
        ("layer", NEEDED),
        ("idxs", NEEDED),
        ("to_output", True),
        ("inplace", True),
        ("dry_run", False),
    ],
    "utils.count_ops_and_params": [("model", NEEDED), ("example_inputs", NEEDED), ("layer_wise", False)],
    "utils.count_params": [("module", NEEDED)],
    "utils.flatten_as_list": [("obj", NEEDED)],
    "utils.draw_computational_graph": DRAWING,
    "utils.draw_groups": DRAWING,
    "utils.draw_dependency_graph": DRAWING,
    "utils.print_tool.before_pruning": [("model", NEEDED)],
    "utils.print_tool.after_pruning": [("model", NEEDED), ("do_print", True)],
    "utils.benchmark.measure_latency": TIMING,
    "utils.benchmark.measure_fps": TIMING,
    "utils.benchmark.measure_throughput": TIMING,
    "utils.benchmark.measure_memory": [
        ("model", NEEDED),
        ("example_inputs", NEEDED),
        ("device", None),
        ("run_fn", None),
    ],
    "ops.module2type": [("module", NEEDED)],
    "ops.type2class": [("op_type", NEEDED)],
    "state_dict": [("model", NEEDED)],
    "load_state_dict": [("model", NEEDED), ("state_dict", NEEDED)],
}


LAYERS = {
    "conv": (tp.ops.OPTYPE.CONV, lambda: nn.Conv2d(8, 8, 3)),
    "depthwise_conv": (tp.ops.OPTYPE.DEPTHWISE_CONV, lambda: nn.Conv2d(8, 8, 3, groups=8)),
    "batchnorm": (tp.ops.OPTYPE.BN, lambda: nn.BatchNorm2d(8)),
    "linear": (tp.ops.OPTYPE.LINEAR, lambda: nn.Linear(8, 8)),
    "prelu": (tp.ops.OPTYPE.PRELU, lambda: nn.PReLU(8)),
    "layernorm": (tp.ops.OPTYPE.LN, lambda: nn.LayerNorm(8)),
    "embedding": (tp.ops.OPTYPE.EMBED, lambda: nn.Embedding(4, 8)),
    "parameter": (tp.ops.OPTYPE.PARAMETER, lambda: nn.Parameter(torch.ones(2, 8))),
    "multihead_attention": (tp.ops.OPTYPE.MHA, lambda: nn.MultiheadAttention(8, 2)),
    "groupnorm": (tp.ops.OPTYPE.GN, lambda: nn.GroupNorm(1, 8)),
    "instancenorm": (tp.ops.OPTYPE.IN, lambda: nn.InstanceNorm2d(8, affine=True)),
}


@pytest.mark.parametrize("reads", [False, True], ids=["out", "in"])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_function_of_layers_cuts_its_layer(kind: str, reads: bool) -> None:
    number, make = LAYERS[kind]
    fn = getattr(tp, f"prune_{kind}_{'in' if reads else 'out'}_channels")
    assert list(inspect.signature(fn).parameters)[1] == "idxs"
    box = tp.PrunerBox[number]
    assert fn is (box.prune_in_channels if reads else box.prune_out_channels)
    idxs = [0, 1, 4, 5]
    layer = fn(make(), idxs=idxs)
    count = box.get_in_channels if reads else box.get_out_channels
    assert count(layer) == 4
    assert count(box(make(), idxs, to_output=not reads)) == 4
    assert count(box(make(), idxs, to_output=not reads, dry_run=True)) == 8
    with pytest.raises(tp.InputError):
        box(make(), [8], to_output=not reads)


def test_the_pruner_of_a_layer_says_what_cuts_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    DG = tp.DependencyGraph().build_dependency(model, IMAGE)
    pruner = DG.get_pruner_of_module(model[0])
    DG.get_pruning_group(model[0], pruner.prune_out_channels, idxs=[0, 3]).prune()
    assert pruner.get_out_channels(model[0]) == DG.get_out_channels(model[0]) == 6
    assert DG.get_in_channels(DG.module2node[model[1]]) == 6
    assert tp.pruner.PrunerBox is tp.function.PrunerBox is tp.PrunerBox


def named(path: str) -> Any:
    found: Any = tp
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures_have_the_same_names_order_and_defaults(path: str) -> None:
    got = [
        (p.name, p.default)
        for p in inspect.signature(named(path)).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    wanted = SIGNATURES[path]
    assert len(got) == len(wanted)
    for (name, default), (their_name, their_default) in zip(got, wanted, strict=True):
        assert their_name is ANY or name == their_name
        assert their_default is ANY or default == their_default, name


def test_names_by_every_path_that_scripts_use() -> None:
    for name in ("BasePruner", "MetaPruner", "MagnitudePruner", "BNScalePruner", "GroupNormPruner", "GrowingRegPruner"):
        assert (
            named(name) is named(f"pruner.{name}") is named(f"algorithms.{name}") is named(f"pruner.algorithms.{name}")
        )
        assert issubclass(named(name), tp.BasePruner)
    assert tp.pruner.function is tp.function is tp.functions
    assert tp.pruner.importance is tp.importance
    assert tp.algorithms.scheduler.linear_scheduler is tp.scheduler.linear_scheduler
    assert tp.pruner.function.BasePruningFunc is tp.pruner.BasePruningFunc is tp.BasePruningFunc
    assert tp.dependency.DependencyGraph is tp.DependencyGraph and tp.dependency.Node is tp.Node
    file = io.BytesIO()
    tp.save({"width": 3}, file)
    file.seek(0)
    assert tp.load(file) == {"width": 3}
    kinds = (
        "CONV BN LINEAR PRELU DEPTHWISE_CONV CONCAT SPLIT CUSTOMIZED ELEMENTWISE LN EMBED PARAMETER MHA LSTM RESHAPE GN"
    )
    assert [kind.name for kind in tp.ops.OPTYPE] == [*kinds.split(), "IN", "UNBIND", "EXPAND", "SLICE", "OUTPUT"]
    layers = {
        "CONV": nn.Conv1d(2, 2, 1), "DEPTHWISE_CONV": nn.Conv2d(2, 2, 1, groups=2), "BN": nn.BatchNorm2d(2),
        "LINEAR": nn.Linear(2, 2), "PRELU": nn.PReLU(), "LN": nn.LayerNorm(2), "EMBED": nn.Embedding(2, 2),
        "MHA": nn.MultiheadAttention(2, 1), "LSTM": nn.LSTM(2, 2), "GN": nn.GroupNorm(1, 2),
        "IN": nn.InstanceNorm2d(2), "PARAMETER": nn.Parameter(torch.ones(2)), "ELEMENTWISE": nn.ReLU(),
    }  # fmt: skip
    for kind, layer in layers.items():
        assert tp.ops.module2type(layer) is tp.ops.OPTYPE[kind]
        assert kind == "ELEMENTWISE" or isinstance(layer, tp.ops.type2class(tp.ops.OPTYPE[kind]))


def resnet18() -> Any:
    torch.manual_seed(0)
    return torchvision.models.resnet18()


def classifier(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]


class Attention(nn.Module):
    """As in timm: one fused layer for queries, keys and values, sizes as attributes."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 48, 16, 16), nn.Linear(48, 10)
        self.position = nn.Parameter(torch.randn(1, 16, 48))
        self.blocks = nn.ModuleList(Attention(48, 6) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(48) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x.mean(1))


class TestReadme:
    def test_one_group_by_hand_and_the_whole_model_in_a_file(self, tmp_path: Path) -> None:
        model = resnet18().eval()
        DG = tp.DependencyGraph().build_dependency(model, example_inputs=IMAGE)
        group = DG.get_pruning_group(model.conv1, tp.prune_conv_out_channels, idxs=[2, 6, 9])
        if DG.check_pruning_group(group):
            group.prune()
        assert "conv1" in group.details()
        model.zero_grad()
        torch.save(model, tmp_path / "model.pth")
        loaded = torch.load(tmp_path / "model.pth", weights_only=False)
        assert loaded.conv1.out_channels == 61
        assert torch.equal(loaded(IMAGE), model(IMAGE))

    def test_all_groups(self) -> None:
        model = resnet18().eval()
        DG = tp.DependencyGraph().build_dependency(model, IMAGE)
        number = 0
        for group in DG.get_all_groups(ignored_layers=[model.conv1], root_module_types=[nn.Conv2d, nn.Linear]):
            group.prune(idxs=[2, 4, 6])
            number += 1
        assert number > 8 and model.conv1.out_channels == 64
        assert model(IMAGE).shape == (1, 1000)

    def test_the_high_level_pruner(self, capsys: pytest.CaptureFixture[str]) -> None:
        model, images = resnet18(), torch.randn(1, 3, 224, 224)
        imp = tp.importance.GroupMagnitudeImportance(p=2)
        pruner = tp.pruner.BasePruner(
            model, images, importance=imp, pruning_ratio=0.5, ignored_layers=classifier(model), round_to=8
        )
        base_macs, base_params = tp.utils.count_ops_and_params(model, images)
        tp.utils.print_tool.before_pruning(model)
        pruner.step()
        tp.utils.print_tool.after_pruning(model)
        macs, params = tp.utils.count_ops_and_params(model, images)
        assert (base_params, params) == (11_689_512, 3_055_880)
        assert (round(base_macs / 1e9, 2), round(macs / 1e9, 2)) == (1.82, 0.49)
        assert "(fc): Linear(in_features=512, out_features=1000, bias=True) => (fc): Linear(in_features=256" in (
            capsys.readouterr().out
        )

    def test_ratios_of_layers_and_blocks(self) -> None:
        model = resnet18()
        tp.pruner.BasePruner(
            model,
            IMAGE,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            pruning_ratio_dict={model.conv1: 0.2, model.layer2: 0.8},
            ignored_layers=classifier(model),
        ).step()
        assert (model.conv1.out_channels, model.layer2[0].conv1.out_channels) == (51, 25)
        assert model.layer4[0].conv1.out_channels == 256

    @pytest.mark.parametrize("isomorphic", [False, True])
    def test_global_and_isomorphic(self, isomorphic: bool) -> None:
        model = resnet18()
        pruner = tp.pruner.BasePruner(
            model,
            IMAGE,
            importance=tp.importance.GroupMagnitudeImportance(),
            isomorphic=isomorphic,
            global_pruning=True,
            pruning_ratio_dict={(model.layer1, model.layer2): 0.4, model.layer3: 0.2},
            ignored_layers=classifier(model),
        )
        pruner.step()
        widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert len({w % 8 for w in widths}) > 1
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)

    @pytest.mark.parametrize("name", ["BNScalePruner", "GroupNormPruner", "GrowingRegPruner"])
    def test_sparse_training(self, name: str) -> None:
        model = resnet18()
        pruner = getattr(tp.pruner, name)(
            model, IMAGE, importance=tp.importance.GroupMagnitudeImportance(), ignored_layers=classifier(model)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        scale = model.bn1.weight.detach().clone()
        model.train()
        pruner.update_regularizer()
        for _ in range(2):
            data, target = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data), target)
            loss.backward()
            before = model.bn1.weight.grad.clone()
            pruner.regularize(model)
            assert not torch.equal(before, model.bn1.weight.grad)
            optimizer.step()
            if isinstance(pruner, tp.pruner.GrowingRegPruner):
                pruner.update_reg()
        assert not torch.equal(scale, model.bn1.weight.detach())
        pruner.step()
        assert model.conv1.out_channels == 32

    def test_interactive(self) -> None:
        model, iterative_steps = resnet18(), 2
        pruner = tp.pruner.BasePruner(
            model,
            IMAGE,
            importance=tp.importance.GroupMagnitudeImportance(),
            iterative_steps=iterative_steps,
            ignored_layers=classifier(model),
        )
        params = [tp.utils.count_params(model)]
        for _ in range(iterative_steps):
            for group in pruner.step(interactive=True):
                dep, idxs = group[0]
                assert isinstance(dep.target.module, nn.Conv2d)
                assert dep.handler is tp.prune_conv_out_channels
                assert str(group) and len(idxs) > 0
                group.prune()
            params.append(tp.utils.count_ops_and_params(model, IMAGE)[1])
        assert params[0] > params[1] > params[2] == 3_055_880

    def test_masking_by_zeros(self) -> None:
        model = resnet18().eval()
        pruner = tp.pruner.BasePruner(
            model, IMAGE, importance=tp.importance.GroupMagnitudeImportance(), ignored_layers=classifier(model)
        )
        for group in pruner.step(interactive=True):
            for dep, idxs in group:
                layer, pruning_fn = dep.target.module, dep.handler
                if pruning_fn in {tp.prune_conv_in_channels, tp.prune_linear_in_channels}:
                    layer.weight.data[:, idxs] *= 0
                elif pruning_fn in {tp.prune_conv_out_channels, tp.prune_batchnorm_out_channels}:
                    layer.weight.data[idxs] *= 0
                    if layer.bias is not None:
                        layer.bias.data[idxs] *= 0
        assert tp.utils.count_params(model) == 11_689_512
        masked = model(IMAGE)
        pruner.reset()
        pruner.step()  # the zeros are the least important now
        assert tp.utils.count_params(model) == 3_055_880
        assert torch.allclose(model(IMAGE), masked, atol=1e-5)

    def test_low_level_functions(self) -> None:
        model = resnet18()
        tp.prune_conv_out_channels(model.conv1, idxs=[2, 6, 9])
        tp.prune_batchnorm_out_channels(model.bn1, idxs=[2, 6, 9])
        tp.prune_conv_in_channels(model.layer2[0].conv1, idxs=[2, 6, 9])
        assert (model.conv1.out_channels, model.bn1.num_features, model.layer2[0].conv1.in_channels) == (61, 61, 61)

    def test_static_attributes_need_no_edits(self) -> None:
        class Scale(nn.Module):
            def __init__(self, dim: int) -> None:
                super().__init__()
                self.shape = (dim, 1, 1)
                self.scale = nn.Parameter(torch.ones(dim))

            def forward(self, x: Tensor) -> Tensor:
                return x * self.scale.view(self.shape)

        model = nn.Sequential(nn.Conv2d(3, 8, 3), Scale(8), nn.Conv2d(8, 4, 3))
        tp.pruner.MagnitudePruner(model, IMAGE, importance=tp.importance.MagnitudeImportance()).step()
        assert model[1].shape == (4, 1, 1)
        assert model(IMAGE).shape == (1, 4, 60, 60)


class TestImportances:
    """Each criterion drives a pruner by the snippet of its page."""

    @pytest.mark.parametrize("name", ["MagnitudeImportance", "BNScaleImportance", "LAMPImportance", "FPGMImportance"])
    def test_weights_alone(self, name: str) -> None:
        model = resnet18()
        imp = getattr(tp.importance, name)()
        tp.pruner.MagnitudePruner(model, IMAGE, imp, pruning_ratio=0.5, ignored_layers=classifier(model)).step()
        assert model.conv1.out_channels == 32
        assert model(IMAGE).shape == (1, 1000)

    @pytest.mark.parametrize("multivariable", [False, True])
    def test_a_loss_and_its_gradients(self, multivariable: bool) -> None:
        model = resnet18()
        imp = tp.importance.GroupTaylorImportance(multivariable=multivariable)
        pruner = tp.pruner.BasePruner(model, IMAGE, imp, pruning_ratio=0.5, ignored_layers=classifier(model))
        loss = nn.functional.cross_entropy(model(IMAGE.repeat(2, 1, 1, 1)), torch.tensor([1, 2]))
        loss.backward()
        pruner.step()
        assert model.conv1.out_channels == 32

    def test_squared_gradients_sample_by_sample(self) -> None:
        model = resnet18()
        imp = tp.importance.GroupHessianImportance()
        pruner = tp.pruner.BasePruner(
            model, IMAGE, imp, pruning_ratio=0.5, ignored_layers=classifier(model), global_pruning=True
        )
        imp.zero_grad()
        losses = nn.functional.cross_entropy(
            model(torch.randn(3, *IMAGE.shape[1:])), torch.tensor([1, 2, 3]), reduction="none"
        )
        for loss in losses:
            model.zero_grad()
            loss.backward(retain_graph=True)
            imp.accumulate_grad(model)
        pruner.step()
        assert sum(p.numel() for p in model.parameters()) < 8_000_000

    def test_a_criterion_of_ones_own(self) -> None:
        class MyMagnitude(tp.importance.Importance):
            def __call__(self, group: Any, **kwargs: Any) -> torch.Tensor:
                found = []
                for dep, idxs in group:
                    layer, prune_fn = dep.layer, dep.pruning_fn
                    if isinstance(layer, nn.Conv2d) and prune_fn == tp.prune_conv_out_channels:
                        found.append(layer.weight.data[idxs].flatten(1).abs().pow(2).sum(1))
                return torch.stack(found).mean(0)

        model = resnet18()
        pruner = tp.pruner.BasePruner(model, IMAGE, MyMagnitude(), pruning_ratio=0.5, ignored_layers=classifier(model))
        pruner.step()
        assert model.conv1.out_channels == 32

    def test_scales_of_norms_are_what_the_pruner_named_after_them_goes_by(self) -> None:
        model = resnet18()
        with torch.no_grad():
            model.layer1[0].bn1.weight[:8] = 0.0
        pruner = tp.pruner.BNScalePruner(model, IMAGE, pruning_ratio=0.125, ignored_layers=classifier(model))
        pruner.step()
        scales = model.layer1[0].bn1.weight
        assert scales.shape == (56,) and bool((scales == 1).all())


class TestExamplesAndTests:
    def test_a_pruner_of_ones_own(self) -> None:
        """The notebook: Network Slimming from scratch, an importance over items and a regulariser."""

        class MySlimmingImportance(tp.importance.Importance):
            def __call__(self, group: Any, **kwargs: Any) -> Tensor | None:
                group_imp = [
                    torch.abs(dep.layer.weight.data[idxs])
                    for dep, idxs in group
                    if isinstance(dep.layer, nn.BatchNorm2d) and dep.layer.affine
                ]
                return torch.stack(group_imp, dim=0).mean(dim=0) if group_imp else None

        class MySlimmingPruner(tp.pruner.BasePruner):
            def regularize(self, model: nn.Module, reg: float) -> None:  # type: ignore[override]
                for m in model.modules():
                    if isinstance(m, nn.BatchNorm2d) and m.affine:
                        m.weight.grad.data.add_(reg * torch.sign(m.weight.data))

        model = resnet18()
        nn.init.uniform_(model.bn1.weight)
        pruner = MySlimmingPruner(
            model, IMAGE, global_pruning=False, importance=MySlimmingImportance(), ignored_layers=classifier(model)
        )
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        pruner.regularize(model, reg=1e-2)
        assert torch.equal(model.bn1.weight.grad, 1e-2 * model.bn1.weight.sign())
        pruner.step()
        assert model.conv1.out_channels == 32

    def test_heads_of_a_vision_transformer(self) -> None:
        """examples/transformers: heads and their dims; the loop that corrects attributes finds them right already."""
        model = Transformer().eval()
        num_heads, ignored = {}, [model.head]
        for m in model.modules():
            if isinstance(m, Attention):
                num_heads[m.qkv] = m.num_heads
        pruner = tp.pruner.BasePruner(
            model,
            IMAGE,
            global_pruning=False,
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=0.5,
            ignored_layers=ignored,
            num_heads=num_heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=0.34,
            unwrapped_parameters=[(model.position, 2)],
        )
        for group in pruner.step(interactive=True):
            group.prune()
        for m in model.modules():
            if isinstance(m, Attention):
                assert m.num_heads == pruner.num_heads[m.qkv] == 3
                assert m.head_dim == m.qkv.out_features // (3 * m.num_heads)
        assert model(IMAGE).shape == (1, 10)

    def test_unwrapped_parameters_and_channel_groups_are_accepted(self) -> None:
        model = torchvision.models.convnext_tiny()
        unwrapped = [(m.layer_scale, 0) for m in model.modules() if hasattr(m, "layer_scale")]
        pruner = tp.pruner.MetaPruner(
            model, IMAGE, tp.importance.MagnitudeImportance(), unwrapped_parameters=unwrapped, ch_sparsity=0.5,
            channel_groups={}, ignored_layers=classifier(model),
        )  # fmt: skip
        pruner.step()
        assert model.features[1][0].layer_scale.shape == (48, 1, 1)

    def test_a_customised_layer(self) -> None:
        class MyLinear(nn.Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.width = width
                self.scale, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

            def forward(self, x: Tensor) -> Tensor:
                return x * self.scale + self.bias

        class MyLinearPruner(tp.pruner.BasePruningFunc):
            def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
                keep = sorted(set(range(layer.width)) - set(idxs))
                layer.width -= len(idxs)
                layer.scale = nn.Parameter(layer.scale.data[keep])
                layer.bias = nn.Parameter(layer.bias.data[keep])
                return layer

            def get_out_channels(self, layer: Any) -> int:
                return int(layer.width)

            prune_in_channels = prune_out_channels
            get_in_channels = get_out_channels

        model = nn.Sequential(nn.Linear(6, 16), MyLinear(16), nn.ReLU(), nn.Linear(16, 2))
        pruner = tp.pruner.MagnitudePruner(
            model,
            torch.randn(1, 6),
            importance=tp.importance.RandomImportance(),
            customized_pruners={MyLinear: MyLinearPruner()},
        )
        pruner.step()
        assert (model[0].out_features, model[1].width, model[3].in_features) == (8, 8, 8)
        assert model(torch.randn(1, 6)).shape == (1, 2)

    def test_history_in_a_file(self, tmp_path: Path) -> None:
        model = resnet18().eval()
        pruner = tp.pruner.MagnitudePruner(model, IMAGE, importance=tp.importance.RandomImportance(), pruning_ratio=0.3)
        pruner.step()
        torch.save({"model": model.state_dict(), "pruning": pruner.pruning_history()}, tmp_path / "pruned.pth")
        fresh = resnet18().eval()
        saved = torch.load(tmp_path / "pruned.pth")
        DG = tp.DependencyGraph().build_dependency(fresh, IMAGE)
        DG.load_pruning_history(saved["pruning"])
        fresh.load_state_dict(saved["model"])
        assert torch.equal(fresh(IMAGE), model(IMAGE))

    def test_state_dict_with_its_sizes(self, tmp_path: Path) -> None:
        model = Transformer().eval()
        tp.pruner.MagnitudePruner(model, IMAGE, pruning_ratio=0.5, prune_num_heads=True).step()
        torch.save(tp.state_dict(model), tmp_path / "state.pth")
        fresh = Transformer().eval()
        tp.load_state_dict(fresh, torch.load(tmp_path / "state.pth"))
        assert torch.equal(fresh(IMAGE), model(IMAGE))
        with pytest.raises(tp.SurgeryError, match="not of the same code"):
            tp.load_state_dict(resnet18(), tp.state_dict(model))
        with pytest.raises(tp.InputError, match="what prunus"):
            tp.load_state_dict(fresh, model.state_dict())

    def test_inputs_as_a_dict_with_a_forward_of_ones_own(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.out = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

            def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
                return {"logits": self.out(self.a(x) + self.b(y)), "loss": x.sum()}

        inputs = {"x": torch.zeros(1, 4), "y": torch.zeros(1, 4)}
        for options in ({}, {"forward_fn": lambda m, d: m(**d), "output_transform": lambda out: out["logits"].sum()}):
            model = Two()
            tp.pruner.MagnitudePruner(model, inputs, tp.importance.MagnitudeImportance(), **options).step()
            assert (model.a.out_features, model.b.out_features, model.out.in_features) == (4, 4, 4)

    def test_a_recurrent_network(self) -> None:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm, self.out = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.out(self.lstm(x)[0])

        model = Net()
        tp.pruner.BasePruner(model, torch.randn(1, 5, 8), tp.importance.MagnitudeImportance(), pruning_ratio=0.5).step()
        assert model.lstm.hidden_size == 8 and model(torch.randn(1, 5, 8)).shape == (1, 5, 3)

    def test_time_and_pictures(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        mean, deviation = tp.utils.benchmark.measure_latency(model, IMAGE, repeat=3, warmup=1)
        assert mean > 0 and deviation >= 0
        assert tp.utils.benchmark.measure_fps(model, IMAGE, repeat=2, warmup=0) > 0
        assert tp.utils.benchmark.measure_throughput(model, IMAGE, 2, 0, run_fn=lambda m, x: m(x)) > 0
        with pytest.raises(tp.InputError, match="CUDA"):
            tp.utils.benchmark.measure_memory(model, IMAGE)
        with pytest.raises(tp.InputError, match="repeat"):
            tp.utils.benchmark.measure_latency(model, IMAGE, repeat=0)
        DG = tp.DependencyGraph().build_dependency(model, IMAGE)
        for draw in (tp.utils.draw_groups, tp.utils.draw_dependency_graph, tp.utils.draw_computational_graph):
            draw(DG, save_as=tmp_path / f"{draw.__name__}.png", figsize=(2, 2), dpi=30)
            assert (tmp_path / f"{draw.__name__}.png").stat().st_size > 500


def test_settings_of_penalties_are_read_and_set_while_training_goes_on() -> None:
    """``pruner.reg = ...`` in the middle of a loop, as schedules of sparse training do."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))

    def added(pruner: Any) -> Tensor:
        model.zero_grad()
        pruner.regularize(model)
        return model[1].weight.grad.clone()

    for kind, own in (
        ("GroupNormPruner", "alpha"),
        ("GrowingRegPruner", "delta_reg"),
        ("BNScalePruner", "group_lasso"),
    ):
        pruner = getattr(tp.pruner, kind)(model, IMAGE, reg=1e-3)
        assert pruner.reg == 1e-3 and hasattr(pruner, own)
        if kind != "GrowingRegPruner":  # whose strengths grow from the first one
            before = added(pruner)
            pruner.reg = 2e-3
            torch.testing.assert_close(added(pruner), 2 * before)
    growing = tp.pruner.GrowingRegPruner(model, IMAGE)
    growing.delta_reg = 1.0
    growing.update_reg()
    assert growing.decay.strength.max() > 0.9


def test_what_scripts_read_from_graphs_and_nodes() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
            self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.conv(x) * self.scale)

    model = Scaled()
    pruner = tp.pruner.MagnitudePruner(model, IMAGE, out_channel_groups={model.conv: 2}, head_pruning_ratio=0.25)
    DG = pruner.DG
    assert [(entry.parameters is model.scale, entry.pruning_dim) for entry in DG.unwrapped_parameters] == [(True, 1)]
    assert DG.REGISTERED_PRUNERS[tp.ops.OPTYPE.CONV].prune_out_channels is tp.prune_conv_out_channels
    assert not DG.CUSTOMIZED_PRUNERS and not DG.IGNORED_LAYERS_IN_TRACING and not DG.ignored_params and DG.verbose
    assert DG._module2name[model.conv] == "conv" and DG._param_to_name[model.scale] == "scale" and DG.ops is tp.ops
    assert pruner.out_channel_groups == {model.conv: 2} and pruner.in_channel_groups == {}
    assert pruner.per_step_head_pruning_ratio == [0.0, 0.25]
    node = DG.module2node[model.conv]
    assert (node.type, node.module_class) == (tp.ops.OPTYPE.CONV, nn.Conv2d) and "conv" in node.details()


def test_a_group_takes_in_more() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    DG = tp.DependencyGraph().build_dependency(model, torch.randn(1, 8))
    group = DG.get_pruning_group(model[0], tp.prune_linear_out_channels, [0, 2])
    other = DG.get_pruning_group(model[2], tp.prune_linear_out_channels, [1])
    assert group.has_dep(group[1].dep) and not group.has_dep(other[0].dep)
    group.add_dep(group[0].dep, [2, 5])
    assert group[0].idxs == group[1].idxs == [0, 2, 5]
    group.add_and_merge(other[0].dep, [1])
    assert group.has_dep(other[0].dep) and DG.check_pruning_group(group)
    with pytest.raises(tp.InputError, match="do not exist"):
        group.add_dep(other[0].dep, [8])
    group.prune()
    assert (model[0].out_features, model[2].in_features, model[2].out_features, model[4].in_features) == (5, 5, 7, 7)


def test_the_page_about_the_change_runs() -> None:
    page = Path(__file__).parent.parent / "docs" / "coming-from-torch-pruning.md"
    blocks = page.read_text(encoding="utf-8").split("```python\n")[1:]
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block.partition("```")[0], page.name, "exec"), names)
    assert len(blocks) == 3 and names["mask"].lifted


def test_the_page_about_the_change_names_every_public_name() -> None:
    """Every public name of the pruners' part stands on the page."""
    page = (Path(__file__).parent.parent / "docs" / "coming-from-torch-pruning.md").read_text(encoding="utf-8")
    words = set(page.replace("`", " ").replace(".", " ").replace("(", " ").replace(",", " ").split())
    names = {path.rpartition(".")[2] for path in SIGNATURES} | {name for name, _ in BASE}
    names |= {f"prune_{kind}_{side}_channels" for kind in LAYERS for side in ("out", "in")}
    names -= {"__call__"}
    free = {"global_pruning", "before_pruning", "after_pruning", "pruning_ratio", "iterative_steps", "ignored_layers",
            "customized_pruners", "root_module_types", "forward_fn", "output_transform"}  # fmt: skip
    assert names - free <= words, names - free - words


class Positions(tp.importance.Importance):
    """A criterion as scripts have it: a score for each of the root's positions, from the layers that make them."""

    def __call__(self, group: Any, **options: Any) -> Tensor:
        root, idxs = group[0]
        return root.target.module.weight.detach()[idxs].flatten(1).norm(dim=1)


class TestOneScoreForEachPosition:
    """Where several positions of the root go at once, a criterion of others still gives a score for each of them."""

    @pytest.mark.parametrize("options", [{}, {"global_pruning": True}], ids=["local", "global"])
    def test_groups_of_a_convolution(self, options: dict[str, Any]) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2), nn.Flatten())
        with torch.no_grad():  # channels k and k + 4 go together, as they share a column of the weight
            model[0].weight.copy_(torch.tensor([9.0, 1, 8, 2, 1, 2, 9, 3]).view(8, 1, 1, 1).expand(8, 3, 1, 1))
        tp.pruner.MagnitudePruner(model, IMAGE, Positions(), root_module_types=[nn.Conv2d], **options).step()
        assert model[0].weight[:, 0, 0, 0].tolist() == [9, 8, 1, 9]

    def test_a_share_of_one_layer(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2))
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor([9.0, 1, 8, 2, 1, 2, 9, 3]).view(8, 1, 1, 1).expand(8, 3, 1, 1))
        pruner = tp.pruner.MagnitudePruner(model, IMAGE, Positions())
        pruner.manual_prune_width(model[0], tp.prune_conv_out_channels, 0.5)
        assert model[0].weight[:, 0, 0, 0].tolist() == [9, 8, 1, 9]

    def test_queries_and_keys(self) -> None:
        model = Transformer().eval()
        tp.pruner.MagnitudePruner(model, IMAGE, Positions(), pruning_ratio=0.5).step()
        assert model(IMAGE).isfinite().all()

    def test_whole_heads(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.heads, self.qkv, self.out = 4, nn.Linear(8, 48), nn.Linear(16, 8)

            def forward(self, x: Tensor) -> Tensor:
                q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, 4)).permute(2, 0, 3, 1, 4)
                return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

        model = Attention()
        with torch.no_grad():
            model.qkv.weight.unflatten(0, (3, 4, 4))[:, 2].mul_(0.01)
        kept = model.qkv.weight.detach().unflatten(0, (3, 4, 4))[:, [0, 1, 3]].flatten(0, 2)
        tp.pruner.MagnitudePruner(
            model, torch.randn(1, 5, 8), Positions(), pruning_ratio=0.25, prune_num_heads=True, prune_head_dims=False
        ).step()
        assert model.heads == 3 and torch.equal(model.qkv.weight, kept)


def test_the_width_of_a_recurrent_layer_is_its_hidden_size() -> None:
    layer = nn.LSTM(4, 6)
    graph = tp.DependencyGraph().build_dependency(layer, torch.randn(5, 2, 4), output_transform=lambda out: out[1][1])
    assert (graph.get_out_channels(layer), graph.get_in_channels(layer)) == (6, 4)


def test_a_share_of_a_recurrent_layer_is_of_its_hidden_units() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.LSTM(4, 6, batch_first=True)
            self.say = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.say(self.read(x)[0])

    model = Tagger()
    with torch.no_grad():
        model.read.weight_ih_l0[1::6] *= 0.01  # unit 1 is the weakest
        model.read.weight_hh_l0[1::6] *= 0.01
        model.read.weight_hh_l0[:, 1] *= 0.01
        model.say.weight[:, 1] *= 0.01
    pruner = tp.pruner.MagnitudePruner(model, torch.randn(2, 5, 4), importance=tp.importance.MagnitudeImportance())
    pruner.manual_prune_width(model.read, tp.prune_lstm_out_channels, 0.5)
    assert (model.read.hidden_size, model.say.in_features) == (3, 3)
    (plan,) = pruner.pruning_history()
    assert 1 in next(r.positions for r in plan.removals if r.tensor == "say.weight")
