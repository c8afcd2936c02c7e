"""The one-layer editors: right numbers, right attributes, one identity, and all or nothing."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

from prunus import functions as pf
from prunus.errors import InputError

# fmt: off
WIDTHS = [
    # name, layer, function, indices, attributes after it
    ("conv out", lambda: nn.Conv2d(3, 8, 3), pf.prune_conv_out_channels, [0, 5], {"in_channels": 3, "out_channels": 6}),
    ("conv in", lambda: nn.Conv2d(4, 8, 3), pf.prune_conv_in_channels, [1], {"in_channels": 3, "out_channels": 8}),
    ("conv 1d out", lambda: nn.Conv1d(3, 4, 3, bias=False), pf.prune_conv_out_channels, [3], {"out_channels": 3}),
    ("conv 3d in", lambda: nn.Conv3d(3, 4, 1), pf.prune_conv_in_channels, [2], {"in_channels": 2}),
    ("transposed out", lambda: nn.ConvTranspose2d(3, 8, 2), pf.prune_conv_out_channels, [1, 2], {"out_channels": 6}),
    ("transposed in", lambda: nn.ConvTranspose2d(4, 8, 2), pf.prune_conv_in_channels, [0], {"in_channels": 3}),
    ("grouped out, equally", lambda: nn.Conv2d(4, 8, 3, groups=2), pf.prune_conv_out_channels, [0, 7],
     {"in_channels": 4, "out_channels": 6, "groups": 2}),
    ("grouped out, a whole group", lambda: nn.Conv2d(6, 9, 3, groups=3), pf.prune_conv_out_channels, [3, 4, 5],
     {"in_channels": 4, "out_channels": 6, "groups": 2}),
    ("grouped out, both", lambda: nn.Conv2d(6, 9, 3, groups=3), pf.prune_conv_out_channels, [0, 3, 4, 5, 8],
     {"in_channels": 4, "out_channels": 4, "groups": 2}),
    ("grouped in, equally", lambda: nn.Conv2d(4, 8, 3, groups=2), pf.prune_conv_in_channels, [1, 2],
     {"in_channels": 2, "out_channels": 8, "groups": 2}),
    ("grouped in, a whole group", lambda: nn.Conv2d(6, 9, 3, groups=3), pf.prune_conv_in_channels, [0, 1],
     {"in_channels": 4, "out_channels": 6, "groups": 2}),
    ("grouped transposed out", lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), pf.prune_conv_out_channels, [0, 7],
     {"in_channels": 4, "out_channels": 6, "groups": 2}),
    ("grouped transposed out, a group", lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), pf.prune_conv_out_channels,
     [4, 5, 6, 7], {"in_channels": 2, "out_channels": 4, "groups": 1}),
    ("grouped transposed in", lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), pf.prune_conv_in_channels, [1, 2],
     {"in_channels": 2, "out_channels": 8, "groups": 2}),
    ("depthwise out", lambda: nn.Conv2d(8, 8, 3, groups=8), pf.prune_depthwise_conv_out_channels, [0, 5],
     {"in_channels": 6, "out_channels": 6, "groups": 6}),
    ("depthwise in", lambda: nn.Conv2d(8, 8, 3, groups=8), pf.prune_depthwise_conv_in_channels, [7],
     {"in_channels": 7, "out_channels": 7, "groups": 7}),
    ("depthwise by the plain name", lambda: nn.Conv2d(8, 8, 3, groups=8), pf.prune_conv_out_channels, [0, 5],
     {"in_channels": 6, "out_channels": 6, "groups": 6}),
    ("depthwise multiplier out", lambda: nn.Conv2d(3, 6, 3, groups=3), pf.prune_depthwise_conv_out_channels, [2, 3],
     {"in_channels": 2, "out_channels": 4, "groups": 2}),
    ("depthwise multiplier in", lambda: nn.Conv2d(3, 6, 3, groups=3), pf.prune_depthwise_conv_in_channels, [1],
     {"in_channels": 2, "out_channels": 4, "groups": 2}),
    ("linear out", lambda: nn.Linear(4, 6), pf.prune_linear_out_channels, [0], {"in_features": 4, "out_features": 5}),
    ("linear in", lambda: nn.Linear(4, 6), pf.prune_linear_in_channels, [3], {"in_features": 3, "out_features": 6}),
    ("batch norm", lambda: nn.BatchNorm2d(8), pf.prune_batchnorm_out_channels, [0, 5], {"num_features": 6}),
    ("batch norm in", lambda: nn.SyncBatchNorm(8), pf.prune_batchnorm_in_channels, [0, 5], {"num_features": 6}),
    ("batch norm, bare", lambda: nn.BatchNorm1d(8, affine=False, track_running_stats=False),
     pf.prune_batchnorm_out_channels, [0, 5], {"num_features": 6}),
    ("instance norm", lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
     pf.prune_instancenorm_out_channels, [0, 5], {"num_features": 6}),
    ("instance norm in", lambda: nn.InstanceNorm2d(8), pf.prune_instancenorm_in_channels, [1], {"num_features": 7}),
    ("layer norm", lambda: nn.LayerNorm((3, 8)), pf.prune_layernorm_out_channels, [7], {"normalized_shape": (3, 7)}),
    ("layer norm in", lambda: nn.LayerNorm(8, bias=False), pf.prune_layernorm_in_channels, [7],
     {"normalized_shape": (7,)}),
    ("layer norm, bare", lambda: nn.LayerNorm(8, elementwise_affine=False), pf.prune_layernorm_out_channels, [0],
     {"normalized_shape": (7,)}),
    ("RMS norm", lambda: nn.RMSNorm(8), pf.prune_layernorm_out_channels, [0, 1], {"normalized_shape": (6,)}),
    ("group norm, equally", lambda: nn.GroupNorm(2, 8), pf.prune_groupnorm_out_channels, [0, 5],
     {"num_channels": 6, "num_groups": 2}),
    ("group norm, a whole group", lambda: nn.GroupNorm(4, 8, affine=False), pf.prune_groupnorm_in_channels, [2, 3],
     {"num_channels": 6, "num_groups": 3}),
    ("embedding", lambda: nn.Embedding(10, 6), pf.prune_embedding_out_channels, [5], {"embedding_dim": 5}),
    ("embedding bag", lambda: nn.EmbeddingBag(10, 6), pf.prune_embedding_in_channels, [5], {"embedding_dim": 5}),
    ("PReLU", lambda: nn.PReLU(6), pf.prune_prelu_out_channels, [0, 1], {"num_parameters": 4}),
    ("PReLU, one slope", nn.PReLU, pf.prune_prelu_in_channels, [40, 41], {"num_parameters": 1}),
    ("attention, equally", lambda: nn.MultiheadAttention(8, 2), pf.prune_multihead_attention_out_channels, [0, 5],
     {"embed_dim": 6, "num_heads": 2, "head_dim": 3, "kdim": 6, "vdim": 6}),
    ("attention, a whole head", lambda: nn.MultiheadAttention(12, 3, add_bias_kv=True),
     pf.prune_multihead_attention_in_channels, [4, 5, 6, 7], {"embed_dim": 8, "num_heads": 2, "head_dim": 4}),
    ("attention, own key width", lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=7, bias=False),
     pf.prune_multihead_attention_out_channels, [3, 4], {"embed_dim": 6, "num_heads": 2, "kdim": 5, "vdim": 7}),
    ("lstm out", lambda: nn.LSTM(5, 6, 2, bidirectional=True), pf.prune_lstm_out_channels, [0, 4],
     {"input_size": 5, "hidden_size": 4, "proj_size": 0}),
    ("lstm in", lambda: nn.LSTM(5, 6, 2, bidirectional=True), pf.prune_lstm_in_channels, [0, 4],
     {"input_size": 3, "hidden_size": 6}),
    ("lstm projected out", lambda: nn.LSTM(5, 6, 2, bidirectional=True, proj_size=3), pf.prune_lstm_out_channels, [1],
     {"input_size": 5, "hidden_size": 6, "proj_size": 2}),
    ("gru out", lambda: nn.GRU(5, 6, 3), pf.prune_gru_out_channels, [5], {"input_size": 5, "hidden_size": 5}),
    ("gru in", lambda: nn.GRU(5, 6, bias=False), pf.prune_gru_in_channels, [2], {"input_size": 4, "hidden_size": 6}),
    ("rnn out", lambda: nn.RNN(5, 6, bidirectional=True), pf.prune_rnn_out_channels, [5], {"hidden_size": 5}),
    ("rnn in", lambda: nn.RNN(5, 6, 2), pf.prune_rnn_in_channels, [0], {"input_size": 4, "hidden_size": 6}),
]
# fmt: on
NAMES = [row[0] for row in WIDTHS]
EDITS = pytest.mark.parametrize(("make", "function", "idxs", "after"), [row[1:] for row in WIDTHS], ids=NAMES)


def fresh(layer: nn.Module) -> nn.Module:
    """Give the layer distinct numbers, gradients and statistics, so that a wrong slice shows."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) - 0.3
    for parameter in layer.parameters():
        parameter.grad = 10 * parameter.detach()
    return layer.eval()


def keep(size: int, idxs) -> list[int]:
    return [index for index in range(size) if index not in set(idxs)]


@EDITS
def test_attributes_follow_the_weights(make, function, idxs, after) -> None:
    layer = function(fresh(make()), idxs)
    assert {name: getattr(layer, name) for name in after} == after
    assert all(type(getattr(layer, name)) in (int, tuple) for name in after)


@EDITS
def test_the_layer_is_the_one_its_attributes_describe(make, function, idxs, after) -> None:
    """A new layer made from the printed attributes has the same shapes, and takes the state of the pruned one."""
    layer = function(fresh(make()), idxs)
    shapes = {name: tensor.shape for name, tensor in layer.state_dict().items()}
    match layer:
        case nn.MultiheadAttention():
            same = nn.MultiheadAttention(
                layer.embed_dim, layer.num_heads, bias=layer.in_proj_bias is not None, kdim=layer.kdim,
                vdim=layer.vdim, add_bias_kv=layer.bias_k is not None,
            )  # fmt: skip
        case nn.RNNBase():
            options = {"num_layers": layer.num_layers, "bias": layer.bias, "bidirectional": layer.bidirectional}
            if layer.proj_size:
                options["proj_size"] = layer.proj_size
            same = type(layer)(layer.input_size, layer.hidden_size, **options)
        case nn.modules.conv._ConvNd():
            same = type(layer)(
                layer.in_channels, layer.out_channels, layer.kernel_size, groups=layer.groups,
                bias=layer.bias is not None,
            )  # fmt: skip
        case nn.LayerNorm():
            affine = layer.elementwise_affine
            same = nn.LayerNorm(layer.normalized_shape, elementwise_affine=affine, bias=layer.bias is not None)
        case _:
            same = make()
            for name, value in after.items():
                setattr(same, name, value)
            assert shapes.keys() == same.state_dict().keys()
            return
    assert {name: tensor.shape for name, tensor in same.state_dict().items()} == shapes


@EDITS
def test_parameters_keep_identity_and_gradients(make, function, idxs, after) -> None:
    layer = fresh(make())
    before = dict(layer.named_parameters())
    next(iter(layer.parameters()), torch.zeros(1)).requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in before.items()}
    function(layer, idxs)
    for name, parameter in layer.named_parameters():
        assert parameter is before[name]
        assert parameter.requires_grad == flags[name]
        assert torch.equal(parameter.grad, 10 * parameter.detach())


@EDITS
def test_a_copy_leaves_the_layer_alone(make, function, idxs, after) -> None:
    layer = fresh(make())
    state, shown = copy.deepcopy(layer.state_dict()), repr(layer)
    pruned = function(layer, idxs, inplace=False)
    assert pruned is not layer
    assert repr(layer) == shown
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    in_place = function(layer, idxs)
    assert in_place is layer
    assert all(torch.equal(value, pruned.state_dict()[name]) for name, value in layer.state_dict().items())


@EDITS
def test_every_way_to_write_the_indices(make, function, idxs, after) -> None:
    layer = fresh(make())
    want = function(layer, idxs, inplace=False).state_dict()
    for written in (tuple(reversed(idxs)), set(idxs), torch.tensor(idxs), np.array(idxs), iter(idxs)):
        got = function(layer, written, inplace=False).state_dict()
        assert all(torch.equal(value, want[name]) for name, value in got.items())


@EDITS
def test_a_refusal_changes_nothing(make, function, idxs, after) -> None:
    layer = fresh(make())
    if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
        assert function(layer, [10**6]) is layer  # one slope for all channels: there is nothing to refuse
        return
    state, shown = copy.deepcopy(layer.state_dict()), repr(layer)
    for wrong in ([10**6], [-1], [*idxs, idxs[0]], [0.5], ["a"], [True], torch.tensor([True, False])):
        with pytest.raises(InputError, match=function.__name__):
            function(layer, wrong)
    assert repr(layer) == shown
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


@EDITS
def test_another_layer_type_is_refused(make, function, idxs, after) -> None:
    with pytest.raises(InputError, match=r"takes a .* layer, not Identity"):
        function(nn.Identity(), idxs)


@pytest.mark.parametrize(
    ("layer", "function", "size"),
    [
        (nn.Conv2d(3, 4, 1), pf.prune_conv_out_channels, 4),
        (nn.Conv2d(3, 4, 1), pf.prune_conv_in_channels, 3),
        (nn.Conv2d(4, 4, 1, groups=4), pf.prune_depthwise_conv_out_channels, 4),
        (nn.Linear(3, 4), pf.prune_linear_out_channels, 4),
        (nn.BatchNorm1d(4), pf.prune_batchnorm_out_channels, 4),
        (nn.LayerNorm(4), pf.prune_layernorm_out_channels, 4),
        (nn.Embedding(9, 4), pf.prune_embedding_out_channels, 4),
        (nn.MultiheadAttention(4, 2), pf.prune_multihead_attention_out_channels, 4),
        (nn.GRU(3, 4), pf.prune_gru_out_channels, 4),
        (nn.Parameter(torch.zeros(2, 4)), pf.prune_parameter_out_channels, 4),
    ],
)
def test_the_last_channel_stays(layer, function, size) -> None:
    with pytest.raises(InputError, match="at least one must stay"):
        function(layer, range(size))


@pytest.mark.parametrize(
    ("layer", "function", "idxs"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), pf.prune_conv_out_channels, [0]),
        (nn.Conv2d(4, 8, 3, groups=2), pf.prune_conv_in_channels, [0]),
        (nn.ConvTranspose2d(4, 8, 3, groups=2), pf.prune_conv_out_channels, [0, 1, 4]),
        (nn.Conv2d(3, 6, 3, groups=3), pf.prune_depthwise_conv_out_channels, [1]),
        (nn.GroupNorm(2, 8), pf.prune_groupnorm_out_channels, [0, 1, 4]),
        (nn.MultiheadAttention(8, 2), pf.prune_multihead_attention_out_channels, [0]),
    ],
)
def test_unequal_groups_are_refused(layer, function, idxs) -> None:
    with pytest.raises(InputError, match=r"would keep .*; remove equally many from every group, or whole groups"):
        function(layer, idxs)


def test_depthwise_functions_refuse_a_plain_convolution() -> None:
    for function in (pf.prune_depthwise_conv_out_channels, pf.prune_depthwise_conv_in_channels):
        with pytest.raises(InputError, match="not depthwise; use prune_conv_"):
            function(nn.Conv2d(4, 8, 3, groups=2), [0])


# Numbers: what is left computes what it computed before

CONVS = [
    (nn.Conv2d, 4, 8, 1), (nn.Conv2d, 4, 8, 2), (nn.Conv2d, 6, 6, 6), (nn.Conv2d, 3, 6, 3), (nn.Conv1d, 6, 9, 3),
    (nn.ConvTranspose2d, 4, 8, 1), (nn.ConvTranspose2d, 4, 8, 2), (nn.ConvTranspose1d, 6, 9, 3), (nn.Conv3d, 4, 4, 2),
]  # fmt: skip


def dims_of(layer: nn.Module) -> int:
    return {"1d": 1, "2d": 2, "3d": 3}[type(layer).__name__[-2:]]


def some_of_each_group(draw, size: int, groups: int) -> tuple[list[int], list[int]]:
    """Draw whole groups to remove, and equally many positions of each other group; say also which groups are left."""
    width = size // groups
    gone = draw(st.sets(st.integers(0, groups - 1), max_size=groups - 1))
    count = draw(st.integers(0, width - 1))
    idxs = [group * width + offset for group in gone for offset in range(width)]
    for group in sorted(set(range(groups)) - gone):
        offsets = draw(st.permutations(range(width)))[:count]
        idxs.extend(group * width + offset for offset in offsets)
    return sorted(idxs), sorted(set(range(groups)) - gone)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_conv_out_channels_are_a_slice_of_the_output(data) -> None:
    kind, into, out, groups = data.draw(st.sampled_from(CONVS))
    layer = fresh(kind(into, out, 3, groups=groups, padding=1))
    idxs, alive = some_of_each_group(data.draw, out, groups)
    x = torch.rand(2, into, *[5] * dims_of(layer))
    want = layer(x)[:, keep(out, idxs)]
    width = into // groups
    read = [group * width + offset for group in alive for offset in range(width)]
    torch.testing.assert_close(pf.prune_conv_out_channels(layer, idxs)(x[:, read]), want)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_conv_in_channels_removed_are_inputs_that_are_zero(data) -> None:
    kind, into, out, groups = data.draw(st.sampled_from(CONVS))
    layer = fresh(kind(into, out, 3, groups=groups, padding=1))
    idxs, alive = some_of_each_group(data.draw, into, groups)
    x = torch.rand(2, into, *[5] * dims_of(layer))
    x[:, idxs] = 0
    width = out // groups
    written = [group * width + offset for group in alive for offset in range(width)]
    want = layer(x)[:, written]
    torch.testing.assert_close(pf.prune_conv_in_channels(layer, idxs)(x[:, keep(into, idxs)]), want)


def test_linear_numbers() -> None:
    layer, x = fresh(nn.Linear(5, 7)), torch.rand(2, 5)
    want = layer(x)[:, keep(7, [0, 3])]
    torch.testing.assert_close(pf.prune_linear_out_channels(layer, [0, 3])(x), want)
    x[:, [1, 4]] = 0
    want = layer(x)
    torch.testing.assert_close(pf.prune_linear_in_channels(layer, [1, 4])(x[:, keep(5, [1, 4])]), want)


@pytest.mark.parametrize(
    ("layer", "function", "shape", "dim"),
    [
        (nn.BatchNorm2d(6), pf.prune_batchnorm_out_channels, (2, 6, 4, 4), 1),
        (nn.InstanceNorm1d(6, affine=True), pf.prune_instancenorm_out_channels, (2, 6, 4), 1),
        (nn.PReLU(6), pf.prune_prelu_out_channels, (2, 6, 4), 1),
        (nn.PReLU(), pf.prune_prelu_out_channels, (2, 6, 4), 1),
    ],
)
def test_channelwise_layers_give_a_slice(layer, function, shape, dim) -> None:
    fresh(layer)
    for buffer in layer.buffers():
        buffer.data = buffer.data.abs()
    x = torch.rand(shape) - 0.5
    left = torch.tensor(keep(6, [0, 4]))
    want = layer(x).index_select(dim, left)
    torch.testing.assert_close(function(layer, [0, 4])(x.index_select(dim, left)), want)


def test_norms_over_channels_norm_what_is_left() -> None:
    left = keep(8, [0, 5])
    x = torch.rand(2, 8)[:, left]
    norm = fresh(nn.LayerNorm(8))
    weight, bias = norm.weight[left], norm.bias[left]
    want = torch.nn.functional.layer_norm(x, (6,), weight, bias)
    torch.testing.assert_close(pf.prune_layernorm_out_channels(norm, [0, 5])(x), want)
    norm = fresh(nn.GroupNorm(2, 8))
    weight, bias = norm.weight[left], norm.bias[left]
    want = torch.nn.functional.group_norm(x, 2, weight, bias)
    torch.testing.assert_close(pf.prune_groupnorm_out_channels(norm, [0, 5])(x), want)


def test_embedding_gives_a_slice() -> None:
    layer, tokens = fresh(nn.Embedding(9, 6)), torch.tensor([[1, 8, 0]])
    want = layer(tokens)[..., keep(6, [2])]
    assert torch.equal(pf.prune_embedding_out_channels(layer, [2])(tokens), want)


def test_sparse_gradients_are_cut() -> None:
    layer = nn.Embedding(9, 6, sparse=True)
    layer(torch.tensor([1, 8, 1])).pow(2).sum().backward()
    want = layer.weight.grad.to_dense()[:, keep(6, [2])]
    assert torch.equal(pf.prune_embedding_out_channels(layer, [2]).weight.grad.to_dense(), want)


RECURRENT = [
    (nn.LSTM, pf.prune_lstm_out_channels, pf.prune_lstm_in_channels),
    (nn.GRU, pf.prune_gru_out_channels, pf.prune_gru_in_channels),
    (nn.RNN, pf.prune_rnn_out_channels, pf.prune_rnn_in_channels),
]
OPTIONS = [{}, {"num_layers": 3}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("kind", "out", "into"), RECURRENT)
def test_recurrent_hidden_units_removed_are_units_that_nothing_reads(kind, out, into, options) -> None:
    hidden, idxs = 6, [0, 4]
    layer, x = fresh(kind(5, hidden, **options)), torch.rand(3, 4, 5)
    directions = 2 if layer.bidirectional else 1
    both = [direction * hidden + index for direction in range(directions) for index in idxs]
    for name, parameter in layer.named_parameters():
        if name.startswith("weight_hh"):
            parameter.data[:, idxs] = 0
        elif name.startswith("weight_ih") and "_l0" not in name:
            parameter.data[:, both] = 0
    output, state = layer(x)
    pruned_output, pruned_state = out(layer, idxs)(x)
    torch.testing.assert_close(pruned_output, output[..., keep(directions * hidden, both)])
    for got, want in zip(pruned_state, state, strict=True) if kind is nn.LSTM else [(pruned_state, state)]:
        torch.testing.assert_close(got, want[..., keep(hidden, idxs)])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("kind", "out", "into"), RECURRENT)
def test_recurrent_inputs_removed_are_inputs_that_are_zero(kind, out, into, options) -> None:
    layer, x = fresh(kind(5, 6, **options)), torch.rand(3, 4, 5)
    x[..., [1, 2]] = 0
    want, _ = layer(x)
    got, _ = into(layer, [1, 2])(x[..., keep(5, [1, 2])])
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projected_lstm_loses_projected_features() -> None:
    layer, x = fresh(nn.LSTM(5, 6, 2, proj_size=3)), torch.rand(3, 4, 5)
    for name, parameter in layer.named_parameters():
        if name.startswith("weight_hh") or name == "weight_ih_l1":
            parameter.data[:, [1]] = 0
    want, _ = layer(x)
    got, _ = pf.prune_lstm_out_channels(layer, [1])(x)
    torch.testing.assert_close(got, want[..., [0, 2]])


def test_recurrent_layers_train_on_after_pruning() -> None:
    layer = pf.prune_gru_out_channels(nn.GRU(5, 6, 2, bidirectional=True), [0, 3])
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.weight_hh_l1_reverse.detach().clone()
    layer(torch.rand(3, 4, 5))[0].sum().backward()
    optimiser.step()
    assert not torch.equal(layer.weight_hh_l1_reverse, before)
    assert all(listed is own for listed, own in zip(layer._flat_weights, layer.parameters(), strict=True))


@pytest.mark.parametrize("idxs", [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]])
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True}])
def test_attention_heads_removed_are_heads_that_nothing_reads(idxs, options) -> None:
    layer = fresh(nn.MultiheadAttention(12, 3, batch_first=True, **options))
    left = keep(12, idxs)
    query = torch.rand(2, 4, 12)
    query[..., idxs] = 0
    key, value = (torch.rand(2, 6, layer.kdim), torch.rand(2, 6, layer.vdim)) if "kdim" in options else (query, query)
    layer.out_proj.weight.data[:, idxs] = 0
    want, _ = layer(query, key, value)
    pruned = pf.prune_multihead_attention_out_channels(layer, idxs)
    cut = query[..., left]
    key, value = (key, value) if "kdim" in options else (cut, cut)
    got, _ = pruned(cut, key, value)
    torch.testing.assert_close(got, want[..., left])


# Parameters and the surroundings of a layer


def test_bare_parameters() -> None:
    parameter = nn.Parameter(torch.arange(12.0).reshape(3, 4))
    parameter.grad = parameter.detach() + 1
    assert pf.prune_parameter_out_channels(parameter, [1]) is parameter
    assert torch.equal(parameter.detach()[0], torch.tensor([0.0, 2.0, 3.0]))
    copied = pf.prune_parameter_in_channels(parameter, [0], inplace=False, dim=0)
    assert (copied.shape, parameter.shape) == ((2, 3), (3, 3))
    assert isinstance(copied, nn.Parameter)
    assert torch.equal(parameter.grad, parameter.detach() + 1)


@pytest.mark.parametrize(
    ("parameter", "options", "message"),
    [
        (nn.Linear(2, 2), {}, "not Linear"),
        (torch.zeros(2, 3), {"dim": 2}, "no dimension 2"),
        (torch.zeros(2, 3, requires_grad=True) * 2, {}, "result of a computation"),
        (torch.zeros(2, 3), {"idxs": [3]}, r"in \[0, 3\)"),
    ],
)
def test_what_is_no_parameter_is_refused(parameter, options, message) -> None:
    with pytest.raises(InputError, match=message):
        pf.prune_parameter_out_channels(parameter, options.pop("idxs", [0]), **options)


def test_a_shared_parameter_stays_shared() -> None:
    embedding, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    head.weight = embedding.weight
    pf.prune_embedding_out_channels(embedding, [0])
    assert head.weight is embedding.weight
    assert head.weight.shape == (9, 5)


def test_an_optimiser_made_before_steps_after() -> None:
    layer = nn.Linear(4, 6)
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.0)
    pf.prune_linear_out_channels(layer, [0, 1])
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 4)).sum().backward()
    optimiser.step()
    torch.testing.assert_close(layer.weight.detach(), before - 1)


def test_channels_last_stays_channels_last() -> None:
    layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    weight = pf.prune_conv_in_channels(pf.prune_conv_out_channels(layer, [0]), [0]).weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert pf.prune_conv_out_channels(nn.Conv2d(4, 8, 3), [0]).weight.is_contiguous()


def test_the_meta_device_is_pruned_too() -> None:
    layer = pf.prune_conv_out_channels(nn.Conv2d(4, 8, 3, groups=2, device="meta"), [0, 4])
    assert layer.weight.shape == (6, 2, 3, 3)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.utils.parametrizations.weight_norm, r"remove_parametrizations\(layer, 'weight'\)"),
        (nn.utils.parametrizations.spectral_norm, r"remove_parametrizations\(layer, 'weight'\)"),
        (lambda layer: l1_unstructured(layer, "weight", 0.5), "make it a plain parameter again"),
    ],
)
def test_computed_weights_are_refused_with_the_cure(wrap, message) -> None:
    with pytest.raises(InputError, match=message):
        pf.prune_linear_out_channels(wrap(nn.Linear(4, 6)), [0])


def test_layers_without_weights_yet_are_refused() -> None:
    with pytest.raises(InputError, match="run the model once"):
        pf.prune_linear_out_channels(nn.LazyLinear(4), [0])


def test_layers_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        layer = nn.Linear(4, 6)
    with pytest.raises(InputError, match="inference_mode"):
        pf.prune_linear_out_channels(layer, [0])


def test_a_failure_half_way_changes_nothing() -> None:
    """The weight could be cut, the bias could not: neither is."""
    layer = nn.Linear(4, 6)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
    with pytest.raises(InputError, match="bias"):
        pf.prune_linear_out_channels(layer, [0])
    assert (layer.weight.shape, layer.out_features) == ((6, 4), 6)


# The functions as names for a side of a layer


@pytest.mark.parametrize(
    ("layer", "stem"),
    [
        (nn.Conv2d(4, 8, 3), "conv"), (nn.ConvTranspose1d(4, 8, 3), "conv"), (nn.Conv2d(4, 8, 3, groups=4), "conv"),
        (nn.Conv2d(4, 4, 3, groups=4), "depthwise_conv"), (nn.Conv2d(1, 1, 3), "conv"), (nn.Linear(2, 2), "linear"),
        (nn.BatchNorm3d(2), "batchnorm"), (nn.SyncBatchNorm(2), "batchnorm"), (nn.InstanceNorm2d(2), "instancenorm"),
        (nn.LayerNorm(2), "layernorm"), (nn.RMSNorm(2), "layernorm"), (nn.GroupNorm(1, 2), "groupnorm"),
        (nn.PReLU(2), "prelu"), (nn.Embedding(2, 2), "embedding"), (nn.LSTM(2, 2), "lstm"), (nn.GRU(2, 2), "gru"),
        (nn.RNN(2, 2), "rnn"), (nn.MultiheadAttention(2, 1), "multihead_attention"),
        (nn.Parameter(torch.zeros(2)), "parameter"),
    ],
)  # fmt: skip
def test_every_layer_finds_its_functions(layer, stem) -> None:
    out, into = pf.functions_for(layer)
    assert (out.__name__, into.__name__) == (f"prune_{stem}_out_channels", f"prune_{stem}_in_channels")
    assert pf.is_out_channel_fn(out)
    assert not pf.is_out_channel_fn(into)
    assert pf.is_in_channel_fn(into)
    assert not pf.is_in_channel_fn(out)


def test_layers_without_channels_find_none() -> None:
    assert pf.functions_for(nn.ReLU()) is None
    assert not pf.is_out_channel_fn(len)
    assert not pf.is_in_channel_fn(len)


def test_every_public_function_says_whose_the_dependencies_are() -> None:
    named = [getattr(pf, name) for name in pf.__all__ if name.startswith("prune_")]
    assert len(named) == 2 * 14
    for function in named:
        said = function.__doc__ or ""
        assert "the caller's" in said or "the same as `prune_" in said.lower(), function.__name__


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(float(width)))


class ScalePruner(pf.BasePruningFunc):
    TARGET_MODULES = Scale

    def prune_out_channels(self, layer, idxs):
        left = keep(layer.weight.numel(), idxs)
        layer.weight = self._prune_parameter_and_grad(layer.weight, left, 0)
        return layer

    def get_out_channels(self, layer) -> int:
        return layer.weight.numel()

    prune_in_channels = prune_out_channels
    get_in_channels = get_out_channels


def test_a_custom_pruner_prunes_and_names_both_sides() -> None:
    pruner, layer = ScalePruner(), Scale(4)
    assert pruner(layer, [0], dry_run=True).weight.numel() == 4
    assert torch.equal(pruner(layer, [3, 0], inplace=False).weight.detach(), torch.tensor([1.0, 2.0]))
    assert pruner(layer, [1], to_output=False) is layer
    assert torch.equal(layer.weight.detach(), torch.tensor([0.0, 2.0, 3.0]))
    assert pf.is_out_channel_fn(pruner.prune_out_channels)
    assert pf.is_in_channel_fn(pruner.prune_in_channels)
    assert not pf.is_in_channel_fn(pruner.get_in_channels)
    assert (pruner.get_in_channel_groups(layer), pruner.get_out_channel_groups(layer)) == (1, 1)


@pytest.mark.parametrize(("layer", "idxs"), [(nn.Linear(2, 2), [0]), (Scale(4), [4]), (Scale(4), range(4))])
def test_a_custom_pruner_refuses(layer, idxs) -> None:
    with pytest.raises(InputError, match="ScalePruner"):
        ScalePruner()(layer, idxs)


def test_a_custom_pruner_must_say_all_four() -> None:
    with pytest.raises(TypeError, match="abstract"):
        pf.BasePruningFunc()


def rows(tensor: Tensor) -> list[float]:
    return tensor.detach()[:, 0].tolist()


def test_gates_are_cut_row_by_row() -> None:
    """The incumbent indexes the four stacked gates of an LSTM as if they were one."""
    layer = nn.LSTM(1, 3)
    layer.weight_ih_l0.data = torch.arange(12.0).reshape(12, 1)
    assert rows(pf.prune_lstm_out_channels(layer, [1]).weight_ih_l0) == [0, 2, 3, 5, 6, 8, 9, 11]
