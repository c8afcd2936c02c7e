"""Run a model without leaving a trace on it."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import numpy as np
import torch
from numpy.random import mtrand
from torch import Tensor, nn

__all__ = ["eagerly", "put_back", "untouched", "without_mha_fastpath"]

_CONTAINERS = frozenset({dict, OrderedDict, list, set})  # hooks are kept in ordered dictionaries


@contextmanager
def untouched(model: nn.Module, modules: Sequence[nn.Module] | None = None, *, values: bool = True) -> Iterator[None]:
    """Put `model` in evaluation mode, and afterwards put everything back that a forward pass may have changed.

    Modes are set on each module directly: the `train()` of some classes also merges or freezes weights. Put back are
    mode, attributes and the lists, dicts and sets in them (caches), buffers and other tensors held as attributes, and
    the random states of torch, numpy and Python. Parameters are not looked at: a forward pass that edits those is
    broken in evaluation too.

    Args:
        model: Any module.
        modules: Its modules, each once, if they are known already.
        values: Whether values count. If not, those of tensors are for the caller to keep and to put back, and numpy
            draws other numbers meanwhile: to copy the state of its generator takes as long as a small network does.
    """
    modules = list(model.modules()) if modules is None else modules
    with _random_states(model, values):
        memory = _Memory(modules, values)
        try:
            for module in modules:
                vars(module)["training"] = False
            yield
        finally:
            memory.restore()


@contextmanager
def without_mha_fastpath() -> Iterator[None]:
    """The fused path of multi-head attention hides its ops, and so does code that is compiled (flex attention)."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with eagerly():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def eagerly() -> AbstractContextManager[object]:
    """Compiled code is not run; as the compiler is costly to import, this does nothing as long as nobody has."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Memory:
    """What modules hold themselves: mode, attributes, and the contents of those that can change in place."""

    def __init__(self, modules: Sequence[nn.Module], values: bool) -> None:
        self._attributes = [(vars(module), vars(module).copy()) for module in modules]
        containers = [v for _, held in self._attributes for v in held.values() if type(v) in _CONTAINERS]
        self._empty = [value for value in containers if not value]
        self._filled = [(value, value.copy()) for value in containers if value]
        self._tensors: list[tuple[Tensor, Tensor]] = []
        if values:
            tensors = [value for _, held in self._attributes for value in held.values() if isinstance(value, Tensor)]
            tensors.extend(tensor for module in modules for tensor in module.buffers(recurse=False))
            self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta]

    def restore(self) -> None:
        for held, before in self._attributes:
            if len(held) != len(before):
                for name in held.keys() - before.keys():
                    del held[name]
            held.update(before)
        for value in self._empty if any(self._empty) else ():
            value.clear()
        for value, before in self._filled:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
        for tensor, values in self._tensors:
            if not torch.equal(tensor, values):  # versions do not tell: inference mode does not count writes
                put_back(tensor, values)


def put_back(tensor: Tensor, values: Tensor) -> None:
    """Give a tensor the values, and the shape, that it had."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.shape != values.shape:
            tensor.resize_(values.shape)
        tensor.copy_(values)


@contextmanager
def _random_states(model: nn.Module, values: bool) -> Iterator[None]:
    """Put back the random states of torch (of the devices that the model is on too), numpy and Python."""
    tensors = (*model.parameters(), *model.buffers()) if torch.cuda.is_available() else ()
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    python_state = random.getstate()
    with torch.random.fork_rng(devices=list(devices)), _numpy_copied() if values else _numpy_exchanged():
        try:
            yield
        finally:
            random.setstate(python_state)


@contextmanager
def _numpy_copied() -> Iterator[None]:
    """Numpy's generator as it was, afterwards."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


@contextmanager
def _numpy_exchanged() -> Iterator[None]:
    """Another generator for numpy, meanwhile."""
    own = mtrand.get_bit_generator()
    mtrand.set_bit_generator(_spare_generator())
    try:
        yield
    finally:
        mtrand.set_bit_generator(own)


@cache
def _spare_generator() -> np.random.MT19937:
    """One of the kind that numpy's own is: others cannot be seeded by what numpy offers for that."""
    return np.random.MT19937(0)
