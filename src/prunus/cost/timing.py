"""Time models against each other on the machine that runs this."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from prunus.cost.counting import call
from prunus.errors import InputError
from prunus.untouched import untouched

__all__ = ["latency"]


def latency(
    models: Mapping[str, Callable[..., Any]], inputs: Any, repeat: int = 50, warmup: int = 10
) -> dict[str, float]:
    """Time models on the same inputs, in turns, and give the median of each in milliseconds.

    Turns make the comparison fair: whatever slows the machine down for a while slows all of them down. The order
    changes from turn to turn. Modules run in evaluation mode, without gradients, and are left as they were.

    Args:
        models: Modules, or any functions, by name.
        inputs: One tensor, a tuple or list of positional arguments, or a mapping of keyword arguments, for all models;
            on the device that they run on.
        repeat: Timed turns.
        warmup: Turns before the first timed one.

    Returns:
        Median milliseconds by name.

    Raises:
        InputError: No models, or no timed turn.

    Example:
        >>> times = latency({"wide": nn.Linear(64, 64), "narrow": nn.Linear(64, 32)}, torch.zeros(1, 64), repeat=3)
        >>> sorted(times)
        ['narrow', 'wide']
    """
    if not models or repeat < 1 or warmup < 0:
        raise InputError(f"latency needs a model and at least one turn; got {len(models)} models, repeat={repeat}")
    names = list(models)
    wait = _wait_for(models, inputs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        for model in models.values():
            if isinstance(model, nn.Module):
                stack.enter_context(untouched(model))
        stack.enter_context(torch.inference_mode())
        for turn in range(warmup + repeat):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                wait()
                start = time.perf_counter()
                call(models[name], inputs)
                wait()
                if turn >= warmup:
                    seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}


def _wait_for(models: Mapping[str, Callable[..., Any]], inputs: Any) -> Callable[[], None]:
    """Give the function that waits for all work in flight: a GPU runs behind the program, a CPU does not."""
    if isinstance(inputs, Mapping):
        values = list(inputs.values())
    else:
        values = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
    tensors = [value for value in values if isinstance(value, Tensor)]
    for model in models.values():
        if isinstance(model, nn.Module):
            tensors.extend(model.parameters())
    if all(tensor.device.type in ("cpu", "meta") for tensor in tensors):
        return lambda: None
    return torch.accelerator.synchronize
