"""The calls that a model makes, as data: which op on which shapes, so that each can be run again at other widths."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from prunus.cost.counting import call as run_model
from prunus.modes import tensors_among
from prunus.rules import lookup
from prunus.untouched import untouched, without_mha_fastpath

Shape = tuple[int, ...]
MOST_COPIES = 64  # of the weights of one call


@dataclass(frozen=True)
class Spec:
    """A tensor argument without its values: ``order`` is its dims from the outermost in memory to the innermost.

    ``spread`` are the dims along which it was expanded, which take no memory; ``weight``: the model keeps it.
    """

    number: int
    shape: Shape
    dtype: torch.dtype
    order: tuple[int, ...]
    spread: tuple[int, ...]
    weight: bool = False

    def build(self, shape: Shape, device: torch.device) -> Tensor:
        """A tensor of that layout with another shape: halves, zeros for integers, true for bools."""
        sizes = [1 if d in self.spread else shape[d] for d in self.order]
        real = self.dtype.is_floating_point or self.dtype.is_complex
        found = torch.full(sizes, 0.5 if real else self.dtype == torch.bool, dtype=self.dtype, device=device)
        back = [self.order.index(d) for d in range(len(shape))]
        return found.permute(back).expand(shape)

    @property
    def dense(self) -> bool:
        """Whether it lies in memory in the order of its dims."""
        return self.order == tuple(range(len(self.shape))) and not self.spread


@dataclass(frozen=True)
class Call:
    """One call of an op: ``args`` and ``kwargs`` with :class:`Spec` in place of tensors, in the order of ``specs``."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    specs: tuple[Spec, ...]
    free: bool  # it only views, or makes nothing

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of its tensors, as they were."""
        return tuple(spec.shape for spec in self.specs)

    def signature(self, shapes: Sequence[Shape]) -> str:
        """What its time depends on, as a text."""

        def show(value: Any) -> str:
            if isinstance(value, Spec):
                layout = "" if value.dense else f"{value.order}{value.spread}"
                return f"{str(value.dtype).removeprefix('torch.')}{list(shapes[value.number])}{layout}"
            if isinstance(value, (list, tuple)):
                return f"({','.join(map(show, value))})"
            return str(value)

        args, kwargs = self.at(shapes)
        named = [f"{key}={show(value)}" for key, value in sorted(kwargs.items())]
        return f"{self.name}({','.join([*map(show, args), *named])})"

    def at(self, shapes: Sequence[Shape]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for other shapes: groups and normalised shapes follow."""
        args = list(self.args)
        where = _GROUPS.get(self.name)
        if where is not None and len(args) > where and isinstance(args[where], int) and args[where] > 1:
            (before, weight), (now, narrow) = self.shapes[:2], shapes[:2]
            args[where] = max(round(args[where] * now[1] / before[1] * weight[1] / narrow[1]), 1)
        if self.name in _NORMALIZED and len(args) > 1 and isinstance(args[1], (list, tuple)):
            args[1] = list(shapes[0][len(shapes[0]) - len(args[1]) :])
        if self.name == "group_norm" and len(args) > 1 and shapes[0][1] % args[1]:
            args[1] = max(round(args[1] * shapes[0][1] / self.shapes[0][1]), 1)
        return tuple(args), self.kwargs

    def thunk(self, shapes: Sequence[Shape], device: torch.device, spread: int = 0) -> Callable[[], Any]:
        """The call on new tensors of other shapes, ready to be made.

        Args:
            shapes: of its tensors.
            device: where they are made.
            spread: bytes over which copies of its weights are spread, of which each call takes the next.
        """
        args, kwargs = self.at(shapes)
        pairs = list(zip(self.specs, shapes, strict=True))
        own = sum(prod(shape) * spec.dtype.itemsize for spec, shape in pairs if spec.weight)
        copies = min(max(spread // own, 1), MOST_COPIES) if own else 1
        once = {spec.number: spec.build(tuple(shape), device) for spec, shape in pairs if not spec.weight}
        turns = itertools.cycle(
            [
                _filled((args, kwargs), {**once, **{s.number: s.build(tuple(n), device) for s, n in pairs if s.weight}})
                for _ in range(copies)
            ]
        )

        def make() -> Any:
            positional, named = next(turns)
            return self.func(*positional, **named)

        return make

    def elements(self, shapes: Sequence[Shape]) -> int:
        """How many numbers its tensors hold altogether."""
        return sum(prod(shape) for shape in shapes)


_GROUPS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 6),
    **dict.fromkeys(("convolution", "_convolution"), 8),
}
_NORMALIZED = frozenset({"layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"})


def record_calls(
    model: nn.Module, example_inputs: Any, forward_fn: Callable[[nn.Module, Any], Any] | None = None
) -> tuple[list[Call], int]:
    """Every op that one run of the model calls, in order, and how many modules are called; the model is as it was."""
    recorder = _Recorder(frozenset(t.data_ptr() for t in (*model.parameters(), *model.buffers())))
    entered = [0]

    def enter(module: nn.Module, args: Any) -> None:
        entered[0] += 1

    hook = nn.modules.module.register_module_forward_pre_hook(enter)
    try:
        with without_mha_fastpath(), untouched(model), torch.inference_mode(), recorder:
            (run_model if forward_fn is None else forward_fn)(model, example_inputs)
    finally:
        hook.remove()
    return recorder.calls, entered[0]


class _Recorder(TorchDispatchMode):
    """Sees the ops as tracing does: one that has a rule stays whole, any other composite is taken apart."""

    def __init__(self, weights: frozenset[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = weights
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if lookup(func) is None and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        specs: list[Spec] = []

        def note(tensor: Tensor) -> Spec:
            specs.append(_spec(len(specs), tensor, tensor.data_ptr() in self._weights))
            return specs[-1]

        noted_args = tree_map_only(Tensor, note, tuple(args))
        noted_kwargs = tree_map_only(Tensor, note, dict(kwargs))
        result = func(*args, **kwargs)
        free = not func._schema.is_mutable and _views(result, (*args, *kwargs.values()))
        spelled = func.overloadpacket.__name__
        name = spelled.rstrip("_") or spelled
        if not free and name in ("reshape", "flatten"):  # it copies; its sizes would not fit another width
            func, noted_args, noted_kwargs = torch.ops.aten.clone.default, noted_args[:1], {}
            noted_kwargs = {"memory_format": torch.contiguous_format}
        self.calls.append(Call(name, func, noted_args, noted_kwargs, tuple(specs), free))
        return result


def _filled(arguments: Any, tensors: dict[int, Tensor]) -> Any:
    """Arguments with tensors in place of their specs."""
    return tree_map_only(Spec, lambda spec: tensors[spec.number], arguments)


def _spec(number: int, tensor: Tensor, weight: bool) -> Spec:
    strides = tensor.stride() if tensor.layout is torch.strided else tuple(range(tensor.dim(), 0, -1))
    spread = tuple(d for d, stride in enumerate(strides) if stride == 0 and tensor.shape[d] > 1)
    order = tuple(sorted(range(tensor.dim()), key=lambda d: (-strides[d] if tensor.shape[d] > 1 else -1 << 62, d)))
    if tensor.is_contiguous():
        order = tuple(range(tensor.dim()))
    return Spec(number, tuple(tensor.shape), tensor.dtype, order, spread, weight)


def _views(result: Any, arguments: Any) -> bool:
    """Whether everything that a call returned lies in memory that it was given."""
    given = {t.untyped_storage().data_ptr() for t in tensors_among(arguments) if t.layout is torch.strided}
    made = list(tensors_among((result,)))
    return all(t.layout is torch.strided and t.untyped_storage().data_ptr() in given for t in made)
