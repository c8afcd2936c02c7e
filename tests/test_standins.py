"""Costly kernels give zeros of the right shape while tracing, unless somebody looks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.standins import HollowValueError, decides, standin_for
from prunus.tracing import trace

aten = torch.ops.aten
CONVOLUTIONS = [
    (aten.conv1d.default, (2, 4, 9), (6, 4, 3), {"stride": [2]}),
    (aten.conv1d.default, (4, 9), (6, 2, 3), {"groups": 2, "padding": [1]}),
    (aten.conv2d.default, (1, 4, 9, 8), (6, 4, 3, 2), {"stride": (2, 1), "padding": (0, 2)}),
    (aten.conv2d.default, (1, 6, 11, 11), (6, 1, 5, 5), {"groups": 6, "padding": [2], "dilation": [2]}),
    (aten.conv3d.default, (1, 2, 5, 6, 7), (3, 2, 1, 3, 2), {"stride": [1, 2, 3]}),
]


@pytest.mark.parametrize(("op", "x", "weight", "options"), CONVOLUTIONS)
def test_a_stand_in_for_a_convolution_has_the_shape_of_the_result(op, x, weight, options):
    operands = torch.randn(x), torch.randn(weight), torch.randn(weight[0])
    given = standin_for(op)(*operands, **options)
    assert given.shape == op(*operands, **options).shape
    assert given.count_nonzero() == 0


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (aten.linear.default, [(2, 3, 5), (4, 5), (4,)]),
        (aten.linear.default, [(5,), (4, 5)]),
        (aten.matmul.default, [(2, 1, 3, 5), (7, 5, 4)]),
        (aten.mm.default, [(3, 5), (5, 4)]),
        (aten.bmm.default, [(2, 3, 5), (2, 5, 4)]),
        (aten.addmm.default, [(4,), (3, 5), (5, 4)]),
        (aten.baddbmm.default, [(2, 3, 1), (2, 3, 5), (2, 5, 4)]),
        (aten.scaled_dot_product_attention.default, [(2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)]),
    ],
)
def test_a_stand_in_for_a_product_has_the_shape_of_the_result(op, shapes):
    operands = [torch.randn(s) for s in shapes]
    assert standin_for(op)(*operands).shape == op(*operands).shape


RECURRENT = [
    *((kind, {}) for kind in (nn.LSTM, nn.GRU, nn.RNN)),
    (nn.LSTM, {"proj_size": 3}),
    (nn.GRU, {"batch_first": True}),
    (nn.RNN, {"bidirectional": True}),
]


@pytest.mark.parametrize(("kind", "options"), RECURRENT)
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_stand_in_for_a_recurrent_kernel_has_the_shapes_of_the_results(kind, options):
    layer, x = kind(4, 6, num_layers=2, **options).eval(), torch.randn(3, 5, 4)
    expected = [t.shape for t in torch.utils._pytree.tree_leaves(layer(x))]
    seen = []
    layer.register_forward_hook(lambda m, a, out: seen.extend(torch.utils._pytree.tree_leaves(out)))
    trace(layer, x)
    assert [t.shape for t in seen] == expected
    assert not any(t.count_nonzero() for t in seen)


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (aten.linear.default, [(2, 6), (4, 5)]),
        (aten.linear.default, [(2, 5), (4, 5), (3,)]),
        (aten.mm.default, [(3, 4), (5, 4)]),
        (aten.matmul.default, [(2, 3, 5), (3, 5, 4)]),
        (aten.addmm.default, [(3,), (3, 5), (5, 4)]),
        (aten.conv2d.default, [(1, 3, 8, 8), (6, 4, 3, 3)]),
        (aten.conv2d.default, [(1, 4, 2, 2), (6, 4, 3, 3)]),
        (aten.scaled_dot_product_attention.default, [(2, 3, 5, 8), (2, 3, 7, 6), (2, 3, 7, 6)]),
    ],
)
def test_operands_that_do_not_fit_are_left_to_the_kernel(op, shapes):
    assert standin_for(op)(*(torch.randn(s) for s in shapes)) is None


def test_operands_of_two_types_are_left_to_the_kernel():
    assert standin_for(aten.mm.default)(torch.randn(3, 4), torch.randn(4, 5).double()) is None
    assert standin_for(aten.mm.default)(torch.ones(3, 4).long(), torch.ones(4, 5).long()) is None


def test_kernels_of_a_network_are_not_run():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    outputs = []
    for layer in model:
        layer.register_forward_hook(lambda m, a, out: outputs.append(out))
    trace(model, torch.randn(1, 3, 8, 8))
    assert [tuple(t.shape) for t in outputs] == [(1, 8, 6, 6), (1, 4, 4, 4), (1, 64), (1, 5)]
    assert not any(t.count_nonzero() for t in outputs)


class Branch(nn.Module):
    """Takes one of two layers, by a value that it computes."""

    def __init__(self, look) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.positive, self.other = nn.Linear(8, 4), nn.Linear(8, 4)
        self.look = look
        with torch.no_grad():
            self.first.weight.fill_(1.0)
            self.first.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        try:
            seen = self.look(y)
        except Exception:  # a model may catch whatever it likes
            seen = False
        return self.positive(y) if seen else self.other(y)


LOOKS = {
    "item": lambda y: y.sum().item() > 0,
    "bool": lambda y: bool((y > 0).all()),
    "float": lambda y: float(y.mean()) > 0,
    "tolist": lambda y: sum(y[0].tolist()) > 0,
    "numpy": lambda y: np.asarray(y.cpu().numpy()).sum() > 0,
    "nonzero": lambda y: y.nonzero().shape[0] > 0,
    "mask": lambda y: y[y > 0].shape[0] > 0,
    "equal": lambda y: not torch.equal(y, torch.zeros_like(y)),
    "counts": lambda y: y.repeat_interleave((y[0] > 0).long(), dim=1).shape[1] > 0,
    "where": lambda y: torch.where(y > 0)[0].shape[0] > 0,
    "classes": lambda y: nn.functional.one_hot(y.long().reshape(-1)).shape[1] > 1,
    "written": lambda y: torch.zeros(2, 8).copy_(y).sum().item() > 0,
    "written in a part": lambda y: _part(torch.zeros(2, 9), y),
}


def _part(whole: Tensor, y: Tensor) -> bool:
    whole[:, 1:] = y
    return bool(whole.sum() > 0)


@pytest.mark.parametrize("look", LOOKS)
def test_a_model_that_decides_takes_the_path_of_its_inputs(look):
    model = Branch(LOOKS[look])
    found = trace(model, torch.ones(2, 6))
    assert set(found.unread) == {"other.weight", "other.bias"}


def test_constants_may_be_looked_at_without_computing_everything():
    class Checks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y * keep[:, None]) if bool(keep.all()) else self.second(y)

    seen = []
    model = Checks()
    model.first.register_forward_hook(lambda m, a, out: seen.append(out))
    found = trace(model, (torch.randn(2, 6), torch.tensor([1, 1])))
    assert found.unread == ()
    assert [t.count_nonzero().item() for t in seen] == [0]


def test_ops_that_give_numbers_or_unknown_shapes_decide_and_so_do_ops_of_other_libraries():
    with torch.library._scoped_library("prunus_test", "DEF") as library:
        library.define("unknown(Tensor x) -> Tensor")
        assert decides(torch.ops.prunus_test.unknown.default)
    assert decides(aten.is_nonzero.default)
    assert decides(aten._local_scalar_dense.default)
    assert not decides(aten.relu.default)
    assert not decides(aten.linear.default)


def test_no_clause_of_a_model_catches_the_end_of_a_run():
    assert not issubclass(HollowValueError, Exception)


def test_inputs_that_do_not_fit_get_the_error_of_the_kernel():
    with pytest.raises(prunus.InputError, match=r"cannot run on the example inputs .*mat1 and mat2"):
        trace(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(1, 5))


def test_what_is_found_does_not_depend_on_values(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten())
    model.append(nn.Linear(6 * 16, 5))
    x = torch.randn(1, 3, 8, 8)
    hollow = prunus.DependencyGraph().build_dependency(model, x).coupling
    monkeypatch.setattr("prunus.entries.standin_for", lambda op: None)
    monkeypatch.setattr("prunus.entries.derived", {})
    computed = prunus.DependencyGraph().build_dependency(model, x).coupling
    assert [any(t.hollow for e in c.trace.events for t in e.results) for c in (hollow, computed)] == [True, False]
    assert [f.units.tolist() for f in hollow.families] == [f.units.tolist() for f in computed.families]
    assert [e.name for e in hollow.trace.events] == [e.name for e in computed.trace.events]
    counted = [[(t.factor, t.step) for t in c.trace.ledger.macs] for c in (hollow, computed)]
    assert counted[0] == counted[1]
