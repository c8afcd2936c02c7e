"""Layers that crashed or were skipped: recurrent nets, attention, norms with statistics, parametrised weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, spectral_norm
from torch.nn.utils.parametrizations import weight_norm

import prunus as tp
from prunus.errors import NothingToPruneError, SurgeryError

Oracle = Callable[..., Any]
IMAGE = torch.randn(2, 3, 8, 8)
TOKENS = torch.randn(2, 5, 6)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2}, {"bidirectional": True}, {"num_layers": 2, "bidirectional": True}, {"bias": False}],
    ids=str,
)
def test_recurrent_nets(oracle: Oracle, kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    """Gates are cut together, in every layer and direction, on the hidden and on the input side."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pre = nn.Linear(6, 10)
            self.rnn = kind(10, 8, batch_first=True, **options)
            self.out = nn.Linear(16 if self.rnn.bidirectional else 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(self.pre(x))[0])

    model = Net()
    assert oracle(model, TOKENS).share > 0.9
    result = tp.prune(model, TOKENS, tp.Target(ratio=0.5))
    assert (model.rnn.input_size, model.rnn.hidden_size) == (5, 4)
    assert all(a is b for a, b in zip(model.rnn._flat_weights, model.rnn.parameters(), strict=True))
    model.train()(TOKENS).sum().backward()
    result.undo()
    assert model.rnn.hidden_size == 8


def test_recurrent_net_with_projection(oracle: Oracle) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.LSTM(6, 8, proj_size=4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    model = Net()
    oracle(model, TOKENS)
    tp.prune(model, TOKENS, tp.Target(ratio=0.5))
    assert model.rnn.proj_size in (2, 4)
    assert model.rnn.weight_hr_l0.shape == (model.rnn.proj_size, model.rnn.hidden_size)


class Attention(nn.Module):
    """Blocks of nn.MultiheadAttention, each with its residual."""

    def __init__(self, depth: int = 1, residual: bool = True, mix: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.pre, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(depth))
        self.mixers = nn.ModuleList(nn.Linear(16, 16) if mix else nn.Identity() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(x)
        for block, mixer in zip(self.blocks, self.mixers, strict=True):
            y = mixer(block(x, x, x, need_weights=False)[0])
            x = x + y if self.residual else y
        return self.out(x)


@pytest.mark.parametrize(
    ("depth", "batch"),
    [
        (1, 1),
        (1, 2),
        (2, 1),
        (2, 2),
    ],
)
def test_multihead_attention(oracle: Oracle, depth: int, batch: int) -> None:
    """The embedding and the heads shrink in step, so that one still divides by the other; at any batch size."""
    model = Attention(depth)
    inputs = torch.randn(batch, 5, 6)
    assert oracle(model, inputs).share > 0.9
    tp.prune(model, inputs, tp.Target(ratio=0.5))
    for block in model.blocks:
        assert block.embed_dim % block.num_heads == 0
        assert block.embed_dim < 16
        assert block.head_dim * block.num_heads == block.embed_dim
    model.train()(inputs).sum().backward()


@pytest.mark.parametrize("arguments", [{"residual": False}, {"mix": True}], ids=str)
def test_multihead_attention_whose_output_is_pruned_alone(oracle: Oracle, arguments: dict[str, Any]) -> None:
    """The output projection may get narrower than the queries; embed_dim is the width of the queries."""
    oracle(Attention(**arguments), TOKENS)


def test_attention_over_another_sequence(oracle: Oracle) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.out = nn.Linear(6, 16), nn.Linear(4, 12), nn.Linear(16, 3)
            self.attention = nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            q, kv = self.q(x), self.kv(y)
            return self.out(q + self.attention(q, kv, kv)[0])

    assert oracle(Cross(), (TOKENS, torch.randn(2, 7, 4))).share > 0.5


@pytest.mark.parametrize("repeat", ["interleave", "expand", "enable_gqa"])
def test_grouped_queries(oracle: Oracle, repeat: str) -> None:
    """Several query heads share a key head, however the code writes it: heads go with their key and value head."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.kv_heads, self.head_dim = 4, 2, 8
            self.norm = nn.LayerNorm(16)
            self.pre = nn.Linear(6, 16)
            self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
            self.o, self.out = nn.Linear(32, 16), nn.Linear(16, 3)

        def repeat(self, x: Tensor) -> Tensor:
            if repeat == "interleave":
                return x.repeat_interleave(self.heads // self.kv_heads, dim=1)
            b, h, n, d = x.shape
            x = x[:, :, None].expand(b, h, self.heads // self.kv_heads, n, d)
            return x.reshape(b, h * (self.heads // self.kv_heads), n, d)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pre(x)
            b, n, _ = x.shape
            y = self.norm(x)
            q = self.q(y).view(b, n, self.heads, self.head_dim).transpose(1, 2)
            k = self.k(y).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
            v = self.v(y).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
            if repeat == "enable_gqa":
                z = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            else:
                z = F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v))
            return self.out(x + self.o(z.transpose(1, 2).reshape(b, n, -1)))

    model = Grouped()
    assert oracle(model, TOKENS).share > 0.9
    tp.prune(model, TOKENS, tp.Target(ratio=0.5))
    assert model.q.out_features == model.heads * model.head_dim
    assert model.k.out_features == model.kv_heads * model.head_dim
    assert model.heads % model.kv_heads == 0
    assert model.q.out_features < 32


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("group norm", lambda: nn.GroupNorm(2, 8)),
        ("group norm of single channels", lambda: nn.GroupNorm(8, 8)),
        ("group norm of one group", lambda: nn.GroupNorm(1, 8)),
        ("group norm without weights", lambda: nn.GroupNorm(2, 8, affine=False)),
        ("instance norm", lambda: nn.InstanceNorm2d(8)),
        ("instance norm with weights", lambda: nn.InstanceNorm2d(8, affine=True)),
        ("instance norm with statistics", lambda: nn.InstanceNorm2d(8, track_running_stats=True)),
        ("instance norm with both", lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
        ("batch norm without weights", lambda: nn.BatchNorm2d(8, affine=False)),
        ("batch norm without statistics", lambda: nn.BatchNorm2d(8, track_running_stats=False)),
        ("local response", lambda: nn.LocalResponseNorm(3)),
        ("prelu per channel", lambda: nn.PReLU(8)),
        ("prelu for all", lambda: nn.PReLU(1)),
        ("dropout per channel", lambda: nn.Dropout2d(0.5)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_norms_and_friends(oracle: Oracle, name: str, norm: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm(), nn.ReLU(), nn.Conv2d(8, 4, 1))
    if name == "local response":
        assert tp.verify(model.eval(), IMAGE).ok
        return
    oracle(model, IMAGE)
    tp.prune(model, IMAGE, tp.Target(ratio=0.5))
    assert model[0].out_channels == 4
    for attribute in ("num_channels", "num_features"):
        assert getattr(model[1], attribute, 4) == 4
    assert 4 % getattr(model[1], "num_groups", 1) == 0
    model.train()(IMAGE).sum().backward()


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(10), nn.RMSNorm(10), nn.LayerNorm(10, elementwise_affine=False)], ids=str
)
def test_token_norms(oracle: Oracle, norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 10), norm, nn.Linear(10, 3))
    oracle(model, TOKENS)
    tp.prune(model, TOKENS, tp.Target(ratio=0.5))
    assert tuple(model[1].normalized_shape) == (5,)  # type: ignore[arg-type]


def test_frozen_batch_norm_and_other_channel_sized_buffers(oracle: Oracle) -> None:
    """Torchvision's FrozenBatchNorm2d holds only buffers; they are cut like weights."""
    frozen = pytest.importorskip("torchvision.ops").FrozenBatchNorm2d

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), frozen(8), nn.Conv2d(8, 4, 1)
            self.register_buffer("scale", torch.rand(1, 8, 1, 1) + 0.5)
            self.register_buffer("shift", torch.randn(8), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(x)) * self.scale + self.shift[:, None, None])

    model = Scaled()
    oracle(model, IMAGE)
    tp.prune(model, IMAGE, tp.Target(ratio=0.5))
    assert model.scale.shape == (1, 4, 1, 1)
    assert model.shift.shape == model.norm.running_var.shape == (4,)
    assert "shift" not in model.state_dict()


def test_detached_branches_are_seen(oracle: Oracle) -> None:
    """A branch without gradients reads the same channels."""

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            with torch.no_grad():
                side = self.c(y.detach())
            return self.b(y) + side

    model = Detached()
    oracle(model, IMAGE)
    tp.prune(model, IMAGE, tp.Target(ratio=0.5))
    assert model.b.in_channels == model.c.in_channels == 4


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _with_parametrisation(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", _Double())
    return layer


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("weight_norm", weight_norm),
        ("weight_norm of another dim", lambda layer: weight_norm(layer, dim=1)),
        ("old weight_norm", nn.utils.weight_norm),
        ("old spectral_norm", spectral_norm),
        ("spectral_norm", nn.utils.parametrizations.spectral_norm),
        ("a parametrisation", _with_parametrisation),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrised_layers_are_pruned_kept_or_refused(
    name: str, wrap: Any, model_state: Callable[..., Any], states_equal: Callable[..., bool]
) -> None:
    """Never a crash, never a broken model: what can be cut is cut, else the error says what to call first."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), wrap(nn.Conv2d(8, 6, 1)), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    before, expected = model_state(model), model(IMAGE)
    try:
        result = tp.prune(model, IMAGE, tp.Target(ratio=0.5))
    except (SurgeryError, NothingToPruneError) as error:
        message = str(error)
        assert "parametri" in message or "no rule for" in message
        assert states_equal(model_state(model), before)
    else:
        assert tp.verify(model, IMAGE).ok
        assert model(IMAGE).shape == expected.shape
        result.undo()
    assert torch.equal(model(IMAGE), expected)


def test_positional_conv_of_wav2vec(model_state: Callable[..., Any], states_equal: Callable[..., bool]) -> None:
    """A grouped convolution whose weight is normalised over its kernel: pruned or kept, and the graph verifies."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pre, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
            self.conv = weight_norm(nn.Conv1d(16, 16, 3, padding=1, groups=4), dim=2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pre(x)
            return self.out(x + self.conv(x.transpose(1, 2)).transpose(1, 2))

    model = Positions().eval()
    before = model_state(model)
    try:
        result = tp.prune(model, TOKENS, tp.Target(ratio=0.5))
    except tp.PrunusError as error:
        message = str(error)
        assert "stay" in message or "parametri" in message
    else:
        assert model(TOKENS).shape == (2, 5, 3)
        result.undo()
    assert states_equal(model_state(model), before)
    assert tp.verify(model, TOKENS).ok


@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 8, 1, 1), (8, 1, 1), (2, 8, 1, 1), (1, 8, 8, 8)], ids=str)
def test_unwrapped_parameters_in_any_dim(oracle: Oracle, shape: tuple[int, ...]) -> None:
    """The dim that lines up with the channels is found from the trace, wherever it is."""

    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.loose = nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if len(shape) <= 2:
                return self.b((y.permute(0, 2, 3, 1) * self.loose).permute(0, 3, 1, 2))
            return self.b(y * self.loose)

    model = Loose()
    oracle(model, IMAGE)
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    group = graph.get_pruning_group(model.a, tp.prune_conv_out_channels, [2])
    assert [d.target.name for d, _ in group] == ["a", "loose", "b"]
    group.prune()
    expected = list(shape)
    expected[1 if len(shape) == 4 else len(shape) - 1 if len(shape) < 3 else 0] = 7
    assert list(model.loose.shape) == expected
    assert isinstance(model.loose, nn.Parameter)
