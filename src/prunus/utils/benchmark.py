"""Time and memory of one model, under the names that scripts use; :func:`prunus.cost.latency` compares several."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from prunus.errors import InputError
from prunus.tracing import call_model, tensors_in

RunFn = Callable[[nn.Module, Any], Any]


def measure_latency(
    model: nn.Module, example_inputs: Any, repeat: int = 300, warmup: int = 50, run_fn: RunFn | None = None
) -> tuple[float, float]:
    """Mean and standard deviation of the time of one run, in milliseconds, on the device of the model.

    Args:
        model: any module; it runs in the mode it is in, without gradients.
        example_inputs: a tensor, a tuple of arguments or a dict.
        repeat: timed runs.
        warmup: runs before those.
        run_fn: ``run_fn(model, example_inputs)`` instead of calling the model.

    Raises:
        InputError: no timed run.

    Example:
        >>> mean, deviation = measure_latency(nn.Linear(8, 8), torch.zeros(1, 8), repeat=3, warmup=1)
        >>> mean > 0
        True
    """
    times = [1000 * seconds for seconds in _times(model, example_inputs, repeat, warmup, run_fn)]
    return statistics.fmean(times), statistics.pstdev(times)


def measure_fps(
    model: nn.Module, example_inputs: Any, repeat: int = 300, warmup: int = 50, run_fn: RunFn | None = None
) -> float:
    """Runs per second; see :func:`measure_latency`."""
    return 1 / statistics.fmean(_times(model, example_inputs, repeat, warmup, run_fn))


def measure_throughput(
    model: nn.Module, example_inputs: Any, repeat: int = 300, warmup: int = 50, run_fn: RunFn | None = None
) -> float:
    """Examples per second: runs times the first size of the first tensor; see :func:`measure_latency`."""
    batch = next((t.shape[0] for t in tensors_in(example_inputs) if t.dim()), 1)
    return batch * measure_fps(model, example_inputs, repeat, warmup, run_fn)


def measure_memory(model: nn.Module, example_inputs: Any, device: Any = None, run_fn: RunFn | None = None) -> int:
    """The most memory that one run has allocated at once on a CUDA device, in bytes.

    Raises:
        InputError: the device is none of CUDA, where allocations are not recorded.
    """
    where = torch.device(device) if device is not None else _device(model)
    if where.type != "cuda":
        raise InputError(f"memory is measured on CUDA devices, not on {where}; prunus.cost.count gives parameter bytes")
    torch.cuda.reset_peak_memory_stats(where)
    with torch.no_grad():
        (run_fn or call_model)(model, example_inputs)
    return torch.cuda.max_memory_allocated(where)


def _times(model: nn.Module, inputs: Any, repeat: int, warmup: int, run_fn: RunFn | None) -> list[float]:
    if repeat < 1:
        raise InputError(f"repeat={repeat!r}: at least one run must be timed")
    run, cuda = run_fn or call_model, _device(model).type == "cuda"
    found = []
    with torch.no_grad():
        for k in range(warmup + repeat):
            if cuda:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            run(model, inputs)
            if cuda:
                torch.cuda.synchronize()
            if k >= warmup:
                found.append(time.perf_counter() - begin)
    return found


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


__all__ = ["measure_fps", "measure_latency", "measure_memory", "measure_throughput"]
