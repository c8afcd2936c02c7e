"""What must not happen to the user's model: ties cut, flags and hooks lost, modes changed, attributes left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunus as tp
from prunus.cost import count, latency

Oracle = Callable[..., Any]
IMAGE = torch.randn(2, 3, 8, 8)


def small() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


class Language(nn.Module):
    """Tokens in, tokens out, one matrix for both."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.mid(x).relu())


def test_tied_weights_stay_tied(oracle: Oracle) -> None:
    model, tokens = Language(), torch.randint(0, 11, (2, 5))
    oracle(model, tokens)
    tp.prune(model, tokens, tp.Target(ratio=0.5))
    assert model.head.weight is model.embed.weight
    assert model.head.weight.shape == (11, 4)
    assert (model.embed.embedding_dim, model.head.in_features) == (4, 4)


def test_a_copied_model_stays_tied() -> None:
    model, tokens = copy.deepcopy(Language()), torch.randint(0, 11, (2, 5))
    tp.prune(model, tokens, tp.Target(ratio=0.5))
    assert model.head.weight is model.embed.weight


def test_a_model_without_gradients_is_pruned_like_any_other() -> None:
    """As checkpoints of detectors are; and tracing inside no_grad and inference_mode gives the same."""
    widths = []
    for prepare in (lambda m: m, lambda m: m.requires_grad_(False)):
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            model = prepare(small())
            with mode():
                result = tp.prune(model, IMAGE, tp.Target(ratio=0.5))
            widths.append((model[0].out_channels, model[3].in_channels, result.after.params))
            assert len({p.requires_grad for p in model.parameters()}) == 1
    assert set(widths) == {(4, 4, widths[0][2])}


def test_frozen_parameters_stay_frozen_and_keep_their_identity() -> None:
    model = small()
    model[0].bias.requires_grad_(False)
    own = {name: id(p) for name, p in model.named_parameters()}
    tp.prune(model, IMAGE, tp.Target(ratio=0.5))
    assert {name: id(p) for name, p in model.named_parameters()} == own
    assert not model[0].bias.requires_grad
    assert model[0].weight.requires_grad
    model.train()(IMAGE).sum().backward()
    assert model[0].bias.grad is None
    assert model[0].weight.grad.shape == model[0].weight.shape


def test_gradients_are_cut_with_their_parameters() -> None:
    model = small()
    model(IMAGE).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    result = tp.prune(model, IMAGE, tp.Target(ratio=0.5))
    assert all(p.grad.shape == p.shape for p in model.parameters())
    result.undo()
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_left_as_found(training: bool) -> None:
    """Each module's own mode, also where they differ."""
    model = small().train(training)
    model[1].train(not training)
    before = [m.training for m in model.modules()]
    statistics = model[1].running_mean.clone()
    tp.DependencyGraph().build_dependency(model, IMAGE)
    tp.verify(model, IMAGE)
    count(model, IMAGE)
    assert [m.training for m in model.modules()] == before
    assert torch.equal(model[1].running_mean, statistics)
    tp.prune(model, IMAGE, tp.Target(ratio=0.5))
    assert [m.training for m in model.modules()] == before


def test_random_state_and_gradient_mode_are_left_as_found() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tp.verify(model, torch.zeros(1, 4))
    assert torch.equal(torch.rand(1), expected)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_hooks_are_kept_and_still_fire() -> None:
    model = small()
    seen: list[tuple[int, ...]] = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    model[0].weight.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    tp.prune(model, IMAGE, tp.Target(ratio=0.5))
    seen.clear()
    model(IMAGE).sum().backward()
    assert seen == [(2, 4, 8, 8), (4, 3, 1, 1)]


def test_memory_format_and_dtype_are_kept() -> None:
    model = small().to(memory_format=torch.channels_last).double()
    tp.prune(model, IMAGE.double(), tp.Target(ratio=0.5))
    assert model[3].weight.dtype == torch.float64
    assert model[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_compiled_model_is_accepted() -> None:
    model = small().eval()
    compiled = torch.compile(model, backend="eager")
    tp.prune(compiled, IMAGE, tp.Target(ratio=0.5))
    assert model[0].out_channels == 4
    assert compiled(IMAGE).shape == (2, 4, 8, 8)


def test_static_attributes_follow(oracle: Oracle) -> None:
    """Sizes that the code keeps in attributes, tuples and config objects are set, as plain ints."""

    class Config:
        def __init__(self) -> None:
            self.hidden_size, self.heads = 16, 4

    class Block(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.config, self.head_dim, self.shape = config, config.hidden_size // config.heads, (4, 4)
            self.pre, self.out = nn.Linear(6, 16), nn.Linear(16, 3)
            self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
            self.hidden_dim = 16

        def forward(self, x: Tensor) -> Tensor:
            x = self.pre(x)
            b, n, c = x.shape
            torch._assert(c == self.hidden_dim, "wrong width")
            q, k, v = self.qkv(x).view(b, n, 3, self.config.heads, self.head_dim).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return self.out(x + self.proj(y.reshape(b, n, self.config.heads * self.head_dim)))

    model, x = Block(Config()), torch.randn(2, 5, 6)
    assert oracle(model, x).share > 0.9
    tp.prune(model, x, tp.Target(ratio=0.5))
    assert model.hidden_dim == model.pre.out_features == 8
    assert model.qkv.out_features == 3 * model.config.heads * model.head_dim < 48
    assert type(model.hidden_dim) is type(model.head_dim) is type(model.config.heads) is int


def test_torchvision_vit_keeps_itself_consistent() -> None:
    """hidden_dim of the whole, num_heads and embed_dim of each block; the class token and the positions are cut too."""
    models = pytest.importorskip("torchvision").models
    model = models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=5).eval()
    x = torch.randn(1, 3, 32, 32)
    tp.prune(model, x, tp.Target(ratio=0.5))
    assert model.hidden_dim == 16
    assert model.class_token.shape == (1, 1, 16)
    assert model.encoder.pos_embedding.shape == (1, 5, 16)
    for layer in model.encoder.layers:
        assert layer.self_attention.embed_dim == 16
        assert layer.self_attention.embed_dim % layer.self_attention.num_heads == 0
    assert model(x).shape == (1, 5)


def test_a_hard_coded_view_is_named_with_file_and_line() -> None:
    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 12), nn.Linear(12, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).view(-1, 12)))

    model, x = Hard(), torch.randn(2, 4)
    graph = tp.DependencyGraph().build_dependency(model, x)
    assert [g[0].dep.target.name for g in graph.get_all_groups()] == ["b"]
    line = Hard.forward.__code__.co_firstlineno + 1
    assert f"{__file__}:{line}" in tp.verify(model, x).frozen
    tp.prune(model, x, tp.Target(ratio=0.5))
    assert (model.a.out_features, model.b.out_features) == (12, 3)
    assert model(x).shape == (2, 2)


def test_a_hard_coded_view_in_a_library_is_named_there() -> None:
    """A package whose folder begins with "torch" (torchvision) is user code too."""
    path = torch.__path__[0] + "vision/made_up.py"
    scope: dict[str, Any] = {}
    exec(compile("def fold(x):\n    return x.view(-1, 12)\n", path, "exec"), scope)

    class Hard(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(scope["fold"](self.a(x)))

    assert f"{path}:2" in tp.verify(Hard(), torch.randn(2, 4)).frozen


def test_outputs_that_are_no_tensors(oracle: Oracle) -> None:
    """A dataclass with a cache object, an int and None: what is no tensor is left alone."""

    class Cache:
        def __init__(self, keys: Tensor) -> None:
            self.keys = keys

    @dataclass
    class Output:
        logits: Tensor
        cache: Cache
        steps: int = 1
        loss: Tensor | None = None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Output:
            y = self.a(x)
            return Output(self.b(y), Cache(y))

    model, x = Net(), torch.randn(2, 4)
    graph = tp.DependencyGraph().build_dependency(model, x, output_transform=lambda out: out.logits)
    assert [g[0].dep.target.name for g in graph.get_all_groups()] == ["a"]
    tp.prune(model, x, tp.Target(ratio=0.5), output_transform=lambda out: out.logits)
    assert model(x).logits.shape == (2, 2)
    assert model.a.out_features == 4


def test_macs_of_functional_ops() -> None:
    """Products and attention that no module owns are counted, in the dense and in the pruned model."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 8))
            self.out = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.weight)
            return self.out(F.scaled_dot_product_attention(y, y, y))

    model, x = Functional(), torch.randn(1, 5, 8)
    linear, attention = 5 * 8 * 16 + 5 * 16 * 8, 2 * 5 * 5 * 16
    assert count(model, x).macs == linear + attention
    result = tp.prune(model, x, tp.Target(ratio=0.5))
    assert result.after.macs == count(model, x).macs == (linear + attention) // 2


def test_latency_on_a_cpu() -> None:
    times = latency({"dense": small()}, IMAGE, repeat=3, warmup=1)
    assert times["dense"] > 0


def test_layers_that_only_train_are_followed_or_reported() -> None:
    """A branch that only training reaches is cut too; one that no run reaches is reported to whoever prunes."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.aux = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            y = self.a(x)
            return (self.b(y), self.aux(y)) if self.training else self.b(y)

    model, x = Auxiliary(), torch.randn(2, 4)
    tp.prune(model, x, tp.Target(ratio=0.5))
    assert model.aux.in_features == 4
    assert [y.shape for y in model.train()(x)] == [(2, 2), (2, 2)]

    class Wanting(Auxiliary):
        def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
            return self.b(self.a(x)) if target is None else self.aux(self.a(x)) - target

    result = tp.prune(Wanting(), x, tp.Target(ratio=0.5))
    assert "aux" in result.frozen()
