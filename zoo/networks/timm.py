"""Every module of timm's `models` folder with one of its smallest networks, some with several."""

from __future__ import annotations

from typing import Any

import torch

from zoo.network import Builder, Network, Table

CONVOLUTIONAL = [
    "gernet_s",
    "repvgg_a0",
    "mobileone_s0",
    "test_byobnet",
    "convmixer_768_32",
    "test_convnext",
    "convnextv2_atto",
    "cpubone_nano",
    "csatv2",
    "cs3darknet_s",
    "cspresnet50",
    "cspnext_tiny",
    "davit_tiny",
    "densenet121",
    "dla46_c",
    "dla60_res2net",
    "dpn48b",
    "edgenext_xx_small",
    "efficientnet_lite0",
    "mixnet_s",
    "test_efficientnet",
    "efficientvim_m1",
    "efficientvit_b0",
    "fasternet_t0",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "ghostnet_050",
    "ghostnetv2_100",
    "ghostnetv3_050",
    "hardcorenas_a",
    "hgnet_tiny",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "iformer_t",
    "inception_next_atto",
    "lcnetv2_small",
    "lowformer_b0",
    "mambaout_femto",
    "caformer_s18",
    "poolformer_s12",
    "lcnet_035",
    "mobilenetv3_small_050",
    "nextvit_small",
    "test_nfnet",
    "pvt_v2_b0",
    "rdnet_tiny",
    "regnetx_002",
    "regnety_002",
    "regnetz_005",
    "repghostnet_050",
    "repvit_m0_9",
    "res2net50_14w_8s",
    "resnest14d",
    "test_resnet",
    "resnet10t",
    "ecaresnet26t",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "legacy_seresnet18",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "tiny_vit_5m_224",
    "tresnet_m",
    "ese_vovnet19b_slim_dw",
    "legacy_xception",
    "xception41",
    "crossvit_9_240",
    "sam2_hiera_tiny",
]
"""Networks that take pictures of any size: 64 pixels."""

SIZED = [
    "botnet26t_256",
    "lambda_resnet26t",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "coat_tiny",
    "convit_tiny",
    "efficientformerv2_s0",
    "efficientvit_m0",
    "gcvit_xxtiny",
    "hiera_tiny_224",
    "levit_128s",
    "levit_conv_128s",
    "test_coatnet",
    "test_maxvit",
    "maxxvit_rmlp_nano_rw_256",
    "gmixer_12_224",
    "gmlp_ti16_224",
    "resmlp_12_224",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "nest_tiny",
    "pit_xs_224",
    "sequencer2d_s",
    "mixer_s32_224",
    "mvitv2_tiny",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_ns_224",
    "tnt_s_patch16_224",
    "twins_pcpvt_small",
    "twins_svt_small",
    "visformer_tiny",
    "test_vit",
    "vit_tiny_r_s16_p8_224",
    "test_vit_relpos",
    "vitamin_small_224",
    "volo_d1_224",
    "xcit_nano_12_p16_224",
]
"""Networks that are built for a size of pictures: 64 pixels."""

LARGER = {
    "eca_halonext26ts": 256,
    "bat_resnext26ts": 256,
    "efficientformer_l1": 224,
    "inception_resnet_v2": 128,
    "inception_v3": 128,
    "inception_v4": 128,
}
"""Networks that need larger pictures."""

NARROW = {"embed_dim": 48, "depth": 2, "num_heads": 3}
SMALLER: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"img_size": 64, **NARROW},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, **NARROW},
    "deit3_small_patch16_224": {"img_size": 64, **NARROW},
    "eva02_tiny_patch14_224": {"img_size": 56, **NARROW},
    "vit_tiny_patch16_dinov3_qkvb": {"img_size": 64, **NARROW},
    "vit_tiny_patch16_224": {"img_size": 64, **NARROW},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, **NARROW},
    "vit_base_patch16_siglip_224": {"img_size": 64, **NARROW},
    "samvit_base_patch16_224": {"img_size": 64, **NARROW, "global_attn_indexes": (1,)},
    "naflexvit_base_patch16_gap": {"img_size": 64, **NARROW},
    "qwen3_vit_88m": {"img_size": 64, **NARROW},
    "gemma4_vit_167m": {"img_size": 64, **NARROW},
    "deepseek_vit_412m": {"img_size": 224, **NARROW},
    "vgg11_bn": {},
    "nasnetalarge": {"num_features": 1152, "stem_size": 24},
    "mobilenetv5_300m": {"channel_multiplier": 0.25},
}
"""Networks whose settings are made smaller."""


def _build(name: str, size: int, **options: Any) -> Builder:
    def build() -> Network:
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=10, **options)
        return Network(model, torch.randn(2, 3, size, size))

    return build


def table() -> Table:
    """Every network of the family, by name."""
    found: Table = {name: _build(name, 64) for name in CONVOLUTIONAL}
    found.update({name: _build(name, 64, img_size=64) for name in SIZED})
    found.update({name: _build(name, size) for name, size in LARGER.items()})
    found.update({name: _build(name, options.get("img_size", 64), **options) for name, options in SMALLER.items()})
    return found
