"""Generated networks: whatever is composed of known blocks, the graph of it proves itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import prunus


class Block(nn.Module):
    """One step of a generated network, chosen by its kind; ``width`` channels come out."""

    def __init__(self, kind: str, into: int, size: int, layers: dict[str, nn.Module], width: int) -> None:
        super().__init__()
        self.kind, self.size, self.out = kind, size, width
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.kind)(x)

    # images -----------------------------------------------------------------------------------------------------

    def conv(self, x):
        return self.n(self.a(x)).relu()

    def residual(self, x):
        return x + self.b(self.n(self.a(x)).relu())

    def halves(self, x):
        left, right = x.chunk(2, 1)
        return self.b(torch.cat([left, right, self.a(right).relu()], 1))

    def uneven(self, x):
        left, right = x.split([self.size, x.shape[1] - self.size], 1)
        return torch.cat([self.b(right), self.a(left)], 1)

    def shuffle(self, x):
        b, c, h, w = x.shape
        return self.a(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))

    def shared(self, x):
        return self.a(self.a(x).relu())

    def gate(self, x):
        return x * self.b(self.a(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    def dense(self, x):
        return torch.cat([x, self.a(F.silu(x))], 1)

    def pyramid(self, x):
        return self.a(F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0)) + self.b(x)

    # sequences --------------------------------------------------------------------------------------------------

    def linear(self, x):
        return F.gelu(self.n(self.a(x)))

    def mlp(self, x):
        return x + self.b(F.gelu(self.a(self.n(x))))

    def glu(self, x):
        value, control = self.a(x).chunk(2, -1)
        return self.b(value * control.sigmoid())

    def recurrent(self, x):
        return self.a(x)[0]

    def attention(self, x):
        b, t, _ = x.shape
        q, k, v = (p(x).view(b, t, self.size, -1).transpose(1, 2) for p in (self.a, self.b, self.c))
        return x + self.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def fused(self, x):
        b, t, _ = x.shape
        q, k, v = self.a(x).reshape(b, t, 3, self.size, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.b(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1))

    def twice(self, x):
        return self.a(self.a(x).relu()) + x


@dataclass(frozen=True)
class Step:
    """A block as data, so that Hypothesis can print and shrink it."""

    kind: str
    width: int
    norm: str
    groups: int


def norm_of(kind: str, width: int) -> nn.Module:
    """A norm over the channels of an image (``bn``, ``gn``) or a sequence (``ln``, ``rms``)."""
    table = {"bn": nn.BatchNorm2d, "gn": lambda c: nn.GroupNorm(2, c), "ln": nn.LayerNorm, "rms": nn.RMSNorm}
    return table[kind](width) if kind in table else nn.Identity()


def image_block(step: Step, c: int) -> Block:
    """The layers of an image block that reads ``c`` channels."""
    w, kind = step.width, step.kind
    conv = nn.Conv2d
    half = c // 2
    made: dict[str, tuple[dict[str, nn.Module], int, int]] = {
        "conv": ({"a": conv(c, w, 3, padding=1, groups=step.groups), "n": norm_of(step.norm, w)}, 0, w),
        "residual": ({"a": conv(c, w, 1), "n": norm_of(step.norm, w), "b": conv(w, c, 3, padding=1)}, 0, c),
        "halves": ({"a": conv(half, half, 3, padding=1), "b": conv(c + half, w, 1)}, 0, w),
        "uneven": ({"a": conv(half // 2, w, 1), "b": conv(c - half // 2, w, 1)}, half // 2, 2 * w),
        "shuffle": ({"a": conv(c, w, 1, groups=step.groups)}, 0, w),
        "shared": ({"a": conv(c, c, 1)}, 0, c),
        "gate": ({"a": conv(c, w, 1), "b": conv(w, c, 1)}, 0, c),
        "dense": ({"a": conv(c, w, 1)}, 0, c + w),
        "pyramid": ({"a": conv(c, w, 1), "b": conv(c, w, 1)}, 0, w),
    }
    layers, size, out = made[kind]
    return Block(kind, c, size, layers, out)


def sequence_block(step: Step, c: int) -> Block:
    """The layers of a sequence block that reads ``c`` channels."""
    w, kind = step.width, step.kind
    linear = nn.Linear
    made: dict[str, tuple[dict[str, nn.Module], int, int]] = {
        "linear": ({"a": linear(c, w), "n": norm_of(step.norm, w)}, 0, w),
        "mlp": ({"n": norm_of(step.norm, c), "a": linear(c, w), "b": linear(w, c)}, 0, c),
        "glu": ({"a": linear(c, 2 * w), "b": linear(w, c)}, 0, c),
        "recurrent": ({"a": nn.GRU(c, w, step.groups, batch_first=True)}, 0, w),
        "attention": ({"a": linear(c, w), "b": linear(c, w), "c": linear(c, w), "d": linear(w, c)}, 2, c),
        "fused": ({"a": linear(c, 3 * w), "b": linear(w, c)}, 2, c),
        "twice": ({"a": linear(c, c)}, 0, c),
    }
    layers, size, out = made[kind]
    return Block(kind, c, size, layers, out)


class Network(nn.Module):
    """A stem, generated blocks, a head."""

    def __init__(self, steps: tuple[Step, ...], image: bool) -> None:
        super().__init__()
        self.image = image
        self.stem = nn.Conv2d(3, 8, 3, padding=1) if image else nn.Linear(6, 8)
        self.blocks = nn.ModuleList()
        c = 8
        for step in steps:
            block = image_block(step, c) if image else sequence_block(step, c)
            self.blocks.append(block)
            c = block.out
        self.head = nn.Linear(c, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3) if self.image else 1))


def steps(kinds: tuple[str, ...], norms: tuple[str, ...]) -> st.SearchStrategy[tuple[Step, ...]]:
    """One to four blocks."""
    one = st.builds(
        Step, st.sampled_from(kinds), st.sampled_from((4, 8, 12)), st.sampled_from(norms), st.sampled_from((1, 2))
    )
    return st.lists(one, min_size=1, max_size=4).map(tuple)


IMAGE = ("conv", "residual", "halves", "uneven", "shuffle", "shared", "gate", "dense", "pyramid")
SEQUENCE = ("linear", "mlp", "glu", "recurrent", "attention", "fused", "twice")
BOUNDED = settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def prove(oracle: Any, network: nn.Module, inputs: torch.Tensor) -> None:
    """Symmetry, removal = silence, undo identity, replay on a copy and plan cost == counted cost (see the oracle)."""
    found = oracle(network, inputs, again=False)
    assert found.result.after.params < found.result.before.params
    assert found.bundles > 0 and found.share > 0


@given(steps(IMAGE, ("bn", "gn", "none")))
@BOUNDED
def test_images(oracle, made) -> None:
    """All four properties hold on every composition of image blocks."""
    torch.manual_seed(0)
    prove(oracle, Network(made, image=True), torch.randn(2, 3, 4, 4))


@given(steps(SEQUENCE, ("ln", "rms", "none")))
@BOUNDED
def test_sequences(oracle, made) -> None:
    """All four properties hold on every composition of sequence blocks."""
    torch.manual_seed(0)
    prove(oracle, Network(made, image=False), torch.randn(2, 3, 6))


@pytest.mark.parametrize("kind", IMAGE + SEQUENCE)
def test_every_block_by_itself(oracle, kind) -> None:
    """Each block alone, and again behind itself, so that a failure above is easy to place."""
    image = kind in IMAGE
    step = Step(kind, 8, "bn" if image else "ln", 2)
    for made in ((step,), (step, step)):
        network = Network(made, image)
        prove(oracle, network, torch.randn(2, 3, 4, 4) if image else torch.randn(2, 3, 6))
        assert prunus.verify(network, torch.randn(2, 3, 4, 4) if image else torch.randn(2, 3, 6)).prunable_share > 0.5
