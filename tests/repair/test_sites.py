"""Every multiplication in one form: rows of inputs times the matrix of its weight are the rows of its output."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prunus.repair.sites import Region, locate
from prunus.repair.watch import Use, Watch, Weights


def uses_of(model: nn.Module, x: torch.Tensor) -> list[tuple[Use, torch.Tensor]]:
    found = []
    with torch.inference_mode(), Watch(Weights(model), after=lambda *a: found.append((a[5], a[4])) if a[5] else None):
        model(x)
    return found


class Conv1D(nn.Module):
    """As transformers has it: inputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 10)), nn.Parameter(torch.randn(10))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, 6), self.weight).view(*x.shape[:-1], 10)


class Half(nn.Module):
    """Reads a weight in another dtype, and only a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 6))

    def forward(self, x):
        return F.linear(x.double(), self.weight.to(torch.float64)[4:9])


CALLS = {
    "linear": (lambda: nn.Linear(6, 10), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 10, bias=False), (5, 6)),
    "inputs first": (Conv1D, (2, 3, 6)),
    "part of a cast": (Half, (2, 3, 6)),
    "conv": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 6)),
    "1x1": (lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 7, 6)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 6)),
    "strided, dilated, uneven": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (2, 1)), (2, 4, 9, 8)),
    "same": (lambda: nn.Conv2d(4, 6, 4, padding="same", dilation=2), (2, 4, 9, 8)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 7, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 6)),
    "1d": (lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2), (2, 4, 11)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 2, 4, 5, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (2, 4, 4, 5)),
    "transposed, grouped, dilated": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, dilation=2), (2, 4, 4, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 4, 3, padding=1), (2, 4, 5)),
}


@pytest.mark.parametrize("name", CALLS)
def test_rows_times_matrix_are_the_output(name) -> None:
    build, shape = CALLS[name]
    model = build()
    [(use, output)] = uses_of(model, torch.randn(shape))
    call = use.call
    samples, each = call.positions(output)
    picked = torch.randperm(samples * each)[: samples * each - 1]
    rows = call.prepared()(picked, call.places(output))
    matrix = call.matrix(call.weight.detach())
    found = (rows @ matrix.transpose(1, 2)).transpose(0, 1).flatten(1)
    if call.bias is not None:
        found = found + call.bias
    assert torch.allclose(found, call.out_rows(output, picked), atol=1e-5)
    assert torch.equal(call.unmatrix(matrix), call.weight)


def test_the_part_that_an_op_reads_is_found() -> None:
    [(use, _)] = uses_of(Half(), torch.randn(2, 6))
    assert use.key.name == "weight"
    assert use.region == Region((0, 1), (4, 0), (5, 6))


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (lambda w: w, Region((0, 1, 2), (0, 0, 0), (4, 6, 3))),
        (lambda w: w.permute(2, 0, 1), Region((2, 0, 1), (0, 0, 0), (3, 4, 6))),
        (lambda w: w[1:3, 2:, 1:2], Region((0, 1, 2), (1, 2, 1), (2, 4, 1))),
        (lambda w: w[::2], None),
        (lambda w: w.flatten(1), None),
    ],
)
def test_views_are_located(view, expected) -> None:
    weight = torch.arange(72.0).view(4, 6, 3)
    region = locate(view(weight), weight)
    assert region == expected
    assert region is None or torch.equal(region.of(weight), view(weight))


def test_attention_reads_its_projections() -> None:
    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
            self.packed = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.packed(self.inner(x, x[..., :6], x[..., :6])[0], x, x)[0]

    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        names = [use.key.name for use, _ in uses_of(Self().eval(), torch.randn(2, 5, 8))]
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert names[:4] == [*(f"inner.{k}_proj_weight" for k in "qkv"), "inner.out_proj.weight"]
    assert names[4:] == ["packed.in_proj_weight", "packed.in_proj_weight", "packed.out_proj.weight"]
