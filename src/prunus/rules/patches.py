"""Patches and neighbourhoods: positions of space move into channels and back, or are read at computed places."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch

from prunus.labels import Dims, Label, Labelled, in_memory
from prunus.rules.joins import fix, take
from prunus.rules.table import Op, rule
from prunus.rules.views import move, reshape

aten = torch.ops.aten


@rule(aten.im2col)
def im2col(op: Op, x: Labelled, kernel_size: Sequence[int], *args: Any) -> Dims:
    """``(N, C, H, W) -> (N, C * kernel, L)``: each channel makes one output channel for each place of the kernel."""
    x = fix(op, x, (-2, -1), f"{op.name} slides over it")
    return (*take(x, x.ndim - 3, np.repeat(np.arange(x.shape[-3]), prod(kernel_size)))[:-2], None)


@rule(aten.col2im)
def col2im(op: Op, x: Labelled, output_size: Sequence[int], kernel_size: Sequence[int], *args: Any) -> Dims:
    """``(N, C * kernel, L) -> (N, C, H, W)``: the channels of one kernel live together."""
    x = fix(op, x, (-1,), f"{op.name} slides over it")
    return (*x.dims[:-2], runs(op, x.dims[-2], prod(kernel_size)), None, None)


def runs(op: Op, label: Label | None, length: int) -> Label | None:
    """The label of a dim of which each position was made of a run of ``length``: the run lives together."""
    if label is None:
        return None
    rows = label.ids.reshape(*label.ids.shape[:-1], -1, length)
    op.ledger.tie(rows[..., :-1], rows[..., 1:])
    return Label(rows[..., 0], label.context) if rows.shape[-2] > 1 else None


@rule(aten.pixel_shuffle)
def pixel_shuffle(op: Op, x: Labelled, upscale_factor: int) -> Dims:
    """``(*, C * r * r, H, W) -> (*, C, H * r, W * r)``: the channels of one output channel live together."""
    x = fix(op, x, (-2, -1), f"{op.name} moves channels into it")
    return (*x.dims[:-3], runs(op, x.dims[-3], upscale_factor**2), None, None)


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(op: Op, x: Labelled, downscale_factor: int) -> Dims:
    """``(*, C, H * r, W * r) -> (*, C * r * r, H, W)``: each channel becomes a run of channels."""
    x = fix(op, x, (-2, -1), f"{op.name} moves it into channels")
    return take(x, x.ndim - 3, np.repeat(np.arange(x.shape[-3]), downscale_factor**2))


@rule(aten.unfold)
def unfold(op: Op, x: Labelled, dimension: int, size: int, step: int) -> Dims:
    """Windows of a dim, side by side: the windows' positions are a new last dim."""
    return (*fix(op, x, (dimension,) if x.ndim else (), f"{op.name} slides over it").dims, None)


@rule(aten.as_strided)
def as_strided(
    op: Op, x: Labelled, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Dims:
    """Dense memory read by strides: labelled dims that are read as they lie pass, over the others windows may slide."""
    strides, offset = op.layouts[0]
    order = in_memory(x.shape, strides)
    if not order or not (storage_offset is None or storage_offset == offset == 0):
        return by_address(op, x)
    x = fix(op, x, _slid_over(x, strides, order, size, stride), f"windows slide over it ({op.name})")
    walks = _walks(x, strides, order, size, stride)
    if walks is None:
        return by_address(op, x)
    where = {d: k for k, (d, _) in enumerate(walks) if d is not None}
    labels = [x.dims[d] if d is not None else None for d, _ in walks]
    dims = tuple(label.rename(where) if label is not None else None for label in labels)
    op.require_sizes(size, dims)
    for asked, step, n, (_, base) in zip(op.call.sizes(stride) or stride, stride, size, walks, strict=True):
        if n != 1:
            _require_stride(op, x, asked, step // base, [d for d in order if strides[d] < base])
    return dims


class _Walk(NamedTuple):
    """What a dim of a strided view walks along: a dim of the tensor (None: dims that stay), and where that starts."""

    dim: int | None
    base: int


def _slid_over(
    x: Labelled, strides: Sequence[int], order: Sequence[int], size: Sequence[int], stride: Sequence[int]
) -> list[int]:
    """The dims over which a strided view walks otherwise than from their first position to their last one."""
    exact = {(strides[d], x.shape[d]) for d in order}
    steps = [(step, n) for step, n in zip(stride, size, strict=True) if n != 1 and (step, n) not in exact]
    return [d for d in order if any(strides[d] * x.shape[d] > s and strides[d] <= (n - 1) * s for s, n in steps)]


def _walks(
    x: Labelled, strides: Sequence[int], order: Sequence[int], size: Sequence[int], stride: Sequence[int]
) -> list[_Walk] | None:
    """What each dim of a strided view walks along; None if one reads a part of what may shrink, or leaves its dim."""
    labels = {d: label for d in order if (label := x.dims[d]) is not None}
    whole = {strides[d]: d for d in order if d in labels or any(d in label.context for label in labels.values())}
    last, length = _runs_that_stay(x, strides, order, whole)
    walks: list[_Walk] = []
    for n, step in zip(size, stride, strict=True):
        base = max((b for b in length if b <= step), default=0)
        if n == 1:
            walks.append(_Walk(None, step))
        elif step in whole and n == x.shape[whole[step]]:
            walks.append(_Walk(whole.pop(step), step))
        elif base and step % base == 0:
            last[base] += (n - 1) * (step // base)
            walks.append(_Walk(None, base))
        else:
            return None
    inside = all(last[base] < length[base] for base in length)
    return walks if inside and not whole else None


def _runs_that_stay(
    x: Labelled, strides: Sequence[int], order: Sequence[int], whole: dict[int, int]
) -> tuple[dict[int, int], dict[int, int]]:
    """By the stride of each run of dims that stay and lie together: 0, and how many positions it has."""
    length: dict[int, int] = {}
    base = 0
    for d in order:
        base = 0 if strides[d] in whole else base or strides[d]
        if base:
            length[base] = strides[d] * x.shape[d] // base
    return dict.fromkeys(length, 0), length


def _require_stride(op: Op, x: Labelled, asked: Any, times: int, inside: Sequence[int]) -> None:
    """The code steps by ``asked``, which must stay so many times the dims ``inside`` (innermost first)."""
    if all(x.dims[d] is None for d in inside):
        op.require_same(asked)
        return
    order = [*(d for d in range(x.ndim) if d not in inside), *reversed(inside)]
    turned = Labelled(tuple(x.shape[d] for d in order), move(x, order))
    outside = turned.shape[: x.ndim - len(inside)]
    label = reshape(op, turned, (*outside, prod(turned.shape[len(outside) :])))[-1]
    if label is not None:
        op.require(asked, np.tile(label.ids, times))


@rule(aten.as_strided_scatter)
def by_address(op: Op, x: Labelled, *args: Any) -> Dims:
    """Memory read by addresses: nothing may move."""
    for tensor in op.inputs:
        op.freeze(tensor.dims, f"{op.name} reads its memory by address")
    return (None,) * len(op.shape)


@rule(aten.resize, aten.resize_, aten.resize_as_, aten.set_)
def resize(op: Op, x: Labelled, size: Any = None, *args: Any, **kwargs: Any) -> Dims:
    """The memory seen with other sizes; with the sizes that it has, nothing changes."""
    if op.name == "resize" and isinstance(size, (list, tuple)) and op.shape == x.shape and not x.numbers:
        op.require_sizes(size, x.dims)
        return x.dims
    for tensor in op.inputs:
        op.freeze(tensor.dims, f"{op.name} lays its memory out anew")
    return (None,) * len(op.shape)


@rule(aten.rot90)
def rot90(op: Op, x: Labelled, k: int = 1, dims: Sequence[int] = (0, 1)) -> Dims:
    """Two dims turned: both stay."""
    a, b = (d % x.ndim for d in dims)
    x = fix(op, x, (a, b), f"{op.name} turns it")
    order: list[int | None] = list(range(x.ndim))
    if k % 2:
        order[a], order[b] = b, a
    return move(x, order)


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(op: Op, x: Labelled, groups: int) -> Dims:
    """Channels in ``groups`` rows, read by columns."""
    split = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    rows = Labelled(split, reshape(op, x, split))
    if rows.dims[1] is not None:
        op.require_argument(groups, "groups", 1, rows.dims[1].ids)
    order = [0, 2, 1, *range(3, len(split))]
    turned = Labelled(tuple(split[d] for d in order), move(rows, order))
    return reshape(op, turned, x.shape)


@rule(aten.grid_sampler, aten.grid_sampler_2d, aten.grid_sampler_3d, aten.cudnn_grid_sampler)
def grid_sampler(op: Op, x: Labelled, grid: Labelled, *args: Any) -> Dims:
    """``(N, C, *space), (N, *places, coordinates) -> (N, C, *places)``: channels pass."""
    x = fix(op, x, range(2, x.ndim), f"{op.name} reads it by coordinates")
    grid = fix(op, grid, (grid.ndim - 1,), "it holds coordinates")
    batch = op.couple(x.dims[0], grid.dims[0]) if x.dims[0] or grid.dims[0] else None
    where = {0: 0, **{d: d + 1 for d in range(1, grid.ndim - 1)}}
    places = [d.rename(where) if d is not None else None for d in grid.dims[1:-1]]
    return (batch, x.dims[1], *places)


@rule(aten.affine_grid_generator)
def affine_grid(op: Op, theta: Labelled, *args: Any) -> Dims:
    """A grid of coordinates from matrices; the batch passes."""
    theta = fix(op, theta, (1, 2), f"{op.name} reads it by position")
    return (theta.dims[0], *[None] * (len(op.shape) - 1))


@rule("torchvision::nms")
def nms(op: Op, *args: Any) -> Dims:
    """Boxes chosen by value: their number is computed."""
    for tensor in op.inputs:
        op.freeze(tensor.dims, f"{op.name} compares its positions")
    return (None,)


@rule("torchvision::roi_align", "torchvision::roi_pool")
def roi_align(op: Op, x: Labelled, rois: Labelled, *args: Any) -> Dims | list[Dims | None]:
    """``(N, C, H, W), (K, 5) -> (K, C, h, w)``: channels pass."""
    dims = (rois.dims[0], _read_by_boxes(op, x, rois), None, None)
    return dims if len(op.shapes) == 1 else [dims, dims]


@rule("torchvision::ps_roi_align", "torchvision::ps_roi_pool")
def position_sensitive(op: Op, x: Labelled, rois: Labelled, *args: Any) -> list[Dims | None]:
    """``(N, C * h * w, H, W), (K, 5) -> (K, C, h, w)``: each place of a box reads channels of its own."""
    channels = runs(op, _read_by_boxes(op, x, rois), prod(op.shape[2:]))
    dims = (rois.dims[0], channels, None, None)
    return [dims, *[dims] * (len(op.shapes) - 1)]


def _read_by_boxes(op: Op, x: Labelled, rois: Labelled) -> Label | None:
    op.freeze(rois.dims[1:], "it holds coordinates")
    return fix(op, x, (0, 2, 3), f"{op.name} reads it by coordinates").dims[1]
