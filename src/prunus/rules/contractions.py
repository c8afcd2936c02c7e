"""Contractions: the summed dim is tied, batch dims are tied like pointwise ones, the rest passes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from prunus.labels import Dims, Ids, Label, Labelled
from prunus.rules.joins import fix, take, without_context
from prunus.rules.table import Op, rule

aten = torch.ops.aten
LARGEST_CUT = 2**14  # positions of a matrix, cut out of one dim, that are followed one by one


@rule(aten.linear)
def linear(op: Op, x: Labelled, weight: Labelled, bias: Labelled | None = None) -> Dims:
    """``... i, o i, o -> ... o``."""
    if weight.ndim == 1:
        return contract(op, [x, weight], [[*range(x.ndim)], [x.ndim - 1]], [*range(x.ndim - 1)])
    last = x.ndim - 1
    read = op.couple(x.dims[last], weight.dims[1]) if x.shape[last] > 1 else None
    made = weight.dims[0]
    if bias is not None:
        made = op.couple(made, bias.dims[0])
    op.reads(weight.dims[1])
    op.hands_on(weight.dims[0])
    batch = [(n, d) for n, d in zip(x.shape[:last], x.dims, strict=False)]
    op.count(*batch, (x.shape[last], read), (weight.shape[0], made))
    return (*without_context(op, x, last)[:last], made)


def products(letters: Sequence[Sequence[int]], out: Sequence[int]) -> list[set[int]]:
    """The letters over which each product of an einsum runs, from left to right; one that sums nothing is no product.

    What only one operand has and nothing needs later is summed beforehand.

    Example:
        >>> [sorted(map(chr, found)) for found in products([b"btc", b"bsc", b"bsd"], b"btd")]
        [['b', 'c', 's', 't'], ['b', 'd', 's', 't']]
    """
    found = []
    have = set(letters[0])
    for k, term in enumerate(letters[1:], 1):
        later = set(out).union(*letters[k + 1 :])
        both = have & set(term)
        have = (have | set(term)) & (later | both)
        if both - later:
            found.append(set(have))
        have &= later
    return found


def contract(
    op: Op, operands: Sequence[Labelled], letters: Sequence[Sequence[int]], out: Sequence[int], *, counted: bool = True
) -> Dims:
    """An einsum: dim ``d`` of ``operands[k]`` is called ``letters[k][d]``; the output's dims are called ``out``."""
    found: dict[int, Label | None] = {}
    size: dict[int, int] = {}
    made = all(operand.source > -2 for operand in operands)
    for operand, names in zip(operands, letters, strict=True):
        for name, n, own in zip(names, operand.shape, operand.dims, strict=True):
            if n == 1:
                size.setdefault(name, 1)
                continue
            label = own.rename(names) if own is not None else None
            if name in found:
                label = op.couple(found[name], label)
                if label is not None and name in out:
                    op.ledger.batched.append(label.ids)
            found[name] = label
            size[name] = n
            (op.hands_on if name in out else op.reads)(own)
            if own is not None and made and name not in out:
                op.ledger.paired.append(own.ids)
    for product in products(letters, out) if counted else ():
        op.count(*[(size[name], found.get(name)) for name in product])
    summed = {name: found.get(name) is None for name in size if name not in out}
    where = {name: k for k, name in enumerate(out)}
    return tuple(_passing(op, label, summed, where) if (label := found.get(n)) is not None else None for n in out)


def _passing(op: Op, label: Label, summed: dict[int, bool], where: dict[int, int]) -> Label:
    """A label of the output; rows that depend on a summed dim (fixed or not) are tied."""
    for name, fixed in summed.items():
        if name in label.context:
            one = op.ledger.unite(label.ids, label.context.index(name), fixed)
            label = Label(one, tuple(c for c in label.context if c != name))
    return label.rename(where)


def plus(op: Op, bias: Labelled, dims: Dims) -> Dims:
    """``dims`` after adding a tensor that broadcasts to them."""
    offset = len(dims) - bias.ndim
    out = list(dims)
    for d, n in enumerate(bias.shape):
        if n > 1:
            label = bias.dims[d]
            label = label.rename(range(offset, len(dims))) if label is not None else None
            out[d + offset] = op.couple(out[d + offset], label) if out[d + offset] or label else None
    return tuple(out)


@rule(aten.mm, aten.bmm, aten.matmul, aten.mv, aten.dot, aten.vdot, aten.linalg_matmul)
def matmul(op: Op, a: Labelled, b: Labelled, *args: Any) -> Dims:
    """``... i k, ... k j -> ... i j``, with vectors as PyTorch reads them."""
    batch = max(a.ndim, b.ndim, 2) - 2
    i, k, j = batch, batch + 1, batch + 2
    left = [k] if a.ndim == 1 else [*range(batch - a.ndim + 2, batch), i, k]
    right = [k] if b.ndim == 1 else [*range(batch - b.ndim + 2, batch), k, j]
    out = [*range(batch), *([i] if a.ndim > 1 else []), *([j] if b.ndim > 1 else [])]
    return contract(op, [a, b], [left, right], out)


@rule(aten.addmm, aten.baddbmm, aten.addbmm, aten.addmv)
def addmm(op: Op, bias: Labelled, a: Labelled, b: Labelled, **kwargs: Any) -> Dims:
    """A matrix product plus a tensor that broadcasts."""
    if op.name == "addbmm":
        return plus(op, bias, contract(op, [a, b], [[0, 1, 2], [0, 2, 3]], [1, 3]))
    return plus(op, bias, matmul(op, a, b))


@rule(aten.einsum)
def einsum(op: Op, equation: str, operands: Sequence[Labelled], **kwargs: Any) -> Dims:
    """Any pattern without a repeated letter inside one operand."""
    names, out = spelled(equation, [t.ndim for t in operands])
    if any(len(set(term)) < len(term) for term in names):
        op.freeze([d for t in operands for d in t.dims], "einsum takes a diagonal of it")
        return (None,) * len(op.shape)
    return contract(op, operands, names, out)


def spelled(equation: str, ndims: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """The letters of each operand of an einsum and of its output, as numbers (those of an ellipsis below zero)."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    dots = max((n - len(s.replace("...", "")) for s, n in zip(terms, ndims, strict=True) if "..." in s), default=0)
    names = [_letters(s, n) for s, n in zip(terms, ndims, strict=True)]
    if arrow:
        return names, _letters(right, dots + len(right.replace("...", "")))
    flat = [n for term in names for n in term]
    return names, [*range(-dots, 0), *sorted(n for n in set(flat) if n >= 0 and flat.count(n) == 1)]


def _letters(term: str, ndim: int) -> list[int]:
    """Letters as code points; the dims of an ellipsis as -dots ... -1."""
    if "..." not in term:
        return [ord(c) for c in term]
    before, after = term.split("...")
    own = ndim - len(before) - len(after)
    return [*map(ord, before), *range(-own, 0), *map(ord, after)]


@rule(
    aten.scaled_dot_product_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_attention_math,
)
def attention(op: Op, q: Labelled, k: Labelled, v: Labelled, *args: Any, **kwargs: Any) -> Dims | list[Dims | None]:
    """``... l e, ... s e, ... s f -> ... l f``: head dims of q and k are tied, heads of all three too."""
    batch = q.ndim - 2
    for t in (q, k, v):
        op.freeze(t.dims[-2:-1], "attention normalises over it")
    k, v = (_repeated(t, q) for t in (k, v))
    for t in op.inputs[3:]:
        op.freeze(t.dims[-2:], "it masks attention")
    lead = [*range(batch)]
    scores = contract(op, [q, k], [[*lead, 100, 102], [*lead, 101, 102]], [*lead, 100, 101])
    if kwargs.get("scale") is None and q.dims[-1] is not None:
        op.ledger.scale(op.inputs[0], q.dims[-1].ids, -0.5)
    weights = Labelled((*np.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2]), scores)
    for mask in op.inputs[3:]:
        weights = Labelled(weights.shape, plus(op, mask, weights.dims))
    out = contract(op, [weights, v], [[*lead, 100, 101], [*lead, 101, 103]], [*lead, 100, 103])
    if len(op.shapes) == 1:
        return out
    return [out, *[None] * (len(op.shapes) - 1)]


def _repeated(t: Labelled, q: Labelled) -> Labelled:
    """Keys or values of fewer heads than queries: each head serves a run of query heads."""
    if t.ndim < 3 or t.shape[-3] == q.shape[-3] or t.shape[-3] == 1:
        return t
    times = q.shape[-3] // t.shape[-3]
    dim = t.ndim - 3
    dims = take(t, dim, np.repeat(np.arange(t.shape[dim]), times))
    return Labelled((*t.shape[:dim], q.shape[-3], *t.shape[dim + 1 :]), dims)


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def conv(
    op: Op, x: Labelled, weight: Labelled, bias: Labelled | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Dims:  # fmt: skip
    """A convolution; with groups, a contraction for each group."""
    return convolution(op, x, weight, bias, stride, padding, dilation, False, 0, groups)


@rule(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
def conv_transpose(
    op: Op, x: Labelled, weight: Labelled, bias: Labelled | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Dims:  # fmt: skip
    """A transposed convolution: the weight's first dim is read, its second is made."""
    return convolution(op, x, weight, bias, stride, padding, dilation, True, output_padding, groups)


@rule(aten.conv_tbc)
def conv_tbc(op: Op, x: Labelled, weight: Labelled, bias: Labelled, pad: int = 0) -> Dims:
    """``t b i, k i o, o -> t b o``: a convolution along the first dim."""
    op.freeze(weight.dims[:1], "it is a kernel size")
    x = fix(op, x, (0,), f"{op.name} slides over it")
    read = op.couple(x.dims[2], weight.dims[1]) if x.shape[2] > 1 else None
    made = op.couple(weight.dims[2], bias.dims[0]) if weight.shape[2] > 1 else None
    op.reads(weight.dims[1])
    op.hands_on(weight.dims[2])
    batch = op.shape[0] * weight.shape[0], (x.shape[1], x.dims[1])
    op.count(*batch, (weight.shape[1], read), (weight.shape[2], made))
    return (None, x.dims[1], made)


@rule(aten.convolution, aten._convolution)
def convolution(
    op: Op, x: Labelled, weight: Labelled, bias: Labelled | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, *args: Any,
) -> Dims:  # fmt: skip
    """Every convolution."""
    channel = x.ndim - weight.ndim + 1
    op.freeze(weight.dims[2:], "it is a kernel size")
    weight = _computed(op, weight)
    op.freeze(x.dims[channel + 1 :], f"{op.name} slides over it")
    x = Labelled(x.shape, without_context(op, x, channel)) if x.dims[channel] is None else x
    into, made = (weight.dims[0], weight.dims[1]) if transposed else (weight.dims[1], weight.dims[0])
    op.reads(into)
    op.hands_on(made)
    if groups == 1:
        read = op.couple(x.dims[channel], into) if x.shape[channel] > 1 else None
        counted = made = op.couple(made, bias.dims[0]) if bias is not None else made
    elif transposed:
        read, counted, made = _grouped_transposed(op, x.dims[channel], weight, bias, groups)
    else:
        read, made = _grouped(op, x.dims[channel], weight, bias, groups)
        counted = made
    spatial = (x if transposed else op).shape[channel + 1 :]
    sizes = (weight.shape[0], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[0])
    batch = zip(x.shape[:channel], x.dims[:channel], strict=True)
    op.count(*batch, prod(weight.shape[2:]) * prod(spatial), (sizes[0], read), (sizes[1], counted))
    return (*x.dims[:channel], made, *[None] * (x.ndim - channel - 1))


def _computed(op: Op, weight: Labelled) -> Labelled:
    """A kernel that was cut out of one dim: its channels are numbered anew for each position of the other one."""
    channels, nothing = weight.dims[:2], (None,) * (weight.ndim - 2)
    in_parts = any(label is not None and label.context for label in weight.dims[2:])
    if any(d is not None and d.context and (in_parts or d.ids.size > LARGEST_CUT) for d in channels):
        op.freeze(channels, "kernels of a fixed size, or very many, were cut out of it")
        channels = (None, None)
    weight = Labelled(weight.shape, (*channels, *nothing), weight.source)
    for d in (0, 1):
        weight = Labelled(weight.shape, without_context(op, weight, d), weight.source)
    return weight


def _grouped(
    op: Op, x: Label | None, weight: Labelled, bias: Labelled | None, groups: int
) -> tuple[Label | None, Label | None]:
    """What is read inside a group, and the output channels."""
    into, made = weight.dims[1], weight.dims[0]
    if made is None:
        op.freeze([x, into, bias.dims[0] if bias is not None else None], f"the output of {op.name} has a fixed size")
        return into, made
    made = (op.couple(made, bias.dims[0]) if bias is not None else made) or made
    if x is None or x.context:
        op.freeze([into, x], f"the input of {op.name} has a fixed size or depends on other dimensions")
        if made.size == groups:
            op.freeze([made], f"the input channels of {op.name} are fixed, and each makes one output")
        op.ledger.balance(made.ids.reshape(groups, -1), "groups of a convolution are equally wide")
        op.ledger.freeze(op.ledger.rows(made.ids.reshape(groups, -1)), "its input channels are fixed")
        return into, made
    ins, outs = x.ids.reshape(groups, -1), made.ids.reshape(groups, -1)
    if into is None:  # depthwise
        if outs.shape[1] == 1:
            op.ledger.couple(x, made)
        else:
            op.ledger.belong(x.ids, outs)
            op.ledger.balance(outs, "a depthwise convolution makes equally many channels from each input channel")
        op.require_argument(groups, "groups", 6, x.ids)
        return None, made
    op.ledger.tie(np.broadcast_to(into.ids, ins.shape), ins)
    op.ledger.align(ins, "all groups of a convolution share the numbering of their input channels")
    coarse = op.ledger.rows(ins)
    op.ledger.batched.append(coarse)
    _outputs_of_groups(op, coarse, outs)
    op.require_argument(groups, "groups", 6, coarse)
    return into, made


def _outputs_of_groups(op: Op, coarse: Ids, outs: Ids) -> None:
    """What a group makes goes with it; a single output cannot go without its group."""
    if outs.shape[1] == 1:
        op.ledger.tie(coarse, outs.reshape(-1))
        return
    op.ledger.belong(coarse, outs)
    op.ledger.balance(outs, "groups of a convolution are equally wide")


def _grouped_transposed(
    op: Op, x: Label | None, weight: Labelled, bias: Labelled | None, groups: int
) -> tuple[Label | None, Label | None, Label | None]:
    """Input channels, what one group makes, and the output channels."""
    read = op.couple(x, weight.dims[0])
    made = weight.dims[1]
    width = groups * weight.shape[1]
    out = bias.dims[0] if bias is not None else None
    out = out if out is not None else Label(op.ledger.fresh(width))
    outs = out.ids.reshape(groups, -1)
    if read is None or read.context:
        op.freeze([read, made, out], f"the input of {op.name} has a fixed size")
        return read, made, out
    ins = read.ids.reshape(groups, -1)
    if made is not None:
        op.ledger.tie(np.broadcast_to(made.ids, outs.shape), outs)
        op.ledger.align(outs, "all groups of a convolution share the numbering of their output channels")
    if ins.shape[1] == 1 and outs.shape[1] == 1:
        op.ledger.tie(ins.reshape(-1), outs.reshape(-1))
        op.require_argument(groups, "groups", 6, read.ids)
        return read, None, out
    coarse = op.ledger.rows(ins) if ins.shape[1] > 1 else ins.reshape(-1)
    op.ledger.batched.append(coarse)
    if ins.shape[1] > 1:
        op.ledger.balance(ins, "groups of a convolution are equally wide")
    _outputs_of_groups(op, coarse, outs)
    op.require_argument(groups, "groups", 6, coarse)
    return read, made, out


@rule("torchvision::deform_conv2d")
def deform_conv2d(
    op: Op, x: Labelled, weight: Labelled, offset: Labelled, mask: Labelled, bias: Labelled, *args: int
) -> Dims:
    """A convolution that reads each place of its kernel at an offset; channels of one offset group share it."""
    groups, offset_groups = args[6], args[7]
    for t in (offset, mask):
        op.freeze(t.dims, f"{op.name} reads offsets and weights of every place of its kernel there")
    label = x.dims[1]
    if label is not None and offset_groups > 1:
        rows = label.ids.reshape(*label.ids.shape[:-1], offset_groups, -1)
        op.ledger.balance(rows, "channels that share offsets are equally many")
        op.ledger.freeze(op.ledger.rows(rows), "the number of its offset groups is fixed")
    return convolution(op, x, weight, bias, 1, 0, 1, False, 0, groups)
