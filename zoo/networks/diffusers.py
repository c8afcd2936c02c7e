"""Diffusers: the networks of diffusion pipelines from small configurations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo.network import Builder, Network, Table


def _make(kind: str, inputs: Callable[[], dict[str, Any]], **options: Any) -> Builder:
    def build() -> Network:
        import diffusers

        return Network(getattr(diffusers, kind)(**options), {**inputs(), "return_dict": False})

    return build


def _noisy(channels: int = 3, size: int = 16, **more: Any) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        made = {key: value() for key, value in more.items()}
        return {"sample": torch.randn(1, channels, size, size), "timestep": torch.tensor([10]), **made}

    return inputs


def _image(channels: int = 3, size: int = 16) -> Callable[[], dict[str, Any]]:
    return lambda: {"sample": torch.randn(1, channels, size, size)}


def _text() -> torch.Tensor:
    return torch.randn(1, 5, 24)


def _transformed(channels: int, size: int, **more: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    def inputs() -> dict[str, Any]:
        made = {key: value() for key, value in more.items()}
        return {"hidden_states": torch.randn(1, channels, size, size), "timestep": torch.tensor([10]), **made}

    return inputs


UNET = {"sample_size": 16, "layers_per_block": 1, "norm_num_groups": 4}
AUTOENCODER = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def table() -> Table:
    """Every network of the family, by name."""
    conditioned = {
        **UNET,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
    }
    return {
        "unet_2d": _make(
            "UNet2DModel",
            _noisy(),
            **UNET,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
        ),
        "unet_2d_plain": _make(
            "UNet2DModel",
            _noisy(),
            **UNET,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            add_attention=False,
        ),
        "unet_2d_skip": _make(
            "UNet2DModel",
            _noisy(),
            **{**UNET, "norm_num_groups": None},
            block_out_channels=(32, 64),
            down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            time_embedding_type="fourier",
        ),
        "unet_2d_condition": _make("UNet2DConditionModel", _noisy(4, encoder_hidden_states=_text), **conditioned),
        "unet_2d_condition_linear": _make(
            "UNet2DConditionModel",
            _noisy(4, encoder_hidden_states=_text),
            **conditioned,
            use_linear_projection=True,
            transformer_layers_per_block=2,
        ),
        "unet_1d": _make(
            "UNet1DModel",
            lambda: {"sample": torch.randn(1, 14, 16), "timestep": torch.tensor([10])},
            sample_size=16,
            in_channels=14,
            out_channels=14,
            extra_in_channels=0,
            time_embedding_type="positional",
            use_timestep_embedding=True,
            flip_sin_to_cos=False,
            freq_shift=1.0,
            block_out_channels=(32, 64),
            down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"),
            up_block_types=("UpResnetBlock1D",),
            mid_block_type="MidResTemporalBlock1D",
            out_block_type="OutConv1DBlock",
            act_fn="mish",
            layers_per_block=1,
            downsample_each_block=False,
        ),
        "autoencoder_kl": _make("AutoencoderKL", _image(), **AUTOENCODER),
        "autoencoder_tiny": _make(
            "AutoencoderTiny",
            _image(),
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            num_encoder_blocks=(1, 2),
            num_decoder_blocks=(2, 1),
        ),
        "vq": _make("VQModel", _image(), **AUTOENCODER, num_vq_embeddings=12),
        "dit": _make(
            "DiTTransformer2DModel",
            _transformed(4, 8, class_labels=lambda: torch.tensor([1])),
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
            norm_num_groups=4,
        ),
        "pixart": _make(
            "PixArtTransformer2DModel",
            _transformed(
                4,
                8,
                encoder_hidden_states=_text,
                added_cond_kwargs=lambda: {"resolution": None, "aspect_ratio": None},
            ),
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            cross_attention_dim=32,
            caption_channels=24,
            norm_num_groups=4,
            use_additional_conditions=False,
        ),
        "sd3": _make(
            "SD3Transformer2DModel",
            _transformed(4, 8, encoder_hidden_states=_text, pooled_projections=lambda: torch.randn(1, 12)),
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=12,
            out_channels=4,
            pos_embed_max_size=8,
        ),
        "lumina2": _make(
            "Lumina2Transformer2DModel",
            lambda: {
                "hidden_states": torch.randn(2, 4, 16, 16),
                "encoder_hidden_states": torch.randn(2, 16, 32),
                "timestep": torch.rand(2),
                "encoder_attention_mask": torch.ones(2, 16, dtype=torch.bool),
            },
            sample_size=16,
            patch_size=2,
            in_channels=4,
            hidden_size=24,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 128, 128),
            cap_feat_dim=32,
        ),
        "prior": _make(
            "PriorTransformer",
            lambda: {
                "hidden_states": torch.randn(1, 24),
                "timestep": torch.tensor([10]),
                "proj_embedding": torch.randn(1, 24),
                "encoder_hidden_states": torch.randn(1, 5, 24),
            },
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            embedding_dim=24,
            num_embeddings=5,
            additional_embeddings=4,
        ),
        "transformer_2d": _make(
            "Transformer2DModel",
            lambda: {"hidden_states": torch.randn(1, 32, 8, 8), "encoder_hidden_states": _text()},
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=32,
            num_layers=2,
            cross_attention_dim=24,
            norm_num_groups=4,
        ),
        "controlnet": _make(
            "ControlNetModel",
            _noisy(
                4,
                encoder_hidden_states=_text,
                controlnet_cond=lambda: torch.randn(1, 3, 128, 128),
            ),
            **{k: v for k, v in conditioned.items() if k not in {"sample_size", "up_block_types"}},
        ),
        "unet_3d_condition": _make(
            "UNet3DConditionModel",
            lambda: {
                "sample": torch.randn(1, 4, 3, 16, 16),
                "timestep": torch.tensor([10]),
                "encoder_hidden_states": _text(),
            },
            **{
                **conditioned,
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            },
        ),
    }
