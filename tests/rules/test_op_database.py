"""PyTorch's own database of ops: every rule is checked on its samples, and every core op is accounted for.

The samples of an op become the parameters of a small model that multiplies each output by weights and sums it. If the
labels are right, permuting positions that live together (and the weights along with them) changes nothing, and so it
does to remove them; ``verify`` checks both.
"""

from __future__ import annotations

import sys
import types
import unittest
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import prunus
from prunus.rules import lookup

MADE = "makes a tensor from numbers alone: nothing flows in"
GRADIENT = "computes gradients, which no forward pass does"
NUMBER = "hands a size to Python, which the sizes of tensors follow by themselves"
BY_VALUE = "which positions it reads or writes is computed: what flows in is frozen"

CORE_WITHOUT_RULE = {
    "aten::_adaptive_avg_pool2d_backward": GRADIENT,
    "aten::avg_pool2d_backward": GRADIENT,
    "aten::convolution_backward": GRADIENT,
    "aten::embedding_dense_backward": GRADIENT,
    "aten::max_pool2d_with_indices_backward": GRADIENT,
    "aten::native_group_norm_backward": GRADIENT,
    "aten::native_layer_norm_backward": GRADIENT,
    "aten::arange": MADE,
    "aten::empty_strided": MADE,
    "aten::randperm": MADE,
    "aten::scalar_tensor": MADE,
    "aten::sym_is_contiguous": NUMBER,
    "aten::sym_numel": NUMBER,
    "aten::sym_size": NUMBER,
    "aten::sym_storage_offset": NUMBER,
    "aten::sym_stride": NUMBER,
    "aten::_embedding_bag": BY_VALUE,
    "aten::diagonal": BY_VALUE,
    "aten::gather": BY_VALUE,
    "aten::index_put": BY_VALUE,
    "aten::masked_scatter": BY_VALUE,
    "aten::nonzero": BY_VALUE,
    "aten::scatter": BY_VALUE,
    "aten::scatter_add": BY_VALUE,
    "aten::scatter_reduce": BY_VALUE,
}
"""Core ops that may do without a rule, and why."""

UNFIT = {
    "argwhere": "its number of rows depends on values",
    "nonzero": "its number of rows depends on values",
    "nonzero_static": "its number of rows depends on values",
    "masked_select": "its number of rows depends on values",
    "unique": "its number of rows depends on values",
    "unique_consecutive": "its number of rows depends on values",
    "nn.functional.binary_cross_entropy": "the disturbed values leave its domain",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "its samples drop out",
    "torch._scaled_mm": "numbers of eight bits cannot be disturbed",
    "torch._scaled_mm_v2": "numbers of eight bits cannot be disturbed",
}
RANDOM = "rand normal uniform bernoulli dropout cauchy exponential geometric multinomial rrelu fractional empty resize"
SAMPLES = 2


def core_ops() -> Iterator[torch._ops.OpOverload]:
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in getattr(packet, "overloads", list)():
            op = getattr(packet, overload)
            if torch.Tag.core in op.tags:
                yield op


def test_every_core_op_has_a_rule_or_a_reason() -> None:
    lacking = {op._schema.name for op in core_ops() if lookup(op) is None}
    assert lacking <= CORE_WITHOUT_RULE.keys()
    assert sum(1 for _ in core_ops()) > 150


class Called(nn.Module):
    """An op on its sample: float tensors are parameters, and each output is weighted and summed."""

    def __init__(self, op: Any, sample: Any) -> None:
        super().__init__()
        self.op = op
        self.leaves, self.spec = pytree.tree_flatten((sample.input, list(sample.args), dict(sample.kwargs)))
        for k, leaf in enumerate(self.leaves):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and leaf.is_floating_point():
                self.register_parameter(f"p{k}", nn.Parameter(leaf.detach().clone(), requires_grad=False))
        with torch.no_grad():
            for k, y in enumerate(self.outputs()):
                self.register_parameter(f"w{k}", nn.Parameter(torch.randn(y.shape).double(), requires_grad=False))

    def outputs(self) -> list[torch.Tensor]:
        leaves = [getattr(self, f"p{k}", leaf) for k, leaf in enumerate(self.leaves)]
        first, args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        found = (t for t in pytree.tree_leaves(self.op(first, *args, **kwargs)) if isinstance(t, torch.Tensor))
        return [(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).double() for t in found]

    def forward(self) -> list[torch.Tensor]:
        return [(y * self.get_parameter(f"w{k}")).sum() for k, y in enumerate(self.outputs())]


def database() -> list[Any]:
    """The op database of PyTorch's own tests, which asks for a package that only its assertions need."""
    if "expecttest" not in sys.modules:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in
    found = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    return [op for op in found.op_db if op.name not in UNFIT and not any(r in op.name for r in RANDOM.split())]


def models(op: Any) -> Iterator[Called]:
    """A few models of an op whose outputs are numbers and the same in every run."""
    count = 0
    for sample in op.sample_inputs("cpu", torch.float64):
        if count == SAMPLES or sample.kwargs.get("dropout_p") or sample.kwargs.get("training"):
            return
        try:
            model = Called(op, sample).eval()
            ok = all(bool(y.isfinite().all()) for y in model())
        except Exception:  # an error of the op on its own sample, or of sparse tensors
            continue
        if ok and any(p.numel() > 1 for name, p in model.named_parameters() if name[0] == "p"):
            count += 1
            yield model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(8))
def test_rules_hold_on_the_samples_of_the_op_database(part: int) -> None:
    """What lives together may be permuted or removed together, for every op and sample."""
    wrong: dict[str, str] = {}
    checked = 0
    for op in database()[part::8]:
        for model in models(op):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = prunus.verify(model, ())
            checked += 1
            outside = report.symmetry_error == float("inf")  # the disturbed values left the op's domain
            if not report.ok and not outside:
                wrong[op.name] = f"{report}"
    assert not wrong
    assert checked > 50
