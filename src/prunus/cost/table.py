"""A table of measured times of single calls, kept on disk for each device, and filled as it is asked."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from prunus.cost.recorded import Call, Shape
from prunus.cost.timing import clock_for, in_turns, steady_memory

CACHE = "PRUNUS_CACHE"
LEAST_S = 0.01  # of timed calls for one entry
COLD = 48 << 20  # bytes of weights, more than caches hold
LONG_S = 0.2  # after which few calls will do
MOST_CALLS = 60
FEWEST_CALLS = 6

Timer = Callable[[Callable[[], Any], torch.device], float]
"""``(call, device) -> milliseconds`` of one call."""
Race = Callable[[Sequence[Callable[[], Any]], torch.device], list[float]]
"""``(calls, device) -> milliseconds`` of each of several calls, made in turns."""


def cache_folder() -> Path:
    """Where measured times are kept: ``$PRUNUS_CACHE``, or ``~/.cache/prunus`` (``$XDG_CACHE_HOME/prunus``)."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunus"


def device_name(device: torch.device) -> str:
    """What times depend on besides the call: the hardware, the number of threads, the version of torch."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{device.type} {_processor()} x{torch.get_num_threads()}"
    return f"{hardware}, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def stopwatch(thunk: Callable[[], Any], device: torch.device) -> float:
    """The shortest of some calls in milliseconds, after one to warm up: what else runs only makes them longer.

    It makes at least six calls, and more of short ones; three will do where they are long. Where torch uses one thread
    of a CPU, that thread's own time is counted, which does not grow while other programs run.
    """
    clock = clock_for(device)
    wait: Callable[[], Any] = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    with torch.inference_mode(), steady_memory():
        thunk()
        wait()
        seconds: list[float] = []
        while not _enough(len(seconds), sum(seconds)):
            start = clock()
            thunk()
            wait()
            seconds.append(clock() - start)
    return 1000 * min(seconds)


def _enough(calls: int, seconds: float) -> bool:
    if seconds > LONG_S:
        return calls >= 3
    return calls >= FEWEST_CALLS and (seconds >= LEAST_S or calls >= MOST_CALLS)


class LatencyTable:
    """Times of single calls on one device: measured at the first question, remembered, and kept on disk.

    Args:
        device: where the calls run.
        folder: where the table is kept; default :func:`cache_folder`; False: nowhere.
        timer: what measures a call.
        race: what measures whole models against each other.

    Example:
        >>> table = LatencyTable("cpu", folder=False, timer=lambda call, device: 2.0)
        >>> table.device.type, len(table)
        ('cpu', 0)
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        folder: str | Path | bool | None = None,
        timer: Timer = stopwatch,
        race: Race = in_turns,
    ) -> None:
        self.device = torch.device(device)
        self.name = device_name(self.device)
        self.timer, self.race = timer, race
        self._times: dict[str, float] = {}
        self._new = 0
        self.path: Path | None = None
        if folder is not False:
            chosen = cache_folder() if folder is None or folder is True else Path(folder)
            digest = hashlib.sha256(self.name.encode()).hexdigest()[:16]
            self.path = chosen / "latency" / f"{digest}.json"
            self._times = _read(self.path)

    def __len__(self) -> int:
        return len(self._times)

    def time(self, call: Call, shapes: Sequence[Shape], cold: bool = False) -> float:
        """The milliseconds of a call on tensors of these shapes.

        In a model whose weights do not fit into the processor's cache, every call finds its own weights ``cold``: then
        the call is timed on many copies of them in turn.

        A call that cannot be made on its own at these shapes is taken to cost what it did at the traced shapes, for
        each number that its tensors hold.
        """
        key = _key(call, shapes, cold)
        found = self._times.get(key)
        if found is None:
            try:
                found = self.timer(call.thunk(shapes, self.device, COLD if cold else 0), self.device)
            except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
                if tuple(shapes) == call.shapes:
                    found = 0.0
                else:
                    found = (
                        self.time(call, call.shapes, cold) * call.elements(shapes) / max(call.elements(call.shapes), 1)
                    )
            self._times[key] = found
            self._new += 1
        return found

    def again(self, call: Call, shapes: Sequence[Shape], cold: bool = False) -> float:
        """Measure a call once more, and remember the shorter of both times: the other one may have met noise."""
        before = self.time(call, shapes, cold)
        key = _key(call, shapes, cold)
        del self._times[key]
        self._times[key] = min(before, self.time(call, shapes, cold))
        return self._times[key]

    def save(self) -> None:
        """Write what is new to disk, beside what other processes wrote meanwhile; a read-only disk is no error."""
        if self.path is None or not self._new:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            merged = {**_read(self.path), **self._times}
            handle, draft = tempfile.mkstemp(prefix=".latency-", dir=self.path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"device": self.name, "milliseconds": merged}, file, indent=0)
            os.replace(draft, self.path)
            self._new = 0
        except OSError:
            return


def _key(call: Call, shapes: Sequence[Shape], cold: bool) -> str:
    return call.signature(shapes) + (" cold" if cold else "")


def _read(path: Path) -> dict[str, float]:
    """The times in a file; one that cannot be read counts as empty."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["milliseconds"]
        return {str(key): float(value) for key, value in data.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
