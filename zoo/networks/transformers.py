"""Architectures of transformers (Hugging Face) from small configurations, with a task head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo.network import Builder, Network, Table

WORDS = 64
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What most configurations of text models call their sizes."""
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
PICTURE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
SEQ2SEQ = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def _run(model: Any, inputs: dict[str, Any]) -> Any:
    """Call a model, and take what its head gives: the encoder's states are no outputs."""
    found = model(**inputs)
    for name in ("logits", "logits_per_image", "prediction_logits", "start_logits", "reconstruction"):
        if (picked := getattr(found, name, None)) is not None:
            if name == "start_logits":
                return picked, found.end_logits
            return picked if getattr(found, "pred_boxes", None) is None else (picked, found.pred_boxes)
    if (masks := getattr(found, "masks_queries_logits", None)) is not None:
        return masks, found.class_queries_logits
    if (depth := getattr(found, "predicted_depth", None)) is not None:
        return depth
    return found


def _make(kind: str, head: str, options: dict[str, Any], inputs: Callable[[], dict[str, Any]]) -> Builder:
    """A model `kind + head` with the configuration `kind + "Config"`."""

    def build() -> Network:
        import transformers

        transformers.logging.set_verbosity_error()
        config = getattr(transformers, f"{kind}Config")(**options)
        for part in (config, *(getattr(config, p, None) for p in ("text_config", "vision_config"))):
            if part is not None:
                part.use_cache = False
        model = getattr(transformers, f"{kind}{head}")(config)
        return Network(model.float(), inputs(), _run)

    return build


def _tokens(length: int = 10, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_ids": torch.randint(3, WORDS, (2, length)), **more}


def _both() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, WORDS, (2, 10)), "decoder_input_ids": torch.randint(3, WORDS, (2, 7))}


def _pixels(size: int = 32, count: int = 2, channels: int = 3) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(count, channels, size, size)}


def _encoders() -> Table:
    cls, masked = "ForSequenceClassification", "ForMaskedLM"
    altered = {"embedding_size": 16}
    table: dict[str, tuple[str, dict[str, Any]]] = {
        "Bert": (cls, {}),
        "Roberta": (cls, {}),
        "XLMRoberta": ("ForTokenClassification", {}),
        "DistilBert": (cls, {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
        "Albert": (cls, altered),
        "Electra": (cls, altered),
        "DebertaV2": (cls, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}),
        "Deberta": (cls, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
        "MPNet": (cls, {}),
        "Camembert": (cls, {}),
        "ConvBert": (cls, {**altered, "conv_kernel_size": 3, "head_ratio": 2}),
        "MobileBert": (cls, {**altered, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
        "SqueezeBert": (cls, {"embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2}),
        "RoFormer": (cls, {"embedding_size": 32}),
        "Nystromformer": (cls, {"num_landmarks": 4, "segment_means_seq_len": 16}),
        "MegatronBert": (cls, {}),
        "Ernie": (cls, {}),
        "IBert": (cls, {}),
        "FNet": (cls, {}),
        "BigBird": (cls, {"attention_type": "original_full"}),
        "Longformer": (cls, {"attention_window": [4, 4]}),
        "ModernBert": (
            cls,
            {"global_attn_every_n_layers": 2, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
        ),
        "Funnel": (cls, {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1]}),
        "XLNet": (cls, {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
        "XLM": (cls, {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": WORDS}),
        "LayoutLM": (cls, {}),
        "Canine": (cls, {"num_hash_buckets": 50, "local_transformer_stride": 8, "type_vocab_size": 2}),
        "Splinter": ("ForQuestionAnswering", {}),
        "Yoso": (masked, {}),
    }
    found = {}
    for kind, (head, options) in table.items():
        length = 16 if kind in {"Nystromformer", "Funnel"} else 32 if kind == "Canine" else 10
        own = {"vocab_size": WORDS} if kind in {"Funnel", "XLNet"} else TEXT
        found[kind.lower()] = _make(kind, head, {**own, **options}, _tokens(length))
    found["bert_masked"] = _make("Bert", masked, TEXT, _tokens())
    found["bert_questions"] = _make("Bert", "ForQuestionAnswering", TEXT, _tokens())
    return found


def _decoders() -> Table:
    gpt = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "rotary_dim": 4}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    state = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    groups = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    table: dict[str, dict[str, Any]] = {
        "GPTNeo": {
            **gpt,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        "GPTNeoX": TEXT,
        "GPTJ": gpt,
        "GPTBigCode": gpt,
        "CodeGen": gpt,
        "OPT": {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
        "Bloom": {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "XGLM": {"vocab_size": WORDS, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
        "Llama": DECODER,
        "Mistral": DECODER,
        "Mixtral": {**DECODER, **EXPERTS},
        "Qwen2": DECODER,
        "Qwen3": DECODER,
        "Qwen2Moe": {**DECODER, **EXPERTS},
        "Qwen3Moe": {**DECODER, **EXPERTS},
        "Gemma": DECODER,
        "Gemma2": DECODER,
        "Phi": {**DECODER, "num_key_value_heads": 4},
        "Phi3": DECODER,
        "Falcon": {**TEXT, "multi_query": True},
        "Olmo": DECODER,
        "Olmo2": DECODER,
        "Olmoe": {**DECODER, **EXPERTS},
        "StableLm": DECODER,
        "Granite": DECODER,
        "GraniteMoe": {**DECODER, **EXPERTS},
        "Cohere": DECODER,
        "Starcoder2": DECODER,
        "Glm": DECODER,
        "Glm4": DECODER,
        "SmolLM3": DECODER,
        "Nemotron": DECODER,
        "Persimmon": TEXT,
        "Mpt": {"vocab_size": WORDS, "d_model": 32, "n_layers": 2, "n_heads": 4},
        "GptOss": {**DECODER, **EXPERTS},
        "DeepseekV2": {**DECODER, **EXPERTS, **latent, **groups, "num_key_value_heads": 4},
        "DeepseekV3": {**DECODER, **EXPERTS, **latent, **groups, "num_key_value_heads": 4},
        "Mamba": state,
        "Mamba2": {**state, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
        "FalconMamba": state,
        "Rwkv": {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    }
    found = {kind.lower(): _make(kind, "ForCausalLM", options, _tokens()) for kind, options in table.items()}
    found["gpt2"] = _make("GPT2", "LMHeadModel", gpt, _tokens())
    found["gpt2_classifier"] = _make("GPT2", "ForSequenceClassification", {**gpt, "pad_token_id": 0}, _tokens())
    found["gemma3_text"] = _gemma3
    found["llama_cached"] = _cached("Llama", "ForCausalLM", DECODER)
    found["gpt2_cached"] = _cached("GPT2", "LMHeadModel", gpt)
    found["mamba_cached"] = _cached("Mamba", "ForCausalLM", state)
    found["llama_classifier"] = _make("Llama", "ForSequenceClassification", DECODER, _tokens())
    return found


def _cached(kind: str, head: str, options: dict[str, Any]) -> Builder:
    """As users call it: caches are returned beside the output, all of which counts."""

    def build() -> Network:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**options)
        return Network(getattr(transformers, f"{kind}{head}")(config).float(), _tokens()())

    return build


def _gemma3() -> Network:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Network(Gemma3ForCausalLM(Gemma3TextConfig(**{**DECODER, "use_cache": False})), _tokens()(), _run)


def _sequences() -> Table:
    t5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    audio = {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 20}
    generate = "ForConditionalGeneration"
    found = {kind.lower(): _make(kind, generate, t5, _both) for kind in ("T5", "MT5", "LongT5", "SwitchTransformers")}
    found["t5_gated"] = _make("T5", generate, {**t5, "feed_forward_proj": "gated-gelu"}, _both)
    for kind in ("Bart", "MBart", "Pegasus", "M2M100", "BlenderbotSmall", "Blenderbot"):
        found[kind.lower()] = _make(kind, generate, SEQ2SEQ, _both)
    found["bart_classifier"] = _make("Bart", "ForSequenceClassification", SEQ2SEQ, lambda: {"input_ids": _ended()})
    windows = {"attention_window": 4, "max_encoder_position_embeddings": 40, "max_decoder_position_embeddings": 40}
    found["led"] = _make("LED", generate, {**SEQ2SEQ, **windows}, _both)
    found["marian"] = _make("Marian", "MTModel", SEQ2SEQ, _both)
    spoken = {**SEQ2SEQ, **audio}
    found["whisper"] = _make(
        "Whisper",
        generate,
        spoken,
        lambda: {"input_features": torch.randn(2, 16, 32), "decoder_input_ids": torch.randint(3, WORDS, (2, 5))},
    )
    found["speech_to_text"] = _make(
        "Speech2Text",
        generate,
        {**spoken, "input_feat_per_channel": 16, "conv_channels": 24, "max_source_positions": 40},
        lambda: {"input_features": torch.randn(2, 32, 16), "decoder_input_ids": torch.randint(3, WORDS, (2, 5))},
    )
    return found


def _ended() -> Any:
    tokens = torch.randint(3, WORDS, (2, 10))
    tokens[:, -1] = 2
    return tokens


def _sounds() -> Table:
    waves = {
        **TEXT,
        "conv_dim": (16, 16, 16),
        "conv_kernel": (8, 3, 2),
        "conv_stride": (4, 2, 2),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "num_buckets": 16,
        "max_bucket_distance": 40,
    }

    def heard() -> dict[str, Any]:
        return {"input_values": torch.randn(2, 400)}

    found = {k.lower(): _make(k, "ForCTC", waves, heard) for k in ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech")}
    found["wav2vec2_classifier"] = _make("Wav2Vec2", "ForSequenceClassification", waves, heard)
    found["data2vec_audio"] = _make("Data2VecAudio", "ForCTC", {**waves, "conv_pos_kernel_size": 5}, heard)
    found["ast"] = _make(
        "AST",
        "ForAudioClassification",
        {**PICTURE, "num_mel_bins": 16, "max_length": 32, "frequency_stride": 8, "time_stride": 8},
        lambda: {"input_values": torch.randn(2, 32, 16)},
    )
    return found


def _pictures() -> Table:
    image = "ForImageClassification"
    stages = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_channels": 3}
    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
    table: dict[str, tuple[str, dict[str, Any]]] = {
        "ViT": (image, PICTURE),
        "ViTMSN": (image, PICTURE),
        "DeiT": (image, PICTURE),
        "Beit": (image, {**PICTURE, "use_relative_position_bias": True}),
        "Dinov2": (image, PICTURE),
        "Dinov2WithRegisters": (image, PICTURE),
        "Data2VecVision": (image, PICTURE),
        "Swin": (image, swin),
        "Swinv2": (image, swin),
        "ConvNext": (image, {**stages, "num_stages": 2}),
        "ConvNextV2": (image, {**stages, "num_stages": 2}),
        "ResNet": (image, {**stages, "embedding_size": 16}),
        "RegNet": (image, {**stages, "embedding_size": 16, "groups_width": 8}),
        "MobileNetV1": (image, {}),
        "MobileNetV2": (image, {}),
        "Bit": (image, {**stages, "embedding_size": 16, "num_groups": 4}),
        "Levit": (
            image,
            {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1]},
        ),
        "PoolFormer": (
            image,
            {**stages, "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]},
        ),
        "Cvt": (image, {"embed_dim": [16, 24, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}),
        "Pvt": (
            image,
            {
                "image_size": 64,
                "hidden_sizes": [16, 24, 32, 40],
                "depths": [1, 1, 1, 1],
                "num_attention_heads": [1, 2, 4, 5],
            },
        ),
        "MobileViT": (
            image,
            {
                "image_size": 64,
                "hidden_sizes": [24, 32, 40],
                "neck_hidden_sizes": [8, 12, 16, 24, 32, 40, 48],
                "num_attention_heads": 4,
            },
        ),
        "MobileViTV2": (image, {"image_size": 64, "width_multiplier": 0.5}),
        "FocalNet": (
            image,
            {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
        ),
        "Hiera": (
            image,
            {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
        ),
        "EfficientNet": (
            image,
            {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640},
        ),
        "Segformer": (
            "ForSemanticSegmentation",
            {
                "hidden_sizes": [16, 24, 32, 40],
                "depths": [1, 1, 1, 1],
                "num_attention_heads": [1, 2, 4, 4],
                "decoder_hidden_size": 24,
            },
        ),
        "GLPN": (
            "ForDepthEstimation",
            {
                "hidden_sizes": [16, 24, 32, 40],
                "depths": [1, 1, 1, 1],
                "num_attention_heads": [1, 2, 4, 4],
                "decoder_hidden_size": 24,
            },
        ),
        "Yolos": ("ForObjectDetection", {**PICTURE, "image_size": [32, 32], "num_detection_tokens": 5}),
        "Siglip": (image, {"vision_config": PICTURE, "text_config": TEXT, "image_size": 32}),
    }
    found = {}
    for kind, (head, options) in table.items():
        size = options.get("image_size", 64)
        found[kind.lower()] = _make(kind, head, options, _pixels(size if isinstance(size, int) else size[0]))
    found["detr"] = _detr("Detr")
    found["conditional_detr"] = _detr("ConditionalDetr")
    found["deformable_detr"] = _detr("DeformableDetr")
    found["mask2former"] = _masks("Mask2Former")
    found["maskformer"] = _masks("MaskFormer")
    frames = {**PICTURE, "num_frames": 4, "tubelet_size": 2}
    for kind in ("TimesformerForVideoClassification", "VideoMAEForVideoClassification", "VivitForVideoClassification"):
        name = kind.removesuffix("ForVideoClassification")
        options = {**frames, "tubelet_size": [2, 8, 8]} if name == "Vivit" else frames
        found[name.lower()] = _make(
            name, "ForVideoClassification", options, lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)}
        )
    return found


def _detr(kind: str) -> Builder:
    def build() -> Network:
        import transformers

        backbone = transformers.ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 24, 32, 40],
            depths=[1, 1, 1, 1],
            out_features=["stage2", "stage3", "stage4"],
        )
        if kind != "DeformableDetr":
            backbone.out_features = ["stage4"]
        sizes = {
            k: v for k, v in SEQ2SEQ.items() if k.split("_")[0] in {"d", "encoder", "decoder"} and "token" not in k
        }
        config = getattr(transformers, f"{kind}Config")(
            **sizes,
            backbone_config=backbone,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            num_queries=6,
            num_labels=3,
        )
        return Network(getattr(transformers, f"{kind}ForObjectDetection")(config), _pixels(64)(), _run)

    return build


def _masks(kind: str) -> Builder:
    def build() -> Network:
        import transformers

        backbone = transformers.SwinConfig(
            image_size=64,
            patch_size=4,
            embed_dim=16,
            depths=[1, 1, 1, 1],
            num_heads=[2, 2, 4, 4],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        if kind == "MaskFormer":
            decoder = transformers.DetrConfig(
                **{
                    k: v
                    for k, v in SEQ2SEQ.items()
                    if k.split("_")[0] in {"d", "encoder", "decoder"} and "token" not in k
                },
                num_queries=6,
                use_timm_backbone=False,
                backbone_config=transformers.ResNetConfig(),
                backbone=None,
            )
            config: Any = transformers.MaskFormerConfig(
                backbone_config=backbone,
                decoder_config=decoder,
                fpn_feature_size=32,
                mask_feature_size=32,
                num_labels=3,
            )
            model: Any = transformers.MaskFormerForInstanceSegmentation(config)
        else:
            config = transformers.Mask2FormerConfig(
                backbone_config=backbone,
                hidden_dim=32,
                feature_size=32,
                mask_feature_size=32,
                encoder_layers=1,
                decoder_layers=2,
                num_attention_heads=4,
                dim_feedforward=48,
                encoder_feedforward_dim=48,
                num_queries=6,
                num_labels=3,
            )
            model = transformers.Mask2FormerForUniversalSegmentation(config)
        return Network(model, _pixels(64)(), _run)

    return build


def _pairs() -> Table:
    text = {**TEXT, "projection_dim": 16}

    def seen() -> dict[str, Any]:
        return {**_tokens()(), **_pixels()()}

    two = {"text_config": text, "vision_config": {**PICTURE, "projection_dim": 16}, "projection_dim": 16}
    found = {
        name.lower(): _make(name, "Model", two, seen)
        for name in ("CLIP", "Siglip", "Siglip2", "AltCLIP", "ChineseCLIP")
    }
    found.pop("siglip2")
    found["siglip_pair"] = found.pop("siglip")
    found["clip_classifier"] = _make("CLIP", "ForImageClassification", two, _pixels())
    found["blip"] = _make(
        "Blip", "ForConditionalGeneration", {**two, "text_config": {**text, "encoder_hidden_size": 32}}, seen
    )
    found["vilt"] = _make("Vilt", "ForQuestionAnswering", {**TEXT, **PICTURE, "num_labels": 3}, seen)
    found["llava"] = _llava
    found["perceiver"] = _make(
        "Perceiver",
        "ForSequenceClassification",
        {
            **TEXT,
            "d_latents": 32,
            "d_model": 24,
            "num_latents": 6,
            "num_self_attends_per_block": 2,
            "num_blocks": 1,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
        },
        lambda: {"inputs": torch.randint(3, WORDS, (2, 10))},
    )
    return found


def _llava() -> Network:
    import transformers

    vision = transformers.CLIPVisionConfig(**PICTURE)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**DECODER), image_token_id=63, image_seq_length=16
    )
    config.text_config.use_cache = False
    tokens = torch.cat([torch.full((2, 16), 63), torch.randint(3, 60, (2, 6))], dim=1)
    return Network(
        transformers.LlavaForConditionalGeneration(config),
        {"input_ids": tokens, **_pixels()(), "use_cache": False},
        _run,
    )


def _adapted() -> Network:
    """A decoder with low-rank adapters of peft."""
    from peft import LoraConfig, get_peft_model

    net = _make("Llama", "ForCausalLM", DECODER, _tokens())()
    model: Any = get_peft_model(net.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    return Network(model, net.inputs, _run)


def _random_bases() -> Network:
    """A decoder with adapters of full rank: a sum of random bases, which two views merge with the rank."""
    from peft import RandLoraConfig, get_peft_model

    net = _make("Llama", "ForCausalLM", DECODER, _tokens())()
    model: Any = get_peft_model(net.model, RandLoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    return Network(model, net.inputs, _run)


def table() -> Table:
    """Every network of the family, by name."""
    return {
        **_encoders(),
        **_decoders(),
        **_sequences(),
        **_sounds(),
        **_pictures(),
        **_pairs(),
        "llama_lora": _adapted,
        "llama_randlora": _random_bases,
    }
