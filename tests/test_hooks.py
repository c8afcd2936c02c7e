"""What users say that no graph can know: hints, rules for their ops, pruners for their layers; and its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import prunus

PAGE = Path(__file__).parents[1] / "docs" / "hooks.md"
X = torch.randn(2, 8)


def test_the_page_of_hooks_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], PAGE.name, "exec"), namespace)
    assert len(blocks) > 8


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


def sizes(graph):
    return [group.size for group in graph.get_all_groups()]


def build(model, inputs=X, **options):
    return prunus.DependencyGraph().build_dependency(model, inputs, **options)


# -- hints ---------------------------------------------------------------------------------------------------------


def test_all_kinds_of_ignored_layers() -> None:
    model = mlp()
    assert sizes(build(model, ignored_layers=[model[0]])) == [24]
    assert sizes(build(model, ignored_layers=["2"])) == [16]
    assert sizes(build(model, ignored_layers=["[02]"])) == []
    assert sizes(build(model, ignored_layers=["*.bias"])) == []
    assert sizes(build(model, ignored_layers=[nn.Linear])) == []
    assert sizes(build(model, ignored_layers=[nn.Conv2d])) == [16, 24]
    assert sizes(build(model, ignored_params=["0.bias"])) == [24]
    assert sizes(build(model, ignored_params=[model[2].weight])) == []
    graph = build(model)
    assert [g.size for g in graph.get_all_groups(ignored_layers=["0"])] == [24]


def test_a_frozen_dim_and_frozen_positions_stay_and_say_why() -> None:
    model = mlp()
    graph = build(model, ignored_params=[prunus.freeze(model[2].weight, 1)])
    assert sizes(graph) == [24]
    assert "the caller asked to keep it" in graph.explain("2")
    graph = build(model, ignored_layers=[prunus.freeze("0.weight", -2, [0, 15])])
    group = next(graph.get_all_groups())
    assert group[0].idxs == list(range(1, 15))


@pytest.mark.parametrize(
    ("hint", "message"),
    [
        ("nolayer", "nothing in the model is called 'nolayer'"),
        ("0.weights", "did you mean 0.weight"),
        (nn.Linear(2, 2), "not part of the model"),
        (nn.Parameter(torch.ones(3)), "not part of the model"),
        (3, "which is no module"),
        (prunus.freeze("0.weight", 2), "it has no dim 2"),
        (prunus.freeze("0.weight", 0, [16]), "16 positions"),
    ],
)
def test_hints_that_mean_nothing_are_refused(hint, message) -> None:
    with pytest.raises(prunus.InputError, match=re.escape(message)):
        build(mlp(), ignored_layers=[hint])


class Table(nn.Module):
    """A bare square table of which, as far as ops tell, both dims may shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)
        self.table = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return self.b(self.a(x) @ self.table)


def test_of_an_unwrapped_parameter_only_the_given_dim_shrinks() -> None:
    model = Table()
    assert sizes(build(model)) == [6]
    graph = build(model, unwrapped_parameters=[(model.table, 1)])
    assert sizes(graph) == []  # the linear layer feeds dim 0
    group = graph.get_pruning_group(model.table, prunus.prune_parameter_out_channels, [0, 1])
    group.prune()
    assert (model.table.shape, model.b.in_features, model.a.out_features) == ((6, 4), 4, 6)
    graph = build(model, unwrapped_parameters={model.table: 0})
    assert sizes(graph) == [6]
    assert "only dim 0 of it may shrink" in graph.explain("b")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (lambda m: {m.table: 2}, "has no dim 2"),
        (lambda m: [(m.table, -3)], "has no dim -3"),
        (lambda m: [(nn.Parameter(torch.ones(2)), 0)], "not part of the model"),
        (lambda m: [(m.a, 0)], "pass parameters of the model"),
        (lambda m: [3], "pass pairs"),
    ],
)
def test_wrong_unwrapped_parameters_are_refused(pairs, message) -> None:
    model = Table()
    with pytest.raises(prunus.InputError, match=message):
        build(model, unwrapped_parameters=pairs(model))


# -- rules ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("prunus_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.b(double(self.a(x)))


def test_rules_are_registered_replaced_and_removed(oracle) -> None:
    model = Doubles()
    assert sizes(build(model)) == []
    try:
        prunus.rule(double)(prunus.rules.pointwise.pointwise)
        assert oracle(model, X).groups == 1
        with pytest.raises(prunus.InputError, match=r"has a rule already.*override=True"):
            prunus.rule(double)(prunus.rules.pointwise.pointwise)
        prunus.rule(double, override=True)(lambda op, x: op.freeze(x.dims, "no") or None)
        assert sizes(build(model)) == []
        prunus.remove_rule(double)
        assert sizes(build(model)) == [6]
    finally:
        prunus.remove_rule(double)
    assert sizes(build(model)) == []
    with pytest.raises(prunus.InputError, match="has no rule of its own"):
        prunus.remove_rule(double)
    with pytest.raises(prunus.InputError, match="is no op"):
        prunus.rule(torch.relu)


# -- customised layers ---------------------------------------------------------------------------------------------


class Kernel(nn.Module):
    """Its values pass through numpy, so that no label survives."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(inputs, outputs))
        self.offset = nn.Parameter(torch.randn(outputs))
        self.outputs = outputs

    def forward(self, x):
        last = x.movedim(1, -1) if x.dim() == 4 else x
        y = torch.from_numpy(last.detach().numpy() @ self.matrix.detach().numpy()) + self.offset
        return y.movedim(-1, 1) if x.dim() == 4 else y


class KernelPruner(prunus.BasePruningFunc):
    """Makes new parameters, as many users' functions do."""

    def prune_out_channels(self, layer, idxs):
        keep = [k for k in range(layer.outputs) if k not in idxs]
        layer.matrix = nn.Parameter(layer.matrix[:, keep].clone())
        layer.offset = nn.Parameter(layer.offset[keep].clone())
        layer.outputs = len(keep)
        return layer

    def prune_in_channels(self, layer, idxs):
        keep = [k for k in range(layer.matrix.shape[0]) if k not in idxs]
        layer.matrix.data = layer.matrix.data[keep]

    def get_out_channels(self, layer):
        return layer.outputs

    def get_in_channels(self, layer):
        return layer.matrix.shape[0]


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x * self.weight.view(-1, *[1] * (x.dim() - 2)).sort(dim=0).values.flip(0)


class ScalePruner(prunus.BasePruningFunc):
    def prune_out_channels(self, layer, idxs):
        prunus.prune_parameter_out_channels(layer.weight, idxs)

    def get_out_channels(self, layer):
        return layer.weight.numel()

    prune_in_channels = prune_out_channels
    get_in_channels = get_out_channels


def with_kernel():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Kernel(16, 12), nn.ReLU(), nn.Linear(12, 4))


def test_a_customised_layer_is_cut_on_both_sides_and_undone(model_state, states_equal) -> None:
    model, pruner = with_kernel(), KernelPruner()
    before, dense = model_state(model), model(X)
    assert sizes(build(model)) == []
    graph = build(model, customized_pruners={Kernel: pruner})
    assert states_equal(before, model_state(model))
    group = graph.get_pruning_group(model[0], prunus.prune_linear_out_channels, [3])
    assert [(d.target.name, d.handler, i) for d, i in group] == [
        ("0", prunus.prune_linear_out_channels, [3]),
        ("2", pruner.prune_in_channels, [3]),
    ]
    assert "prune_in_channels on 2 (Kernel())" in str(group)
    other = graph.get_pruning_group(model[2], pruner.prune_out_channels, [0, 11])
    assert [d.target.name for d, _ in other] == ["2", "4"]
    receipts = [group.prune(), other.prune()]
    assert (model[2].matrix.shape, model[4].in_features, model[0].out_features) == ((15, 10), 10, 15)
    assert model(X).shape == (2, 4)
    assert graph.get_out_channels(model[2]) == 10
    assert graph.get_in_channels(model[2]) == 15
    for receipt in reversed(receipts):
        receipt.undo()
    assert states_equal(before, model_state(model))
    assert torch.equal(model(X), dense)


def test_what_a_customised_layer_loses_is_what_zeros_lose() -> None:
    model = with_kernel()
    graph = build(model, customized_pruners={"2": KernelPruner()})
    with torch.no_grad():
        model[4].weight[:, 5] = 0
    zeroed = model(X)
    graph.get_pruning_group(model[4], prunus.prune_linear_in_channels, [5]).prune()
    assert torch.allclose(model(X), zeroed, atol=1e-5)


def test_the_plan_counts_the_parameters_of_a_customised_layer(tmp_path) -> None:
    model = with_kernel()
    pruners = {Kernel: KernelPruner()}
    result = prunus.prune(model, X, prunus.Target(params=0.6), customized_pruners=pruners)
    assert result.after.params == sum(p.numel() for p in model.parameters()) <= 0.6 * result.before.params
    assert result.after.macs == prunus.cost.count(model, X).macs
    pruned = model(X)
    result.undo()
    result.plan.save(tmp_path / "plan.json")
    loaded = prunus.Plan.load(tmp_path / "plan.json")
    assert loaded == result.plan
    with pytest.raises(prunus.SurgeryError, match="customized_pruners="):
        loaded.apply(model)
    loaded.apply(model, customized_pruners=pruners)
    assert torch.equal(model(X), pruned)


def test_the_pruner_takes_customised_layers_in_steps() -> None:
    model = with_kernel()
    pruner = prunus.pruner.MagnitudePruner(
        model, X, pruning_ratio=0.5, iterative_steps=2, customized_pruners={model[2]: KernelPruner()}
    )
    pruner.step()
    pruner.step()
    assert model[0].out_features == 8
    assert model[2].matrix.shape[0] == 8
    assert model(X).shape == (2, 4)


def test_one_axis_layers_pass_channels_on_also_in_feature_maps(model_state, states_equal) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Scale(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    x, pruner = torch.randn(1, 3, 6, 6), ScalePruner()
    graph = build(model, x, customized_pruners={Scale: pruner})
    before = model_state(model)
    group = graph.get_pruning_group(model[1], pruner.prune_out_channels, [2])
    assert sorted(d.target.name for d, _ in group) == ["0", "1", "3"]
    receipt = group.prune()
    assert model[1].weight.shape == (7,)
    assert model(x).shape == (1, 4, 4, 4)
    receipt.undo()
    assert states_equal(before, model_state(model))


def test_coupled_layers_with_two_functions_are_cut_by_both() -> None:
    class Coupled(KernelPruner):
        coupled = True

    model = nn.Sequential(nn.Linear(8, 6), Kernel(6, 6), nn.ReLU(), nn.Linear(6, 4))
    graph = build(model, customized_pruners={Kernel: Coupled()})
    graph.get_pruning_group(model[0], prunus.prune_linear_out_channels, [0]).prune()
    assert model[1].matrix.shape == (5, 5)
    assert model[3].in_features == 5


def test_pruning_dim_names_the_dim_of_the_channels() -> None:
    model = nn.Sequential(nn.Linear(8, 5), Kernel(5, 5), nn.Linear(5, 4))
    x = torch.randn(2, 5, 8)  # five tokens, five channels
    graph = build(model, x, customized_pruners={Kernel: KernelPruner(pruning_dim=-1)})
    graph.get_pruning_group(model[0], prunus.prune_linear_out_channels, [0]).prune()
    assert model[1].matrix.shape == (4, 5)
    assert model(x).shape == (2, 5, 4)


class Faulty(KernelPruner):
    """Does half of its work and then fails."""

    def prune_in_channels(self, layer, idxs):
        super().prune_in_channels(layer, idxs)
        layer.offset.data.zero_()
        layer.extra = nn.Linear(1, 1)
        raise RuntimeError("no")


class Short(KernelPruner):
    def prune_in_channels(self, layer, idxs):
        super().prune_in_channels(layer, idxs[:1])


class Other(KernelPruner):
    def prune_out_channels(self, layer, idxs):
        return Kernel(layer.matrix.shape[0], layer.outputs - len(idxs))


@pytest.mark.parametrize(
    ("pruner", "message"),
    [(Faulty(), "RuntimeError: no"), (Short(), "get_in_channels says 15 where 14"), (Other(), "in place")],
)
def test_a_cut_that_fails_is_taken_back(pruner, message, model_state, states_equal) -> None:
    model = with_kernel()
    graph = build(model, customized_pruners={Kernel: pruner})
    before = model_state(model)
    layer, fn = (
        (model[4], prunus.prune_linear_in_channels)
        if isinstance(pruner, Other)
        else (
            model[0],
            prunus.prune_linear_out_channels,
        )
    )
    group = graph.get_pruning_group(layer, fn, [1, 2])
    with pytest.raises(prunus.SurgeryError, match=message):
        group.prune()
    assert states_equal(before, model_state(model))
    assert graph.get_out_channels(model[0]) == 16


def test_an_optimiser_follows_and_undo_takes_it_back() -> None:
    model = with_kernel()
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    matrix = model[2].matrix
    state = {k: v.clone() for k, v in optimizer.state[matrix].items()}
    result = prunus.prune(
        model, X, prunus.Target(params=0.6), customized_pruners={Kernel: KernelPruner()}, optimizer=optimizer
    )
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    result.undo()
    assert model[2].matrix is matrix
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert all(torch.equal(state[k], v) for k, v in optimizer.state[matrix].items())


def test_a_layer_whose_weights_are_used_elsewhere_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.kernel, self.b = nn.Linear(8, 6), Kernel(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.b(self.kernel(self.a(x)) + self.kernel.offset)

    graph = build(Tied(), customized_pruners={Kernel: KernelPruner()})
    assert sizes(graph) == []
    assert "used outside its customised layer" in graph.explain("a")


@pytest.mark.parametrize(
    ("pruners", "message"),
    [
        ({Kernel: KernelPruner}, "must be an instance"),
        ({Kernel: object()}, "must be an instance"),
        ({Kernel(2, 2): KernelPruner()}, "not part of the model"),
        ({"nothing": KernelPruner()}, "nothing in the model is called"),
        ({3: KernelPruner()}, "is no module"),
        ({Kernel: type("P", (KernelPruner,), {"TARGET_MODULES": nn.Linear})()}, "handles"),
        ({Kernel: type("P", (KernelPruner,), {"get_in_channels": lambda self, m: 7})()}, "get_in_channels says 7"),
        ({Kernel: type("P", (KernelPruner,), {"get_out_channels": lambda self, m: 7})()}, "get_out_channels says 7"),
        ({Kernel: KernelPruner(pruning_dim=0)}, "pruning_dim"),
    ],
)
def test_wrong_customised_pruners_are_refused(pruners, message, model_state, states_equal) -> None:
    model = with_kernel()
    before = model_state(model)
    with pytest.raises(prunus.InputError, match=message):
        build(model, customized_pruners=pruners)
    assert states_equal(before, model_state(model))


def test_a_registered_layer_is_known_to_the_graph() -> None:
    model, pruner = with_kernel(), KernelPruner()
    graph = prunus.DependencyGraph()
    graph.register_customized_layer(Kernel, pruner)
    graph.build_dependency(model, X)
    assert graph.get_pruner_of_module(model[2]) is pruner
    assert graph.get_pruner_of_module(model[0])[0] is prunus.prune_linear_out_channels
    assert [g.size for g in graph.get_all_groups(root_module_types=[nn.Linear, Kernel])] == [16, 12]


@pytest.mark.parametrize("way", [lambda y: y.numpy(), lambda y: y.tolist(), lambda y: __import__("numpy").asarray(y)])
def test_what_leaves_torch_is_frozen(way) -> None:
    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.b(torch.as_tensor(way(self.a(x).detach())))

    graph = build(Leaves())
    assert sizes(graph) == []
    assert "hands its values to Python" in graph.explain("a")


def test_a_shared_layer_ties_what_it_makes_to_what_it_reads() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.kernel, self.b = nn.Linear(8, 6), Kernel(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.b(self.kernel(self.kernel(self.a(x))))

    model = Twice()
    graph = build(model, customized_pruners={Kernel: KernelPruner()})
    graph.get_pruning_group(model.a, prunus.prune_linear_out_channels, [1]).prune()
    assert model.kernel.matrix.shape == (5, 5)
    assert model(X).shape == (2, 4)


def test_heads_that_flow_into_a_customised_layer_lose_the_same_dims() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.kernel, self.b, self.size = nn.Linear(8, 12), Kernel(4, 5), nn.Linear(15, 4), 4

        def forward(self, x):
            return self.b(self.kernel(self.a(x).view(len(x), -1, self.size)).flatten(1))

    model = Heads()
    graph = build(model, customized_pruners={Kernel: KernelPruner(pruning_dim=-1)})
    assert sizes(graph) == [4]
    graph.get_pruning_group(model.a, prunus.prune_linear_out_channels, [1]).prune()
    assert (model.a.out_features, model.kernel.matrix.shape, model.size) == (9, (3, 5), 3)
    pruner = graph.get_pruner_of_module(model.kernel)
    graph.get_pruning_group(model.kernel, pruner.prune_out_channels, [0]).prune()
    assert model.b.in_features == 12
    assert model(X).shape == (2, 4)


def test_a_customised_layer_is_traced_without_data_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Scale(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    graph = build(model, torch.randn(1, 3, 6, 6), customized_pruners={"1": ScalePruner()}, device="meta")
    assert sizes(graph) == [8]


def test_a_forward_that_fails_inside_a_customised_layer_is_an_input_error() -> None:
    with pytest.raises(prunus.InputError, match="cannot run on the example inputs"):
        build(nn.Sequential(Kernel(9, 4)), X, customized_pruners={Kernel: KernelPruner()})
