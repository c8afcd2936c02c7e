"""What each ATen op costs: one line of a table, one small function of shapes.

A multiply-accumulate (MAC) is one multiplication with the addition that takes its result in. Convolutions, products of
matrices, attention and recurrent layers are made of them; nothing else counts as MACs. `OPERATIONS` says, for those
who compare with Torch-Pruning, what other layers do: one operation for each element, two for a norm with weights.

To add an op, write a function of its positional arguments and its output that returns a count, and give it a line in
the table under the name of its schema, as `torch.ops.aten.mm.default._schema.name` prints it. All overloads of an op
share the name. An op without a line is taken apart into the ops that it is made of; one that cannot be counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

from torch import Tensor

from prunus.rules.contractions import products, spelled

__all__ = ["MACS", "OPERATIONS", "Formula"]

Formula = Callable[[Sequence[Any], Any], int]
"""Counts one call from its positional arguments and its output."""


# Multiply-accumulates


def _convolution(args: Sequence[Any], out: Tensor) -> int:
    """Each output element reads one row of the weight, `(out, in / groups, *kernel)`."""
    weight: Tensor = args[1]
    return out.numel() * (weight.numel() // weight.shape[0])


def _transposed_convolution(args: Sequence[Any], out: Tensor) -> int:
    """Each input element is spread by one row of the weight, `(in, out / groups, *kernel)`."""
    return _convolution(args, args[0])


def _either_convolution(args: Sequence[Any], out: Tensor) -> int:
    transposed = args[6]
    return _transposed_convolution(args, out) if transposed else _convolution(args, out)


def _product(args: Sequence[Any], out: Tensor) -> int:
    """Each output element sums over the last dimension of the first factor."""
    first: Tensor = args[0]
    return out.numel() * first.shape[-1]


def _sum_and_product(args: Sequence[Any], out: Tensor) -> int:
    return _product(args[1:], out)


def _batch_sum_of_products(args: Sequence[Any], out: Tensor) -> int:
    first: Tensor = args[1]
    return out.numel() * first.shape[0] * first.shape[-1]


def _grouped_product(args: Sequence[Any], out: Tensor) -> int:
    """Rows `(n, k)` each meet the matrix of their own group, `(groups, k, m)`; other forms as a plain product."""
    first, second = args[0], args[1]
    if first.ndim == 2 and second.ndim == 2:  # the groups share out the contracted dimension
        return out.numel() // out.shape[0] * first.shape[-1]
    return _product(args, out)


def _bilinear(args: Sequence[Any], out: Tensor) -> int:
    weight: Tensor = args[2]
    return out.numel() * (weight.numel() // weight.shape[0])


def _trilinear(args: Sequence[Any], out: Tensor) -> int:
    """The op that `bilinear` becomes: factors `(n, 1, i, 1)`, `(1, o, i, j)` and `(n, 1, 1, j)`."""
    weight: Tensor = args[1]
    return out.numel() * (weight.numel() // out.shape[-1])


def _einsum(args: Sequence[Any], out: Tensor) -> int:
    """Factors are multiplied from left to right; each product runs over all letters that are left."""
    factors: Sequence[Tensor] = args[1]
    letters, kept = spelled(args[0], [factor.ndim for factor in factors])
    sizes: dict[int, int] = {}
    for names, factor in zip(letters, factors, strict=True):
        sizes.update((name, n) for name, n in zip(names, factor.shape, strict=True) if n > sizes.get(name, 0))
    return sum(prod(sizes[name] for name in product) for product in products(letters, kept))


def _attention(args: Sequence[Any], out: Any) -> int:
    """Scores take one product for each query, key and head dimension, and their use one for each value dimension."""
    query, key, value = args[:3]
    keys = key.shape[-2]
    heads_and_queries = query.numel() // query.shape[-1]
    return heads_and_queries * keys * (query.shape[-1] + value.shape[-1])


def _recurrent(args: Sequence[Any], out: Any) -> int:
    """Every matrix is used once for each step of each sequence: `(input, state, parameters, ...)`."""
    steps = args[0].numel() // args[0].shape[-1]
    return steps * sum(weight.numel() for weight in args[2] if weight.ndim == 2)


def _any_recurrent(args: Sequence[Any], out: Any) -> int:
    """The same, also for a packed sequence: `(data, batch_sizes, state, parameters, ...)`."""
    packed = isinstance(args[1], Tensor) and isinstance(args[3], (list, tuple))
    return _recurrent((args[0], None, args[3] if packed else args[2]), out)


def _cudnn_recurrent(args: Sequence[Any], out: Any) -> int:
    """The same for `(input, parameters, ...)`."""
    return _recurrent((args[0], None, args[1]), out)


def _mkldnn_recurrent(args: Sequence[Any], out: Any) -> int:
    """The same for one layer in one direction: `(input, weight_ih, weight_hh, bias_ih, bias_hh, ...)`."""
    return _recurrent((args[0], None, args[1:5]), out)


MACS: Mapping[str, Formula] = MappingProxyType(
    {
        "aten::conv1d": _convolution,
        "aten::conv2d": _convolution,
        "aten::conv3d": _convolution,
        "aten::conv_transpose1d": _transposed_convolution,
        "aten::conv_transpose2d": _transposed_convolution,
        "aten::conv_transpose3d": _transposed_convolution,
        "aten::convolution": _either_convolution,
        "aten::_convolution": _either_convolution,
        "aten::convolution_overrideable": _either_convolution,
        "aten::conv_tbc": lambda args, out: out.numel() * args[1].shape[0] * args[1].shape[1],
        "torchvision::deform_conv2d": _convolution,
        "aten::linear": _product,
        "aten::mm": _product,
        "aten::bmm": _product,
        "aten::mv": _product,
        "aten::dot": lambda args, out: args[0].numel(),
        "aten::vdot": lambda args, out: args[0].numel(),
        "aten::addmm": _sum_and_product,
        "aten::_addmm_activation": _sum_and_product,
        "aten::addmv": _sum_and_product,
        "aten::addmm_": _sum_and_product,
        "aten::baddbmm": _sum_and_product,
        "aten::baddbmm_": _sum_and_product,
        "aten::addbmm": _batch_sum_of_products,
        "aten::_int_mm": _product,
        "aten::_scaled_mm": _product,
        "aten::_grouped_mm": _grouped_product,
        "aten::einsum": _einsum,
        "aten::bilinear": _bilinear,
        "aten::_trilinear": _trilinear,
        "aten::scaled_dot_product_attention": _attention,
        "aten::_scaled_dot_product_flash_attention": _attention,
        "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
        "aten::_scaled_dot_product_efficient_attention": _attention,
        "aten::_scaled_dot_product_cudnn_attention": _attention,
        "aten::_scaled_dot_product_fused_attention_overrideable": _attention,
        "aten::lstm": _any_recurrent,
        "aten::gru": _any_recurrent,
        "aten::rnn_tanh": _any_recurrent,
        "aten::rnn_relu": _any_recurrent,
        "aten::_cudnn_rnn": _cudnn_recurrent,
        "aten::mkldnn_rnn_layer": _mkldnn_recurrent,
    }
)
"""Multiply-accumulates of one call, by the name of the op."""


# Element-wise operations, for comparison


def _each_output(args: Sequence[Any], out: Tensor) -> int:
    return out.numel()


def _each_input(args: Sequence[Any], out: Any) -> int:
    return args[0].numel()


def _bias(args: Sequence[Any], out: Tensor) -> int:
    return out.numel() if len(args) > 2 and args[2] is not None else 0


def _norm(weight_at: int) -> Formula:
    """One operation for each element, two where there is a weight, which is argument `weight_at`."""

    def count(args: Sequence[Any], out: Any) -> int:
        weighted = len(args) > weight_at and args[weight_at] is not None
        return args[0].numel() * (2 if weighted else 1)

    return count


OPERATIONS: Mapping[str, Formula] = MappingProxyType(
    {
        **dict.fromkeys(("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution"), _bias),
        **dict.fromkeys(("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d"), _bias),
        "aten::linear": _bias,
        "aten::batch_norm": _norm(1),
        "aten::native_batch_norm": _norm(1),
        "aten::cudnn_batch_norm": _norm(1),
        "aten::instance_norm": _norm(1),
        "aten::layer_norm": _norm(2),
        "aten::native_layer_norm": _norm(2),
        "aten::rms_norm": _norm(2),
        "aten::group_norm": _norm(2),
        "aten::native_group_norm": _norm(1),
        **dict.fromkeys(("aten::relu", "aten::relu_", "aten::relu6", "aten::relu6_"), _each_output),
        **dict.fromkeys(("aten::elu", "aten::elu_", "aten::leaky_relu", "aten::leaky_relu_"), _each_output),
        **dict.fromkeys(("aten::prelu", "aten::_prelu_kernel"), _each_output),
        **dict.fromkeys(("aten::max_pool1d", "aten::max_pool2d", "aten::max_pool3d"), _each_input),
        **dict.fromkeys(("aten::max_pool2d_with_indices", "aten::max_pool3d_with_indices"), _each_input),
        **dict.fromkeys(("aten::avg_pool1d", "aten::avg_pool2d", "aten::avg_pool3d"), _each_input),
        **dict.fromkeys((f"aten::adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)), _each_input),
    }
)
"""Element-wise operations of one call, by the name of the op."""
