"""One `nn.MultiheadAttention` at a time."""

from __future__ import annotations

from torch import nn

from prunus.functions._edit import Edit, Indices

__all__ = ["prune_multihead_attention_in_channels", "prune_multihead_attention_out_channels"]


def prune_multihead_attention_out_channels(
    layer: nn.MultiheadAttention, idxs: Indices, inplace: bool = True
) -> nn.MultiheadAttention:
    """Remove embedding dimensions of one multi-head attention, in place; dependencies are the caller's.

    `torch.nn.MultiheadAttention` has one width for its query, its heads and its output, so the same positions go in
    all three: dimension `e` belongs to head `e // head_dim`. The heads that are left must keep equally many; a head
    that loses all of them goes. Key and value inputs of a width of their own (`kdim`, `vdim`) keep that width.

    Args:
        layer: A multi-head attention.
        idxs: Embedding dimensions to remove, each in `[0, layer.embed_dim)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, unequal heads, or none left; nothing was changed.

    Example:
        >>> attention = nn.MultiheadAttention(embed_dim=8, num_heads=2)
        >>> pruned = prune_multihead_attention_out_channels(attention, [0, 5])
        >>> pruned.embed_dim, pruned.num_heads, pruned.head_dim
        (6, 2, 3)
    """
    return _prune(layer, idxs, inplace, "prune_multihead_attention_out_channels")


def prune_multihead_attention_in_channels(
    layer: nn.MultiheadAttention, idxs: Indices, inplace: bool = True
) -> nn.MultiheadAttention:
    """Remove embedding dimensions of one multi-head attention, in place.

    The same as `prune_multihead_attention_out_channels`, because the layer has one width.
    """
    return _prune(layer, idxs, inplace, "prune_multihead_attention_in_channels")


def _prune(layer: nn.MultiheadAttention, idxs: Indices, inplace: bool, caller: str) -> nn.MultiheadAttention:
    edit = Edit(layer, nn.MultiheadAttention, caller, inplace)
    layer = edit.layer
    width = layer.embed_dim
    keep = edit.keep(idxs, width, "embedding dimension")
    heads = edit.groups(keep, width, layer.num_heads, "embedding dimension")
    same_width: bool = layer._qkv_same_embed_dim
    packed = [part * width + position for part in range(3) for position in keep]
    if same_width:
        edit.cut("in_proj_weight", (0, packed), (1, keep))
        edit.set(kdim=len(keep), vdim=len(keep))
    else:
        edit.cut("q_proj_weight", (0, keep), (1, keep))
        edit.cut("k_proj_weight", (0, keep))
        edit.cut("v_proj_weight", (0, keep))
    edit.cut("in_proj_bias", (0, packed))
    edit.cut("bias_k", (-1, keep))
    edit.cut("bias_v", (-1, keep))
    edit.cut("weight", (0, keep), (1, keep), owner=layer.out_proj)
    edit.cut("bias", (0, keep), owner=layer.out_proj)
    edit.set(layer.out_proj, in_features=len(keep), out_features=len(keep))
    edit.set(embed_dim=len(keep), num_heads=len(heads), head_dim=len(keep) // len(heads))
    return edit.commit()
