"""Tracing: run the model once, see every ATen op, and let the rules say what it does to labels.

Two modes work together. A *function mode* sees the torch functions that the model's Python code calls: it hands out
sizes that remember their source and keeps the arguments of the running call, so that a rule can ask how a size was
written. A *dispatch mode* sees the ATen ops that really run and applies the rule of each. The model leaves tracing as
it came: training flags, attributes and caches, buffers, random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunus.errors import InputError, PrunusError
from prunus.held import Held, Modules, held_tensors
from prunus.labels import Ledger
from prunus.modes import Event, FunctionMode, Tracer
from prunus.sizes import mark_attributes
from prunus.untouched import untouched


@dataclass(frozen=True)
class Trace:
    """What one run of the model taught."""

    model: nn.Module
    held: tuple[Held, ...]
    ledger: Ledger
    events: tuple[Event, ...]
    unsupported: Mapping[str, tuple[str, ...]]  # op without rule -> modules in which it ran
    unread: tuple[str, ...]  # parameters that no op of the run has read
    modules: Mapping[str, nn.Module]  # every path of every module


Inputs = Any
ForwardFn = Callable[[nn.Module, Any], Any]


def call_model(model: nn.Module, example_inputs: Inputs, forward_fn: ForwardFn | None = None) -> Any:
    """Run the model on a tensor, a tuple or list of positional arguments, or a dict of keyword arguments."""
    if forward_fn is not None:
        return forward_fn(model, example_inputs)
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def trace(
    model: nn.Module,
    example_inputs: Inputs,
    forward_fn: ForwardFn | None = None,
    output_transform: Callable[[Any], Any] | None = None,
) -> Trace:
    """Run the model once in eval mode and record what every op does to labels.

    Args:
        model: any module; it is left as it came. Gradients are not needed.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, on the model's device.
        forward_fn: ``forward_fn(model, example_inputs)`` to use instead of calling the model.
        output_transform: picks, from the output, what must keep its sizes (default: every tensor in it).

    Raises:
        InputError: the model cannot run on the inputs.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}: pass the model itself")
    try:
        return _trace(model, example_inputs, forward_fn, output_transform, torch.inference_mode())
    except PrunusError:
        raise
    except Exception:  # some models differentiate while they run, which inference mode forbids
        pass
    try:
        return _trace(model, example_inputs, forward_fn, output_transform, torch.no_grad())
    except PrunusError:
        raise
    except Exception as error:
        raise InputError(
            f"the model cannot run on the example inputs ({type(error).__name__}: {error}); call it with the same "
            "inputs in eval mode to see where, and pass a tensor, a tuple of arguments, a dict, or a forward_fn"
        ) from error


def _trace(
    model: nn.Module,
    example_inputs: Inputs,
    forward_fn: ForwardFn | None,
    output_transform: Callable[[Any], Any] | None,
    guard: AbstractContextManager[Any],
) -> Trace:
    """One recorded run, without gradients."""
    ledger = Ledger()
    modules = list(model.named_modules(remove_duplicate=False))
    held, index = held_tensors(modules)
    once: Modules = [(path, m) for m, path in {m: path for path, m in reversed(modules)}.items()]
    tracer = Tracer(ledger, held, index, once)
    with untouched(model, [m for _, m in once], values=False), tracer.protecting(), ExitStack() as stack:
        stack.enter_context(_marked(once, ledger))
        for context in (guard, _without_mha_fastpath(), tracer.following_modules(), FunctionMode(tracer), tracer):
            stack.enter_context(context)

        def run() -> None:
            output = call_model(model, example_inputs, forward_fn)
            if output_transform is not None:
                output = output_transform(output)
            ledger.step = len(tracer.events)
            for tensor in tensors_in(output):
                for label in tracer.labels_of(tensor).dims:
                    if label is not None:
                        ledger.freeze(label.ids, "it is an output of the model")

        run()
        ledger.evaluated = len(tracer.events)
        if _unread(held):
            _run_in_training(model, ledger, run)
    unsupported = {name: tuple(dict.fromkeys(where)) for name, where in tracer.unsupported.items()}
    return Trace(model, tuple(held), ledger, tuple(tracer.events), unsupported, _unread(held), dict(modules))


def _unread(held: Sequence[Held]) -> tuple[str, ...]:
    """The parameters that no op has read."""
    return tuple(
        h.name for h in held if h.places[0].kind == "parameter" and max(h.shape, default=1) > 1 and max(h.starts) < 0
    )


def _run_in_training(model: nn.Module, ledger: Ledger, run: Callable[[], None]) -> None:
    """Run once more in training mode, for layers that only train (auxiliary heads); what cannot run is left unread."""
    counted = len(ledger.macs)
    with untouched(model):
        for module in model.modules():
            module.training = True
        with suppress(Exception):  # a training forward may want targets; the layers are then reported as not read
            run()
    del ledger.macs[counted:]


@contextmanager
def _marked(modules: Modules, ledger: Ledger) -> Iterator[None]:
    """The model's ints as sizes that remember where they came from, and then as plain ints again."""
    undo = mark_attributes(modules, ledger)
    before = [(fields, set(fields)) for fields in {id(f): f for f, _, _ in undo}.values()]
    try:
        yield
    finally:
        for fields, name, value in undo:
            fields[name] = value
        for fields, names in before:
            for name in set(fields) - names:
                del fields[name]


@contextmanager
def _without_mha_fastpath() -> Iterator[None]:
    """The fused path of multi-head attention hides its ops."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists, dicts, dataclasses and plain objects."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield value
        return
    if value is None or isinstance(value, (str, bytes, int, float, bool, type, nn.Module)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        children: Any = value.values()
    elif isinstance(value, (tuple, list, set, frozenset)):
        children = value
    else:
        children = getattr(value, "__dict__", {}).values()
    for child in children:
        yield from tensors_in(child, seen)
