"""Watch what each weight reads, and the gradients of what it makes, while the model runs.

A function mode sees the torch functions that the model calls and finds the weights among their arguments by identity
(views of a weight count too), so layers, functional calls and bare parameters are all the same to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from prunus.calibration.patches import Conv, patches
from prunus.calibration.statistics import Reading
from prunus.modes import COMPOSED_IN_PYTHON, unguarded

_CONV = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
_PRODUCTS = frozenset({
    torch.matmul, torch.mm, torch.bmm,
    torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__,
})  # fmt: skip
_SUMS = frozenset({torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm})
_RECURRENT = frozenset({torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu})


class Part(NamedTuple):
    """A weight that an argument is a view of: its name, its dim for each dim of the view, and where that begins."""

    name: str
    dims: tuple[int, ...]
    starts: tuple[int, ...]


class Recorder(TorchFunctionMode):
    """Sums up what weights read while it is active.

    Args:
        names: the name of each parameter, by identity.
        shapes: the shape of each parameter, by name.
        grams: whether second moments between inputs are kept, and up to how many columns per block.
        rows: at most so many places of a sample enter these second moments, evenly spread.
    """

    def __init__(
        self, names: Mapping[int, str], shapes: Mapping[str, tuple[int, ...]], grams: int = 0, rows: int = 1024
    ) -> None:
        super().__init__()
        self.names, self.shapes, self.grams, self.rows = names, shapes, grams, rows
        self.readings: dict[str, Reading] = {}
        self.energies = False
        self.scale = 1.0  # what turns the gradient of the loss into that of one sample
        self.mask: torch.Tensor | None = None  # (samples, places): which places count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSED_IN_PYTHON:
            with self:
                return unguarded(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        watch = self._watcher(func)
        if watch is not None:
            watch(func, args, kwargs, out)
        return out

    def _watcher(self, func: Any) -> Callable[[Any, Any, Any, Any], None] | None:
        if func is F.linear:
            return self._linear
        if func in _CONV or func in _TRANSPOSED:
            return self._convolution
        if func in _PRODUCTS or func in _SUMS:
            return self._product
        return self._recurrent if func in _RECURRENT else None

    # -- the ops ----------------------------------------------------------------------------------------------------

    def _linear(self, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        x, weight = _arguments(("input", "weight"), args, kwargs)
        part = self._part(weight)
        if part is not None and weight.dim() == 2:
            self.observe(part, x.unsqueeze(0), reads=1)
            self._watch_energy(part, out, makes=0, channel=-1)

    def _product(self, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        if func in _SUMS:
            _, left, right = _arguments(("input", "mat1", "mat2"), args, kwargs)
        else:
            left, right = _arguments(("input", "other"), args, kwargs)
        part, channel = self._part(right), -1
        if part is None:  # weight @ x is (x' @ weight')'
            part = self._part(left)
            if part is None or min(left.dim(), right.dim()) < 2:
                return
            left, right, channel = right.mT, left.mT, -2
            part = Part(part.name, (*part.dims[:-2], *part.dims[:-3:-1]), (*part.starts[:-2], *part.starts[:-3:-1]))
        if right.dim() == 2:
            self.observe(part, left.unsqueeze(0), reads=0)
            self._watch_energy(part, out, makes=1, channel=channel)
        elif right.dim() == 3 and left.dim() == 3 and left.shape[0] == right.shape[0]:
            self.observe(part, left.unsqueeze(1), reads=1, stack=True)

    def _convolution(self, func: Any, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        transposed = func in _TRANSPOSED
        own = ("input", "weight", "bias", "stride", "padding")
        rest = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        found = dict(zip((*own, *rest), args, strict=False)) | kwargs
        x, weight, groups = found["input"], found["weight"], found.get("groups", 1)
        part = self._part(weight)
        if part is None or part.dims != tuple(range(weight.dim())) or weight.shape[1 - transposed] == 1 < groups:
            return
        alone = x.dim() == weight.dim() - 1
        x = x.unsqueeze(0) if alone else x
        last = x.movedim(1, -1)  # (samples, *places, channels)
        conv = None
        if not transposed and weight[0].numel() <= self.grams and weight.dim() <= 4:
            conv = Conv(x, tuple(weight.shape[2:]), groups, *(found.get(k) for k in ("stride", "padding", "dilation")))
        if transposed:
            self.observe(part, last.unsqueeze(0), reads=0, gram=groups == 1)
        else:
            self.observe(part, last.unflatten(-1, (groups, -1)).movedim(-2, 0), reads=1, conv=conv)
        self._watch_energy(part, out, makes=None if transposed else 0, channel=0 if alone else 1)

    def _recurrent(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """The inputs of the first layer, and the states of the last: others never leave the kernel."""
        if kwargs or len(args) != 9 or not isinstance(args[2], (list, tuple, torch.Tensor)):
            return
        x, _, weights, biased, layers, _, _, both, _ = args
        if not isinstance(weights, (list, tuple)):
            return
        step = 4 if biased else 2
        directions = 2 if both else 1
        extra = len(weights) % step  # projections are not looked at
        if extra or len(weights) != step * layers * directions:
            return
        states = out[0].chunk(directions, dim=-1)
        for k in range(directions):
            first, last = weights[k * step], weights[((layers - 1) * directions + k) * step + 1]
            for weight, seen in ((first, x), (last, states[k])):
                part = self._part(weight)
                if part is not None:
                    self.observe(part, seen.unsqueeze(0), reads=1, gram=False)

    # -- sums -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(
        self,
        part: Part,
        x: torch.Tensor,
        reads: int,
        conv: Conv | None = None,
        gram: bool = True,
        stack: bool = False,
    ) -> None:
        """Add what a weight reads: ``x`` (blocks, samples, places..., positions) meets the dim ``reads`` of it."""
        dim = part.dims[reads]
        if x.shape[-1] != self.shapes[part.name][dim] or part.starts[reads]:
            return  # only a piece of the columns is read here
        x = x.detach()
        x = x if x.dtype is torch.float64 else x.float()
        x = x.unsqueeze(1) if x.dim() < 3 else x
        reading = self.readings.setdefault(part.name, Reading(dim, x.shape[0], stack=stack))
        if (reading.blocks, reading.dim) != (x.shape[0], dim):
            return  # another use of the same weight, in another way
        kept = self._unmasked(x)
        _sum_moments(reading, kept, x)
        if not self.grams or not gram:
            return
        columns = patches(conv, self.rows) if conv is not None and conv.size > 1 else _rows(kept, self.rows)
        if columns.shape[-1] <= self.grams:
            _sum_gram(reading, columns)

    def _unmasked(self, x: torch.Tensor) -> torch.Tensor:
        """Only the places that count, as (blocks, rows, positions); all of them, as they are, without a mask."""
        if self.mask is not None and x.dim() == 4 and x.shape[1:3] == self.mask.shape:
            return x[:, self.mask.to(x.device)]
        return x

    def _watch_energy(self, part: Part, out: torch.Tensor, makes: int | None, channel: int) -> None:
        """Add the energy of the gradient of what a weight makes, once it is known; ``makes``: the weight's own dim."""
        reading = self.readings.get(part.name)
        if not self.energies or reading is None or not out.requires_grad:
            return
        width, scale = out.shape[channel], self.scale**2
        start = 0 if makes is None else part.starts[makes]
        size = width if makes is None else self.shapes[part.name][part.dims[makes]]

        def add(gradient: torch.Tensor) -> None:
            energy = gradient.detach().double().square().movedim(channel, -1).reshape(-1, width).sum(dim=0)
            if reading.energy is None:
                reading.energy = torch.zeros(size, dtype=torch.float64, device=energy.device)
            if len(reading.energy) == size:
                reading.energy[start : start + width] += energy * scale

        out.register_hook(add)

    def _part(self, weight: Any) -> Part | None:
        """The parameter that an argument is a view of."""
        if not isinstance(weight, torch.Tensor):
            return None
        name = self.names.get(id(weight))
        if name is not None:
            return Part(name, tuple(range(weight.dim())), (0,) * weight.dim())
        base = weight._base
        name = None if base is None else self.names.get(id(base))
        return None if name is None or base is None else _view(name, weight, base)


def _arguments(names: tuple[str, ...], args: Any, kwargs: Any) -> list[Any]:
    return [args[k] if k < len(args) else kwargs[name] for k, name in enumerate(names)]


def _view(name: str, view: torch.Tensor, base: torch.Tensor) -> Part | None:
    """Which dims of ``base`` the dims of ``view`` are (transposed or narrowed), or None if it is neither."""
    if view.dim() != base.dim():
        return None
    left = list(range(base.dim()))
    dims = []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        found = next((d for d in left if base.stride(d) == stride and base.shape[d] >= size), None)
        if found is None:
            return None
        left.remove(found)
        dims.append(found)
    offset = int(view.storage_offset()) - int(base.storage_offset())
    start, strides = [0] * base.dim(), base.stride()
    for d in sorted(range(base.dim()), key=lambda d: -strides[d]):
        start[d], offset = divmod(offset, max(strides[d], 1))
    return Part(name, tuple(dims), tuple(start[d] for d in dims))


def _sum_moments(reading: Reading, kept: torch.Tensor, x: torch.Tensor) -> None:
    rows = kept.flatten(1, -2)
    reading.rows += rows.shape[1]
    reading.samples += x.shape[1]
    reading.first = reading.first.to(rows.device) + rows.sum(dim=1).double()
    reading.second = reading.second.to(rows.device) + rows.square().sum(dim=1).double()
    means = x.abs().flatten(2, -2).mean(dim=2).square() if x.dim() > 3 else x.square()
    reading.means = reading.means.to(rows.device) + means.sum(dim=1).double()


def _rows(x: torch.Tensor, most: int) -> torch.Tensor:
    """(blocks, rows, positions), with at most ``most`` evenly spread places of each sample."""
    if x.dim() > 3:
        x = x.flatten(2, -2)
        x = x[:, :, :: -(-x.shape[2] // most)]
    return x.flatten(1, -2)


def _sum_gram(reading: Reading, columns: torch.Tensor) -> None:
    if reading.shift is None:
        reading.shift = columns.mean(dim=1)
    columns = columns - reading.shift[:, None]
    product, first = columns.mT @ columns, columns.sum(dim=1).double()
    reading.gram_rows += columns.shape[1]
    reading.kernel = columns.shape[-1] // reading.first.shape[-1]
    reading.gram = product if reading.gram is None else reading.gram.add_(product)
    reading.gram_first = first if reading.gram_first is None else reading.gram_first.add_(first)
