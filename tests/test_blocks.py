"""Whole blocks: found from the ops, proved (removal is silence), dropped, costed, saved, undone."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus.blocks.find import Search
from prunus.cost import count
from prunus.drops import Cut, Drop, cuts_then, drops_then, earlier_name, later_name
from prunus.tracing import call_model, tensors_in

PAGE = Path(__file__).parents[1] / "docs" / "depth.md"
X = torch.randn(2, 8)


class Residual(nn.Sequential):
    """x + f(x), the sum in its own code."""

    def forward(self, x):
        return x + super().forward(x)


def branch(width: int = 16) -> list[nn.Module]:
    return [nn.LayerNorm(width), nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, width)]


def stack(depth: int = 4, width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), *(Residual(*branch(width)) for _ in range(depth)), nn.Linear(width, 3))


class Around(nn.Module):
    """The code around the children adds, and may look at where they stand."""

    def __init__(self, children: Any, step: Any, **attributes: Any) -> None:
        super().__init__()
        self.inlet, self.layers, self.outlet = nn.Linear(8, 16), nn.ModuleList(children), nn.Linear(16, 3)
        self.step = step
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.outlet(self.step(self, self.inlet(x)))


def results(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return [t.clone() for t in tensors_in(call_model(model.eval(), inputs)) if t.is_floating_point()]


def names(blocks: Any) -> list[str]:
    return [block.name for block in blocks if block.droppable]


def reasons(blocks: Any) -> dict[str, str]:
    return {block.name: block.reason for block in blocks if not block.droppable}


def check_dropping(model: nn.Module, inputs: Any, model_state: Any, states_equal: Any) -> list[prunus.Block]:
    """Dropping is what the plan says, for the least important block and for all of them; undo restores every bit."""
    model.eval()
    dense, before, order = results(model, inputs), model_state(model), [name for name, _ in model.named_modules()]
    search = Search(model, inputs)
    blocks = search.blocks()
    assert states_equal(before, model_state(model)), "looking for blocks changed the model"
    free = [block for block in blocks if block.droppable]
    for chosen in ([block] for block in free):
        silent, _ = search.prover.silent([block.shape for block in chosen])
        copied, whole = copy.deepcopy(model), count(model, inputs)
        result = prunus.drop_blocks(model, inputs, blocks=chosen)
        left = results(model, inputs)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(silent, left, strict=True))
        after = count(model, inputs)
        assert (result.before.macs, result.before.params) == (whole.macs, whole.params)
        assert (result.after.macs, result.after.params) == (after.macs, after.params)
        prunus.Plan.from_json(result.plan.to_json()).apply(copied)
        assert all(torch.equal(a, b) for a, b in zip(left, results(copied, inputs), strict=True))
        result.undo()
        assert states_equal(before, model_state(model))
        assert [name for name, _ in model.named_modules()] == order
        assert all(torch.equal(a, b) for a, b in zip(dense, results(model, inputs), strict=True))
    return blocks


# -- what is a block -------------------------------------------------------------------------------------------------


def test_children_that_add_to_their_input_are_blocks(model_state, states_equal) -> None:
    blocks = check_dropping(stack(), X, model_state, states_equal)
    assert names(blocks) == ["1", "2", "3", "4"] and not reasons(blocks)
    assert blocks[0].params == 16 * 2 + 16 * 24 + 24 + 24 * 16 + 16 and blocks[0].macs == 2 * 2 * 16 * 24
    assert blocks[0].branches == ("1.3",)


def test_children_that_the_code_around_adds_are_blocks(model_state, states_equal) -> None:
    def step(net, x):
        for layer in net.layers:
            x = x + 0.5 * layer(x)
        return x

    model = Around([nn.Sequential(*branch()) for _ in range(3)], step)
    assert names(check_dropping(model, X, model_state, states_equal)) == ["layers.0", "layers.1", "layers.2"]


def test_pairs_of_children_go_together(model_state, states_equal) -> None:
    def step(net, x):
        for one, other in net.layers:
            x = one(x) + x
            x += other(x)
        return x

    pairs = [nn.ModuleList([nn.Sequential(*branch()), nn.Sequential(*branch())]) for _ in range(3)]
    blocks = check_dropping(Around(pairs, step), X, model_state, states_equal)
    assert names(blocks) == ["layers.0", "layers.1", "layers.2"] and not reasons(blocks)


def test_lists_that_are_run_through_in_step_go_together(model_state, states_equal) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inlet, self.outlet = nn.Linear(8, 16), nn.Linear(16, 3)
            self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
            self.ups = nn.ModuleList(nn.Linear(16, 24) for _ in range(3))
            self.downs = nn.ModuleList(nn.Linear(24, 16) for _ in range(3))

        def forward(self, x):
            x = self.inlet(x)
            for k in range(len(self.ups)):
                x = x + self.downs[k](self.ups[k](self.norms[k](x)).relu())
            return self.outlet(x)

    blocks = check_dropping(Net(), X, model_state, states_equal)
    assert [block.parts[0] for block in blocks] == ["downs.0", "downs.1", "downs.2"] and not reasons(blocks)
    assert set(blocks[1].parts) == {"norms.1", "ups.1", "downs.1"}
    assert blocks[1].params == 16 * 2 + 16 * 24 + 24 + 24 * 16 + 16


def test_layer_scale_and_two_branches(model_state, states_equal) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Sequential(*branch()), nn.Sequential(*branch())
            self.gamma = nn.Parameter(torch.full((16,), 1e-6))

        def forward(self, x, mask=None):
            x = x + self.gamma * self.one(x)
            return (torch.add(self.two(x), x), None)

    def step(net, x):
        for layer in net.layers:
            x = layer(x)[0]
        return x

    blocks = check_dropping(Around([Layer() for _ in range(3)], step), X, model_state, states_equal)
    assert names(blocks) == ["layers.0", "layers.1", "layers.2"]
    assert blocks[0].branches == ("layers.0.one.3", "layers.0.two.3")


def test_a_norm_after_the_sum_goes_too(model_state, states_equal) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm = nn.Sequential(nn.Linear(16, 16), nn.GELU()), nn.LayerNorm(16)

        def forward(self, x):
            return self.norm(x + self.body(x))

    model = nn.Sequential(nn.Linear(8, 16), Layer(), Layer(), nn.Linear(16, 2))
    blocks = check_dropping(model, X, model_state, states_equal)
    assert names(blocks) == ["1", "2"] and all(block.post_norm for block in blocks)
    assert not any(block.post_norm for block in prunus.find_blocks(stack(), X))


class Basic(nn.Module):
    """A block of a residual network: a rectifier after the sum (or before the branch, in place)."""

    def __init__(self, before: int, after: int, stride: int = 1, first: bool = False) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(before, after, 3, stride, 1), nn.Conv2d(after, after, 3, 1, 1)
        self.norm, self.first = nn.BatchNorm2d(after), first
        self.down = nn.Conv2d(before, after, 1, stride) if before != after else nn.Identity()

    def forward(self, x):
        if self.first:
            x = nn.functional.relu(x, inplace=True)
        y = self.norm(self.two(self.one(x).relu()))
        y += self.down(x)
        return y if self.first else y.relu_()


def residual_network(**options: Any) -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    body = nn.Sequential(Basic(8, 8, **options), Basic(8, 8, **options), Basic(8, 12, 2, **options), Basic(12, 12))
    return nn.Sequential(OrderedDict(stem=stem, body=body, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))


def test_a_rectifier_after_the_sum_is_no_obstacle_where_nothing_is_negative(model_state, states_equal) -> None:
    x = torch.randn(2, 3, 8, 8)
    assert names(check_dropping(residual_network(), x, model_state, states_equal)) == ["body.0", "body.1", "body.3"]


def test_a_rectifier_that_changes_the_stream_is_an_obstacle() -> None:
    model = residual_network(first=True)
    model.stem = nn.Conv2d(3, 8, 3, padding=1)  # may be negative
    found = prunus.find_blocks(model, torch.randn(2, 3, 8, 8))
    assert "relu" in reasons(found)["body.0"] and "more to its input than add to it" in reasons(found)["body.0"]


def test_networks_without_a_stream_have_no_blocks() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GELU())
    x = torch.randn(1, 3, 8, 8)
    assert prunus.find_blocks(plain, x) == []
    with pytest.raises(prunus.NothingToPruneError, match="nothing is added to a stream"):
        prunus.drop_blocks(plain, x, count=1)


# -- what stays, and why ---------------------------------------------------------------------------------------------


class Split(nn.Module):
    """Outputs of all children are put side by side, as in C2f."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.m = nn.Conv2d(3, 8, 1), nn.ModuleList(Basic(4, 4) for _ in range(2))
        self.two = nn.Conv2d(16, 6, 1)

    def forward(self, x):
        y = list(self.one(x).relu().chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.two(torch.cat(y, 1))


class SplitOtherwise(Split):
    """The same, where no convolution alone reads what is side by side, or where it is grouped."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.three = how, nn.Linear(16, 6)
        if how == "grouped":
            self.two = nn.Conv2d(16, 6, 1, groups=2)

    def forward(self, x):
        y = list(self.one(x).relu().chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        y = torch.cat([y[-1], *y] if self.how == "repeated" else y, 1)
        if self.how == "linear":
            return self.three(y.mean((2, 3)))
        if self.how == "repeated":
            return nn.functional.conv2d(y, self.two.weight.repeat(1, 2, 1, 1)[:, :20])
        return (self.two(y), y) if self.how == "returned" else self.two(y)


@pytest.mark.parametrize("how", ["grouped", "linear", "repeated", "returned"])
def test_outputs_that_are_put_side_by_side_stay(how) -> None:
    found = prunus.find_blocks(SplitOtherwise(how), torch.randn(1, 3, 8, 8))
    assert {"m.1"} <= set(reasons(found)) and not names(found)
    assert all("beside its input (cat)" in reason for reason in reasons(found).values())


@pytest.mark.parametrize("gone", [["m.0"], ["m.1"], ["m.0", "m.1"]])
def test_a_convolution_reads_once_what_would_stand_side_by_side_twice(gone, tmp_path) -> None:
    """Its weights for both are added: the outputs are those of a model in which the block passes its input on."""
    model, x = Split().eval(), torch.randn(2, 3, 8, 8)
    silent, dense = copy.deepcopy(model), model(x)
    for path in gone:
        silent.m[int(path[-1])] = nn.Identity()
    result = prunus.drop_blocks(model, x, blocks=gone)
    assert model.two.weight.shape[1] == model.two.in_channels == 16 - 4 * len(gone)
    assert torch.allclose(model(x), silent(x), atol=1e-5)
    cost = prunus.cost.count(model, x)
    assert (result.after.macs, result.after.params) == (cost.macs, cost.params)
    narrow = prunus.prune(model, x, prunus.Target(ratio=0.5))
    both, expected = result.plan.then(narrow.plan), model(x)
    narrow.undo()
    result.undo()
    assert torch.equal(model(x), dense)
    both.save(tmp_path / "plan.json")
    prunus.Plan.load(tmp_path / "plan.json").apply(model)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_sums_in_code_that_no_container_holds_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.one(x)
            return x + self.two(x.relu())

    (block,) = prunus.find_blocks(Net(), X)
    assert not block.droppable and "no container holds it" in block.reason and block.branches == ("two",)


def test_a_child_that_runs_twice_or_hangs_twice_stays() -> None:
    layer = Residual(*branch())

    def step(net, x):
        for layer in (*net.layers, *net.layers):
            x = layer(x)
        return x

    assert "runs 2 times" in reasons(prunus.find_blocks(Around([Residual(*branch())], step), X))["layers.0"]
    twice = Around([layer], lambda net, x: net.layers[0](x), other=layer)
    assert "it is also " in next(iter(reasons(prunus.find_blocks(twice, X)).values()))


def test_a_child_that_gives_others_something_stays() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.bias = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x, shared=None):
            shared = self.bias(x).tanh() if shared is None else shared
            return x + self.body(x) * shared, shared

    def step(net, x):
        shared = None
        for layer in net.layers:
            x, shared = layer(x, shared)
        return x

    found = prunus.find_blocks(Around([Layer() for _ in range(3)], step), X)
    assert names(found) == ["layers.1", "layers.2"]
    assert "layers.1 reads something else that it computes (mul)" in reasons(found)["layers.0"]


def test_code_that_counts_on_the_place_of_a_child_is_found_out(model_state, states_equal) -> None:
    def by_place(net, x):
        for k, layer in enumerate(net.layers):
            x = layer(x) if k else layer(x) * 0.5
        return x

    def by_name(net, x):
        return net.layers[2](net.layers[1](net.layers[0](x)))

    def by_count(net, x):
        for k in range(net.num_layers):
            x = net.layers[k](x)
        return x

    layers = [Residual(*branch()) for _ in range(4)]
    assert names(check_dropping(Around(layers, by_place), X, model_state, states_equal)) == [
        "layers.1",
        "layers.2",
        "layers.3",
    ]
    assert "removal is not silence" in reasons(prunus.find_blocks(Around(layers, by_place), X))["layers.0"]
    model = Around(layers[:3], by_name)
    before = model_state(model)
    assert all("does not run without it (IndexError" in r for r in reasons(prunus.find_blocks(model, X)).values())
    assert states_equal(before, model_state(model))
    model = Around(layers, by_count, num_layers=4)
    assert len(names(check_dropping(model, X, model_state, states_equal))) == 4
    prunus.drop_blocks(model, X, count=3)
    assert model.num_layers == len(model.layers) == 1


def test_own_numbers_of_children_count_up_again(model_state, states_equal) -> None:
    class Layer(nn.Module):
        def __init__(self, k: int, scaled: bool) -> None:
            super().__init__()
            self.body, self.scaled = nn.Linear(16, 16), scaled
            self.body.layer_idx = k + 5

        def forward(self, x):
            return x + self.body(x) / (self.body.layer_idx if self.scaled else 1)

    def step(net, x):
        for layer in net.layers:
            x = layer(x)
        return x

    model = Around([Layer(k, False) for k in range(4)], step)
    assert len(names(check_dropping(model, X, model_state, states_equal))) == 4
    prunus.drop_blocks(model, X, blocks=["layers.1", "layers.2"])
    assert [layer.body.layer_idx for layer in model.layers] == [5, 6]
    scaled = Around([Layer(k, True) for k in range(4)], step)
    assert names(prunus.find_blocks(scaled, X)) == ["layers.3"]  # others would change the numbers of those after them


def test_a_layer_scale_of_nearly_nothing_hides_nothing() -> None:
    class Layer(nn.Module):
        def __init__(self, k: int) -> None:
            super().__init__()
            self.body, self.gamma, self.idx = nn.Linear(16, 16), nn.Parameter(torch.zeros(16)), k

        def forward(self, x):
            return x + self.gamma * self.body(x) * (1 + self.idx)

    model = nn.Sequential(nn.Linear(8, 16), *(Layer(k) for k in range(3)))
    assert names(prunus.find_blocks(model, X)) == ["3"]


def test_what_the_model_returns_of_each_child_keeps_it() -> None:
    def step(net, x):
        net.seen = []
        for layer in net.layers:
            x = layer(x)
            net.seen.append(x)
        return x

    class Telling(Around):
        def forward(self, x):
            out = super().forward(x)
            return out, self.seen

    found = prunus.find_blocks(Telling([Residual(*branch()) for _ in range(2)], step), X)
    assert all("returns 2 tensors without it, and 3" in reason for reason in reasons(found).values())


def test_what_cannot_be_run_is_refused() -> None:
    with pytest.raises(prunus.InputError, match="cannot run on the example inputs"):
        prunus.find_blocks(stack(), torch.randn(2, 9))
    with torch.device("meta"):
        empty = stack()
    with pytest.raises(prunus.InputError, match="meta device"):
        prunus.find_blocks(empty, torch.randn(2, 8))


# -- choosing --------------------------------------------------------------------------------------------------------


def streams(model: nn.Sequential, x: torch.Tensor) -> list[torch.Tensor]:
    found = [x]
    for child in model.eval():
        found.append(child(found[-1]))
    return found


def test_scores_are_what_the_papers_say() -> None:
    model = stack()
    with torch.no_grad():
        steps = [*pairwise(streams(model, X))][1:-1]
        cosines = [nn.functional.cosine_similarity(a, b, dim=-1) for a, b in steps]
        lengths = [(b - a).norm(dim=-1) / a.norm(dim=-1) for a, b in steps]
    found = prunus.find_blocks(model, X)
    for block, cosine, length in zip(found, cosines, lengths, strict=True):
        assert block.influence == pytest.approx(1 - float(cosine.mean()), abs=1e-6)
        assert block.change == pytest.approx(float(length.mean()), rel=1e-5)


def test_the_least_important_blocks_go() -> None:
    model = stack()
    found = prunus.find_blocks(model, X)
    expected = {block.name for block in sorted(found, key=lambda block: block.influence)[:2]}
    result = prunus.drop_blocks(model, X, count=2)
    assert set(result.dropped) == expected and len(model) == 4
    assert [line for line in str(result).splitlines() if "dropped" in line].__len__() == 2
    result.undo()
    weights = {"1": 3.0, "2": 1.0, "3": 2.0, "4": 4.0}
    result = prunus.drop_blocks(model, X, count=2, importance=lambda block, before, after: weights[block.name])
    assert set(result.dropped) == {"2", "3"} and result.scores == weights


def test_outputs_and_data_as_score() -> None:
    model = stack()
    batches = [torch.randn(4, 8), torch.randn(2, 8)]
    result = prunus.drop_blocks(model, X, count=1, importance="outputs", data=batches)
    result.undo()
    for name, score in result.scores.items():
        moved = []
        for batch in batches:
            dense = results(model, batch)[0]
            copied = copy.deepcopy(model)
            prunus.drop_blocks(copied, X, blocks=[name])
            moved.append(float((results(copied, batch)[0] - dense).norm() / dense.norm()))
        assert score == pytest.approx(sum(moved) / 2, rel=1e-4)


def test_targets() -> None:
    model = stack(5)
    result = prunus.drop_blocks(model, X, target=prunus.Target(params=0.5))
    assert result.after.params <= result.before.params / 2 and len(result.dropped) == 3
    result.undo()
    result = prunus.drop_blocks(model, X, target=prunus.Target(ratio=0.4))
    assert len(result.dropped) == 2
    result.undo()
    with pytest.raises(prunus.TargetError, match="cannot be met"):
        prunus.drop_blocks(model, X, target=prunus.Target(macs=0.01))
    with pytest.raises(prunus.TargetError, match="only 5"):
        prunus.drop_blocks(model, X, count=6)
    assert len(model) == 7


def test_wrong_requests_change_nothing(model_state, states_equal) -> None:
    model = Around([Residual(*branch()), nn.Linear(16, 16)], lambda net, x: net.layers[1](net.layers[0](x)))
    before = model_state(model)
    for options, words in (
        ({}, "give count="),
        ({"count": 1, "target": prunus.Target(macs=0.5)}, "give count="),
        ({"count": 0}, "positive int"),
        ({"count": True}, "positive int"),
        ({"count": 1, "importance": "best"}, "pass a function or one of"),
        ({"blocks": ["nothing.*"]}, "nothing"),
        ({"blocks": [3]}, "blocks holds 3"),
        ({"blocks": ["layers.0"]}, "layers.0 stays"),
        ({"count": 1, "importance": lambda *_: float("nan")}, "no number"),
    ):
        with pytest.raises(prunus.InputError, match=re.escape(words)):
            prunus.drop_blocks(stack() if "importance" in options else model, X, **options)
    assert states_equal(before, model_state(model))


# -- plans -----------------------------------------------------------------------------------------------------------


def test_names_before_and_after() -> None:
    drops = (Drop("a", ("1",), (("0", "0"), ("2", "1"))), Drop("a.2.b", ("0",), (("1", "0"),)))
    assert later_name(drops, "a.2.b.1.weight") == "a.1.b.0.weight"
    assert earlier_name(drops, "a.1.b.0.weight") == "a.2.b.1.weight"
    assert later_name(drops, "a.1.weight") is None and later_name(drops, "c.1") == "c.1"
    second = (Drop("a", ("1",), (("0", "0"),)),)
    assert drops_then(drops[:1], second) == (Drop("a", ("1", "2"), (("0", "0"),)),)
    assert cuts_then([Cut("", "l", 4, (1,))], [Cut("", "l", 3, (1,))]) == (Cut("", "l", 4, (1, 2)),)
    with pytest.raises(prunus.SurgeryError):
        drops_then(drops[:1], (Drop("a", ("5",), (("0", "0"),)),))
    with pytest.raises(prunus.SurgeryError):
        cuts_then([Cut("", "l", 4, (1,))], [Cut("", "l", 4, (1,))])


def test_plans_of_blocks_and_of_channels_are_one_plan(model_state, states_equal) -> None:
    model = stack().eval()
    copied, before = copy.deepcopy(model), model_state(model)
    first = prunus.drop_blocks(model, X, blocks=["2"])
    second = prunus.prune(model, X, prunus.Target(ratio=0.5))
    third = prunus.drop_blocks(model, X, blocks=["2"])  # it was number 3
    plan = first.plan.then(second.plan).then(third.plan)
    assert plan.after == third.after and plan.before == first.before
    receipt = prunus.Plan.from_json(plan.to_json()).apply(copied)
    assert torch.equal(results(model, X)[0], results(copied, X)[0])
    assert states_equal(model_state(model), model_state(copied))
    assert "1" in str(plan) and len(plan) == len(plan.removals) + 1
    receipt.undo()
    assert states_equal(before, model_state(copied))
    for result in (third, second, first):
        result.undo()
    assert states_equal(before, model_state(model))


def test_a_plan_for_another_model_changes_nothing(model_state, states_equal) -> None:
    plan = prunus.drop_blocks(stack(), X, count=1).plan
    for other, words in ((stack(5), "children"), (nn.ModuleDict({"a": nn.Linear(2, 2)}), "children")):
        before = model_state(other)
        with pytest.raises(prunus.SurgeryError, match=words):
            plan.apply(other)
        assert states_equal(before, model_state(other))


def test_an_optimizer_lets_go(model_state) -> None:
    model = stack()
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    many, state = len(optimizer.param_groups[0]["params"]), set(optimizer.state)
    result = prunus.drop_blocks(model, X, count=1, optimizer=optimizer)
    assert len(optimizer.param_groups[0]["params"]) == many - 6 == len(list(model.parameters())) == len(optimizer.state)
    model(X).sum().backward()
    optimizer.step()
    result.undo()
    assert len(optimizer.param_groups[0]["params"]) == many and set(optimizer.state) == state


def test_names_that_count_up_go_on_counting_up() -> None:
    layers = nn.Sequential(OrderedDict((f"layer_{k + 1}", Residual(*branch())) for k in range(3)))
    model = nn.Sequential(nn.Linear(8, 16), layers)
    result = prunus.drop_blocks(model, X, blocks=["1.layer_2"])
    assert list(layers._modules) == ["layer_1", "layer_2"]
    result.undo()
    assert list(layers._modules) == ["layer_1", "layer_2", "layer_3"]
    named = nn.Sequential(OrderedDict(a=nn.Linear(8, 16), b=Residual(*branch()), c=nn.Linear(16, 2)))
    prunus.drop_blocks(named, X, blocks=["b"])
    assert list(named._modules) == ["a", "c"]


class Config:
    """Says how many layers there are, in two numbers of which only one counts; the first layer has a bias."""

    def __init__(self) -> None:
        self.num_hidden_layers, self.block_size, self.layer_kinds = 3, 3, ["a", "b", "c"]


class Configured(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        layers = (Residual(nn.Linear(16, 16, bias=k == 0)) for k in range(config.num_hidden_layers))
        self.inlet, self.layers = nn.Linear(8, 16), nn.ModuleList(layers)

    def forward(self, x):
        x = self.inlet(x)
        for kind, layer in zip(self.config.layer_kinds, self.layers, strict=True):
            x = layer(x) + (1 if kind == "z" else 0)
        return x


def test_a_number_in_a_configuration_counts_if_it_builds_the_cut_model() -> None:
    model = Configured(Config()).eval()
    result = prunus.drop_blocks(model, X, blocks=["layers.1"])
    config = model.config
    assert (config.num_hidden_layers, config.block_size, config.layer_kinds) == (2, 3, ["a", "c"])
    assert not result.plan.notes
    Configured(config).load_state_dict(model.state_dict())
    result.undo()
    assert (config.num_hidden_layers, config.layer_kinds) == (3, ["a", "b", "c"])
    result = prunus.drop_blocks(model, X, blocks=["layers.0"])  # the new first layer has no bias
    assert "the configuration cannot say which children of layers are left" in result.plan.notes[0]
    assert "which children" in str(result)


# -- generated networks ----------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """One layer of a generated network: what it adds, and how."""

    def __init__(self, kind: str, width: int, k: int) -> None:
        super().__init__()
        self.kind, self.place = kind, k
        self.norm, self.one, self.two = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x):
        y = self.two(self.one(self.norm(x)).relu())
        if self.kind == "two":
            x = x + y
            y = self.one(x).tanh()
        if self.kind == "inplace":
            y += x
        sums = {
            "pre": lambda: x + y,
            "scaled": lambda: self.gamma * y + x,
            "two": lambda: x + y,
            "post": lambda: self.norm(x + y),
            "inplace": lambda: y,
            "moved": lambda: (x.unsqueeze(1).transpose(0, 1) + y.unsqueeze(0)).squeeze(0),
            "gated": lambda: x * self.one(x).sigmoid() + y,
            "scaled stream": lambda: x * 0.5 + y,
            "plain": lambda: y,
        }
        return sums[self.kind]()


BLOCKS = ("pre", "scaled", "two", "post", "inplace", "moved")
OTHERS = ("gated", "scaled stream", "plain")


@given(
    kinds=st.lists(st.sampled_from(BLOCKS + OTHERS), min_size=1, max_size=6),
    inside=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_generated_stacks(kinds: list[str], inside: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layers = [Layer(kind, 6, k) for k, kind in enumerate(kinds)]
    model = nn.Sequential(nn.Linear(8, 6), *([nn.Sequential(*layers)] if inside else layers), nn.Linear(6, 2)).eval()
    first = "1." if inside else ""
    offset = 0 if inside else 1
    found = prunus.find_blocks(model, X)
    assert names(found) == [f"{first}{k + offset}" for k, kind in enumerate(kinds) if kind in BLOCKS]
    if not names(found):
        return
    before, cost = results(model, X)[0], count(model, X)
    result = prunus.drop_blocks(model, X, count=1 + seed % len(names(found)))
    gone = {int(name.rpartition(".")[2]) - offset for name in result.dropped}
    rest = [model[0], *(layer for k, layer in enumerate(layers) if k not in gone), model[-1]]
    assert torch.equal(results(model, X)[0], results(nn.Sequential(*rest), X)[0])
    now = count(model, X)
    assert (result.before.macs, result.after.macs, result.after.params) == (cost.macs, now.macs, now.params)
    result.undo()
    assert torch.equal(results(model, X)[0], before)


# -- real networks ---------------------------------------------------------------------------------------------------


def test_networks_of_torchvision_load_again() -> None:
    models = pytest.importorskip("torchvision.models")
    resnet = models.ResNet(models.resnet.BasicBlock, [2, 3, 3, 1], 10).eval()
    x = torch.randn(1, 3, 32, 32)
    found = prunus.find_blocks(resnet, x)
    assert names(found) == ["layer1.0", "layer1.1", "layer2.1", "layer2.2", "layer3.1", "layer3.2"]
    assert not reasons(found)  # what changes the width adds nothing to its input
    prunus.drop_blocks(resnet, x, blocks=["layer3.1", "layer1.0"])
    stock = models.ResNet(models.resnet.BasicBlock, [1, 3, 2, 1], 10).eval()
    stock.load_state_dict(resnet.state_dict())
    assert torch.equal(stock(x), resnet(x))


def test_mobile_networks_of_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    model, x = models.mobilenet_v3_small(num_classes=10).eval(), torch.randn(1, 3, 32, 32)
    before = results(model, x)[0]
    result = prunus.drop_blocks(model, x, count=3)
    assert len(result.scores) == 6 and len(result.dropped) == 3
    result.undo()
    assert torch.equal(results(model, x)[0], before)


def transformer(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    found = pytest.importorskip("transformers")
    small = {
        "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 60,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    ids = torch.randint(3, 60, (2, 7))
    if name == "t5":
        config = found.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=4, num_heads=2, vocab_size=60)
        return found.T5ForConditionalGeneration(config).eval(), {"input_ids": ids, "decoder_input_ids": ids}
    if name == "gpt2":
        config = found.GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=60, bos_token_id=1, eos_token_id=2)
        return found.GPT2LMHeadModel(config).eval(), {"input_ids": ids}
    if name == "bert":
        return found.BertModel(found.BertConfig(**small)).eval(), {"input_ids": ids}
    family = {"llama": "Llama", "gemma2": "Gemma2"}[name]
    config = getattr(found, f"{family}Config")(**small, num_key_value_heads=2, head_dim=8)
    return getattr(found, f"{family}ForCausalLM")(config).eval(), {"input_ids": ids}


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gemma2", "t5"])
def test_transformers_load_again_and_generate(name: str, tmp_path, model_state, states_equal) -> None:
    model, inputs = transformer(name)
    before, config = model_state(model), model.config.to_dict()
    saved = {"architectures": None, "dtype": None}  # what saving writes
    result = prunus.drop_blocks(model, inputs, count=2, importance=lambda block, x, y: -float(block.name[-1]) % 3)
    assert len(result.dropped) == 2 and not result.plan.notes
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for a, b in zip(results(model, inputs), results(again, inputs), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    if name in {"llama", "gpt2", "gemma2"}:
        ask = {"max_new_tokens": 4, "do_sample": False, "input_ids": inputs["input_ids"]}
        assert torch.equal(model.generate(**ask), model.generate(**ask, use_cache=False))
    result.undo()
    assert states_equal(before, model_state(model)) and {**model.config.to_dict(), **saved} == {**config, **saved}


def test_what_a_block_of_a_transformer_gives_to_others_keeps_it() -> None:
    model, inputs = transformer("t5")
    found = prunus.find_blocks(model, inputs)
    assert set(reasons(found)) == {"encoder.block.0", "decoder.block.0"}  # they compute the biases of positions
    assert len(names(found)) == 6


def test_detectors(monkeypatch) -> None:
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    x = torch.randn(1, 3, 64, 64)
    found = prunus.find_blocks(tasks.DetectionModel("yolov8n.yaml", verbose=False).eval(), x)
    assert len(found) == len(names(found)) == 6  # bottlenecks of C2f, whose outputs are put side by side
    result = prunus.drop_blocks(tasks.DetectionModel("yolov5n.yaml", verbose=False).eval(), x, count=2)
    assert len(result.dropped) == 2


def test_the_page_of_depth_runs(tmp_path, monkeypatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], PAGE.name, "exec"), namespace)
    assert len(blocks) >= 4
