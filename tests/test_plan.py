"""Plans: removals as data."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import prunus
from prunus.cost import count
from prunus.plan import Footprint, Plan, Removal, Setting

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    """A small convolutional network with a residual and a classifier."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.a = nn.Conv2d(8, 12, 3, padding=1)
            self.norm = nn.BatchNorm2d(12)
            self.b = nn.Conv2d(12, 8, 1)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.head((x + self.b(self.norm(self.a(x)).relu())).mean((2, 3)))

    torch.manual_seed(0)
    return Small().eval()


def test_json_round_trip() -> None:
    """What is written is read back equal."""
    plan = prunus.prune(network(), X, prunus.Target(ratio=0.5)).plan
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()


def test_save_and_load_then_replay_on_a_copy(tmp_path) -> None:
    """A loaded plan on a copy of the dense model gives the same outputs, bit for bit."""
    model = network()
    dense = copy.deepcopy(model)
    prunus.prune(model, X, prunus.Target(macs=0.5)).plan.save(tmp_path / "plan.json")
    Plan.load(tmp_path / "plan.json").apply(dense)
    with torch.no_grad():
        assert torch.equal(model(X), dense(X))


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"format": 99}', '{"format": 1, "removals": [{}]}', "not json"]
)
def test_what_is_no_plan_is_refused(text) -> None:
    """Any other text is an InputError that says so."""
    with pytest.raises(prunus.InputError, match="not a plan"):
        Plan.from_json(text)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("budget", ["macs", "params"])
def test_cost_is_the_counted_cost(share, budget) -> None:
    """The plan's MACs and parameters, computed without the model, are those counted after surgery."""
    model = network()
    before = count(model, X)
    plan = prunus.prune(model, X, prunus.Target(**{budget: share})).plan
    after = count(model, X)
    assert (plan.before.macs, plan.before.params) == (before.macs, before.params)
    assert (plan.after.macs, plan.after.params) == (after.macs, after.params)
    assert getattr(plan.after, budget) <= share * getattr(plan.before, budget)
    assert plan.after.bytes == sum(p.numel() * p.element_size() for p in model.parameters())


def test_then_equals_both() -> None:
    """One merged plan does what two plans do one after the other."""
    model = network()
    one, merged = copy.deepcopy(model), copy.deepcopy(model)
    first = prunus.prune(one, X, prunus.Target(ratio=0.25)).plan
    second = prunus.prune(one, X, prunus.Target(ratio=0.5)).plan
    both = first.then(second)
    assert both.before == first.before
    assert both.after == second.after
    both.apply(merged)
    with torch.no_grad():
        assert torch.equal(one(X), merged(X))
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (one, merged)]
    assert shapes[0] == shapes[1]


def test_then_refuses_plans_that_do_not_follow() -> None:
    """A second plan for other sizes is refused with the tensor's name."""
    nothing = Footprint(0, 0, 0)
    first = Plan((Removal("a.weight", 0, 8, (0, 1)),), (), nothing, nothing)
    with pytest.raises(prunus.SurgeryError, match=r"a\.weight dim 0: the first plan leaves 6, the second needs 8"):
        first.then(first)


def test_then_counts_positions_of_the_dense_model() -> None:
    """Positions of the second plan are counted in what the first one left; later settings win."""
    nothing = Footprint(0, 0, 0)
    first = Plan((Removal("w", 0, 6, (1, 3)),), (Setting("", "c", None, 4),), nothing, nothing)
    second = Plan(
        (Removal("w", 0, 4, (1, 3)), Removal("v", 1, 5, (0,))), (Setting("", "c", None, 2),), nothing, nothing
    )
    both = first.then(second)
    assert both.removals == (Removal("w", 0, 6, (1, 2, 3, 5)), Removal("v", 1, 5, (0,)))
    assert both.settings == (Setting("", "c", None, 2),)


def test_plan_prints_what_it_does() -> None:
    """Every removal is one line, after the totals."""
    plan = prunus.prune(network(), X, prunus.Target(ratio=0.5)).plan
    lines = str(plan).splitlines()
    assert lines[0].startswith("Plan: MACs ")
    assert "  stem.weight dim 0: 8 -> 4" in lines
    assert len(lines) == 1 + len(plan.removals) + len(plan.settings)
    assert len(plan) == len(plan.removals)


def test_facts_are_set_on_replay() -> None:
    """An attribute that equals a width by construction follows the width, also when a saved plan is replayed."""
    model = network()
    model.width = 8
    dense = copy.deepcopy(model)
    facts = [prunus.Fact(module=model, attribute="width", parameter="stem.weight", dim=0)]
    plan = prunus.prune(model, X, prunus.Target(ratio=0.5), facts=facts).plan
    assert model.width == 4
    assert type(model.width) is int
    Plan.from_json(plan.to_json()).apply(dense)
    assert dense.width == 4


def test_fact_about_a_foreign_module_is_refused() -> None:
    """A fact that names a module outside the model is an InputError, and nothing changes."""
    model = network()
    facts = [prunus.Fact(module=nn.Linear(2, 2), attribute="out_features", parameter="weight", dim=0)]
    with pytest.raises(prunus.InputError, match="not in the model"):
        prunus.prune(model, X, facts=facts)
    assert model.stem.weight.shape[0] == 8
