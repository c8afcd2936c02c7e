"""Networks of other kinds: state spaces, Fourier mixing and operators, gated restoration, adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus as tp

TOKENS = torch.randint(0, 50, (1, 9))


class Answer(nn.Module):
    """A language model that returns a single tensor."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x, **self.options)[0]


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
STATE = {**SMALL, "state_size": 4, "time_step_rank": 2}
HEADS = {**SMALL, "state_size": 4, "num_heads": 4, "head_dim": 8, "chunk_size": 4}
SEQUENCE_MODELS = [
    pytest.param("Mamba", "MambaForCausalLM", STATE, id="mamba"),
    pytest.param("FalconMamba", "FalconMambaForCausalLM", STATE, id="falcon-mamba"),
    pytest.param("Mamba2", "Mamba2ForCausalLM", {**HEADS, "n_groups": 1}, id="mamba2"),
    pytest.param("Mamba2", "Mamba2ForCausalLM", {**HEADS, "n_groups": 2}, id="mamba2-groups"),
    pytest.param("Rwkv", "RwkvForCausalLM", {**SMALL, "attention_hidden_size": 16, "context_length": 16}, id="rwkv"),
    pytest.param("FNet", "FNetModel", {**SMALL, "intermediate_size": 32, "max_position_embeddings": 32}, id="fnet"),
]


@pytest.mark.parametrize(("config", "model", "sizes"), SEQUENCE_MODELS)
def test_sequence_models(oracle, config, model, sizes) -> None:
    """Scans, convolutions and transforms over time leave the channels free."""
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, model)(getattr(transformers, config + "Config")(**sizes))
    options = {} if config == "FNet" else {"use_cache": False}
    assert oracle(Answer(made, **options), TOKENS).share > 0.9


def test_adapters_of_peft(oracle) -> None:
    """LoRA layers around a frozen base are cut with it, and their ranks on their own."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    plain = oracle(Answer(base, use_cache=False), TOKENS).bundles
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    assert oracle(Answer(adapted, use_cache=False), TOKENS).bundles == plain + 2 * 3 * 4


class SpectralConv(nn.Module):
    """Channels mixed at each of the lowest frequencies, with complex weights."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes, self.width = modes, width
        self.weight = nn.Parameter(torch.randn(width, width, modes, modes, dtype=torch.cfloat) / width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, _, h, w = x.shape
        m = self.modes
        out = torch.zeros(b, self.width, h, w // 2 + 1, dtype=torch.cfloat)
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", torch.fft.rfft2(x)[:, :, :m, :m], self.weight)
        return torch.fft.irfft2(out, s=(h, w))


class FourierOperator(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.lift, self.out = nn.Linear(3, width), nn.Linear(width, 1)
        self.spectral = nn.ModuleList(SpectralConv(width, 3) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lift(x).permute(0, 3, 1, 2)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        return self.out(x.permute(0, 2, 3, 1))


def test_fourier_neural_operator(oracle) -> None:
    """Complex weights are permuted, silenced and cut like real ones."""
    model = FourierOperator()
    found = oracle(model, torch.randn(2, 8, 8, 3))
    assert (found.bundles, found.share > 0.99) == (24, True)
    tp.prune(model, torch.randn(2, 8, 8, 3), tp.Target(ratio=0.5))
    assert model.spectral[0].weight.shape == (4, 4, 3, 3)
    assert model.spectral[0].weight.is_complex()


class Gated(nn.Module):
    """The block of NAFNet: gates of two halves, a depthwise convolution, attention over channels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.GroupNorm(1, c), nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.deep = nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c)
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))
        self.scale = nn.Parameter(torch.ones(1, c, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.deep(self.wide(self.norm(x))).chunk(2, 1)
        y = a * b
        return x + self.narrow(y * self.attention(y)) * self.scale


class Restoration(nn.Module):
    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, 3, 3, padding=1)
        self.outer, self.inner = Gated(c), Gated(2 * c)
        self.down = nn.Conv2d(c, 2 * c, 2, 2)
        self.up = nn.Sequential(nn.Conv2d(2 * c, 4 * c, 1, bias=False), nn.PixelShuffle(2))
        self.side = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * c, c, 1), nn.Upsample(scale_factor=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.outer(self.first(x))
        return self.last(self.up(self.inner(self.down(y))) + y + self.side(y)) + x


def test_restoration_with_pixel_shuffles(oracle) -> None:
    assert oracle(Restoration(), torch.randn(1, 3, 8, 8)).share > 0.99
