"""Grouped and depthwise convolutions in every combination: property tests."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import prunus


class Chain(nn.Module):
    """Drawn layers between a first and a last convolution."""

    def __init__(self, layers: list[tuple[str, int, int]], affine: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.layers, self.kinds = nn.ModuleList(), []
        width = 8
        for kind, groups, times in layers:
            groups = groups if width % groups == 0 else 1  # noqa: PLW2901
            if kind in ("conv", "transposed", "dilated"):
                made = groups * times if width < 32 else width
                options = {"padding": 2, "dilation": 2} if kind == "dilated" else {"padding": 1}
                layer = nn.ConvTranspose2d if kind == "transposed" else nn.Conv2d
                self.layers.append(layer(width, made, 3, groups=groups, **options))
                width = made
            elif kind == "depthwise":
                self.layers.append(nn.Conv2d(width, width * times, 3, padding=1, groups=width))
                width *= times
            elif kind == "norm":
                self.layers.append(nn.GroupNorm(groups, width, affine=affine))
            elif kind == "shuffle":
                self.layers.append(nn.ChannelShuffle(groups))
            else:  # cat
                self.layers.append(nn.Conv2d(width, groups, 1))
                width += groups
            self.kinds.append(kind)
        self.last = nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            x = torch.cat([x, layer(x)], 1) if kind == "cat" else layer(x)
        return self.last(F.relu(x))


KINDS = ["conv", "transposed", "dilated", "depthwise", "norm", "shuffle", "cat"]
DRAWN = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([1, 2, 4, 8]), st.integers(1, 3)), max_size=4)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(DRAWN, st.booleans())
def test_any_chain_of_grouped_layers_is_sound(oracle, layers, affine) -> None:
    """Whatever is drawn, what may be removed is removed without changing anything else."""
    with contextlib.suppress(prunus.NothingToPruneError):
        oracle(Chain(layers, affine).double(), torch.randn(2, 3, 6, 6).double())


GROUPED = [
    pytest.param([("conv", 2, 1)], 4, id="one-output-per-group"),
    pytest.param([("conv", 4, 2)], 4, id="groups"),
    pytest.param([("transposed", 2, 1)], 4, id="transposed-one-output-per-group"),
    pytest.param([("transposed", 4, 3)], 5, id="transposed-groups"),
    pytest.param([("depthwise", 8, 1)], 8, id="depthwise"),
    pytest.param([("depthwise", 8, 3)], 3, id="depthwise-multiplier"),
    pytest.param([("cat", 8, 1), ("depthwise", 8, 2)], 2, id="depthwise-after-cat"),
    pytest.param([("shuffle", 2, 1), ("conv", 2, 4)], 6, id="groups-after-shuffle"),
]


@pytest.mark.parametrize(("layers", "bundles"), GROUPED)
def test_as_much_as_expected_can_be_removed(oracle, layers, bundles) -> None:
    assert oracle(Chain(layers, True), torch.randn(2, 3, 6, 6)).bundles == bundles


class FlatKernels(nn.Module):
    """Experts' kernels are kept as vectors, mixed for each picture, and cut out of the mix."""

    def __init__(self, size: int, groups: int = 1) -> None:
        super().__init__()
        self.size, self.groups, self.made = size, groups, 12
        self.first, self.route, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 3), nn.Conv2d(12, 4, 1)
        self.kernels = nn.Parameter(torch.randn(3, 12 * (8 // groups) * size**2))
        self.between = nn.Conv2d(12, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        mixed = self.route(x.mean((2, 3))).sigmoid() @ self.kernels
        kernels = mixed.view(n * self.made, c // self.groups, self.size, self.size)
        y = F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=self.size // 2, groups=n * self.groups)
        return self.last(F.relu(self.between(y.view(n, self.made, h, w))))


@pytest.mark.parametrize(("size", "groups"), [(1, 1), (3, 1), (1, 2), (3, 4)])
def test_kernels_cut_out_of_vectors_are_followed_or_kept(oracle, size, groups) -> None:
    """Such kernels are read as any others: their operations are counted, and no op is reported as unknown."""
    model, pictures = FlatKernels(size, groups), torch.randn(2, 3, 6, 6)
    found = oracle(model, pictures)
    assert not prunus.DependencyGraph().build_dependency(model, pictures).unsupported
    assert "between.weight:0" not in found.frozen
    assert ("first.weight:0" in found.frozen) == (size == 3)


class Standardised(nn.Module):
    """A convolution whose kernels are standardised, each as one vector, before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Conv2d(3, 6, 1), nn.Parameter(torch.randn(8, 6, 3, 3))
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        kernels = self.weight.reshape(1, self.weight.shape[0], -1)
        kernels = F.batch_norm(kernels, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return self.last(F.conv2d(self.first(x), kernels))


def test_channels_that_standardised_kernels_make_can_go(oracle) -> None:
    """Positions inside a kernel are averaged over and stay; whole kernels go."""
    found = oracle(Standardised(), torch.randn(2, 3, 6, 6))
    assert "weight:0" not in found.frozen
    assert "last.weight:1" not in found.frozen
