"""Time models against each other on the machine that runs this."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunus.cost.counting import call
from prunus.errors import InputError
from prunus.untouched import untouched

__all__ = ["in_turns", "latency"]

SPENT_S = 1.5  # on timed turns, as long as there are at least FEWEST of them and at most MOST
FEWEST, MOST = 5, 60
WARM = 3
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of glibc's malloc.h


def latency(
    models: Mapping[str, Callable[..., Any]], inputs: Any, repeat: int = 50, warmup: int = 10
) -> dict[str, float]:
    """Time models on the same inputs, in turns, in milliseconds.

    Turns make the comparison fair: whatever slows the machine down for a while slows all of them down. The first model
    is given the median of its runs, every other one that times the median of its ratio to the first in the same turn.
    The order changes from turn to turn. Modules run in evaluation mode, without gradients, and are left as they were.

    Args:
        models: Modules, or any functions, by name.
        inputs: One tensor, a tuple or list of positional arguments, or a mapping of keyword arguments, for all models;
            on the device that they run on.
        repeat: Timed turns.
        warmup: Turns before the first timed one.

    Returns:
        Milliseconds of one run by name.

    Raises:
        InputError: No models, or no timed turn.

    Example:
        >>> times = latency({"wide": nn.Linear(64, 64), "narrow": nn.Linear(64, 32)}, torch.zeros(1, 64), repeat=3)
        >>> sorted(times)
        ['narrow', 'wide']
    """
    if not models or repeat < 1 or warmup < 0:
        raise InputError(f"latency needs a model and at least one turn; got {len(models)} models, repeat={repeat}")
    wait = _wait_for(models, inputs)
    calls = [partial(call, model, inputs) for model in models.values()]
    with ExitStack() as stack:
        for model in models.values():
            if isinstance(model, nn.Module):
                stack.enter_context(untouched(model))
        taken = _turns(calls, wait, time.perf_counter, warmup, lambda done, seconds: done >= repeat)
    return dict(zip(models, _medians(taken), strict=True))


def in_turns(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """The milliseconds of each of some calls, made in turns, so that all of them meet the same machine."""
    wait: Callable[[], Any] = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize

    def enough(done: int, seconds: float) -> bool:
        return done >= FEWEST and (done >= MOST or seconds >= SPENT_S)

    return _medians(_turns(calls, wait, clock_for(device), WARM, enough))


def _medians(turns: Sequence[Sequence[float]]) -> list[float]:
    """Milliseconds: the first call's median, and that times the median of each call's ratio to the first in its turn.

    A machine that changes its speed between turns does not change these ratios.
    """
    first, *_ = columns = list(zip(*turns, strict=True))
    ratios = (statistics.median(b / a for a, b in zip(first, own, strict=True)) for own in columns)
    return [1000 * statistics.median(first) * ratio for ratio in ratios]


def clock_for(device: torch.device) -> Callable[[], float]:
    """A clock in seconds; where torch uses one thread of a CPU that thread's own, which stands while others run."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


@contextmanager
def steady_memory() -> Iterator[None]:
    """While it lasts, glibc keeps memory that is freed for the next run instead of giving it back to the system.

    Else it depends on what lies at the end of the heap whether each run on a CPU waits for thousands of page faults or
    for none: up to a third of the time of a small network. Afterwards the thresholds are those that glibc itself
    arrives at once large blocks were freed (mallopt(3)).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 32 << 20)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


def _turns(
    calls: Sequence[Callable[[], Any]],
    wait: Callable[[], Any],
    clock: Callable[[], float],
    warmup: int,
    enough: Callable[[int, float], bool],
) -> list[list[float]]:
    """The seconds of each call, turn by turn, until ``enough(turns, seconds)``; who begins changes."""
    timed: list[list[float]] = []
    spent = 0.0
    turn = 0
    with torch.inference_mode(), steady_memory():
        while not enough(len(timed), spent):
            seconds = [0.0] * len(calls)
            for k in range(len(calls)):
                which = (turn + k) % len(calls)
                wait()
                start = clock()
                calls[which]()
                wait()
                seconds[which] = clock() - start
            turn += 1
            if turn > warmup:
                timed.append(seconds)
                spent += sum(seconds)
    return timed


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
