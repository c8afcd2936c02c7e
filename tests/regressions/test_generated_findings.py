"""What generated programs have found: the smallest network of each finding, which failed before."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus
from prunus.cost import count
from prunus.graph import DependencyGraph


class Net(nn.Module):
    """Layers and attributes, and a function ``forward(self, *inputs)`` that uses them."""

    def __init__(self, function, **members) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs):
        return self.function(self, *inputs)


IMAGE, SEQUENCE, VECTOR = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 6), torch.randn(2, 7)


def image(function, reads, **members):
    return Net(lambda s, x: s.o(function(s, s.i(x))), i=nn.Conv2d(3, 8, 1), o=nn.Conv2d(reads, 3, 1), **members)


def sequence(function, reads, **members):
    return Net(lambda s, x: s.o(function(s, s.i(x))), i=nn.Linear(6, 8), o=nn.Linear(reads, 3), **members)


PROGRAMS = [
    pytest.param(
        lambda: Net(lambda s, x: s.o(s.c(s.i(x))[0]), i=nn.Linear(7, 8), c=nn.LSTMCell(8, 4), o=nn.Linear(4, 3)),
        VECTOR,
        id="the gates of a cell with one hidden unit are unpacked by number",
    ),
    pytest.param(
        lambda: sequence(lambda s, x: s.m(x)[0], 4, m=nn.LSTM(8, 4, batch_first=True)),
        SEQUENCE,
        id="the gates of a recurrent layer with one hidden unit stay",
    ),
    pytest.param(
        lambda: image(lambda s, x: x.unflatten(1, (s.n, x.shape[1] // 4)).tanh().flatten(1, 2), 8, n=4),
        IMAGE,
        id="a derived size of one stays one",
    ),
    pytest.param(
        lambda: Net(
            lambda s, x: (
                s.o(s.i(x).repeat_interleave(s.n, 1).sum(1)),
                s.r(s.q(x).unflatten(2, (-1, s.n)).tanh().flatten(2)),
            ),
            i=nn.Linear(6, 8),
            q=nn.Linear(6, 8),
            n=2,
            o=nn.Linear(8, 3),
            r=nn.Linear(8, 3),
        ),
        SEQUENCE,
        id="an attribute that repeats a tensor may not follow another dim",
    ),
    pytest.param(
        lambda: image(lambda s, x: s.m(x), 4, m=nn.ConvTranspose2d(8, 4, 3, padding=1, groups=2)),
        IMAGE,
        id="a transposed group of one output channel goes with its group only",
    ),
    pytest.param(
        lambda: image(lambda s, x: s.m(x), 2, m=nn.Conv2d(8, 2, 3, padding=1, groups=2)),
        IMAGE,
        id="a group of one output channel goes with its group only",
    ),
    pytest.param(
        lambda: image(
            lambda s, x: F.pixel_shuffle(s.n(x), 2).unflatten(1, (s.k, s.one)).mean(2),
            2,
            n=nn.GroupNorm(4, 8),
            k=2,
            one=1,
        ),
        IMAGE,
        id="the channels of a pixel live together whatever rows they are in",
    ),
    pytest.param(
        lambda: image(lambda s, x: x.flip(0)[:, 0:1].expand_as(x).unflatten(1, (s.k, -1)).mean(2), 2, k=2),
        IMAGE,
        id="rows that hold a fixed part stay",
    ),
    pytest.param(
        lambda: image(lambda s, x: s.m(x.repeat_interleave(2, 1)), 4, m=nn.Conv2d(16, 4, 1, groups=2)),
        IMAGE,
        id="groups of a convolution over repeated channels",
    ),
    pytest.param(
        lambda: Net(
            lambda s, x: (
                s.q(s.f(x)[..., :2]),
                s.o(torch.stack([s.f(x), s.i(x)], 1).sum(1)),
                s.r(s.i(x).unflatten(-1, (s.n, -1)).tanh().flatten(2)),
            ),
            i=nn.Linear(6, 8),
            f=nn.Linear(6, 8),
            n=2,
            o=nn.Linear(8, 3),
            r=nn.Linear(8, 3),
            q=nn.Linear(2, 3),
        ),
        SEQUENCE,
        id="a head may not go from one part of a stack only",
    ),
    pytest.param(
        lambda: Net(
            lambda s, x: (
                (s.o(x2[:, s.n :]), s.r(x2.unflatten(1, (s.k, -1)).transpose(1, 2).flatten(1, 2)))
                if (x2 := torch.stack([s.i(x), s.i(x)], 2).flatten(1, 2)) is not None
                else None
            ),
            i=nn.Conv2d(3, 8, 1),
            n=2,
            k=2,
            o=nn.Conv2d(14, 3, 1),
            r=nn.Conv2d(16, 3, 1),
        ),
        IMAGE,
        id="rows that share positions",
    ),
    pytest.param(
        lambda: sequence(
            lambda s, x: (
                (s.w + x.unflatten(2, (s.k, -1)).mean(2).repeat_interleave(2, 2)).unflatten(2, (4, -1)).amax(3)
            ),
            4,
            w=nn.Parameter(torch.randn(8)),
            k=2,
        ),
        SEQUENCE,
        id="copies that lie in one dim go together",
    ),
    pytest.param(
        lambda: Net(
            lambda s, x: (
                s.o(s.i(x).unflatten(2, (s.n, -1)).tanh().flatten(2)),
                s.r(s.i(x).unflatten(2, (s.k, s.i(x).shape[2] // 2)).softmax(2).flatten(2)),
            ),
            i=nn.Linear(6, 8),
            n=4,
            k=2,
            o=nn.Linear(8, 3),
            r=nn.Linear(8, 3),
        ),
        SEQUENCE,
        id="a head may not take a part of rows that are tied position by position",
    ),
    pytest.param(
        lambda: image(
            lambda s, x: s.t(s.m(x).unflatten(1, (s.n, -1)).transpose(1, 2).flatten(1, 2)),
            4,
            m=nn.Conv2d(8, 6, 1),
            n=2,
            t=nn.ConvTranspose2d(6, 4, 3, padding=1, groups=2),
        ),
        IMAGE,
        id="rows that take unequal parts of groups",
    ),
    pytest.param(
        lambda: Net(
            lambda s, x: s.o((s.i(x)[:, :, None] * s.k(x)[:, None]).flatten(1)),
            i=nn.Linear(7, 8),
            k=nn.Linear(7, 4),
            o=nn.Linear(32, 3),
        ),
        VECTOR,
        id="a product of two dims goes with either",
    ),
    pytest.param(
        lambda: Net(
            lambda s, x: s.o((s.i(x).unflatten(1, (s.n, -1))[..., None] * s.k(x)[:, None, None]).flatten(1)),
            i=nn.Linear(7, 8),
            n=2,
            k=nn.Linear(7, 4),
            o=nn.Linear(32, 3),
        ),
        VECTOR,
        id="a product of heads and another dim",
    ),
    pytest.param(
        lambda: image(lambda s, x: F.pixel_unshuffle(F.interpolate(x, scale_factor=2), 2), 32),
        IMAGE,
        id="pixels into channels",
    ),
    pytest.param(
        lambda: Net(
            lambda s, x: (
                s.o(F.pad(s.i(x), [1, 1]).view(2, 5, s.n, -1).transpose(1, 2).flatten(1)),
                s.r(s.q(x).unflatten(2, (-1, s.n)).tanh().flatten(2)),
            ),
            i=nn.Linear(6, 8),
            q=nn.Linear(6, 8),
            n=2,
            o=nn.Linear(50, 3),
            r=nn.Linear(8, 3),
        ),
        SEQUENCE,
        id="an attribute that sizes a dim that stays may not change",
    ),
    pytest.param(
        lambda: Net(
            lambda s, x: (
                s.o(s.i(x).view(2, 5, 2, s.n).flatten(2)),
                s.r(s.i(x).unflatten(2, (s.h, s.k, -1)).flatten(2)),
            ),
            i=nn.Linear(6, 8),
            n=4,
            h=2,
            k=2,
            o=nn.Linear(8, 3),
            r=nn.Linear(8, 3),
        ),
        SEQUENCE,
        id="rows of rows are the rows that hold the same positions",
    ),
    pytest.param(
        lambda: sequence(lambda s, x: torch.einsum("btc,bsd->btd", x, x), 8),
        SEQUENCE,
        id="an einsum sums what only one operand has beforehand",
    ),
    pytest.param(
        lambda: sequence(
            lambda s, x: torch.einsum("btc,cd,de->bte", x, s.v, s.w),
            2,
            v=nn.Parameter(torch.randn(8, 2)),
            w=nn.Parameter(torch.randn(2, 2)),
        ),
        SEQUENCE,
        id="an einsum over one position is a product like any other",
    ),
    pytest.param(
        lambda: Net(lambda s, x: s.o(s.i(x @ (x.transpose(1, 2) @ x))), i=nn.Linear(6, 8), o=nn.Linear(8, 3)),
        SEQUENCE,
        id="products of inputs cost too",
    ),
]


@pytest.mark.parametrize(("build", "inputs"), PROGRAMS)
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_program(oracle, build, inputs, ratio) -> None:
    """All that the oracle asks holds, also when the model is pruned again and again until hardly anything is left."""
    model = build()
    assert prunus.verify(model, inputs).ok
    with contextlib.suppress(prunus.NothingToPruneError):
        oracle(copy.deepcopy(model), inputs, ratio)
    for _ in range(3):
        try:
            result = prunus.prune(model, inputs, prunus.Target(ratio=ratio))
        except prunus.NothingToPruneError:
            return
        cost = count(model, inputs)
        assert (result.after.macs, result.after.params) == (cost.macs, cost.params)
        assert prunus.verify(model, inputs).ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_do_not_depend_on_the_default_dtype(dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs, before = torch.randn(2, 4), torch.get_default_dtype()
    expected = prunus.prune(copy.deepcopy(model), inputs, prunus.Target(ratio=0.5)).plan
    torch.set_default_dtype(dtype)
    try:
        assert prunus.prune(model, inputs, prunus.Target(ratio=0.5)).plan == expected
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("function", "position"),
    [
        pytest.param(lambda s, x: x[..., : -s.n], 0, id="slice"),
        pytest.param(lambda s, x: x.narrow(2, s.n, 1 * s.one), 7, id="narrow"),
    ],
)
def test_a_part_that_would_become_empty_keeps_its_last_position(function, position) -> None:
    model = sequence(function, 1, n=7, one=1)
    graph = DependencyGraph().build_dependency(model, SEQUENCE)
    group = graph.get_pruning_group(model.i, prunus.prune_linear_out_channels, [position])
    assert not graph.check_pruning_group(group)
    with pytest.raises(prunus.PrunusError):
        group.prune()
    assert model(SEQUENCE).shape == (2, 5, 3)


def test_every_dim_of_a_bare_parameter_is_a_side_of_its_own() -> None:
    """The positions of an item belong to the dim that the parameter's function cuts, the last one."""
    model = sequence(lambda s, x: x + s.w, 8, w=nn.Parameter(torch.randn(1, 5, 8)))
    graph = DependencyGraph().build_dependency(model, SEQUENCE)
    group = graph.get_pruning_group(model.w, prunus.prune_parameter_out_channels, [5, 7])
    assert {dep.layer: idxs for dep, idxs in group}[model.i] == [5, 7]
    group.prune()
    assert model.w.shape == (1, 5, 6)


def test_items_of_a_recurrent_layer_are_about_what_the_layer_reads() -> None:
    """The second layer reads the states of both directions, which are no input of the module."""
    model = sequence(lambda s, x: s.m(x)[0], 16, m=nn.LSTM(8, 8, 2, batch_first=True, bidirectional=True))
    graph = DependencyGraph().build_dependency(model, SEQUENCE)
    reads = [idxs for group in graph.get_all_groups(root_module_types=(nn.Module,)) for dep, idxs in group
             if dep.layer is model.m and graph.is_in_channel_pruning_fn(dep.handler)]  # fmt: skip
    assert reads == [list(range(8))]


def test_a_matrix_product_reads_the_weight() -> None:
    model = sequence(lambda s, x: x @ s.w, 4, w=nn.Parameter(torch.randn(8, 4)))
    coupling = DependencyGraph().build_dependency(model, SEQUENCE).coupling
    reads = {(coupling.trace.held[k].name, dim) for k, dim in coupling.consumers}
    assert reads == {("w", 0), ("i.weight", 1), ("o.weight", 1)}
