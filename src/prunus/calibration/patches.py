"""The patches that a convolution multiplies with its kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

MOST = 1 << 24  # numbers in the patches that are looked at together


class Conv(NamedTuple):
    """A call of a convolution (1 or 2 places dims): its input (samples, channels, *places), kernel and settings."""

    x: torch.Tensor
    kernel: tuple[int, ...]
    groups: int
    stride: Any
    padding: Any
    dilation: Any

    @property
    def size(self) -> int:
        """The number of a kernel's places."""
        return int(torch.Size(self.kernel).numel())


def patches(conv: Conv, most: int) -> torch.Tensor:
    """The patches as (groups, rows, channels of a group x kernel), at most ``most`` evenly spread ones of each sample.

    Example:
        >>> conv = Conv(torch.arange(4.0).reshape(1, 1, 4), (2,), 1, (1,), (0,), (1,))
        >>> patches(conv, 10)
        tensor([[[0., 1.],
                 [1., 2.],
                 [2., 3.]]])
    """
    x = conv.x.detach()
    x = x if x.dtype is torch.float64 else x.float()
    flat = len(conv.kernel) == 1
    kernel = (1, *conv.kernel) if flat else conv.kernel
    stride, dilation = (_pair(value, 1, flat) for value in (conv.stride, conv.dilation))
    x = x.unsqueeze(2) if flat else x
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        x = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        padding = (0, 0)
    else:
        padding = (0, 0) if conv.padding in (None, "valid") else _pair(conv.padding, 0, flat)
    found = []
    for some in x.split(max(1, MOST // (x[0].numel() * conv.size))):
        columns = F.unfold(some, kernel, dilation, padding, stride)  # (samples, channels x kernel, places)
        columns = columns[:, :, :: -(-columns.shape[-1] // most)].unflatten(1, (conv.groups, -1))
        found.append(columns.permute(1, 0, 3, 2).flatten(1, 2))
    return torch.cat(found, dim=1)


def _pair(value: Any, default: int, flat: bool) -> tuple[int, int]:
    """A setting for both dims; for one-dimensional convolutions the first gets what leaves it as it is."""
    values = (value,) if isinstance(value, int) else tuple(value) if value is not None else (default,)
    if flat:
        return (default, int(values[0]))
    return (int(values[0]), int(values[-1]))
