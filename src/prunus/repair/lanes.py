"""Runs that go side by side: each in a thread of its own, of which only one moves at any time, from stop to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Cancelled(BaseException):
    """Ends a run that is no longer wanted; no ``except Exception`` of a model holds it back."""


@dataclass(frozen=True)
class _Surroundings:
    """What threads do not inherit: the current device, and automatic mixed precision."""

    device: int | None
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def here(cls) -> _Surroundings:
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        return cls(device, tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds))

    def enter(self) -> None:
        if self.device is not None:
            torch.cuda.set_device(self.device)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)


class Lane(Generic[T]):
    """A run that halts wherever it calls :meth:`halt`, and goes on when :meth:`advance` is called.

    Args:
        run: called with the lane; what it returns is the lane's ``result``.

    Example:
        >>> lane = Lane(lambda lane: lane.halt("here") or "done")
        >>> lane.advance(), lane.advance(), lane.result
        ('here', None, 'done')
    """

    def __init__(self, run: Callable[[Lane[T]], Any]) -> None:
        self.result: Any = None
        self.stop: T | None = None
        self.over = False
        self._run = run
        self._error: BaseException | None = None
        self._cancelled = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._around = _Surroundings.here()
        self._thread = threading.Thread(target=self._work, name="prunus-repair", daemon=True)

    def advance(self) -> T | None:
        """Let the run go on to its next stop; None when it has come to its end. What it raises is raised here."""
        if self.over:
            return None
        self.stop = None
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        return self.stop

    def halt(self, stop: T) -> None:
        """Called by the run itself: wait here."""
        self.stop = stop
        self._back.release()
        self._go.acquire()
        self.check()

    def check(self) -> None:
        """Called by the run itself: end it if it is no longer wanted."""
        if self._cancelled:
            raise Cancelled

    def close(self) -> None:
        """End the run wherever it is, and wait until it has ended."""
        self._cancelled = True
        if self._thread.ident is not None and not self.over:
            self._go.release()
            self._thread.join()
        self.over, self.stop = True, None

    def _work(self) -> None:
        self._go.acquire()
        try:
            if not self._cancelled:
                self._around.enter()
                self.result = self._run(self)
        except Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.over = True
            self._back.release()
