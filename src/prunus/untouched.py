"""Run a model without leaving a trace on it."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import numpy as np
import torch
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
        values: Whether the values of tensors are kept and put back too; false where the caller sees to that.
    """
    modules = list(model.modules()) if modules is None else modules
    with ExitStack() as stack:
        stack.enter_context(_random_states(model))
        memories = [_Memory(module, values) for module in modules]
        stack.callback(_restore, memories)
        for module in modules:
            vars(module)["training"] = False
        yield


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


def _restore(memories: list[_Memory]) -> None:
    for memory in memories:
        memory.restore()


class _Memory:
    """What a module holds itself: mode, attributes, and the contents of those that can change in place."""

    __slots__ = ("_attributes", "_empty", "_filled", "_module", "_tensors")

    def __init__(self, module: nn.Module, values: bool) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        held = self._attributes.values()
        containers = [value for value in held if type(value) in _CONTAINERS]
        self._empty = [value for value in containers if not value]
        self._filled = [(value, value.copy()) for value in containers if value]
        self._tensors: list[tuple[Tensor, Tensor]] = []
        if values:
            tensors = [value for value in held if isinstance(value, Tensor)]
            tensors.extend(module.buffers(recurse=False))
            self._tensors = [(tensor, tensor.detach().clone()) for tensor in tensors if not tensor.is_meta]

    def restore(self) -> None:
        held = vars(self._module)
        if len(held) != len(self._attributes):
            for name in [name for name in held if name not in self._attributes]:
                del held[name]
        held.update(self._attributes)
        if any(self._empty):
            for value in self._empty:
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
def _random_states(model: nn.Module) -> Iterator[None]:
    """Put back the random states of torch (of the devices that the model is on too), numpy and Python."""
    tensors = (*model.parameters(), *model.buffers()) if torch.cuda.is_available() else ()
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
