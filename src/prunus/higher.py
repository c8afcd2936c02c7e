"""Higher-order ops: calls that hold functions of the model's code, such as flex attention and `torch.cond`.

A dispatch mode meets them whole. What they do is in their dense kernel, which is written in ordinary ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode


def _cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
    return (true_fn if pred else false_fn)(*operands)


_OWN: dict[str, Callable[..., Any]] = {"cond": _cond}  # their kernels refuse to be watched


def inside(op: Any) -> Callable[..., Any] | None:
    """The function that does with ordinary ops what a higher-order op does; None for any other op.

    Raises:
        NotImplementedError: the op is higher-order and has no such function.

    Example:
        >>> import torch
        >>> inside(torch.ops.aten.relu.default) is None, callable(inside(torch.ops.higher_order.cond))
        (True, True)
    """
    if not isinstance(op, HigherOrderOperator):
        return None
    kernel = _OWN.get(op.name()) or op.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
    if kernel is None:
        raise NotImplementedError(f"{op} cannot be looked into: it has no kernel that is written in ordinary ops")
    return kernel


class SeesInside(TorchDispatchMode):
    """A dispatch mode that sees the ordinary ops of higher-order ones: it handles each by :meth:`see`."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = inside(func)
        if kernel is None:
            return self.see(func, args, kwargs or {})
        with self:
            return kernel(*args, **(kwargs or {}))

    def see(self, func: torch._ops.OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        """What to do with an ordinary op."""
        return func(*args, **kwargs)
