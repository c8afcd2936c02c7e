"""Wrong channels, wrong counts, crashes: ops that move, cut or join channels, and the indices that must follow them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunus as tp

Oracle = Callable[..., Any]
IMAGE = torch.randn(2, 3, 8, 8)


def group_of(model: nn.Module, inputs: Any, layer: nn.Module, idxs: list[int]) -> dict[str, list[int]]:
    """Which positions of which layers go with output positions of ``layer``."""
    graph = tp.DependencyGraph().build_dependency(model, inputs)
    fn = tp.functions.functions_for(layer)
    assert fn is not None
    return {f"{d.target.name}.{d.handler.__name__}": i for d, i in graph.get_pruning_group(layer, fn[0], idxs)}


class Between(nn.Module):
    """conv -> an op -> conv."""

    def __init__(self, op: Callable[[Tensor], Tensor], width: int = 8, out: int = 8) -> None:
        super().__init__()
        self.op = op
        self.a, self.b = nn.Conv2d(3, width, 1), nn.Conv2d(out, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.op(self.a(x)))


def test_a_chunk_piece_with_two_users(oracle: Oracle) -> None:
    """The block of YOLOv8: the second half goes on to a bottleneck and to the concat; it is one piece, not two."""

    class C2f(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cv1, self.cv2 = nn.Conv2d(3, 16, 1), nn.Conv2d(24, 5, 1)
            self.m = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            y = list(self.cv1(x).chunk(2, 1))
            y.append(y[-1] + self.m(y[-1]))
            return self.cv2(torch.cat(y, 1))

    model = C2f()
    assert oracle(model, IMAGE).share > 0.9
    members = group_of(model, IMAGE, model.cv1, [9])  # the second half's channel 1, and by balance one of the first
    assert sorted(members["cv1.prune_conv_out_channels"]) == [1, 9]
    assert sorted(members["cv2.prune_conv_in_channels"]) == [1, 9, 17]
    assert members["m.0.prune_conv_in_channels"] == [1]
    assert members["m.0.prune_conv_out_channels"] == [1]


def test_unequal_split_pieces_go_their_own_ways(oracle: Oracle) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = [3, 5]
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(3, 2), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.a(x).split(self.sizes, dim=-1)
            return self.b(left) + self.c(right)

    model = Split()
    oracle(model, torch.randn(2, 4))
    members = group_of(model, torch.randn(2, 4), model.a, [4])
    assert members == {"a.prune_linear_out_channels": [4], "c.prune_linear_in_channels": [1]}


def test_an_unknown_op_is_a_barrier_not_elementwise(oracle: Oracle) -> None:
    """What flows into an op without a rule stays; it is listed; the rest of the model is pruned."""
    library = torch.library.Library("prunus_regressions", "FRAGMENT")
    library.define("turn(Tensor x) -> Tensor")
    library.impl("turn", lambda x: x.flip(1).clone(), "CompositeExplicitAutograd")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(torch.ops.prunus_regressions.turn(self.a(x))).relu())

    model = Net()
    found = oracle(model, IMAGE)
    assert "a.weight:0" in found.frozen
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    assert [g[0].dep.target.name for g in graph.get_all_groups()] == ["b"]
    assert [name for name in graph.unsupported if "turn" in name]
    assert "turn" in tp.verify(model, IMAGE).frozen


@pytest.mark.parametrize(
    ("name", "op", "taken"),
    [
        ("flip", lambda x: x.flip(1), 6),
        ("roll", lambda x: x.roll(2, 1), 3),
        ("index_select", lambda x: x.index_select(1, torch.tensor([7, 1, 0, 2, 3, 4, 5, 6])), 1),
        ("fancy index", lambda x: x[:, [7, 6, 5, 4, 3, 2, 1, 0]], 6),
        ("concat of halves, exchanged", lambda x: torch.cat((x[:, 4:], x[:, :4]), 1), 5),
    ],
)
def test_moved_channels_are_followed_or_kept(oracle: Oracle, name: str, op: Any, taken: int) -> None:
    """Channel 1 arrives somewhere else: that column goes, or the channel stays; never column 1 by mistake."""
    model = Between(op)
    oracle_or_frozen(oracle, model)
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    group = graph.get_pruning_group(model.a, tp.prune_conv_out_channels, [1])
    if graph.check_pruning_group(group):
        members = {f"{d.target.name}.{d.handler.__name__}": i for d, i in group}
        assert taken in members["b.prune_conv_in_channels"]
        assert len(members["b.prune_conv_in_channels"]) == len(members["a.prune_conv_out_channels"])


def oracle_or_frozen(oracle: Oracle, model: nn.Module, inputs: Any = IMAGE) -> None:
    """The model verifies; where something may go, pruning it holds too."""
    assert tp.verify(model, inputs).ok
    try:
        oracle(model, inputs)
    except tp.NothingToPruneError as error:
        message = str(error)
        assert "stay" in message


def test_channel_shuffle(oracle: Oracle) -> None:
    """Shuffling two halves of eight sends channel 1 to place 2, and both halves shrink together."""

    def shuffle(x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)

    model = Between(shuffle)
    assert oracle(model, IMAGE).share > 0.8
    members = group_of(model, IMAGE, model.a, [1])
    assert sorted(members["a.prune_conv_out_channels"]) == [1, 5]
    assert sorted(members["b.prune_conv_in_channels"]) == [2, 3]


@pytest.mark.parametrize(
    ("name", "model", "inputs"),
    [
        ("pixel shuffle", lambda: Between(nn.PixelShuffle(2), 16, 4), IMAGE),
        ("pixel unshuffle", lambda: Between(nn.PixelUnshuffle(2), 4, 16), IMAGE),
        ("glu", lambda: Between(nn.GLU(1), 16, 8), IMAGE),
        ("unfold", lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Unfold(2), nn.Conv1d(16, 4, 1)), IMAGE),
        ("channel shuffle module", lambda: Between(nn.ChannelShuffle(2)), IMAGE),
        ("group-wise max", lambda: Between(lambda x: x.view(2, 4, 2, 8, 8).amax(2), 8, 4), IMAGE),
        ("unbind", lambda: Between(lambda x: sum(x.unflatten(1, (2, 4)).unbind(1)), 8, 4), IMAGE),
        ("stack", lambda: Between(lambda x: torch.stack((x, x), 1).flatten(1, 2), 8, 16), IMAGE),
        ("repeat", lambda: Between(lambda x: x.repeat(1, 2, 1, 1), 8, 16), IMAGE),
        ("repeat_interleave", lambda: Between(lambda x: x.repeat_interleave(2, 1), 8, 16), IMAGE),
        ("einsum", lambda: Between(lambda x: torch.einsum("bchw->bhwc", x).permute(0, 3, 1, 2)), IMAGE),
        ("pad channels", lambda: Between(lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), 8, 10), IMAGE),
        ("softmax over channels", lambda: Between(lambda x: x.softmax(1)), IMAGE),
        ("sort over channels", lambda: Between(lambda x: x.sort(1).values), IMAGE),
        ("cumulative sum over channels", lambda: Between(lambda x: x.cumsum(1)), IMAGE),
        ("every second channel", lambda: Between(lambda x: x[:, ::2], 8, 4), IMAGE),
        ("negative slice", lambda: Between(lambda x: x[:, -4:], 8, 4), IMAGE),
        ("strided view", lambda: Between(lambda x: x.as_strided(x.shape, x.stride())), IMAGE),
        ("written in place", lambda: Between(lambda x: x.clone().index_fill_(1, torch.tensor([0]), 0.0)), IMAGE),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_ops_that_crashed_or_lied_are_right_or_kept(oracle: Oracle, name: str, model: Any, inputs: Tensor) -> None:
    oracle_or_frozen(oracle, model(), inputs)


def test_two_flattened_outer_products_that_meet(oracle: Oracle) -> None:
    """Rows and columns of two outer products that are added belong together, one by one."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(3, n) for n in (4, 5, 4, 5))
            self.out = nn.Linear(20, 2)

        def forward(self, x: Tensor) -> Tensor:
            one = self.a(x)[:, :, None] * self.b(x)[:, None]
            two = self.c(x)[:, :, None] * self.d(x)[:, None]
            return self.out(one.flatten(1) + two.flatten(1))

    oracle_or_frozen(oracle, Outer(), torch.randn(2, 3))


@pytest.mark.parametrize("dim", [2, -1])
def test_concat_on_the_last_dim_of_tokens(oracle: Oracle, dim: int) -> None:
    """The same dim, counted from the front or from the back."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 6), nn.Linear(4, 8), nn.Linear(14, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat((self.a(x), self.b(x)), dim=dim))

    model, x = Tokens(), torch.randn(2, 5, 4)
    assert oracle(model, x).share > 0.9
    assert group_of(model, x, model.b, [1]) == {
        "b.prune_linear_out_channels": [1],
        "out.prune_linear_in_channels": [7],
    }


def test_a_linear_on_tokens_does_not_stop_flattening_elsewhere(oracle: Oracle) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4 * 64, 6)
            self.tokens, self.out = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.fc(self.conv(x).flatten(1))
            return self.out(self.tokens(hidden[:, None].expand(-1, 5, -1)))

    model = Mixed()
    oracle(model, IMAGE)
    members = group_of(model, IMAGE, model.conv, [2])
    assert members["fc.prune_linear_in_channels"] == list(range(128, 192))


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 8, 1, 1), (1, 8, 1, 1), (1, 1, 8, 8)])
def test_broadcast_gates(oracle: Oracle, shape: tuple[int, ...]) -> None:
    """A gate of one channel, or of one place, scales a tensor: the tensor's channels can go."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.gate = nn.Conv2d(8, shape[1], 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            g = self.gate(y).sigmoid()
            g = g.mean((2, 3), keepdim=True) if shape[2] == 1 else g
            return self.b(y * (g[:1] if shape[0] == 1 else g))

    model = Gate()
    found = oracle(model, IMAGE)
    assert "a.weight:0" not in found.frozen
    assert group_of(model, IMAGE, model.a, [3])["b.prune_conv_in_channels"] == [3]


@pytest.mark.parametrize(
    "multiplier",
    [1, 2, 3],
)
def test_depthwise_with_a_multiplier(oracle: Oracle, multiplier: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6 * multiplier, 3, groups=6), nn.ReLU(), nn.Conv2d(6 * multiplier, 4, 1)
    )
    assert oracle(model, IMAGE).share > 0.8
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    graph.get_pruning_group(model[0], tp.prune_conv_out_channels, [1]).prune()
    assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (5, 5, 5 * multiplier)
    assert model(IMAGE).shape == (2, 4, 6, 6)


def test_indices_of_a_grouped_conv_are_made_equal_per_group(oracle: Oracle) -> None:
    """Asked for one channel, every group of the convolution gives one; it never runs into a shape error."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=2), nn.ReLU(), nn.Conv2d(12, 4, 1))
    oracle(model, IMAGE)
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    group = graph.get_pruning_group(model[1], tp.prune_conv_out_channels, [0])
    assert len(group[0].idxs) == 2
    assert len([i for i in group[0].idxs if i < 6]) == 1
    group.prune()
    assert (model[1].out_channels, model[1].groups) == (10, 2)
    assert model(IMAGE).shape == (2, 4, 6, 6)


def test_transposed_grouped_conv(oracle: Oracle) -> None:
    oracle(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 12, 2, groups=2), nn.Conv2d(12, 4, 1)), IMAGE)


def test_the_same_module_twice(oracle: Oracle) -> None:
    """Used twice on a stream of its own width: one tensor, one set of atoms, cut once."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.shared, self.b = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.shared(self.shared(self.a(x)).relu()))

    model, x = Twice(), torch.randn(2, 4)
    oracle(model, x)
    graph = tp.DependencyGraph().build_dependency(model, x)
    graph.get_pruning_group(model.a, tp.prune_linear_out_channels, [1, 5]).prune()
    assert model.shared.weight.shape == (6, 6)
    assert model(x).shape == (2, 2)


def test_one_module_under_two_names(oracle: Oracle) -> None:
    """A block registered in two places (as timm's CoaT does with its position encodings) is found under either."""

    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 8)
            self.block = nn.Sequential(nn.Linear(8, 8))
            self.other = nn.Sequential(self.block, nn.ReLU())
            self.alone = self.block[0]
            self.last = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.other(self.first(x)))

    model, x = Aliased(), torch.randn(2, 4)
    oracle(model, x)
    graph = tp.DependencyGraph().build_dependency(model, x, ignored_layers=[model.alone])
    group = graph.get_pruning_group(model.block[0], tp.prune_linear_out_channels, [0])
    assert not graph.check_pruning_group(group)
