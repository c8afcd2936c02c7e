"""The rule table: how a rule is found, and what happens to ops that have none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus
from prunus.rules import lookup, rule
from prunus.rules.pointwise import pointwise
from prunus.tracing import trace

aten = torch.ops.aten


@torch.library.custom_op("prunus_tests::swap_halves", mutates_args=())
def swap_halves(x: torch.Tensor) -> torch.Tensor:
    """An op of the user's own, of which Prunus knows nothing."""
    return torch.cat(x.chunk(2, -1)[::-1], -1)


@torch.library.custom_op("prunus_tests::cut_and_sum", mutates_args=())
def cut_and_sum(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Another one, with two outputs."""
    return x[..., ::2].clone(), x.sum(-1)


UNKNOWN = [
    pytest.param(lambda s, x: swap_halves(x), "swap_halves", id="custom-op"),
    pytest.param(lambda s, x: cut_and_sum(x)[0], "cut_and_sum", id="custom-op-of-two-outputs"),
]


@pytest.mark.parametrize(("function", "name"), UNKNOWN)
def test_unknown_op_freezes_what_flows_in_and_is_listed(networks, function, name) -> None:
    """An op without a rule is never guessed: its inputs stay, and the trace names it and the module it ran in."""
    net = networks.Net(lambda s, x: s.b(function(s, s.a(x))).mean(-1), a=nn.Linear(6, 8), b=nn.LazyLinear(4))
    net(torch.randn(3, 6))
    traced = trace(net, torch.randn(3, 6))
    assert traced.unsupported == {name: ("",)}
    with torch.no_grad():
        found = prunus.DependencyGraph().build_dependency(net, torch.randn(3, 6))
    assert f"no rule for {name}" in prunus.verify(net, torch.randn(3, 6)).frozen
    frozen = {part.held for group in found.coupling.groups for part in group.slices}
    assert next(k for k, h in enumerate(traced.held) if h.name == "a.weight") not in frozen


def test_composite_without_rule_is_decomposed(golden) -> None:
    """An op that PyTorch composes of others needs no rule: its parts have them."""
    found = golden(torch.nn.functional.cosine_similarity, (2, 3), (2, 3))
    assert lookup(aten.tensordot.default) is None
    assert not found.trace.unsupported
    assert golden(lambda a, b: torch.tensordot(a, b, 1), (2, 3), (3, 4)).text() == "a0, b1 ; b0=a1"


@pytest.mark.parametrize("op", [aten.sigmoid.default, aten.exp.default, aten.add.Tensor, aten.where.self])
def test_pointwise_tag_is_enough(op) -> None:
    """Ops that PyTorch tags as pointwise need no entry."""
    assert lookup(op) is pointwise


@pytest.mark.parametrize("name", ["hardswish_", "relu_", "copy_", "masked_fill_"])
def test_in_place_form_has_the_rule_of_its_base(name) -> None:
    """``relu_`` is ruled like ``relu``, tagged or not."""
    packet = getattr(aten, name)
    assert lookup(getattr(packet, packet.overloads()[0])) is pointwise


def test_second_rule_is_refused() -> None:
    """Two rules for one op are a mistake, and the first one stays."""
    before = lookup(aten.relu.default)
    with pytest.raises(
        prunus.InputError, match=r"aten\.linear has a rule already: prunus\.rules\.contractions\.linear"
    ):
        rule(aten.linear)(lambda op, x: x.dims)
    assert lookup(aten.relu.default) is before


def test_registered_rule_is_used(networks, oracle) -> None:
    """A user's rule for a user's op makes it prunable, and the proof covers it."""

    @torch.library.custom_op("prunus_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    rule(torch.ops.prunus_tests.twice)(lambda op, x: x.dims)
    found = oracle(networks.lin(lambda s, x: twice(x)), torch.randn(3, 6))
    assert found.bundles == 8


def test_rule_that_cannot_read_a_call_freezes(golden) -> None:
    """A call that its rule does not expect is treated as an op without a rule: frozen and listed."""

    @torch.library.custom_op("prunus_tests::odd", mutates_args=())
    def odd(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    def broken(op, x):
        raise IndexError("no such dim")

    rule(torch.ops.prunus_tests.odd)(broken)
    found = golden(odd, (2, 3))
    assert found.text() == "- ; a0! ; a1!"
    assert any("the rule for odd cannot read this call (IndexError: no such dim)" in k for k in found.trace.unsupported)
