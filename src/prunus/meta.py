"""Tracing without data: every op that meets a weight runs on meta tensors, whatever device the model is on.

Nothing is copied and nothing is computed but shapes, so the size of a model does not matter. What does not depend on
weights (positions, masks, token numbers, integer buffers) stays real while it is small, so that code that branches on
such values runs as it is written. Code that branches on values that depend on weights cannot be followed here.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn

from prunus.errors import InputError
from prunus.held import Modules
from prunus.higher import SeesInside
from prunus.modes import MARK, FunctionMode, Tracer, tensors_among

LARGEST_REAL = 1 << 16  # a constant with more entries than this is not made
_META = torch.device("meta")
_CPU = torch.device("cpu")
_GET_DEVICE = torch.Tensor.device.__get__


class OverwrittenError(Exception):
    """A real tensor would have to take values that do not exist."""


def runs_without_data(modules: Modules, device: str | torch.device | None) -> bool:
    """Whether to trace on meta tensors: because the caller asks for it, or because the model has no values itself.

    Raises:
        InputError: another device was asked for.
    """
    if device is not None and str(device).partition(":")[0] != "meta":
        raise InputError(f"device={device!r}: only 'meta' can be asked for; to trace elsewhere, move model and inputs")
    parameters = (p for _, m in modules if m._parameters for p in m._parameters.values())
    return device is not None or any(p is not None and p.is_meta for p in parameters)


class MetaMode(SeesInside):
    """Stands above the tracer and replaces real tensors by meta tensors before an op reaches it.

    With ``strict``, everything is replaced; without, small constants stay real until they meet a weight.
    """

    def __init__(self, tracer: Tracer, strict: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracer = tracer
        self.strict = strict
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def see(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the op on meta tensors where it reads a tensor without values."""
        tensors = list(tensors_among((*args, *kwargs.values())))
        if tensors:
            empty = self.strict or any(self._is_empty(t) for t in tensors)
        else:
            empty = self.strict or _size(args) > LARGEST_REAL
        if empty and not self.strict and func._schema.is_mutable and not self._is_empty(tensors[0]):
            raise OverwrittenError(f"{func} writes into a constant")
        device = _META if empty else _CPU
        args = [self._place(a, empty, device) for a in args]
        return func(*args, **{k: self._place(v, empty, device) for k, v in kwargs.items()})

    def _is_empty(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has no values here: it is on meta, or it is a weight."""
        return tensor.is_meta or isinstance(tensor, nn.Parameter) or tensor.numel() > LARGEST_REAL

    def _place(self, value: Any, empty: bool, device: torch.device) -> Any:
        if isinstance(value, torch.Tensor):
            return self._twin(value) if empty and not value.is_meta else value
        if isinstance(value, torch.device):
            return device
        if isinstance(value, (list, tuple)):
            return type(value)(self._place(v, empty, device) for v in value)
        return value

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A meta tensor in place of a real one, always the same for a tensor that lasts."""
        known = self._kept.get(id(tensor))
        if known is not None:
            return known[1]
        if tensor.layout != torch.strided:
            raise InputError(f"a {tensor.layout} tensor cannot be traced on meta; leave device= out")
        with torch.inference_mode(tensor.is_inference()):
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)
        labelled = None if self.tracer.alias(tensor, twin) else self.tracer.labels_of(tensor)
        if labelled is not None and labelled.labelled:
            setattr(twin, MARK, labelled)
        if labelled is None or self.strict:
            self._kept[id(tensor)] = (tensor, twin)
        return twin


def _size(args: Any) -> int:
    """How many entries a factory makes, if it is given sizes."""
    sizes = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    return prod(int(n) for n in sizes) if all(isinstance(n, int) for n in sizes) else 0


class MetaFunctionMode(FunctionMode):
    """Tells the model that its tensors are on the CPU, so that it takes the path that it takes there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _GET_DEVICE:
            return _CPU
        return super().__torch_function__(func, types, args, kwargs)


def no_values(model: nn.Module, error: BaseException) -> InputError:
    """What to tell a user whose model cannot be traced without data."""
    cure = "leave device= out to trace on real tensors"
    if any(p.is_meta for p in model.parameters()):
        cure = "build the model outside torch.device('meta'), or model.to_empty(device='cpu'), to trace on real tensors"
    return InputError(
        f"the model cannot be traced on the meta device ({type(error).__name__}: {error}): its code needs values that "
        f"depend on weights, or an op that has no meta kernel; {cure}"
    )
