"""Stand-ins: zeros in place of what the costly kernels compute.

What must be removed together depends on shapes, not on values, and nearly all the time of a run goes into convolutions,
matrix products and recurrent kernels. While a model is traced, those give zeros of the right shape instead. What is
computed from such zeros is *hollow*. As soon as the model's code, or a kernel whose result has no fixed shape, looks at
a hollow value, :class:`HollowValueError` ends the run, and the model is traced again with everything computed: the path
that is recorded is the path of the example inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch._ops import OpOverload

Standin: TypeAlias = "Callable[..., torch.Tensor | tuple[torch.Tensor, ...] | None]"

aten = torch.ops.aten

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
_OWN = frozenset({"aten", "prims"})
_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
_UNTAGGED = frozenset(
    {
        *(aten.where.default, aten.nonzero_numpy.default, aten.segment_reduce.default, aten.ctc_loss.Tensor),
        aten.as_strided.default,  # zeros may lie in memory in another order than what they stand for
    }
)
_BY_COUNTS = frozenset(
    {
        *(aten.repeat_interleave.self_Tensor, aten.tensor_split.tensor_indices_or_sections, aten.lstm.data),
        *(aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data, aten._pack_padded_sequence.default),
        aten._pad_packed_sequence.default,
    }
)
_BY_MASK = frozenset(["index", "index_put", "index_put_", "_index_put_impl_"])


class HollowValueError(BaseException):
    """The run depends on a value that was not computed; no model's ``except Exception`` may catch it."""


def deciding(op: OpOverload, args: Sequence[Any]) -> Sequence[Any]:
    """Those operands of an op on whose values more than the values of its result depends.

    All of them, where the result is a number for Python or has a shape that depends on values, and in ops of other
    libraries, as nobody knows what they do; masks among indices, as many entries are picked as are set; and counts.
    """
    if op.overloadpacket.__name__ in _BY_MASK:
        return [t for t in args[1] if isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8)]
    return args[1:2] if op in _BY_COUNTS else args


def decides(op: OpOverload) -> bool:
    """Whether more than the values of an op's result depends on the values of some operand; see :func:`deciding`."""
    if op.namespace not in _OWN or op in _UNTAGGED or op in _BY_COUNTS or op.overloadpacket.__name__ in _BY_MASK:
        return True
    returned = op._schema.returns
    return not _TAGS.isdisjoint(op.tags) or any("Tensor" not in str(r.type) for r in returned)


def standin_for(op: OpOverload) -> Standin | None:
    """What gives zeros in place of an op's result, or None in a case that only the kernel can judge."""
    return _STANDINS.get(op)


def _zeros(like: torch.Tensor, shape: Sequence[int], *others: torch.Tensor | None) -> torch.Tensor | None:
    """Zeros, if the tensors go together."""
    for t in (like, *others):
        if t is not None and (
            type(t) not in _PLAIN
            or t.layout is not torch.strided
            or t.dtype != like.dtype
            or t.device != like.device
            or not t.is_floating_point()
        ):
            return None
    return like.new_zeros(shape)


def _each(value: Any, count: int) -> Sequence[int]:
    values = [value] if isinstance(value, int) else value
    return values if len(values) == count else list(values) * count


def _convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> torch.Tensor | None:  # fmt: skip
    count = weight.dim() - 2
    first = x.dim() - count
    if first not in (1, 2) or x.shape[first - 1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            x.shape[first:],
            weight.shape[2:],
            _each(stride, count),
            _each(padding, count),
            _each(dilation, count),
            strict=True,
        )
    ]
    if min(sizes) < 1 or (bias is not None and bias.shape[0] != weight.shape[0]):
        return None
    return _zeros(x, (*x.shape[: first - 1], weight.shape[0], *sizes), weight, bias)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor | None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        return None
    if bias is not None and bias.shape != (weight.shape[0],):
        return None
    return _zeros(x, (*x.shape[:-1], weight.shape[0]), weight, bias)


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
    if x.dim() < 2 or y.dim() < 2 or x.shape[-1] != y.shape[-2]:
        return None
    try:
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    except RuntimeError:
        return None
    return _zeros(x, (*batch, x.shape[-2], y.shape[-1]), y)


def _added_product(bias: torch.Tensor, x: torch.Tensor, y: torch.Tensor, **factors: Any) -> torch.Tensor | None:
    product = _product(x, y) if bias.dim() <= x.dim() == y.dim() else None
    fits = product is not None and all(
        b in (1, n) for b, n in zip(reversed(bias.shape), reversed(product.shape), strict=False)
    )
    return product if fits and bias.dtype == x.dtype else None


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor | None:
    if kwargs.get("enable_gqa") or min(query.dim(), key.dim(), value.dim()) < 3:
        return None
    if query.shape[:-2] != key.shape[:-2] or key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]:
        return None
    return _zeros(query, (*query.shape[:-1], value.shape[-1]), key, value)


def _recurrent(
    x: torch.Tensor, hidden: Any, params: Sequence[torch.Tensor], has_biases: bool, layers: int, *options: Any
) -> tuple[torch.Tensor, ...] | None:
    states = [hidden] if isinstance(hidden, torch.Tensor) else list(hidden)
    _dropout, _train, bidirectional, batch_first = options
    directions = 2 if bidirectional else 1
    if x.dim() != 3 or not params or params[0].dim() != 2 or params[0].shape[1] != x.shape[2]:
        return None
    if any(s.dim() != 3 or s.shape[:2] != (layers * directions, x.shape[0 if batch_first else 1]) for s in states):
        return None
    made = _zeros(x, (*x.shape[:2], directions * states[0].shape[2]), *states, params[0])
    return None if made is None else (made, *(torch.zeros_like(s) for s in states))


_STANDINS: dict[OpOverload, Standin] = {
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.linear.default: _linear,
    aten.matmul.default: _product,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _added_product,
    aten.baddbmm.default: _added_product,
    aten.scaled_dot_product_attention.default: _attention,
    aten.lstm.input: _recurrent,
    aten.gru.input: _recurrent,
    aten.rnn_tanh.input: _recurrent,
    aten.rnn_relu.input: _recurrent,
}
