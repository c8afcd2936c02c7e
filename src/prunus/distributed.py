"""Sums over the ranks of ``torch.distributed``, so that each of them comes to the same result from its own data.

Without a process group nothing is done. With one, ranks meet at every sum, and say where they are and whether all is
well: what fails on one rank is raised on all of them, and none waits for a rank that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from prunus.errors import InputError

_DEPTH: ContextVar[int] = ContextVar("prunus_ranks", default=0)  # of the work under way; -1: alone


class OtherRankError(InputError):
    """Another rank has failed, or the ranks do not do the same."""

    def __init__(self, message: str, depth: int) -> None:
        super().__init__(message)
        self.depth = depth  # of the work that has failed there

    def is_over(self) -> bool:
        """Whether the work that has failed there is the one under way here, or one that this is a part of."""
        return self.depth <= _DEPTH.get()


def count() -> int:
    """How many ranks work together; 1 without a process group, and inside :func:`alone`."""
    if _DEPTH.get() < 0 or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


def rank() -> int:
    """The number of this rank among those that work together."""
    return dist.get_rank() if count() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank works by itself, whatever the process group.

    For code that one rank only runs: ``if rank == 0: with prunus.distributed.alone(): prunus.prune(...)``.

    Example:
        >>> with alone():
        ...     count()
        1
    """
    token = _DEPTH.set(-1)
    try:
        yield
    finally:
        _DEPTH.reset(token)


@contextmanager
def together(what: str) -> Iterator[None]:
    """A work that all ranks do: they meet at its end, and where one of them fails, all of them do.

    Args:
        what: a name for it.

    Raises:
        OtherRankError: another rank failed.
    """
    if count() == 1:
        yield
        return
    depth = _DEPTH.get() + 1
    token = _DEPTH.set(depth)
    try:
        try:
            yield
        except BaseException as error:
            if not isinstance(error, OtherRankError) or error.depth > depth:  # else they have met already
                _gather((depth, f"{what} failed: {type(error).__name__}: {error}", None, True))
            raise
        gathered(None, f"the end of {what}")
    finally:
        _DEPTH.reset(token)


def gathered(value: Any, place: str) -> list[Any]:
    """The values of all ranks, in their order.

    Args:
        value: anything that can be pickled.
        place: where in the work this is; all ranks must be there.

    Raises:
        OtherRankError: another rank failed, or is elsewhere.

    Example:
        >>> gathered("value", "here")
        ['value']
    """
    if count() == 1:
        return [value]
    found = _gather((_DEPTH.get(), place, value, False))
    for k, (depth, said, _, failed) in enumerate(found):
        if failed:
            raise OtherRankError(f"on rank {k}, {said}; nothing was changed on this one", depth)
    places = [said for _, said, _, _ in found]
    if len(set(places)) > 1:
        k = next(k for k, said in enumerate(places) if said != places[0])
        raise OtherRankError(
            f"rank 0 is at {places[0]}, and rank {k} at {places[k]}: all ranks must call the same functions with the "
            "same model and the same arguments, and with inputs for which the model runs in the same way; only the "
            "samples may differ. For what one rank does by itself, use prunus.distributed.alone()",
            _DEPTH.get(),
        )
    return [one for _, _, one, _ in found]


def summed(tensors: Sequence[Tensor], place: str) -> None:
    """Add up tensors over all ranks, in place; shapes and types must agree.

    Args:
        tensors: what to add up.
        place: where in the work this is.

    Raises:
        OtherRankError: another rank failed, or is elsewhere, or has tensors of other shapes.

    Example:
        >>> summed([torch.ones(2)], "here")
    """
    _on_all(tensors, place, dist.all_reduce)


def copied(tensors: Sequence[Tensor], place: str) -> None:
    """Give tensors the values that they have on rank 0, in place.

    Args:
        tensors: what to copy.
        place: where in the work this is.

    Raises:
        OtherRankError: another rank failed, or is elsewhere, or has tensors of other shapes.

    Example:
        >>> copied([torch.ones(2)], "here")
    """
    _on_all(tensors, place, lambda t: dist.broadcast(t, 0))


def _gather(message: tuple[int, str, Any, bool]) -> list[tuple[int, str, Any, bool]]:
    found: list[Any] = [None] * dist.get_world_size()
    with torch.inference_mode(False):
        dist.all_gather_object(found, message)
    return found


def _on_all(tensors: Sequence[Tensor], place: str, op: Callable[[Tensor], Any]) -> None:
    """Do a collective op on each tensor, once all ranks are there with the same shapes."""
    if count() == 1:
        return
    gathered(None, f"{place}, with {[tuple(t.shape) for t in tensors]}")
    for tensor in tensors:
        _through(tensor, op)


def _through(tensor: Tensor, op: Callable[[Tensor], Any]) -> None:
    """Do a collective op on memory that the backend can reach."""
    device = torch.device("cuda") if dist.get_backend() == "nccl" else tensor.device
    with torch.no_grad():
        memory = tensor.detach().to(device).contiguous()
        op(memory)
        if memory.data_ptr() != tensor.data_ptr():
            tensor.copy_(memory)
