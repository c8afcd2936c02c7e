"""Functions that remember their answers hide no size's source from tracing, and remember nothing of it."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import prunus


@lru_cache(256)
def heads_last(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
    """The shape that attention needs, remembered as einops remembers its recipes."""
    return (*shape[:-1], heads, shape[-1] // heads)


@lru_cache
def causal(length: int) -> Tensor:
    """A mask, made once for each length."""
    return torch.full((length, length), float("-inf")).triu(1)


class Attention(nn.Module):
    """Attention whose sizes come from a cached function, with a cached mask."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(8, 3 * width), nn.Linear(width, 5)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(heads_last(tuple(x.shape), self.heads)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, dim=-1))
        mask = causal(x.shape[1])
        return self.out(((q @ k.mT + mask).softmax(-1) @ v).transpose(1, 2).flatten(2))


class OfItsClass(Attention):
    """The same with cached methods."""

    @staticmethod
    @lru_cache(256)
    def shape(shape: tuple[int, ...], heads: int) -> tuple[int, ...]:
        return (*shape[:-1], heads, shape[-1] // heads)

    @lru_cache(256)  # noqa: B019 - as models have it
    def rows(self, heads: int) -> int:
        return heads

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(self.shape(tuple(x.shape), self.rows(self.heads))).transpose(1, 2)


INPUT = torch.randn(2, 6, 8)


@pytest.mark.parametrize("kind", [Attention, OfItsClass])
def test_sizes_from_a_cached_function_are_traced_to_their_source(kind: type[Attention]) -> None:
    """A model that ran before is as prunable as one that never did, though its sizes are remembered as plain ints."""
    model = kind().eval()
    model(INPUT)
    report = prunus.verify(model, INPUT)
    assert report.ok
    assert report.prunable_share > 0.9
    prunus.prune(model, INPUT, prunus.Target(ratio=0.5))
    assert model(INPUT).shape == (2, 6, 5)


def test_cached_functions_remember_no_traced_sizes() -> None:
    """What a cached function answers after tracing are plain ints, and the function itself is back."""
    heads_last.cache_clear()
    before = heads_last
    prunus.DependencyGraph().build_dependency(Attention(), INPUT)
    assert heads_last is before
    assert all(type(size) is int for size in heads_last((2, 6, 32), 4))
    assert heads_last.cache_info().misses == 1


def test_tensors_made_while_tracing_are_not_remembered() -> None:
    """A mask that a cached function made during tracing would be an inference tensor, which training refuses."""
    causal.cache_clear()
    model = Attention()
    prunus.DependencyGraph().build_dependency(model, INPUT)
    scores = torch.zeros(6, 6, requires_grad=True)
    (scores * causal(6).exp()).sum().backward()
    model(INPUT).sum().backward()
    assert scores.grad is not None


class Asks(nn.Module):
    """Asks whether a width is among some, as code that collects features does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x.relu() if x.shape[-1] in frozenset({16, 32}) else x)


@pytest.mark.parametrize(("kind", "times"), [(Asks, 0), (Attention, 1)])
def test_cached_functions_are_looked_for_only_where_they_may_be_asked(monkeypatch, kind, times) -> None:
    """A set remembers no answers; looking for what does takes longer than tracing a small model."""
    found = []
    recall = prunus.tracing.Recall
    monkeypatch.setattr("prunus.tracing.Recall", lambda *args: found.append(args) or recall(*args))
    prunus.DependencyGraph().build_dependency(kind(), INPUT)
    assert len(found) == times
