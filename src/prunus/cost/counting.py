"""Count what a model does and what it weighs, by watching one forward pass.

What is counted: the multiply-accumulates of every ATen op of the pass, whether a layer, a functional call or an
operator in the middle of `forward` made it (`formulas.py` is the table).

What that does not mean:
    - it is not time: a depthwise convolution has few MACs and is slow for each of them; see `latency`;
    - it is not FLOPs, which are twice as many;
    - norms, activations, pooling and additions count nothing, as in most papers;
    - a branch or a loop counts as it ran for the given inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import UninitializedParameter

from prunus.cost.formulas import MACS, OPERATIONS
from prunus.errors import InputError
from prunus.higher import SeesInside
from prunus.untouched import untouched, without_mha_fastpath

__all__ = ["Cost", "call", "count", "count_ops_and_params", "count_params"]

ForwardFn = Callable[[nn.Module, Any], Any]
"""Runs a model its own way: `(model, example_inputs) -> anything`."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs for given inputs.

    Args:
        macs: Multiply-accumulates of one forward pass.
        params: Numbers in its parameters, each shared one counted once.
        bytes: Memory of its parameters and buffers.
    """

    macs: int
    params: int
    bytes: int

    def __str__(self) -> str:
        return f"{_short(self.macs)} MACs, {_short(self.params)} parameters, {_short(self.bytes)}B"


def count(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None = None) -> Cost:
    """Count MACs, parameters and bytes of a model, which is left as it was (mode, buffers, caches, random state).

    Args:
        model: Any module, on any device, the meta device included.
        example_inputs: One tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        forward_fn: Runs the model where calling it is not enough, as `forward_fn(model, example_inputs)`.

    Raises:
        InputError: The model does not run on these inputs, or its parameters are not yet created.

    Example:
        >>> count(nn.Linear(10, 20), torch.zeros(3, 10))
        Cost(macs=600, params=220, bytes=880)
    """
    macs, _ = _watch(model, example_inputs, forward_fn)
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    weight = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return Cost(macs=sum(macs.values()), params=count_params(model), bytes=weight)


def count_params(module: nn.Module) -> int:
    """Count the numbers in the parameters of a model, each shared parameter once.

    Example:
        >>> count_params(nn.Linear(10, 20))
        220
    """
    return sum(parameter.numel() for parameter in module.parameters())


LayerCounts = dict[nn.Module, int]


@overload
def count_ops_and_params(
    model: nn.Module, example_inputs: Any, layer_wise: Literal[False] = False
) -> tuple[int, int]: ...
@overload
def count_ops_and_params(
    model: nn.Module, example_inputs: Any, layer_wise: Literal[True]
) -> tuple[int, int, LayerCounts, LayerCounts]: ...
def count_ops_and_params(
    model: nn.Module, example_inputs: Any, layer_wise: bool = False
) -> tuple[int, int] | tuple[int, int, LayerCounts, LayerCounts]:
    """Count operations and parameters the way users of Torch-Pruning know it.

    Operations are the MACs of `count` and, on top, one for each element of a bias, rectifier or pooling, and two for
    each element of a norm with weights: ResNet-18 at 224 pixels has 1.814 G MACs and 1.822 G operations.

    Args:
        model: Any module; it is left as it was.
        example_inputs: One tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.
        layer_wise: Also say how much each module does and holds by itself, without the modules inside it.

    Returns:
        `(operations, parameters)`, and with `layer_wise` two mappings from modules to counts, which sum to the totals.

    Raises:
        InputError: The model does not run on these inputs, or its parameters are not yet created.

    Example:
        >>> count_ops_and_params(nn.Sequential(nn.Linear(10, 20), nn.ReLU()), torch.zeros(1, 10))
        (240, 220)
    """
    macs, operations = _watch(model, example_inputs, by_module=layer_wise)
    total = macs + operations
    if not layer_wise:
        return sum(total.values()), count_params(model)
    layer_ops: LayerCounts = dict.fromkeys(model.modules(), 0)
    for owner, done in total.items():
        layer_ops[owner if owner in layer_ops else model] += done
    layer_params: LayerCounts = {}
    seen: set[Tensor] = set()
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if parameter not in seen]
        seen.update(own)
        layer_params[module] = sum(parameter.numel() for parameter in own)
    return sum(total.values()), count_params(model), layer_ops, layer_params


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model with one tensor, a tuple or list of positional arguments, or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def _watch(
    model: nn.Module, example_inputs: Any, forward_fn: ForwardFn | None = None, by_module: bool = False
) -> tuple[Counter[nn.Module], Counter[nn.Module]]:
    """Run the model once; give MACs and element-wise operations, on request by the innermost module that ran them."""
    if not isinstance(model, nn.Module):
        raise InputError(f"count takes a torch.nn.Module, not {type(model).__name__}")
    lazy = [name for name, parameter in model.named_parameters() if isinstance(parameter, UninitializedParameter)]
    if lazy:
        raise InputError(f"{lazy[0]} has no shape yet (lazy module); run the model once, then count")
    run = call if forward_fn is None else forward_fn
    counter = _Counter(model)
    with _steady(model), counter.attribution() if by_module else nullcontext(), counter:
        try:
            run(model, example_inputs)
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} does not run on the example inputs ({_describe(example_inputs)}): "
                f"{type(error).__name__}: {error}; give a tensor, a tuple of positional arguments or a dict of "
                "keyword arguments that model(...) accepts, on the model's device"
            ) from error
    return counter.macs, counter.operations


class _Counter(SeesInside):
    """Counts every ATen op that runs while it is active, for the module that is running."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the base class has no annotations
        self.macs: Counter[nn.Module] = Counter()
        self.operations: Counter[nn.Module] = Counter()
        self._running = [model]

    def see(self, func: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
        """Count the op, or those of which it is made."""
        name = func._schema.name
        macs, operations = MACS.get(name), OPERATIONS.get(name)
        if macs is None and operations is None:
            with self:
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        if macs is not None:
            self.macs[self._running[-1]] += macs(args, out)
        if operations is not None:
            self.operations[self._running[-1]] += operations(args, out)
        return out

    @contextmanager
    def attribution(self) -> Iterator[None]:
        """Follow which module is running."""
        before = register_module_forward_pre_hook(lambda module, args: self._running.append(module))
        after = register_module_forward_hook(lambda module, args, out: self._leave(), always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _leave(self) -> None:
        self._running.pop()


@contextmanager
def _steady(model: nn.Module) -> Iterator[None]:
    """Make the ops of a pass the same on every machine, whatever fast path it has.

    In inference mode composite ops (linear, attention) arrive whole. `nn.MultiheadAttention` and
    `nn.TransformerEncoder` are kept off their fused path, which hides the ops, and compiled code is not run.
    """
    with without_mha_fastpath(), untouched(model), torch.compiler.set_stance("force_eager"), torch.inference_mode():
        yield


def _describe(inputs: Any) -> str:
    """Say what the inputs are, by shape."""
    if isinstance(inputs, Tensor):
        return f"tensor of shape {tuple(inputs.shape)}"
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name}: {_describe(value)}" for name, value in inputs.items())
    if isinstance(inputs, (tuple, list)):
        return ", ".join(_describe(value) for value in inputs)
    return type(inputs).__name__


def _short(number: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} "
