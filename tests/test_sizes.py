"""Sizes: ints that remember where they came from, and what becomes of them when the model shrinks."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus.errors import SurgeryError
from prunus.ledger import Ledger
from prunus.sizes import (
    Attribute,
    Binary,
    Extent,
    Fact,
    Size,
    attribute_home,
    expression_of,
    leaves,
    read_attribute,
)
from prunus.solving import evaluate, solve

QUICK = settings(max_examples=100, derandomize=True, deadline=None, database=None)
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def size(value: int, name: str = "c") -> Size:
    """An attribute's size."""
    return Size(value, Attribute("", name), Ledger())


@QUICK
@given(st.integers(2, 100), st.integers(1, 100))
def test_arithmetic_gives_the_int_and_keeps_the_expression(a, b) -> None:
    """Every operation, from either side, has the int's value, and the expression evaluates to it."""
    x = size(a)
    found = {
        "x + b": (x + b, a + b),
        "b + x": (b + x, b + a),
        "x - b": (x - b, a - b),
        "b - x": (b - x, b - a),
        "x * b": (x * b, a * b),
        "b * x": (b * x, b * a),
        "-x": (-x, -a),
        "x * b // b": (x * b // b, a),
        "(x + b) * 2 - x": ((x + b) * 2 - x, (a + b) * 2 - a),
        "a * b // x": (a * b // x, b),
    }
    for text, (got, expected) in found.items():
        assert type(got) is Size, text
        assert int(got) == expected, text
        assert evaluate(got.expression, lambda leaf: a) == pytest.approx(expected), text
        assert list(leaves(got.expression)).count(Attribute("", "c")) >= 1


@QUICK
@given(st.integers(2, 64), st.lists(st.tuples(st.sampled_from("+-*/"), st.integers(1, 16), st.booleans()), max_size=4))
def test_solve_is_the_inverse_of_evaluate(value, steps) -> None:
    """From an expression's value the unknown attribute is found again."""
    expression: object = Attribute("", "c")
    for operator, number, swapped in steps:
        name = "//" if operator == "/" else operator
        expression = Binary(name, number, expression) if swapped else Binary(name, expression, number)
    result = evaluate(expression, lambda leaf: value)
    found = solve(expression, result, lambda leaf: None)
    if found is None:  # not invertible: the unknown was multiplied by nothing or divided away
        assert result == 0 or math.isnan(result)
    else:
        assert found[0] == Attribute("", "c")
        assert found[1] == pytest.approx(value)


@QUICK
@given(st.integers(1, 2000), st.integers(1, 200))
def test_dividing_and_multiplying_again_is_exact(a, b) -> None:
    """``c // h * h`` is ``c``, whatever the sizes: requirements are compared with ==."""
    expression = Binary("*", Binary("//", Attribute("", "c"), b), b)
    assert evaluate(expression, lambda leaf: a) == pytest.approx(a, abs=1e-6)


def test_two_unknowns_are_not_guessed() -> None:
    """An expression with two unknown attributes has no single solution, one with none has nothing to solve."""
    both = Binary("*", Attribute("", "h"), Attribute("", "d"))
    assert solve(both, 12, lambda leaf: None) is None
    assert solve(both, 12, lambda leaf: 3 if leaf.name == "h" else None) == (Attribute("", "d"), 4)
    assert solve(both, 12, lambda leaf: 3) is None
    assert solve(8, 8, lambda leaf: None) is None


def test_other_operations_forget() -> None:
    """True division, comparison with floats and bools behave as those of an int."""
    x = size(8)
    assert x / 2 == 4.0
    assert x == 8
    assert x != 9
    assert x > 7.5
    assert hash(x) == hash(8)
    assert {8: "a"}[x] == "a"
    assert list(range(size(3))) == [0, 1, 2]
    assert torch.zeros(size(2), size(3)).shape == (2, 3)
    assert type(x * 0.5) is float
    assert f"{x}" == "8"


def test_copies_are_plain_ints() -> None:
    """A copied or pickled model never carries expressions with it."""
    x = size(8)
    assert type(copy.deepcopy(x)) is int
    assert type(pickle.loads(pickle.dumps(x))) is int
    assert type(copy.deepcopy([x])[0]) is int


def test_comparing_an_attribute_with_a_tensors_size_is_a_requirement() -> None:
    """That is how modules check their inputs; two equal attributes require nothing."""
    ledger = Ledger()
    ids = ledger.fresh(8)
    attribute, extent = Size(8, Attribute("", "c"), ledger), Size(8, Extent(ids), ledger)
    assert attribute == extent
    assert [(str(r.asked.expression), r.ids is ids) for r in ledger.requirements] == [("c", True)]
    assert extent == attribute
    assert len(ledger.requirements) == 2
    assert attribute == Size(8, Attribute("", "d"), ledger)
    assert attribute == 8
    assert len(ledger.requirements) == 2


def test_expression_of_a_plain_int_is_itself() -> None:
    """A literal stays a literal."""
    assert expression_of(4) == 4
    assert expression_of(size(4)) == Attribute("", "c")


def test_attributes_are_named_as_in_the_code() -> None:
    """Reasons name path, attribute and index."""
    assert str(Attribute("a.b", "c")) == "a.b.c"
    assert str(Attribute("", "config.hidden", 1)) == "config.hidden[1]"
    assert str(Binary("*", Attribute("", "h"), Attribute("", "d"))) == "h * d"
    assert "size of the tensor" in str(Extent(np.arange(3)))


class Sized(nn.Module):
    """A view whose size is read from where the test says."""

    def __init__(self, read, **attributes) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.read = read
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.b(self.a(x).view(-1, self.read(self)))


PLACES = [
    pytest.param(lambda m: m.c, {"c": 8}, lambda m: m.c, 4, id="attribute"),
    pytest.param(lambda m: m.c[1], {"c": [3, 8]}, lambda m: m.c, [3, 4], id="list"),
    pytest.param(lambda m: m.c[0], {"c": (8, "x")}, lambda m: m.c, (4, "x"), id="tuple"),
    pytest.param(lambda m: m.config.c, {"config": SimpleNamespace(c=8)}, lambda m: m.config.c, 4, id="config"),
    pytest.param(lambda m: m.cfg.c[0], {"cfg": SimpleNamespace(c=[8])}, lambda m: m.cfg.c, [4], id="list-in-config"),
    pytest.param(lambda m: m.c * 2, {"c": 4}, lambda m: m.c, 2, id="product"),
    pytest.param(lambda m: m.c // 2, {"c": 16}, lambda m: m.c, 8, id="quotient"),
    pytest.param(lambda m: m.c + 3, {"c": 5}, lambda m: m.c, 1, id="sum"),
    pytest.param(lambda m: 20 - m.c, {"c": 12}, lambda m: m.c, 16, id="difference"),
    pytest.param(lambda m: m.b.in_features, {}, lambda m: m.b.in_features, 4, id="other-module"),
    pytest.param(lambda m: m.a.weight.shape[0], {}, lambda m: m.a.out_features, 4, id="shape"),
]


@pytest.mark.parametrize(("read", "attributes", "after", "expected"), PLACES)
def test_sizes_follow_wherever_they_are_kept(oracle, read, attributes, after, expected) -> None:
    """The attribute that sized the view is set to the new size, as a plain value of its own type."""
    model = Sized(read, **attributes)
    oracle(model, X)
    prunus.prune(model, X, prunus.Target(ratio=0.5))
    found = after(model)
    assert found == expected
    assert type(found) is type(expected)
    assert type(found) is not list or all(type(v) is int for v in found)
    assert model(X).shape == (3, 4)


class HandsOutConfig(Sized):
    """Its configuration is a property."""

    @property
    def config(self):
        return self.hidden


def test_sizes_follow_in_a_config_that_is_a_property(oracle) -> None:
    model = HandsOutConfig(lambda m: m.config.c, hidden=SimpleNamespace(c=8))
    oracle(model, X)
    prunus.prune(model, X, prunus.Target(ratio=0.5))
    assert type(model.config.c) is int
    assert model.config.c == 4


class FailsToHandOutConfig(nn.Module):
    """Its configuration is a property that cannot be read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    @property
    def config(self):
        raise RuntimeError("not trained yet")

    def forward(self, x):
        return self.b(self.a(x))


def test_a_config_that_cannot_be_read_is_left_alone() -> None:
    model = FailsToHandOutConfig()
    prunus.prune(model, torch.randn(1, 4), prunus.Target(ratio=0.5))
    assert model.b.in_features == 4


def test_literal_size_freezes_and_names_the_line() -> None:
    """A number in the code keeps the dim, and the reason gives file, line and the cure."""

    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.m, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.b(self.m(self.a(x)).view(-1, 8))

    model = Literal()
    line = Literal.forward.__code__.co_firstlineno + 1
    result = prunus.prune(model, X, prunus.Target(ratio=0.5))
    assert model.a.weight.shape == (4, 6)
    assert model.m.weight.shape == (8, 4)
    assert f"with the number 8 at {__file__}:{line}; write -1" in result.frozen()


def test_derived_sizes_are_free() -> None:
    """Sizes read from the tensor itself adapt by themselves and leave no setting."""
    model = Sized(lambda m: m.a.weight.shape[0])
    result = prunus.prune(model, X, prunus.Target(ratio=0.5))
    assert result.plan.settings == ()
    assert model.a.weight.shape == (4, 6)


def test_one_attribute_for_two_widths_joins_them(oracle) -> None:
    """Two layers sized by one attribute keep one width."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 4)
            self.width = 8

        def forward(self, x):
            a, b = self.a(x).view(-1, self.width), self.b(x).view(-1, self.width)
            return self.c(torch.cat([a, b], -1))

    model = Two()
    found = oracle(model, X)
    assert found.bundles == 8
    prunus.prune(model, X, prunus.Target(ratio=0.25))
    assert (model.width, len(model.a.weight), len(model.b.weight)) == (6, 6, 6)


def test_an_attribute_that_also_sizes_something_fixed_stays() -> None:
    """If the same attribute sizes the input, the width stays and the reason says why."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.width = 8

        def forward(self, x):
            x = self.a(x).view(-1, self.width)
            return self.c(self.b(x)).view(-1, self.width // 2)

    model = Both()
    result = prunus.prune(model, torch.randn(3, 8), prunus.Target(ratio=0.5))
    assert model.width == 8
    assert model.a.weight.shape == (8, 8)
    assert model.b.weight.shape == (4, 8)
    assert "width" in result.frozen()


def test_two_slices_of_equal_bounds_keep_their_own_attribute() -> None:
    """``x[:, : s.p, : s.q]`` with ``p == q``: each dim is sized by its own attribute."""

    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))
            self.a, self.b = nn.Linear(6, 3), nn.Linear(3, 4)
            self.p = self.q = 3

        def forward(self, x):
            return self.b(self.a(x) @ self.w[: self.p, : self.q])

    model = Slices()
    graph = prunus.DependencyGraph().build_dependency(model, X)
    asked = {str(expression_of(r.asked)) for r in graph.coupling.trace.ledger.requirements}
    assert asked == {"p", "q"}


def test_stride_of_the_same_value_is_not_taken_for_groups() -> None:
    """``groups=`` is found by its place in the call, not by its value."""

    class Strided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.w, self.b = nn.Conv1d(3, 4, 1), nn.Parameter(torch.randn(4, 1, 3)), nn.Conv1d(4, 2, 1)
            self.s = self.g = 4

        def forward(self, x):
            return self.b(torch.nn.functional.conv1d(self.a(x), self.w, None, self.s, 1, 1, self.g))

    model = Strided()
    prunus.prune(model, torch.randn(2, 3, 16), prunus.Target(ratio=0.5))
    assert (model.s, model.g) == (4, 2)


CHECKED = [
    pytest.param(nn.LayerNorm(8, elementwise_affine=False), "normalized_shape", (4,), id="layer-norm"),
    pytest.param(nn.RMSNorm(8, elementwise_affine=False), "normalized_shape", (4,), id="rms-norm"),
    pytest.param(nn.GRU(8, 5, batch_first=True), "input_size", 4, id="gru"),
    pytest.param(nn.LSTM(8, 5, batch_first=True), "input_size", 4, id="lstm"),
]


@pytest.mark.parametrize(("layer", "attribute", "expected"), CHECKED)
def test_sizes_that_torch_modules_check_follow(layer, attribute, expected) -> None:
    """``normalized_shape`` and ``input_size`` are compared with the input's size, so they follow it."""

    class Checked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.layer = nn.Linear(6, 8), copy.deepcopy(layer)
            self.b = nn.Linear(5 if isinstance(layer, nn.RNNBase) else 8, 4)

        def forward(self, x):
            out = self.layer(self.a(x))
            return self.b(out[0] if isinstance(out, tuple) else out)

    model = Checked()
    with torch.no_grad():  # keep the other widths out of it
        prunus.prune(model, X[None], prunus.Target(ratio=0.5))
    assert getattr(model.layer, attribute) == expected
    assert model(X[None]).shape == (1, 3, 4)


def test_group_norm_without_weights_checks_its_channels() -> None:
    """``num_channels`` of a group norm without weights follows, as its kernel only needs the groups to divide."""
    model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.GroupNorm(2, 8, affine=False), nn.Conv1d(8, 4, 1))
    prunus.prune(model, torch.randn(2, 3, 5), prunus.Target(ratio=0.5))
    assert model(torch.randn(2, 3, 5)).shape == (2, 4, 5)
    assert model[1].num_groups == 2


def test_read_and_find_attributes() -> None:
    """Attributes are read and found through modules, config objects and lists."""
    model = nn.Sequential(nn.Linear(6, 8))
    model.config = SimpleNamespace(sizes=[1, 7])
    assert read_attribute(model, Attribute("0", "out_features")) == 8
    assert read_attribute(model, Attribute("", "config.sizes", 1)) == 7
    home, key = attribute_home(model, Attribute("", "config.sizes", 1))
    assert home is vars(model.config)
    assert key == "sizes"


def test_fact_divides() -> None:
    """A fact gives the present size of the parameter's dim, divided."""
    assert Fact(nn.Linear(6, 8), "half", "weight", 0, divide=2).value() == 4


def test_no_size_object_is_left_on_the_model() -> None:
    """After tracing, pruning and undo, all ints are plain again."""
    model = Sized(lambda m: m.c[0] + m.config.h - 2, c=[8], config=SimpleNamespace(h=2))
    assert prunus.verify(model, X).ok
    found = [*model.c, model.config.h, *(v for m in model.modules() for v in vars(m).values() if isinstance(v, int))]
    assert not any(isinstance(v, Size) for v in found)


class Checked(nn.Module):
    """Checks the length of a vector that lives with its channels against a number computed from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.a, self.scale, self.b = 16, nn.Linear(6, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x):
        if self.scale.numel() != self.dim // 2:
            raise RuntimeError("the scale is not half as wide as dim")
        return self.b(self.a(x) * self.scale)


def test_a_computed_number_that_is_compared_with_a_size_follows_it(oracle) -> None:
    """``self.scale.numel() != self.dim // 2`` keeps being false: the attribute is set."""
    model = Checked()
    oracle(model, torch.randn(2, 6))
    prunus.prune(model, torch.randn(2, 6), prunus.Target(ratio=0.5))
    assert (model.dim, model.scale.shape) == (8, (4,))


class Ratio(nn.Module):
    """Values are ``ratio`` times as wide as keys, in every head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.key, self.ratio = 2, 4, 2
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        b, t, _ = x.shape
        q, k = (p(x).view(b, t, self.heads, self.key).transpose(1, 2) for p in (self.q, self.k))
        v = self.v(x).view(b, t, self.heads, self.ratio * self.key).transpose(1, 2)
        y = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, self.heads * self.ratio * self.key))


def test_a_ratio_of_widths_stays_a_whole_number(oracle) -> None:
    """Two factors of one width do not change at once, so that neither ends between two whole numbers."""
    model = Ratio()
    oracle(model, torch.randn(2, 5, 6))
    prunus.prune(model, torch.randn(2, 5, 6), prunus.Target(ratio=0.5))
    assert model.heads * model.ratio * model.key == model.v.weight.shape[0] < 16


class Shifted(nn.Module):
    """A share of the channels, ``1 / share``, comes from the frame before; the next share from the frame after."""

    def __init__(self) -> None:
        super().__init__()
        self.share = 4
        self.first, self.second = nn.Linear(3, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.first(x)
        fold = x.shape[-1] // self.share
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return self.second(out)


def test_a_share_of_a_width_keeps_its_divisor(oracle) -> None:
    """The divisor could change in whole numbers for one part alone; the other parts need it as it is, so all join."""
    model = Shifted()
    found = oracle(model, torch.randn(2, 5, 3))
    assert found.bundles == 4
    prunus.prune(model, torch.randn(2, 5, 3), prunus.Target(ratio=0.5))
    assert (model.share, model.first.weight.shape[0]) == (4, 8)


class Widening(nn.Module):
    """The shortcut is a layer where two attributes differ; only one of them is used to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.width_out = 8, 16
        self.first, self.inner, self.proj, self.last = (nn.Linear(a, b) for a, b in ((3, 8), (8, 16), (8, 16), (16, 4)))

    def forward(self, x):
        x = y = self.first(x)
        if self.width != self.width_out:
            x = self.proj(y).view(x.shape[0], 1, self.width_out).amax(1)
        return self.last(x + self.inner(y))


def test_attributes_that_the_code_finds_different_stay_so(oracle) -> None:
    """The width that is used halves to what the other was: the code would no longer see that they differ."""
    model = Widening()
    oracle(model, torch.randn(2, 3))
    prunus.prune(model, torch.randn(2, 3), prunus.Target(ratio=0.5))
    assert (model.width, model.width_out) == (4, 8)


class Telling(nn.Module):
    """Takes another path where the two widths that it reads from tensors are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(3, 8), nn.Linear(12, 4)

    def forward(self, x):
        a, b = self.first(x), self.second(x)
        return self.last(torch.cat([a, b], -1)) if a.shape[-1] != b.shape[-1] else self.last.weight[:, 0] * a


def test_a_cut_after_which_the_code_would_take_another_path_is_refused() -> None:
    model = Telling()
    graph = prunus.DependencyGraph().build_dependency(model, torch.randn(2, 3))
    graph.get_pruning_group(model.second, prunus.prune_linear_out_channels, [0, 1, 2]).prune()
    with pytest.raises(SurgeryError, match="the code would take another path"):
        graph.get_pruning_group(model.second, prunus.prune_linear_out_channels, [0]).prune()
    assert model.second.out_features == 5


class OuterProduct(nn.Module):
    """Weights of several heads times the features, merged to a size that is a product of two attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 4, 6
        self.features, self.weights, self.head = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(24, 3)

    def forward(self, x):
        x = self.features(x)
        y = x.unsqueeze(1) * self.weights(x).softmax(0).unsqueeze(2) + x.view(-1, 1, self.width)
        return self.head(y.view(-1, self.heads * self.width))


def test_both_factors_of_a_size_change_when_both_their_dims_shrink(oracle) -> None:
    found = oracle(OuterProduct(), torch.randn(5, 8))
    assert found.frozen == {"features.weight:1", "head.weight:0", "head.bias:0"}
    model = OuterProduct()
    prunus.prune(model, torch.randn(5, 8), prunus.Target(ratio=0.5))
    assert (model.heads, model.width, model.head.in_features) == (2, 3, 6)
