"""A small vision transformer of timm on the disturbed digits: trained in about two minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tasks.digits import STEPS, cross_entropy, on_digits, read
from tasks.task import Task, fit, heads_left, trained

EPOCHS, HEADS = 100, 6


def transformer() -> nn.Module:
    """Four blocks of width 96 over 16 patches, 0.45 million parameters."""
    from timm.models.vision_transformer import VisionTransformer

    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 4, "in_chans": 1, "num_classes": 10}
    return VisionTransformer(**sizes, embed_dim=96, depth=4, num_heads=HEADS)


def vit(seed: int, cache: Path) -> Task:
    """Heads and neurons go, the stream stays, on both sides."""
    data = read(seed)
    torch.manual_seed(seed)

    def train(network: nn.Module) -> None:
        fit(network, cross_entropy, data.batches(seed), EPOCHS * STEPS, 2e-3)

    def keep(network: Any) -> list[nn.Module]:
        ends = [m for block in network.blocks for m in (block.attn.proj, block.mlp.fc2)]
        return [network.patch_embed.proj, *ends, network.head]

    def theirs(network: Any, ratio: float) -> dict[str, Any]:
        heads = {block.attn.qkv: HEADS for block in network.blocks}
        return {"num_heads": heads, "prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": ratio}

    def finish(network: Any, pruner: Any) -> None:
        for block in network.blocks:
            own = block.attn
            own.num_heads = heads_left(pruner, own.qkv)
            own.attn_dim = own.qkv.out_features // 3
            own.head_dim = own.attn_dim // own.num_heads

    model = trained(cache / f"vit-{seed}.pt", transformer(), train)
    others = {"options": {"prune_num_heads": True, "prune_head_dims": False}, "theirs": theirs, "finish": finish}
    return on_digits("digits ViT", model, data, (2e-4, 2e-3), True, keep=keep, **others)
