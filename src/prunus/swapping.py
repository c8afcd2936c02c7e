"""Other values, of other sizes, for a tensor that others hold on to."""

from __future__ import annotations

import torch


def put(tensor: torch.Tensor, data: torch.Tensor, grad: torch.Tensor | None) -> None:
    """Let a tensor have other values and another gradient; it stays the same object.

    Where autograd still remembers the old sizes (as long as somebody holds a loss of earlier, it keeps the node that
    accumulates the gradient), it is made to forget them. Otherwise the next ``backward()`` would fail.

    Example:
        >>> layer = torch.nn.Linear(4, 2)
        >>> loss = layer(torch.randn(1, 4)).sum()
        >>> put(layer.weight, layer.weight.data[:, :3], None)
        >>> layer(torch.randn(1, 3)).sum().backward()
        >>> layer.weight.grad.shape
        torch.Size([2, 3])
    """
    tensor.grad = None
    if tensor.requires_grad and data.shape != tensor.shape:
        # torch renews the node when the type changes, not when the sizes do
        other = torch.float16 if tensor.dtype == torch.float32 else torch.float32
        tensor.data = data.new_empty(0, dtype=other)
    tensor.data = data
    if grad is not None:
        tensor.grad = grad


__all__ = ["put"]
