"""Options that silently did something else: caps, rounding, ratios, state between pruners, and pruning nothing."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus as tp
from prunus.errors import InputError, NothingToPruneError
from prunus.pruner import linear_scheduler

IMAGE = torch.randn(2, 3, 8, 8)


def chain(*widths: int) -> Any:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for wide, narrow in zip((3, *widths), (*widths, 4), strict=True):
        layers += [nn.Conv2d(wide, narrow, 1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def widths_of(model: nn.Module) -> list[int]:
    return [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("global_pruning", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
def test_max_pruning_ratio_holds_after_every_step(global_pruning: bool, steps: int) -> None:
    """Also for a group of which nearly everything would go first."""
    model = chain(20, 20, 10)
    with torch.no_grad():
        model[0].weight *= 1e-4
    pruner = tp.pruner.MagnitudePruner(
        model,
        IMAGE,
        importance=tp.importance.MagnitudeImportance(normalizer=None),
        global_pruning=global_pruning,
        pruning_ratio=0.7,
        max_pruning_ratio=0.4,
        iterative_steps=steps,
    )
    for _ in range(steps):
        pruner.step()
        assert all(now >= 0.6 * was for now, was in zip(widths_of(model), (20, 20, 10), strict=False))
    assert widths_of(model)[0] == 12


def test_global_pruning_never_empties_a_layer() -> None:
    model = chain(16, 4, 16)
    with torch.no_grad():
        model[2].weight *= 1e-6
    tp.pruner.MagnitudePruner(
        model,
        IMAGE,
        importance=tp.importance.MagnitudeImportance(normalizer=None),
        global_pruning=True,
        pruning_ratio=0.8,
    ).step()
    assert min(widths_of(model)) >= 1
    assert model(IMAGE).shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    ("width", "round_to", "ratio", "expected"),
    [
        (16, 8, 0.4, 8),  # 9 are left: a multiple of 8
        (16, 8, 0.9, 8),  # 1 is left: not rounded to nothing
        (16, 4, 0.5, 8),
        (12, 8, 0.5, 8),  # 6 are left: one step is kept, the layer is not skipped
        (6, 8, 0.5, 6),  # narrower than the step: stays
        (64, 1, 0.5, 32),
    ],
)
def test_round_to_never_empties_and_never_skips(width: int, round_to: int, ratio: float, expected: int) -> None:
    model = chain(width, 32)
    tp.pruner.MagnitudePruner(model, IMAGE, pruning_ratio=ratio, round_to=round_to).step()
    assert widths_of(model)[0] == expected
    assert widths_of(model)[1] == max(round_to, int(32 * (1 - ratio) + 1e-9) // round_to * round_to)


def test_a_share_of_every_group_is_a_share_of_its_own_width() -> None:
    model = chain(10, 20, 30)
    tp.pruner.MagnitudePruner(model, IMAGE, pruning_ratio=0.2).step()
    assert widths_of(model) == [8, 16, 24, 4]


def test_a_ratio_dict_covers_blocks_and_tuples() -> None:
    model = nn.Sequential(chain(10, 10), nn.ReLU(), nn.Conv2d(4, 10, 1), nn.Conv2d(10, 10, 1), nn.Conv2d(10, 2, 1))
    tp.pruner.MagnitudePruner(
        model, IMAGE, pruning_ratio=0.1, pruning_ratio_dict={model[0]: 0.5, (model[2], model[3]): 0.3}
    ).step()
    assert widths_of(model) == [5, 5, 2, 7, 7, 2]


def test_the_output_protects_itself() -> None:
    """Nobody has to list the classifier: what the model returns keeps its size."""
    model = chain(8, 8)
    tp.pruner.MagnitudePruner(model, IMAGE, pruning_ratio=0.5).step()
    assert widths_of(model) == [4, 4, 4]


@pytest.mark.parametrize("given", [int, "no such layer", 3], ids=str)
def test_what_means_no_module_is_refused_not_dropped(given: Any) -> None:
    model = chain(8, 8)
    with pytest.raises(InputError, match="ignored_layers"):
        tp.pruner.MagnitudePruner(model, IMAGE, ignored_layers=[given])


def test_ignored_layers_by_tuple_set_or_generator() -> None:
    for wrap in (tuple, set, list, iter):
        model = chain(8, 8)
        tp.pruner.MagnitudePruner(model, IMAGE, pruning_ratio=0.5, ignored_layers=wrap([model[0]])).step()
        assert widths_of(model) == [8, 4, 4]


def test_two_pruners_share_nothing() -> None:
    """The second pruner, built with defaults, knows nothing of the first one's model, ratios or ignored layers."""
    first, second = chain(8, 8), chain(8, 8)
    one = tp.pruner.MagnitudePruner(
        first, IMAGE, pruning_ratio=0.5, pruning_ratio_dict={first[0]: 0.25}, ignored_layers=[first[2]]
    )
    two = tp.pruner.MagnitudePruner(second, IMAGE, pruning_ratio=0.5)
    one.step()
    assert widths_of(second) == [8, 8, 4]
    two.step()
    assert widths_of(first) == [6, 8, 4]
    assert widths_of(second) == [4, 4, 4]
    assert two.ignored_layers == []
    assert len(one.pruning_history()) == 1
    assert len(two.pruning_history()) == 1
    assert one.DG.alive is not two.DG.alive


@pytest.mark.parametrize(
    "face",
    [tp.pruner.BasePruner, tp.DependencyGraph.build_dependency, tp.DependencyGraph.get_all_groups, tp.prune, tp.verify],
    ids=lambda f: f.__name__,
)
def test_no_default_is_mutable(face: Any) -> None:
    for parameter in inspect.signature(face).parameters.values():
        assert not isinstance(parameter.default, (list, dict, set)), parameter


def test_two_graphs_of_one_model_share_nothing() -> None:
    model = chain(8, 8)
    one = tp.DependencyGraph().build_dependency(model, IMAGE)
    two = tp.DependencyGraph().build_dependency(model, IMAGE)
    one.get_pruning_group(model[0], tp.prune_conv_out_channels, [0]).prune()
    assert two.get_out_channels(model[0]) == 8
    with pytest.raises(tp.SurgeryError, match="build the graph again"):
        two.get_pruning_group(model[0], tp.prune_conv_out_channels, [0]).prune()
    assert widths_of(model) == [7, 8, 4]


def test_history_replays_on_a_fresh_model() -> None:
    """As data: through JSON, on a model that was built anew, without example inputs."""
    model = chain(12, 12)
    pruner = tp.pruner.MagnitudePruner(model, IMAGE, pruning_ratio=0.5, iterative_steps=3)
    for _ in range(3):
        pruner.step()
    history = [plan.to_json() for plan in pruner.pruning_history()]
    fresh = chain(12, 12)
    for text in history:
        tp.Plan.from_json(text).apply(fresh)
    assert widths_of(fresh) == widths_of(model) == [6, 6, 4]
    assert torch.equal(fresh(IMAGE), model(IMAGE))


def test_a_plan_of_another_model_is_refused() -> None:
    plan = tp.prune(chain(12, 12), IMAGE, tp.Target(ratio=0.5)).plan
    other = chain(12, 10)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(tp.SurgeryError):
        plan.apply(other)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_a_target_in_macs_is_met_not_a_ratio_of_channels() -> None:
    model = chain(32, 32, 32)
    result = tp.prune(model, IMAGE, tp.Target(macs=0.5))
    assert 0.4 < result.after.macs / result.before.macs <= 0.5
    model = chain(32, 32, 32)
    result = tp.prune(model, IMAGE, tp.Target(params=600))
    assert 400 < result.after.params <= 600


def test_nothing_to_prune_is_an_error_that_says_why() -> None:
    """Of all layers that were frozen, ignored, or have one channel, the message names tensors and reasons."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(-1, 8))

    with pytest.raises(NothingToPruneError) as caught:
        tp.prune(Sized(), torch.zeros(1, 3))
    assert "a.weight" in str(caught.value)
    assert "number 8" in str(caught.value)
    with pytest.raises(NothingToPruneError):
        tp.pruner.MagnitudePruner(chain(1, 1), IMAGE)


def test_parameters_without_gradient_or_use_do_not_matter_to_scores() -> None:
    """Scores need no gradients, and a parameter that the forward never reads is no obstacle."""
    model = chain(8, 8)
    model.register_parameter("spare", nn.Parameter(torch.zeros(8)))
    model.register_parameter("none", None)
    model[0](IMAGE).sum().backward()  # gradients for one layer only
    tp.pruner.MagnitudePruner(model, IMAGE, pruning_ratio=0.5).step()
    assert widths_of(model) == [4, 4, 4]
    assert model.spare.shape == (8,)


def test_schedules_are_shares_of_the_start() -> None:
    assert linear_scheduler(0.5, 5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    model = chain(10, 10)
    pruner = tp.pruner.MagnitudePruner(
        model,
        IMAGE,
        pruning_ratio=0.8,
        iterative_steps=2,
        iterative_pruning_ratio_scheduler=lambda ratio, steps: [0.0, 0.5, ratio],
    )
    pruner.step()
    assert widths_of(model)[:2] == [5, 5]
    pruner.step()
    assert widths_of(model)[:2] == [2, 2]
