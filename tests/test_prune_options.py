"""What a user of `prune` says about some layers: shares, caps, widths and scopes, under ratios and under budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import prunus
from prunus import InputError, Target, TargetError
from prunus.allocation import ALLOCATIONS, Ladder, ladder, within
from prunus.coupling import Family
from prunus.selection import Policy, rank

X = torch.randn(1, 3, 12, 12)


class Two(nn.Module):
    """Two stages of two convolutions each, with a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(24, 32, 3), nn.ReLU(), nn.Conv2d(32, 40, 3), nn.ReLU())
        self.head = nn.Linear(40, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(x)).mean((2, 3)))


def widths(model: Two) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


Options = Callable[[Two], Mapping[str, Any]]

OPTIONS: dict[str, Options] = {
    "a module": lambda m: {"pruning_ratio_dict": {m.one: 0.25}},
    "a pattern": lambda m: {"pruning_ratio_dict": {"two.*": 0.75, "one.0": 0.0}},
    "a type": lambda m: {"pruning_ratio_dict": {nn.Conv2d: 0.3}},
    "a tuple that competes": lambda m: {"pruning_ratio_dict": {(m.one, m.two[0]): 0.4}, "global_pruning": True},
    "forms": lambda m: {"isomorphic": True},
    "a minimum": lambda m: {"min_width": 14},
    "minima": lambda m: {"min_width": {m.one: 15, "two.2": 30}},
    "caps": lambda m: {"max_pruning_ratio_dict": {m.one[2]: 0.1, "two.*": 0.25}},
    "rounding": lambda m: {"round_to": 8, "pruning_ratio_dict": {"two.0": 0.7}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_ratio_takes_what_the_pruner_takes(name: str) -> None:
    one, other = Two(), Two()
    prunus.prune(one, X, Target(ratio=0.5), ignored_layers=[one.head], **OPTIONS[name](one))
    pruner = prunus.pruner.BasePruner(other, X, pruning_ratio=0.5, ignored_layers=[other.head], **OPTIONS[name](other))
    pruner.step()
    assert widths(one) == widths(other) != [16, 24, 32, 40]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        (OPTIONS["a module"], lambda w: w[:2] == [12, 18] and w[2] < 32),
        (OPTIONS["a pattern"], lambda w: w[0] == 16 and w[2:] == [8, 10]),
        (OPTIONS["a minimum"], lambda w: min(w) >= 14),
        (OPTIONS["minima"], lambda w: w[0] >= 15 and w[1] >= 15 and w[3] >= 30 and w[2] < 32),
        (OPTIONS["caps"], lambda w: w[1] >= 22 and w[2] >= 24 and w[3] >= 30 and w[0] < 16),
    ],
    ids=["a module", "a pattern", "a minimum", "minima", "caps"],
)
def test_a_budget_is_met_within_what_was_said(options: Options, fits: Callable[[list[int]], bool]) -> None:
    model = Two()
    result = prunus.prune(model, X, Target(macs=0.6), ignored_layers=[model.head], **options(model))
    assert fits(widths(model)), widths(model)
    assert result.budget is not None
    assert result.after.macs <= 0.6 * result.before.macs
    assert result.after.macs >= 0.98 * 0.6 * result.before.macs or result.budget.note


def test_a_tuple_competes_for_its_own_share_under_a_budget() -> None:
    model = Two()
    with torch.no_grad():
        model.one[0].weight.mul_(1e-3)
    key = (model.one[0], model.one[2])
    options: dict[str, Any] = {"global_pruning": True, "importance": size_of}
    prunus.prune(model, X, Target(macs=0.5), pruning_ratio_dict={key: 0.3}, **options)
    found = widths(model)
    assert found[0] + found[1] == 28  # 70 % of 40
    assert found[0] < 8  # its channels are the smallest


def size_of(group: Any) -> torch.Tensor:
    return prunus.importance.MagnitudeImportance(group_reduction="first", normalizer=None)(group)  # type: ignore[return-value]


def test_minimum_widths_hold_after_heads_went_too() -> None:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 1, 4, 64, 160, num_classes=10).eval()
    options: dict[str, Any] = {"prune_num_heads": True, "head_pruning_ratio": 0.5, "min_width": {"*self_attention": 24}}
    prunus.prune(model, torch.randn(1, 3, 32, 32), Target(macs=0.5), **options)
    attention = model.encoder.layers[0].self_attention
    assert attention.num_heads == 2
    assert attention.num_heads * attention.head_dim >= 24


def test_what_the_caps_do_not_allow_is_refused_and_says_so(model_state: Any, states_equal: Any) -> None:
    model = Two()
    before = model_state(model)
    with pytest.raises(TargetError, match=r"max_pruning_ratio, min_width.* keeps \d+% of 4 groups"):
        prunus.prune(model, X, Target(macs=0.3), min_width=16, max_pruning_ratio_dict={"two.*": 0.1, "one.*": 0.2})
    with pytest.raises(TargetError, match="a share of its own keeps"):
        prunus.prune(model, X, Target(macs=0.3), pruning_ratio_dict={"one.*": 0.0, "two.*": 0.1})
    assert states_equal(before, model_state(model))


def ladders(*sizes: int, scores: np.ndarray | None = None) -> list[Ladder]:
    starts = np.cumsum([0, *sizes])
    scores = np.arange(starts[-1], dtype=float) if scores is None else scores
    found = []
    for k, (start, size) in enumerate(zip(starts[:-1], sizes, strict=True)):
        family = Family((np.arange(start, start + size),), coarse=False)
        ranking = rank(family, scores, np.ones(starts[-1], dtype=bool))
        found.append(ladder(k, ranking, scores, Policy(lambda f: None)))
    return found


def test_a_scope_for_each_family_is_uniform_and_one_for_all_is_global() -> None:
    some = ladders(4, 8, 5, scores=np.random.default_rng(0).random(17))
    alone = within(id)(some, {})
    assert all(np.array_equal(a, b) for a, b in zip(alone, ALLOCATIONS["uniform"](some, {}), strict=True))
    together, known = (np.concatenate(found(some, {})) for found in (within(lambda f: 0), ALLOCATIONS["global"]))
    assert np.array_equal(np.argsort(together, kind="stable"), np.argsort(known, kind="stable"))


def test_scopes_lose_the_same_share() -> None:
    some = ladders(10, 10, 20, 20)
    keys = within(lambda f: f.count)(some, {})
    for share in (0.25, 0.5):
        gone = [int(one.sizes[key <= share].sum()) for one, key in zip(some, keys, strict=True)]
        assert (gone[0] + gone[1], gone[2] + gone[3]) == (20 * share, 40 * share)
        assert gone[0] >= gone[1]  # scores rise


def test_forms_compete_under_a_budget() -> None:
    """The first two convolutions compete; the third, which linear layers read, loses the same share as both."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(),
        nn.Linear(16 * 36, 4),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
    prunus.prune(model, X, Target(macs=0.5), isomorphic=True, importance=size_of)
    first, second, third = (model[k].out_channels for k in (0, 2, 4))
    assert first < 8 < second == 16
    assert abs((first + second) / 32 - third / 16) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ratio_dict": {"three.*": 0.5}}, "three"),
        ({"pruning_ratio_dict": {"one.0": 1.0}}, "pruning_ratio_dict.*below 1"),
        ({"max_pruning_ratio_dict": {"one.0": 0.0}}, "max_pruning_ratio_dict.*above 0"),
        ({"max_pruning_ratio": 0.0}, "max_pruning_ratio=0.0"),
        ({"min_width": 0}, "min_width=0"),
        ({"min_width": {nn.Linear(2, 2): 4}}, "not part of the model"),
        ({"round_to": 0}, "round_to=0"),
        ({"isomorphic": True, "allocation": "greedy"}, "an allocation of its own"),
    ],
)
def test_what_means_nothing_is_refused(
    options: Mapping[str, Any], message: str, model_state: Any, states_equal: Any
) -> None:
    model = Two()
    before = model_state(model)
    for target in (Target(macs=0.5), Target(ratio=0.5)):
        with pytest.raises(InputError, match=message):
            prunus.prune(model, X, target, **options)
    assert states_equal(before, model_state(model))
