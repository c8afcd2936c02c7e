"""Multiplications by a weight, whatever layer or function makes them: one form for all of them.

Linear layers, attention projections, convolutions of any kind and their transposes all compute, for each group of
channels and each output position, ``W @ x + b`` with x a row of inputs. This module recognises the ops, says which part
of which parameter they read, and brings inputs, outputs and weights into that form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Region:
    """The part of a parameter that an op reads: for each axis of what it reads, the parameter's dim and the start."""

    dims: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def inside(self, outer: Region) -> Region:
        """This region, given in the coordinates of ``outer``, in those of the whole parameter."""
        starts = tuple(a + outer.starts[k] for k, a in zip(self.dims, self.starts, strict=True))
        return Region(tuple(outer.dims[k] for k in self.dims), starts, self.sizes)

    def of(self, parameter: Tensor) -> Tensor:
        """The part of the parameter, as a view in the op's order of axes."""
        for dim, start, size in zip(self.dims, self.starts, self.sizes, strict=True):
            parameter = parameter.narrow(dim, start, size)
        return parameter.permute(self.dims)


def locate(part: Tensor, whole: Tensor) -> Region | None:
    """Which part of ``whole`` a view of it shows (None: not a box of the same number of dims).

    Example:
        >>> weight = torch.zeros(12, 4)
        >>> locate(weight.chunk(3)[1].t(), weight)
        Region(dims=(1, 0), starts=(0, 4), sizes=(4, 4))
    """
    if part.dim() != whole.dim() or part.numel() == 0:
        return None
    offset = int(part.storage_offset()) - int(whole.storage_offset())
    if offset < 0:
        return None
    strides: tuple[int, ...] = whole.stride()
    order = sorted(range(whole.dim()), key=lambda d: -whole.stride()[d])
    start = [0] * whole.dim()
    for d in order:
        if strides[d] > 0 and whole.shape[d] > 1:
            start[d], offset = divmod(offset, strides[d])
    free, dims = list(range(whole.dim())), []
    for axis in range(part.dim()):
        fits = [d for d in free if part.stride(axis) == strides[d] and part.shape[axis] + start[d] <= whole.shape[d]]
        single = [d for d in free if part.shape[axis] == 1 and whole.shape[d] == 1]
        found = single or sorted(fits, key=lambda d: (whole.shape[d] == 1, d != axis))
        if not found:
            return None
        dims.append(found[0])
        free.remove(found[0])
    return None if offset else Region(tuple(dims), tuple(start[d] for d in dims), tuple(part.shape))


@dataclass(frozen=True)
class Call:
    """One multiplication by a weight, as an op makes it."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    inputs_first: bool = False  # the weight's first axis is the one that is summed over
    spatial: int = 0  # number of kernel dims; 0 for plain matrices
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    @property
    def out_axis(self) -> int:
        """The axis of the weight that holds (the outputs of a group, for transposed convolutions) outputs."""
        return 1 if self.inputs_first else 0

    @property
    def channel(self) -> int:
        """The dim of the output that holds its channels."""
        return -1 - self.spatial

    @property
    def summed(self) -> int:
        """How many inputs each output of the call sums over."""
        return self.matrix(self.weight).shape[2]

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight of this call as (groups, outputs, inputs)."""
        if not self.spatial:
            return (weight.t() if self.inputs_first else weight).unsqueeze(0)
        grouped = weight.reshape(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])
        if self.transposed:
            grouped = grouped.transpose(1, 2).flip(list(range(3, grouped.dim())))
        return grouped.flatten(2)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""
        if not self.spatial:
            return matrix[0].t() if self.inputs_first else matrix[0]
        kernel = self.weight.shape[2:]
        grouped = matrix.reshape(*matrix.shape[:2], -1, *kernel)
        if self.transposed:
            grouped = grouped.flip(list(range(3, grouped.dim()))).transpose(1, 2)
        return grouped.reshape(self.weight.shape)

    def positions(self, output: Tensor) -> tuple[int, int]:
        """How many samples, and how many rows for each of them, an output of this call has."""
        rows = output.numel() // output.shape[self.channel]
        if self.spatial:
            samples = output.shape[0] if output.dim() == self.spatial + 2 else 1
        else:
            samples = output.shape[0] if output.dim() > 1 else 1
        return samples, rows // samples

    def out_rows(self, output: Tensor, picked: Tensor) -> Tensor:
        """The picked rows of an output of this call: (rows, channels)."""
        if not self.spatial:
            return output.reshape(-1, output.shape[-1])[picked]
        batched = output if output.dim() == self.spatial + 2 else output.unsqueeze(0)
        return batched.movedim(1, -1)[_coordinates(picked, (batched.shape[0], *batched.shape[2:]))]

    def prepared(self) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
        """A function that gives picked rows of the inputs: (groups, rows, inputs of a group)."""
        if not self.spatial:
            flat = self.x.reshape(-1, self.x.shape[-1])
            return lambda picked, places: flat[picked].unsqueeze(0)
        x = self.x if self.x.dim() == self.spatial + 2 else self.x.unsqueeze(0)
        x = _spread(x, self.stride) if self.transposed else x
        padded = F.pad(x, [p for pair in reversed(self.padding) for p in pair]) if any(map(any, self.padding)) else x
        kernel = tuple(self.weight.shape[2:])
        step = (1,) * self.spatial if self.transposed else self.stride

        def rows(picked: Tensor, places: tuple[int, ...]) -> Tensor:
            s = padded.stride()
            shape = (padded.shape[0], *places, padded.shape[1], *kernel)
            moves = [a * b for a, b in zip(s[2:], step, strict=True)]
            taps = [a * b for a, b in zip(s[2:], self.dilation, strict=True)]
            windows = padded.as_strided(shape, (s[0], *moves, s[1], *taps), padded.storage_offset())
            found = windows[_coordinates(picked, (padded.shape[0], *places))]
            return found.reshape(len(picked), self.groups, -1).transpose(0, 1)

        return rows

    def places(self, output: Tensor) -> tuple[int, ...]:
        """The sizes of the dims over which the kernel moves."""
        return tuple(output.shape[output.dim() - self.spatial :]) if self.spatial else ()


def _coordinates(index: Tensor, shape: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.unravel_index(index, tuple(shape))


def _spread(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Zeros between the entries: a transposed convolution is a plain one over this."""
    if all(s == 1 for s in stride):
        return x
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    out = x.new_zeros(*x.shape[:2], *sizes)
    every = [slice(None), slice(None), *(slice(None, None, s) for s in stride)]
    out[tuple(every)] = x
    return out


def arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an op by name, with the defaults of those that were not given."""
    found = {}
    for k, argument in enumerate(func._schema.arguments):
        if k < len(args):
            found[argument.name] = args[k]
        elif argument.name in kwargs:
            found[argument.name] = kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value if argument.has_default_value() else None
    return found


def parse(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """The call that an op makes, or None where it is no multiplication by a matrix or a kernel."""
    reader = _READERS.get(func.overloadpacket.__name__)
    return None if reader is None else reader(arguments(func, args, kwargs))


def _linear(a: Mapping[str, Any]) -> Call | None:
    return Call(a["input"], a["weight"], a["bias"])


def _addmm(a: Mapping[str, Any]) -> Call | None:
    if a["beta"] != 1 or a["alpha"] != 1 or a["self"].dim() != 1:
        return None
    return Call(a["mat1"], a["mat2"], a["self"], inputs_first=True)


def _mm(a: Mapping[str, Any]) -> Call | None:
    x, weight = a["self"], a["mat2"] if "mat2" in a else a["other"]
    return Call(x, weight, None, inputs_first=True) if weight.dim() == 2 and x.dim() > 1 else None


def _convolution(a: Mapping[str, Any]) -> Call | None:
    weight = a["weight"]
    n = weight.dim() - 2
    stride, dilation = _each(a["stride"], n), _each(a["dilation"], n)
    if a.get("transposed"):
        return _transposed(a, stride, dilation)
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    padding = a["padding"]
    if padding == "same":
        pads = tuple((r // 2, r - r // 2) for r in reach)
    else:
        pads = tuple((p, p) for p in ((0,) * n if padding == "valid" else _each(padding, n)))
    return Call(a["input"], weight, a["bias"], False, n, stride, pads, dilation, a["groups"])


def _transposed(a: Mapping[str, Any], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Call:
    weight = a["weight"]
    n = weight.dim() - 2
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    padding, more = _each(a["padding"], n), _each(a["output_padding"], n)
    pads = tuple((r - p, r - p + m) for r, p, m in zip(reach, padding, more, strict=True))
    return Call(a["input"], weight, a["bias"], True, n, stride, pads, dilation, a["groups"], True)


def _conv_transpose(a: Mapping[str, Any]) -> Call | None:
    n = a["weight"].dim() - 2
    return _transposed(a, _each(a["stride"], n), _each(a["dilation"], n))


def _each(value: Any, n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


_READERS: dict[str, Callable[[Mapping[str, Any]], Call | None]] = {
    "linear": _linear,
    "addmm": _addmm,
    "mm": _mm,
    "matmul": _mm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
}
MULTIPLICATIONS = frozenset(_READERS)
"""The ops that :func:`parse` reads."""
