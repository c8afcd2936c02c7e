"""What becomes of the output of a multiplication: the norm that reads it, and the stream that it is added to.

Where an output is added to a stream that earlier cuts have changed, the layer can make up for the stream as well: its
target is the dense sum without what the pruned stream already brings. The sums are found by recording one run: from the
output through ops that can be inverted (norms in evaluation, layer scales, views, rolls) to an addition whose other
operand is there before the multiplication runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prunus.modes import tensors_among
from prunus.repair.crowd import Alive
from prunus.repair.recurrent import Gates
from prunus.repair.sites import arguments
from prunus.repair.watch import Key, Use

MARK = "_prunus_step"
SMALL = 1e-4  # scales of norms below this share of the largest are not divided by
Inverse = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Norm:
    """A batch norm that uses its running statistics."""

    weight: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float

    def scale(self) -> Tensor:
        """What it multiplies each channel by."""
        scale = (self.var + self.eps).rsqrt()
        return scale if self.weight is None else scale * self.weight


@dataclass(frozen=True)
class Chain:
    """From an output to what it is added to.

    Args:
        norm: the batch norm that alone reads the output, if one does.
        other: the step that made the other operand of the addition, or None where no such addition was found.
        inverses: what takes the other operand back to the output's place, last op first.
    """

    norm: Norm | None = None
    other: int | None = None
    inverses: tuple[Inverse, ...] = ()

    def back(self, other: Tensor) -> Tensor:
        """The other operand of the addition as if it had been added to the output itself."""
        for inverse in self.inverses:
            other = inverse(other)
        return other


@dataclass
class _Step:
    name: str
    inputs: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    inverse: Inverse | None
    norm: Norm | None


@dataclass
class Recorder:
    """Records one run; pass ``after`` to a :class:`~prunus.repair.watch.Watch`."""

    uses: dict[Key, Use] = field(default_factory=dict)
    sizes: dict[Key, torch.Size] = field(default_factory=dict)
    steps: list[_Step] = field(default_factory=list)
    readers: dict[int, list[int]] = field(default_factory=dict)
    other_readers: dict[str, str] = field(default_factory=dict)  # parameter -> op that multiplies by it, but is no use
    scaled: dict[int, str] = field(default_factory=dict)  # products with a parameter, entry by entry
    look_ups: dict[str, str] = field(default_factory=dict)  # parameter -> op that picks rows of it
    find: Callable[[Tensor], Any] = lambda tensor: None
    held: list[int] = field(default_factory=list)  # for each step: bytes of activations that are there after it
    alive: Alive = field(default_factory=Alive)

    def after(self, step: int, func: Any, args: Any, kwargs: Any, result: Any, use: Use | None) -> None:
        """Note an op."""
        name = func.overloadpacket.__name__
        inputs = []
        for tensor in tensors_among((*args, *kwargs.values())):
            origin = getattr(tensor, MARK, None)
            if origin is not None:
                inputs.append(origin)
                self.readers.setdefault(origin, []).append(step)
            elif use is None and name in _LOOK_UP and (found := self.find(tensor)) is not None:
                self.look_ups.setdefault(found[0], name)
            elif use is None and name in _MULTIPLY and (found := self.find(tensor)) is not None:
                self.other_readers.setdefault(found[0], name)
        self._note_sum(name, step, func, args, kwargs)
        inverse, norm = _inverse_of(name, func, args, kwargs, result) if inputs else (None, None)
        self.steps.append(_Step(name, tuple(inputs), tuple(t.shape for t in tensors_among(args)), inverse, norm))
        for tensor in tensors_among((result,)):
            setattr(tensor, MARK, step)
        self.held.append(self.alive.note(tensors_among((*args, *kwargs.values())), tensors_among((result,))))
        if use is not None:
            self.uses[use.key] = _light(use)
            self.sizes[use.key] = result.shape

    def _note_sum(self, name: str, step: int, func: Any, args: Any, kwargs: Any) -> None:
        """A product with a parameter that is summed over its last dim is a multiplication by a matrix of one row."""
        if name == "mul":
            found = [self.find(t) for t in args[:2] if isinstance(t, Tensor) and getattr(t, MARK, None) is None]
            self.scaled.update((step, one[0]) for one in found if one is not None)
        elif name == "sum" and (scaled := self.scaled.get(getattr(args[0], MARK, -1))) is not None:
            dims = arguments(func, args, kwargs).get("dim") or ()
            if any(d in {-1, args[0].dim() - 1} for d in dims):
                self.other_readers.setdefault(scaled, "mul and sum")

    def held_at_norms(self) -> list[int]:
        """Bytes of activations at each batch norm that uses its running statistics."""
        return [n for step, n in zip(self.steps, self.held, strict=True) if step.norm is not None]

    def has_norm_beside(self, layers: Iterable[Key]) -> bool:
        """Whether, behind the first of some layers, a batch norm reads what none of them made."""
        made = {self.uses[key].step for key in layers}
        first = min(made, default=-1)
        return any(s.norm is not None and k > first and not made & {*s.inputs} for k, s in enumerate(self.steps))

    def chain(self, key: Key) -> Chain:
        """What becomes of the output of a use."""
        start = here = self.uses[key].step
        inverses: list[Inverse] = []
        first: Norm | None = None
        while len(self.readers.get(here, ())) == 1:
            reader = self.readers[here][0]
            step = self.steps[reader]
            if step.norm is not None and here == start:
                first = step.norm
            if step.name in _ADDITIONS:
                others = [i for i in step.inputs if i != here]
                if len(step.inputs) == 2 and len(others) == 1 and others[0] < start and step.inverse is not None:
                    return Chain(first, others[0], tuple(reversed(inverses)))
                break
            if step.inverse is None or len(step.inputs) != 1:
                break
            inverses.append(step.inverse)
            here = reader
        return Chain(first)


def _light(use: Use) -> Use:
    """The use without the activations that it read."""
    call = use.call
    bare = replace(call, x=_meta(call.x))
    if isinstance(bare, Gates) and bare.beside is not None:
        bare = replace(bare, beside=replace(bare.beside, x=_meta(bare.beside.x)))
    return replace(use, call=bare)


def _meta(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


def _same(x: Tensor) -> Tensor:
    return x


def _inverse_of(name: str, func: Any, args: Any, kwargs: Any, result: Any) -> tuple[Inverse | None, Norm | None]:
    """What inverts an op that reads one activation, and the op as a norm."""
    x = args[0] if args and isinstance(args[0], Tensor) else None
    if x is None or not isinstance(result, Tensor):
        return _norm(name, func, args, kwargs)
    found: Inverse | None = None
    if name in _VIEWS:
        found = _reshaped(x.shape)
    elif name in _MOVES:
        found = _moved_back(func, args, kwargs, x.dim())
    elif name == "roll":
        found = _rolled_back(args)
    elif name in _ADDITIONS:
        plain = len(args) > 1 and isinstance(args[1], Tensor) and args[1].shape == x.shape and not kwargs
        found = _same if plain else None
    elif name in _KEEP and x.shape == result.shape:
        found = None if name == "dropout" and arguments(func, args, kwargs)["train"] else _same
    elif name in {"mul", "mul_"}:
        found = _unscaled(args[:2], result)
    else:
        return _norm(name, func, args, kwargs)
    return found, None


def _rolled_back(args: Any) -> Inverse:
    shifts, dims = args[1], args[2] if len(args) > 2 else ()
    back = [-s for s in ((shifts,) if isinstance(shifts, int) else shifts)]
    return lambda t: torch.roll(t, back, dims)


def _reshaped(shape: Sequence[int]) -> Inverse:
    shape = tuple(shape)
    # other batches may have another number of samples
    return lambda t: t.reshape(shape if t.numel() == torch.Size(shape).numel() else (-1, *shape[1:]))


def _moved_back(func: Any, args: Any, kwargs: Any, n: int) -> Inverse | None:
    probe = func(torch.empty(tuple(range(1, n + 1)), device="meta"), *args[1:], **kwargs)
    order = [size - 1 for size in probe.shape]
    inverse = [order.index(d) for d in range(n)]
    return lambda t: t.permute(inverse)


def _unscaled(factors: Sequence[Any], result: Tensor) -> Inverse | None:
    """Division by a layer's scale."""
    fixed = [f for f in factors if not (isinstance(f, Tensor) and getattr(f, MARK, None) is not None)]
    if len(fixed) != 1 or not isinstance(fixed[0], Tensor) or fixed[0].dim() > result.dim():
        return None
    other = next(f for f in factors if f is not fixed[0])
    return (lambda t: _divided(t, fixed[0])) if other.shape == result.shape else None


def _divided(t: Tensor, scale: Tensor) -> Tensor:
    return t * torch.where(scale.abs() > SMALL * scale.abs().max(), 1 / scale, 0)


def _norm(name: str, func: Any, args: Any, kwargs: Any) -> tuple[Inverse | None, Norm | None]:
    if name not in BATCH_NORMS:
        return None, None
    a = arguments(func, args, kwargs)
    if a.get("training", a.get("train")) or a["running_mean"] is None:
        return None, None
    norm = Norm(a["weight"], a["running_mean"], a["running_var"], a["eps"])
    shape = [-1 if d == 1 else 1 for d in range(a["input"].dim())]
    return (lambda t: _divided(t, norm.scale().view(shape))), norm


BATCH_NORMS = frozenset({"batch_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training"})
_ADDITIONS = frozenset({"add", "add_"})
_VIEWS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze"})
_KEEP = frozenset({"dropout", "dropout_", "contiguous", "clone", "detach", "alias", "to", "_to_copy", "slice"})
_KEEP |= {"feature_dropout", "native_dropout"}
_MOVES = frozenset({"permute", "transpose", "t", "movedim"})
_LOOK_UP = frozenset({"embedding", "embedding_bag", "_embedding_bag", "index", "index_select", "gather"})
_MULTIPLY = frozenset(
    {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
)
_MULTIPLY |= {"bmm", "baddbmm", "matmul", "mm", "addmm", "einsum", "_grouped_mm", "bilinear", "linear", "tensordot"}
_MULTIPLY |= {
    "_weight_norm",
    "_weight_norm_interface",
    "norm_except_dim",
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
    "deform_conv2d",
    "_trilinear",
}
