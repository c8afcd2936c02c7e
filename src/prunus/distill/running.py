"""Run a model up to a block: what goes into it, and what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunus.distill.terms import floats
from prunus.repair.samples import Batch, held_share
from prunus.tracing import ForwardFn, call_model

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Reached(BaseException):
    """The block is reached: the rest of the run is not needed."""


@dataclass(frozen=True)
class Run:
    """How the models are called, and on what: inputs to fit on and inputs held out, one for each call."""

    fit: Sequence[Any]
    held: Sequence[Any]
    forward_fn: ForwardFn | None

    def call(self, model: nn.Module, inputs: Any) -> Any:
        """One run, on a copy of the inputs: some models write into them."""
        return call_model(model, copy.deepcopy(inputs), self.forward_fn)

    def counts(self, model: nn.Module, names: Sequence[str]) -> dict[str, int]:
        """How often modules run in a call, in the order in which they first do."""
        counts: dict[str, int] = {}

        def hook(name: str) -> Callable[..., None]:
            def note(*_: Any) -> None:
                counts[name] = counts.get(name, 0) + 1

            return note

        handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
        try:
            with torch.no_grad():
                self.call(model, self.fit[0])
        finally:
            for handle in handles:
                handle.remove()
        return counts

    def into(self, model: nn.Module, name: str, inputs: Any) -> Arguments:
        """What a block is called with."""
        found: list[Arguments] = []

        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.append((args, kwargs))
            raise _Reached

        with _until(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)), torch.no_grad():
            self.call(model, inputs)
        return copy.deepcopy(found[0])

    def out_of(self, model: nn.Module, name: str, inputs: Any) -> list[Tensor]:
        """The float tensors that a block returns; those that the model does, for an empty name."""
        found: list[list[Tensor]] = []

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.append([t.detach().clone() for t in floats(output)])
            raise _Reached

        with torch.no_grad():
            if not name:
                return [t.detach() for t in floats(self.call(model, inputs))]
            with _until(model.get_submodule(name).register_forward_hook(hook)):
                self.call(model, inputs)
        return found[0]


@contextmanager
def _until(handle: Any) -> Iterator[None]:
    try:
        yield
    except _Reached:
        pass
    finally:
        handle.remove()


def parted(batches: Sequence[Batch]) -> tuple[list[Any], list[Any]]:
    """The inputs to fit on and those held out; a batch that is both is cut along its samples."""
    fit, held = [], []
    for batch in batches:
        if batch.held is None:
            stays = batch.count - held_share(batch.count)
            fit.append(_rows(batch, 0, stays))
            held.append(_rows(batch, stays, batch.count))
        else:
            (held if batch.held else fit).append(_rows(batch, 0, batch.count))
    return fit, held


def _rows(batch: Batch, start: int, end: int) -> Any:
    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        rows = value[start:end] if value.dim() and value.shape[0] == batch.count else value
        return rows.detach().clone()

    return tree_map(cut, batch.inputs)
