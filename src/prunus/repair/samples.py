"""The samples to fit on: read once, checked, and split into those to fit and those to judge by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunus.errors import InputError, PrunusError
from prunus.tracing import tensors_in

LANES = 5  # one batch in five is held out; with fewer batches, a fifth of each
WHAT = "pass a DataLoader or a list of batches, and input_fn if a batch is not what the model is called with"


@dataclass(frozen=True)
class Batch:
    """Inputs of one call of the model.

    Args:
        inputs: what the model is called with.
        count: how many samples these are.
        mask: (samples, places): which tokens count; None for all.
        held: whether all of it is held out; None if the last part of it is.
    """

    inputs: Any
    count: int
    mask: Tensor | None
    held: bool | None


def read(
    loader: Iterable[Any],
    input_fn: Callable[[Any], Any] | None,
    most: int,
    model: nn.Module,
    mask_fn: Callable[[Any], Tensor] | None = None,
) -> list[Batch]:
    """The first ``most`` samples (whole batches) of a loader, on the device of the model.

    Raises:
        InputError: there are fewer than two samples, or they hold NaN, or they are all the same.
    """
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise InputError(f"the data is a {type(loader).__name__}, not something that yields batches: {WHAT}")
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    found: list[_Found] = []
    for k, batch in enumerate(loader):
        inputs = _moved(batch if input_fn is None else input_fn(batch), device)
        first = next(tensors_in(inputs), None)
        if first is None:
            raise InputError(f"batch {k} of the data holds no tensor but a {type(batch).__name__}: {WHAT}")
        if any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors_in(inputs)):
            raise InputError(f"batch {k} of the data holds NaN: repair would spread it; leave such samples out")
        mask = None if mask_fn is None else _mask(mask_fn(batch), k, device)
        found.append((inputs, first.shape[0] if first.dim() else 1, mask))
        if sum(n for _, n, _ in found) >= most:
            break
    total = sum(n for _, n, _ in found)
    if total < 2:
        raise InputError(
            f"the data yields {total or 'no'} sample{'' if total == 1 else 's'}: repair fits on some and judges by "
            "others; give at least 16, better 256"
        )
    if _all_the_same([inputs for inputs, _, _ in found]):
        raise InputError(f"all {total} samples of the data are the same: nothing can be fitted to them; give real ones")
    return _split(found)


class CannotRunError(InputError):
    """The model cannot run on the data."""


@contextmanager
def explained() -> Iterator[None]:
    """Say what to do where a model does not run on the data.

    Raises:
        CannotRunError: it does not.
    """
    try:
        yield
    except PrunusError:
        raise
    except Exception as error:
        raise CannotRunError(
            f"the model cannot run on the data ({type(error).__name__}: {error}): call it with what input_fn "
            "makes of a batch, in eval mode, to see where; a tuple is taken as positional arguments: if batches "
            "hold labels too, pass input_fn=lambda batch: batch[0]"
        ) from error


def _moved(inputs: Any, device: torch.device) -> Any:
    return tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, inputs)


_Found = tuple[Any, int, "Tensor | None"]  # inputs, samples, mask


def _mask(mask: Any, k: int, device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dim() < 2:
        what = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise InputError(f"mask_fn gives {what} for batch {k}: it must give a bool tensor of shape (samples, places)")
    return mask.bool().to(device)


def _split(found: list[_Found]) -> list[Batch]:
    """Which batches are held out; the first one is, so that any two or more hold some of both kinds."""
    if len(found) >= LANES:
        order = sorted(range(len(found)), key=lambda k: (k // LANES, k % LANES != LANES - 1))
        return [Batch(*found[k], held=k % LANES == LANES - 1) for k in order]
    if len(found) > 1 and min(n for _, n, _ in found) < LANES:
        return [Batch(*one, held=k == 0) for k, one in enumerate((found[-1], *found[:-1]))]
    return [Batch(*one, held=None) for one in found]


def _all_the_same(inputs: list[Any]) -> bool:
    """Whether every sample equals the first one, in all float tensors (or, without any, in all tensors)."""
    lists = [list(tensors_in(i)) for i in inputs]
    if any(t.is_floating_point() for t in lists[0]):
        lists = [[t for t in tensors if t.is_floating_point()] for tensors in lists]
    for tensors in zip(*lists, strict=False):
        one = tensors[0][:1] if tensors[0].dim() else tensors[0]
        for tensor in tensors:
            if tensor.shape[1:] != one.shape[1:] or not bool((tensor == one).all()):
                return False
    return True


def held_share(count: int) -> int:
    """How many of ``count`` rows of one batch are held out."""
    return max(1, -(-count // LANES)) if count > 1 else 0


LEAST_SAMPLES = 32  # to fit on, where there are so many: more rows of fewer samples are worth little


def least(batches: Sequence[Batch]) -> int:
    """How many batches, from the first on, have some that are held out and enough that are not."""
    fit, held = 0, False
    for k, batch in enumerate(batches):
        fit += 0 if batch.held else batch.count
        held = held or batch.held is not False
        if held and fit >= LEAST_SAMPLES:
            return k + 1
    return len(batches)
