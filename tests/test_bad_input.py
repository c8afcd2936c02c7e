"""Bad input: one clear error before anything changes, from every face that takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import prunus
from prunus import InputError, NothingToPruneError, Target, TargetError

X = torch.randn(2, 8)
NAN = float("nan")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))


def by_ratio(model: Any, inputs: Any = X, **options: Any) -> None:
    prunus.prune(model, inputs, Target(ratio=0.5), **options)


def by_budget(model: Any, inputs: Any = X, **options: Any) -> None:
    prunus.prune(model, inputs, Target(macs=0.5), **options)


def in_steps(model: Any, inputs: Any = X, **options: Any) -> None:
    prunus.pruner.BasePruner(model, inputs, **options).step()


def by_curves(model: Any, inputs: Any = X, **options: Any) -> None:
    prunus.sensitivity(model, inputs, lambda m: 1.0, **options)


PRUNE = (by_ratio, by_budget)
RATIOS = (*PRUNE, in_steps)
ALL = (*RATIOS, by_curves)

Case = tuple[dict[str, Any], type[Exception], str, tuple[Callable[..., None], ...]]

BAD: dict[str, Case] = {
    "a name that is not there": ({"ignored_layers": ["nine"]}, InputError, "called 'nine'", ALL),
    "a pattern that matches nothing": ({"ignored_layers": ["block.*"]}, InputError, r"called 'block\.\*'", ALL),
    "a foreign module": ({"ignored_layers": [nn.Linear(2, 2)]}, InputError, "not part of the model", ALL),
    "no list of layers": ({"ignored_layers": 3}, InputError, "ignored_layers=3: pass a list", ALL),
    "a share for a name that is not there": ({"pruning_ratio_dict": {"nine": 0.5}}, InputError, "'nine'", RATIOS),
    "a share for a pattern of nothing": ({"pruning_ratio_dict": {"block.*": 0.5}}, InputError, "block", RATIOS),
    "a share for a foreign module": (
        {"pruning_ratio_dict": {nn.Linear(2, 2): 0.5}},
        InputError,
        "pruning_ratio_dict holds a Linear that is not part",
        RATIOS,
    ),
    "no dictionary": ({"pruning_ratio_dict": [0.5]}, InputError, "pruning_ratio_dict is a list", RATIOS),
    "a share of one": ({"pruning_ratio_dict": {"0": 1.0}}, InputError, "below 1", RATIOS),
    "a share of nan": ({"pruning_ratio_dict": {"0": NAN}}, InputError, "at least 0", RATIOS),
    "a cap of nan": ({"max_pruning_ratio": NAN}, InputError, "max_pruning_ratio=nan", RATIOS),
    "a cap of nothing": ({"max_pruning_ratio": 0}, InputError, "above 0", RATIOS),
    "multiples of nothing": ({"round_to": 0}, InputError, "round_to=0", RATIOS),
    "multiples of a part": ({"round_to": 2.5}, InputError, "round_to=2.5", RATIOS),
    "no width": ({"min_width": 0}, InputError, "min_width=0", RATIOS),
    "everything": ({"pruning_ratio": 1.0}, InputError, r"pruning_ratio=1\.0", (in_steps,)),
    "less than nothing": ({"pruning_ratio": -0.1}, InputError, "at least 0", (in_steps,)),
    "a share that is no number": ({"pruning_ratio": NAN}, InputError, "pruning_ratio=nan", (in_steps,)),
    "no share": ({"pruning_ratio": None}, InputError, "pruning_ratio=None", (in_steps,)),
    "no steps": ({"iterative_steps": 0}, InputError, "iterative_steps=0", (in_steps,)),
    "a criterion's name": ({"importance": "l1"}, InputError, "importance='l1'", ALL),
    "a criterion's class": (
        {"importance": prunus.importance.MagnitudeImportance},
        InputError,
        r"is a class: .*MagnitudeImportance\(\)",
        ALL,
    ),
    "scores in a list": ({"importance": lambda g: [1.0] * g.size}, InputError, "returned a list .* group of 0", ALL),
    "scores in an array": ({"importance": lambda g: np.ones(g.size)}, InputError, "returned a ndarray", ALL),
    "one number as a score": ({"importance": lambda g: 1.0}, InputError, "returned a float", ALL),
    "too many scores": ({"importance": lambda g: torch.ones(g.size + 1)}, InputError, r"shape \(17,\) .* 16", ALL),
    "a matrix of scores": ({"importance": lambda g: torch.ones(2, g.size)}, InputError, r"shape \(2, 16\)", ALL),
    "one score for all": ({"importance": lambda g: torch.ones(())}, InputError, r"shape \(\) ", ALL),
    "scores of nan": ({"importance": lambda g: torch.full((g.size,), NAN)}, InputError, "returned NaN .* of 0", ALL),
    "scores without values": ({"importance": lambda g: torch.ones(g.size, device="meta")}, InputError, "meta", ALL),
    "no scores at all": (
        {"importance": lambda g: None},
        NothingToPruneError,
        "leaves all of them alone",
        (*PRUNE, by_curves),
    ),
    "Taylor without gradients": (
        {"importance": prunus.importance.TaylorImportance()},
        InputError,
        r"0\.weight .* have no gradients: call loss\.backward",
        ALL,
    ),
    "Hessian without gradients": (
        {"importance": prunus.importance.HessianImportance()},
        InputError,
        "have no gradients: call accumulate_grad",
        ALL,
    ),
    "inputs elsewhere": (
        {"inputs": X.to("meta")},
        InputError,
        "inputs are on meta and the model is on cpu: move them",
        ALL,
    ),
    "inputs of the wrong size": ({"inputs": torch.ones(1, 9)}, InputError, "cannot run on the example inputs", ALL),
    "no inputs": ({"inputs": None}, InputError, "cannot run on the example inputs", ALL),
    "a device to trace on": ({"device": "nowhere"}, InputError, "only 'meta' can be asked for", PRUNE),
    "data that yields nothing": ({"data": []}, InputError, "yields no samples", PRUNE),
    "data that is none": ({"data": 3}, InputError, "not something that yields batches", PRUNE),
    "data of nan": ({"data": [torch.full((4, 8), NAN)]}, InputError, "holds NaN", PRUNE),
    "a metric that is no function": ({"search": 2, "metric": 3}, InputError, "metric=3", PRUNE),
    "a penalty that is none": ({"regularizer": 3}, InputError, "regularizer=3", (in_steps,)),
    "types that are none": ({"root_module_types": 3}, InputError, "root_module_types holds 3", (in_steps,)),
    "a search for a share": ({"search": 2, "metric": lambda m: 1.0}, InputError, "nothing to search", (by_ratio,)),
    "no optimiser": ({"optimizer": "sgd"}, InputError, "optimizer='sgd': pass a torch.optim", PRUNE),
    "heads in a list": ({"num_heads": [2]}, InputError, "num_heads is a list: pass a dict", (in_steps,)),
    "groups that are none": ({"channel_groups": "x"}, InputError, "channel_groups is a str", (in_steps,)),
    "groups of inputs that are none": ({"in_channel_groups": 2}, InputError, "in_channel_groups is a int", (in_steps,)),
    "a penalty by name": ({"regularizer": "l1"}, InputError, "regularizer='l1'", (in_steps,)),
    "parameters that are none": ({"unwrapped_parameters": 5}, InputError, "unwrapped_parameters=5", RATIOS),
    "pruners in a list": ({"customized_pruners": [5]}, InputError, "customized_pruners is a list", RATIOS),
    "inputs without samples": ({"inputs": X[:0]}, InputError, "macs of the model are 0 on the example", (by_budget,)),
    "a metric that gives words": ({"search": 2, "metric": lambda m: "good"}, InputError, "returned 'good'", PRUNE[1:]),
    "shares that are none": ({"shares": 0.5}, InputError, r"shares=0\.5", (by_curves,)),
}


@pytest.mark.parametrize(("name", "face"), [(name, face) for name, case in BAD.items() for face in case[3]])
def test_one_clear_error_before_anything_changes(
    name: str, face: Callable[..., None], model_state: Any, states_equal: Any
) -> None:
    options, error, words, _ = BAD[name]
    model = network()
    before = model_state(model)
    with pytest.raises(error, match=words) as caught:
        face(model, **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert states_equal(before, model_state(model))


@pytest.mark.parametrize("face", ALL)
@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (nn.ReLU(), NothingToPruneError, "this ReLU has no parameters"),
        (nn.Linear, InputError, r"expected a torch\.nn\.Module, got type"),
        (lambda x: x, InputError, "got function"),
        (nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 2)), InputError, "not initialised yet"),
    ],
)
def test_what_is_no_model_is_refused(face: Callable[..., None], model: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        face(model)


@pytest.mark.parametrize("name", ["ratio", "macs", "params", "memory", "latency"])
@pytest.mark.parametrize("value", [0, 0.0, -0.5, -1, NAN, float("inf"), 1.0, "half", True])
def test_targets_that_are_no_share_and_no_number_are_refused(name: str, value: Any) -> None:
    if name == "latency" and value == 1.0 and value is not True:
        assert Target(latency=1.0).asked == {"latency": 1.0}  # a millisecond
        return
    with pytest.raises(InputError, match=f"Target\\({name}="):
        Target(**{name: value})


@pytest.mark.parametrize("target", ["half", 0.5, {"macs": 0.5}])
def test_a_target_is_a_target(target: Any) -> None:
    with pytest.raises(InputError, match=r"pass a prunus\.Target"):
        prunus.prune(network(), X, target)


@pytest.mark.parametrize("target", [Target(ratio=0.75), Target(macs=0.2), Target(params=100)])
def test_more_than_the_caps_allow_is_refused(target: Target, model_state: Any, states_equal: Any) -> None:
    model = network()
    before = model_state(model)
    with pytest.raises(TargetError, match=r"cannot be met.*max_pruning_ratio"):
        prunus.prune(model, X, target, max_pruning_ratio=0.5)
    assert states_equal(before, model_state(model))


CALIBRATIONS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a loader that yields nothing": (lambda m: prunus.calibrate(m, iter(())), "yields nothing"),
    "no loader": (lambda m: prunus.calibrate(m, None), "yields no batches"),
    "a batch without samples": (lambda m: prunus.calibrate(m, [X, torch.ones(0, 8)]), "batch 1 has no samples"),
    "a batch on meta": (lambda m: prunus.calibrate(m, [X.to("meta")]), "on the meta device"),
    "a loss of nan": (lambda m: prunus.calibrate(m, [X], lambda out, _: out.sum() * NAN), "the loss is nan at batch 0"),
    "an infinite loss": (lambda m: prunus.calibrate(m, [X], lambda out, _: out.sum() / 0), "the loss is -?inf|nan"),
    "a loss that is no function": (lambda m: prunus.calibrate(m, [X], 3), "loss_fn=3"),
    "a loss without gradients": (lambda m: prunus.calibrate(m, [X], lambda out, _: torch.ones(())), "depends on"),
    "data of nan": (lambda m: prunus.calibrate(m, [X * NAN], collect=["activations"]), "returns NaN at batch 0"),
    "steps that are no number": (lambda m: prunus.calibrate(m, [X], steps=1.5), r"steps=1\.5"),  # type: ignore[arg-type]
    "a model without parameters": (lambda m: prunus.calibrate(nn.ReLU(), [X], collect=["grams"]), "no parameters"),
    "no model": (lambda m: prunus.calibrate(len, [X]), "got builtin_function_or_method"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_calibration_that_cannot_be_leaves_the_model(name: str, model_state: Any, states_equal: Any) -> None:
    call, words = CALIBRATIONS[name]
    model = network()
    before = model_state(model)
    with pytest.raises(InputError, match=words):
        call(model)
    assert states_equal(before, model_state(model))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("value", ["high", None, torch.ones(3)])
def test_a_metric_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="the metric returned"):
        prunus.sensitivity(network(), X, lambda m: value)


def test_a_curve_with_nan_is_no_importance() -> None:
    found = prunus.sensitivity(network(), X, lambda m: NAN if m[0].out_features < 8 else 1.0, shares=[0.25, 0.75])
    with pytest.raises(InputError, match="NaN with 75% of 0 removed"):
        found.importance()


@pytest.mark.parametrize("positions", [[], [-1], [16], [0.5], ["a"]])
def test_positions_that_are_not_there_are_refused(positions: list[Any]) -> None:
    model = network()
    graph = prunus.DependencyGraph().build_dependency(model, X)
    with pytest.raises(InputError, match=r"no positions of 0|do not exist"):
        graph.get_pruning_group(model[0], prunus.prune_linear_out_channels, positions)


class Nothing:
    """A group that has lost all its units."""

    parts: tuple[Any, ...] = ()
    size = 0


@pytest.mark.parametrize(
    "criterion",
    [
        prunus.importance.MagnitudeImportance(),
        prunus.importance.RandomImportance(),
        prunus.importance.InvariantMagnitudeImportance(),
        prunus.importance.TaylorImportance(),
        prunus.importance.FPGMImportance(),
    ],
    ids=lambda c: type(c).__name__,
)
def test_an_empty_group_is_refused(criterion: Any) -> None:
    with pytest.raises(InputError, match="no units left"):
        criterion(Nothing())


def test_one_ignored_layer_needs_no_list() -> None:
    for one in ("0", lambda m: m[0], nn.Linear):
        model = network()
        given = one(model) if callable(one) and not isinstance(one, type) else one
        if one is nn.Linear:
            with pytest.raises(NothingToPruneError):
                prunus.prune(model, X, ignored_layers=given)
            continue
        prunus.prune(model, X, ignored_layers=given)
        assert model[0].out_features == 16 > model[2].out_features + 4


def test_a_target_above_what_the_model_costs_says_so() -> None:
    """It is not that the groups are too small."""
    with pytest.raises(NothingToPruneError, match=r"costs no more than that as it is \(macs 736 of at most 10,000\)"):
        prunus.prune(network(), X, Target(macs=10_000))


def test_a_model_spread_over_processes_is_pruned_inside(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(network())
        for run in ALL:
            with pytest.raises(InputError, match=r"DistributedDataParallel.*prune what is inside \(model.module\)"):
                run(wrapped)
        assert by_ratio(wrapped.module) is None
        assert wrapped.module[0].out_features == 8
    finally:
        torch.distributed.destroy_process_group()
