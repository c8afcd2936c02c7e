"""Wrapped layers: autograd functions, checkpoints, parametrisations, adapters, compiled and scripted modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import prunus as tp

TOKENS = torch.randn(2, 5, 6)
IMAGE = torch.randn(2, 3, 8, 8)


def around(networks, function, width=8, **members):
    """A linear layer, the function (which calls it), a linear layer."""
    return networks.Net(lambda s, x: s.q(function(s, x)), p=nn.Linear(6, 8), q=nn.Linear(width, 4), **members)


class Gate(torch.autograd.Function):
    """A pointwise function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * torch.tanh(F.softplus(x))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class Product(torch.autograd.Function):
    """A linear layer with a backward of its own."""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return x @ weight.t() + bias

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


def inner():
    return nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 8))


def scaled():
    """A layer whose hooks change what goes in and what comes out."""
    layer = nn.Linear(8, 8)
    layer.scale = nn.Parameter(torch.randn(8))
    layer.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    layer.register_forward_hook(lambda m, args, out: out * m.scale)
    return layer


def compiled_in_place():
    layer = nn.Linear(8, 8)
    layer.compile(backend="eager")
    return layer


WRAPPED = [
    pytest.param(lambda s, x: Gate.apply(s.p(x)), None, 8, id="autograd-function"),
    pytest.param(lambda s, x: Product.apply(x, s.p.weight, s.p.bias), None, 8, id="autograd-product"),
    pytest.param(lambda s, x: checkpoint(s.m, s.p(x), use_reentrant=True), inner, 26, id="checkpoint-reentrant"),
    pytest.param(lambda s, x: checkpoint(s.m, s.p(x), use_reentrant=False), inner, 26, id="checkpoint"),
    pytest.param(
        lambda s, x: checkpoint_sequential(s.m, 2, s.p(x), use_reentrant=False), inner, 26, id="checkpoint-sequential"
    ),
    pytest.param(lambda s, x: s.m(s.p(x)), scaled, 16, id="hooks"),
    pytest.param(lambda s, x: s.m(s.p(x)), lambda: nn.DataParallel(nn.Linear(8, 8)), 16, id="data-parallel"),
    pytest.param(lambda s, x: s.m(s.p(x)), lambda: torch.jit.script(nn.Sequential(nn.ReLU())), 8, id="scripted-relu"),
    pytest.param(lambda s, x: s.m(s.p(x)), compiled_in_place, 16, id="compiled-in-place"),
    pytest.param(
        lambda s, x: s.m(s.p(x)), lambda: torch.compile(nn.Linear(8, 8), backend="eager"), 16, id="compiled-part"
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("function", "make", "bundles"), WRAPPED)
def test_wrapped_layers_are_seen_through(oracle, networks, function, make, bundles) -> None:
    """What runs inside a wrapper is traced like any other code."""
    members = {} if make is None else {"m": make()}
    assert oracle(around(networks, function, **members), TOKENS).bundles == bundles


def test_a_compiled_model_is_pruned(oracle) -> None:
    model = torch.compile(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), backend="eager")
    assert oracle(model, TOKENS).bundles == 8


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrap", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(2, 8))], ids=["script", "trace"]
)
def test_scripted_layers_are_refused(networks, wrap) -> None:
    """TorchScript hides its tensors; the error says what to do, for a part and for the whole model."""
    model = around(networks, lambda s, x: s.m(s.p(x)), m=wrap(nn.Linear(8, 8)))
    for target, inputs in ((model, TOKENS), (model.m, torch.randn(2, 8))):
        with pytest.raises(tp.InputError, match="prune the Python module"):
            tp.prune(target, inputs, tp.Target(ratio=0.5))


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_stay_and_say_why(networks) -> None:
    """The layers around a quantised one keep the widths that it needs."""
    small = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})
    model = around(networks, lambda s, x: s.m(s.p(x)), m=small)
    with pytest.raises(tp.NothingToPruneError, match="linear_dynamic"):
        tp.prune(model, TOKENS, tp.Target(ratio=0.5))
    whole = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 8)), {nn.Linear})
    with pytest.raises(tp.PrunusError, match="quantised"):
        tp.verify(whole, TOKENS)


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def twice(layer):
    parametrize.register_parametrization(layer, "weight", Twice())
    return layer


PARAMETRISED = [
    pytest.param(parametrizations.weight_norm, id="weight_norm"),
    pytest.param(lambda m: parametrizations.weight_norm(m, dim=1), id="weight_norm-dim-1"),
    pytest.param(lambda m: parametrizations.weight_norm(m, dim=None), id="weight_norm-whole"),
    pytest.param(parametrizations.spectral_norm, id="spectral_norm"),
    pytest.param(twice, id="own"),
    pytest.param(nn.utils.weight_norm, id="old-weight_norm"),
    pytest.param(nn.utils.spectral_norm, id="old-spectral_norm"),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("wrap", PARAMETRISED)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_parametrised_layers_are_cut_in_their_originals(oracle, wrap, kind) -> None:
    """Both sides of the layer are pruned, the attributes follow, and the parametrisation can still be removed."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), wrap(kind(8, 6, 3)), nn.ReLU(), nn.Conv2d(6, 4, 3))
    assert oracle(model, IMAGE).bundles == 14
    tp.prune(model, IMAGE, tp.Target(ratio=0.5))
    layer = model[2]
    assert (layer.in_channels, layer.out_channels) == (4, 3)
    assert tuple(layer.weight.shape[:2]) == ((3, 4) if kind is nn.Conv2d else (4, 3))
    expected = model(IMAGE)
    if parametrize.is_parametrized(layer):
        parametrize.remove_parametrizations(layer, "weight")
    assert torch.allclose(model(IMAGE), expected, atol=1e-6)
    model.train()(IMAGE).sum().backward()


def test_groups_of_a_parametrised_layer_are_found_by_the_layer() -> None:
    """The face that users know names the layer, not the tensors of its parametrisation."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), parametrizations.weight_norm(nn.Conv2d(8, 6, 3)), nn.Conv2d(6, 4, 3)
    ).eval()
    graph = tp.DependencyGraph().build_dependency(model, IMAGE)
    group = graph.get_pruning_group(model[1], tp.prune_conv_out_channels, [1, 4])
    assert [dep.target.name for dep, _ in group] == ["1", "2"]
    group.prune()
    assert (model[1].out_channels, model[2].in_channels) == (4, 4)
    assert model(IMAGE).shape == (2, 4, 2, 2)


def test_orthogonal_layers_keep_what_is_computed_as_a_whole(oracle) -> None:
    """A matrix exponential keeps its size, and what it is multiplied with may lose rows."""
    model = nn.Sequential(
        nn.Linear(6, 8), parametrizations.orthogonal(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 3)
    )
    assert oracle(model, TOKENS).bundles == 16


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layer_with_weight_norm(oracle, networks, kind) -> None:
    layer = parametrizations.weight_norm(kind(8, 10, batch_first=True), "weight_hh_l0")
    model = around(networks, lambda s, x: s.l(s.p(x))[0], width=10, l=layer)
    found = oracle(model, TOKENS)
    assert found.bundles == 18
    assert found.share > 0.9


class Adapted(nn.Module):
    """A frozen layer plus a product of two thin ones."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = layer.requires_grad_(False)
        self.a, self.b = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 2.0 * self.b(self.a(x))


def test_adapters_are_pruned_with_their_layer(oracle) -> None:
    """Both sides of the adapter follow its base, and its rank is a group of its own."""
    model = nn.Sequential(Adapted(nn.Linear(6, 8)), nn.ReLU(), Adapted(nn.Linear(8, 4)))
    found = oracle(model, TOKENS)
    assert found.bundles == 16
    tp.prune(model, TOKENS, tp.Target(ratio=0.5))
    assert model[0].b.out_features == model[2].a.in_features == 4
    assert model[0].a.out_features == 2


class Flexible(nn.Module):
    """Attention whose scores are changed by a function, with shared keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.shared, self.slope = 4, 2, nn.Parameter(torch.rand(()))
        self.q, self.kv, self.out = nn.Linear(6, 24), nn.Linear(6, 24), nn.Linear(24, 5)

    def forward(self, x):
        n, t, _ = x.shape
        q = self.q(x).view(n, t, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(n, t, 2, self.shared, -1).permute(2, 0, 3, 1, 4)
        y = flex_attention(q, k, v, lambda score, b, h, i, j: score + (i - j) * self.slope, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(n, t, -1))


def test_flex_attention_is_looked_into(oracle) -> None:
    """The function between scores and softmax is traced too: heads and head dims go as in any other attention."""
    found = oracle(Flexible(), TOKENS)
    assert found.frozen == {"q.weight:1", "kv.weight:1", "out.weight:0", "out.bias:0"}
    assert (found.groups, found.model.heads) == (3, 4)


class MaskedFlexible(nn.Module):
    """The same under a mask that knows no heads, some of which a slope of their own may bend."""

    def __init__(self, padded: bool, sloped: bool) -> None:
        super().__init__()
        self.heads, self.shared, self.padded = 4, 2, padded
        self.slopes = nn.Parameter(torch.rand(4)) if sloped else None
        self.q, self.kv, self.out = nn.Linear(6, 24), nn.Linear(6, 24), nn.Linear(24, 5)

    def forward(self, x):
        n, t, _ = x.shape
        lengths = torch.tensor([t, t - 1], device=x.device)
        q = self.q(x).view(n, t, self.heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(n, t, 2, self.shared, -1).permute(2, 0, 3, 1, 4)

        def seen(b, h, i, j):
            return (i >= j) & (j < lengths[b]) if self.padded else i >= j

        def bent(score, b, h, i, j):
            return score + (i - j) * self.slopes[h]

        mask = create_block_mask(seen, n if self.padded else None, None, t, t, device=str(x.device))
        y = flex_attention(q, k, v, bent if self.slopes is not None else None, mask, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(n, t, -1))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sloped", [False, True])
def test_heads_go_under_a_mask_that_knows_no_heads(oracle, padded, sloped) -> None:
    """What a vectorised function gives for all heads alike follows their number."""
    found = oracle(MaskedFlexible(padded, sloped), TOKENS)
    assert found.frozen == {"q.weight:1", "kv.weight:1", "out.weight:0", "out.bias:0"}
    model = MaskedFlexible(padded, sloped)
    tp.prune(model, TOKENS, tp.Target(ratio=0.5), prune_num_heads=True, prune_head_dims=False)
    assert (model.heads, model.shared, model.q.out_features) == (2, 1, 12)


def test_what_is_mapped_over_a_width_follows_it(oracle, networks) -> None:
    def forward(s, x):
        y = s.p(x)
        return y * torch.vmap(lambda row: x.mean(), in_dims=-1)(y) * torch.vmap(lambda w: 1 - w * x.sum())(s.w)

    assert oracle(around(networks, forward, w=nn.Parameter(torch.randn(8))), TOKENS).bundles == 8


class Branching(nn.Module):
    """One of two branches, by the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.other, self.last = (nn.Linear(a, b) for a, b in ((6, 8), (8, 8), (8, 8), (8, 4)))

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.cond(x.sum() > -1e9, lambda y: self.one(y).relu(), self.other, (x,)))


def test_the_branch_that_cond_takes_is_looked_into() -> None:
    report = tp.verify(Branching().eval(), TOKENS)
    assert report.ok
    assert not report.unsupported


class Observed(nn.Module):
    """Weights quantised with ranges that are observed as it runs, also in eval mode."""

    def __init__(self, per_channel: bool) -> None:
        super().__init__()
        self.per_channel = per_channel
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        count = 8 if per_channel else 1
        for name, kind in (("low", torch.float), ("high", torch.float), ("scale", torch.float), ("zero", torch.int)):
            self.register_buffer(name, torch.ones(count).to(kind))
        self.register_buffer("on", torch.ones(1, dtype=torch.long))

    def forward(self, x):
        ranges = (self.low, self.high, self.scale, self.zero, 0.01, -128, 127, 0, self.per_channel)
        weight = torch.fused_moving_avg_obs_fake_quant(self.first.weight, self.on, self.on, *ranges)
        return self.last(F.linear(x, weight, self.first.bias))


def test_an_op_that_writes_to_several_tensors_leaves_them_as_they_were(model_state, states_equal) -> None:
    model = Observed(per_channel=False).eval()
    before = model_state(model)
    graph = tp.DependencyGraph().build_dependency(model, TOKENS)
    assert states_equal(before, model_state(model))
    assert len(graph.get_pruning_group(model.first, tp.prune_linear_out_channels, [1])) > 1


def test_ranges_of_channels_follow_them() -> None:
    """Scales and zero points, which are whole numbers, are of the channels that are left."""
    model = Observed(per_channel=True).eval()
    report = tp.verify(model, TOKENS)
    assert report.ok
    assert report.groups == 1
    tp.prune(model, TOKENS, tp.Target(ratio=0.5))
    assert [len(t) for t in (model.first.bias, model.low, model.high, model.scale, model.zero)] == [4, 4, 4, 4, 4]
    model(TOKENS).sum().backward()


class Apart(Observed):
    """The zero points are kept by another module than the scales."""

    def __init__(self) -> None:
        super().__init__(per_channel=True)
        del self.zero
        self.zeros = nn.Module()
        self.zeros.register_buffer("zero", torch.zeros(8, dtype=torch.int))

    def forward(self, x):
        weight = torch.fake_quantize_per_channel_affine(self.first.weight, self.scale, self.zeros.zero, 0, -128, 127)
        return self.last(F.linear(x, weight, self.first.bias))


def test_channels_with_zero_points_of_their_own_stay_and_the_cure_is_told() -> None:
    report = tp.verify(Apart().eval(), TOKENS)
    assert report.prunable_share == 0
    assert "prune before preparing quantisation" in report.frozen
    assert not report.unsupported


def prepared(run: bool, on: bool, fused: bool) -> nn.Module:
    """A model as torch prepares it for training that knows it will be quantised, with a range for each channel."""
    from torch.ao import quantization

    convs = [(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), (nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU())]
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(12, 4)
    model = nn.Sequential(*(layer for conv in convs for layer in conv), *pooled)
    model = nn.Sequential(quantization.QuantStub(), *model, quantization.DeQuantStub()).train()
    model.qconfig = quantization.get_default_qat_qconfig("x86", version=1 if fused else 0)
    quantization.fuse_modules_qat(model, [["1", "2", "3"], ["4", "5", "6"]], inplace=True)
    quantization.prepare_qat(model, inplace=True)
    if run:
        model(IMAGE)
    if not on:
        model.apply(quantization.disable_observer)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("run", "on", "fused"), [(True, True, True), (True, True, False), (True, False, False), (False, True, True)]
)
def test_a_model_prepared_for_quantisation_is_pruned_trained_and_converted(
    run, on, fused, model_state, states_equal
) -> None:
    """Its observers see the channels that are left, also before they have seen anything; then torch quantises it."""
    from torch.ao import quantization

    model = prepared(run, on, fused).eval()
    before = model_state(model)
    report = tp.verify(model, IMAGE)
    assert report.ok
    assert report.prunable_share > 0.9
    assert states_equal(before, model_state(model))
    tp.prune(model, IMAGE, tp.Target(ratio=0.5)).undo()
    assert states_equal(before, model_state(model))
    tp.prune(model, IMAGE, tp.Target(ratio=0.5))
    model.train()(IMAGE).square().mean().backward()
    sizes = [len(t) for name, t in model.named_buffers() if name.endswith("weight_fake_quant.zero_point")]
    assert sizes == [4, 6, 4]
    if on:  # ranges that the run does not read keep their sizes
        assert quantization.convert(model.eval())(IMAGE).shape == (2, 4)


@pytest.mark.filterwarnings("ignore")
def test_observers_that_count_values_keep_nothing() -> None:
    from torch.ao import quantization

    model = nn.Sequential(quantization.QuantStub(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    quantization.prepare(model, inplace=True)
    model(TOKENS)
    assert tp.verify(model, TOKENS).ok
    tp.prune(model, TOKENS, tp.Target(ratio=0.5))
    assert model[1].out_features == 4
