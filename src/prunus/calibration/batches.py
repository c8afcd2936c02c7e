"""Batches from whatever a loader yields: inputs, targets, and single samples of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from prunus.errors import InputError


def batches_of(loader: Any, steps: Any) -> Iterator[Any]:
    """At most ``steps`` batches; a tensor or a dict is one batch.

    Raises:
        InputError: the loader cannot be iterated, or yields nothing.
    """
    if steps is not None and (not isinstance(steps, Integral) or steps < 1):
        raise InputError(f"calibrate: steps={steps!r} must be a whole number from 1 on, or None for the whole loader")
    if isinstance(loader, (torch.Tensor, Mapping)):
        loader = [loader]
    if not isinstance(loader, Iterable):
        raise InputError(
            f"calibrate: a {type(loader).__name__} yields no batches; pass a DataLoader, a list of batches or a tensor"
        )
    count = 0
    for batch in loader:
        yield batch
        count += 1
        if count == steps:
            return
    if not count:
        raise InputError("calibrate: the loader yields nothing; pass a loader (or list) with at least one batch")


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets: the first entry of a tuple or list, and the rest; anything else is both.

    Example:
        >>> split_batch(("x", "y")), split_batch({"x": 1})
        (('x', 'y'), ({'x': 1}, {'x': 1}))
    """
    if isinstance(batch, (tuple, list)) and batch:
        rest = batch[1:]
        return batch[0], rest[0] if len(rest) == 1 else rest if rest else None
    return batch, batch


def to_device(value: Any, device: torch.device) -> Any:
    """The same, with every tensor (or object that can move, such as a graph) on a device, and mappings as dicts."""
    if any(t.is_meta for t in tree_leaves(value) if isinstance(t, torch.Tensor)) and device.type != "meta":
        raise InputError(f"calibrate: a batch is on the meta device and has no values; give one that is on {device}")
    if isinstance(value, Mapping):
        return {name: to_device(v, device) for name, v in value.items()}
    return tree_map(lambda v: v.to(device) if callable(getattr(v, "to", None)) else v, value)


def samples_in(value: Any) -> int | None:
    """How many samples a batch has: the size of the first dim that all its tensors share, or None."""
    sizes = {v.shape[0] if v.dim() else 0 for v in tree_leaves(value) if isinstance(v, torch.Tensor)}
    return sizes.pop() if len(sizes) == 1 and 0 not in sizes else None


def is_empty(value: Any) -> bool:
    """Whether all tensors of a batch are without samples."""
    tensors = [v for v in tree_leaves(value) if isinstance(v, torch.Tensor)]
    return bool(tensors) and all(v.dim() and v.shape[0] == 0 for v in tensors)


def sample_of(value: Any, k: int) -> Any:
    """Sample ``k`` of a batch, as a batch of one."""
    return tree_map(lambda v: v[k : k + 1] if isinstance(v, torch.Tensor) else v, value)
