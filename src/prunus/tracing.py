"""Tracing: run the model once, see every ATen op, and let the rules say what it does to labels.

Two modes work together. A *function mode* sees the torch functions that the model's Python code calls: it hands out
sizes that remember their source and keeps the arguments of the running call, so that a rule can ask how a size was
written. A *dispatch mode* sees the ATen ops that really run and applies the rule of each. The model leaves tracing as
it came: training flags, attributes and caches, buffers, random state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from prunus.errors import InputError, PrunusError
from prunus.held import Held, Modules, held_tensors
from prunus.ledger import Ledger
from prunus.meta import MetaFunctionMode, MetaMode, OverwrittenError, no_values, runs_without_data
from prunus.modes import Event, FunctionMode, Tracer
from prunus.opaque import Customized, OpaqueTracer, find_customized, stand_in
from prunus.recall import Recall
from prunus.sizes import SizeAsKeyError, mark_attributes
from prunus.standins import HollowValueError
from prunus.untouched import untouched, without_mha_fastpath


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
    pruners: Mapping[str, Any] = field(default_factory=dict)  # path of each customised layer -> what prunes it


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
    device: str | torch.device | None = None,
    pruners: Mapping[Any, Any] | None = None,
) -> Trace:
    """Run the model once in eval mode and record what every op does to labels.

    Args:
        model: any module; it is left as it came. Gradients are not needed.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, on the model's device.
        forward_fn: ``forward_fn(model, example_inputs)`` to use instead of calling the model.
        output_transform: picks, from the output, what must keep its sizes (default: every tensor in it).
        device: "meta" to trace without data, whatever device the model is on (models on meta always are).
        pruners: what prunes the layers (modules, names or types) that are not looked into.

    Raises:
        InputError: the model cannot run on the inputs.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}: pass the model itself")
    layers = find_customized(model, pruners) if pruners else ()
    modules = list(model.named_modules(remove_duplicate=False))
    empty = runs_without_data(modules, device)
    ways = [_Way(torch.inference_mode, _modes), _Way(torch.no_grad, _modes)]  # some models differentiate as they run
    if empty:
        ways = [_Way(torch.inference_mode, _modes_without_data), _Way(torch.inference_mode, _strictly_without_data)]
        ways.append(_Way(torch.no_grad, _modes_without_data))
    elif not layers:  # nothing is known of what happens inside customised layers
        ways.insert(0, _Way(torch.inference_mode, _modes, hollow=True))
    failure: Exception | None = None
    recall: Recall | None = None
    run = partial(_trace, model, modules, example_inputs, forward_fn, output_transform, layers)
    for way in ways:
        try:
            if recall is None:
                with suppress(SizeAsKeyError):
                    return run(way)
                recall = Recall(model.modules(), forward_fn)  # it takes a while to find the functions that remember
            return run(way, recall)
        except HollowValueError:
            pass
        except PrunusError:
            if not way.hollow:
                raise
        except Exception as error:
            failure = error if failure is None or not empty or isinstance(failure, OverwrittenError) else failure
    if failure is not None and empty:
        raise no_values(model, failure) from failure
    raise InputError(
        f"the model cannot run on the example inputs ({type(failure).__name__}: {failure}); "
        f"{_apart(model, example_inputs)}call it with the same "
        "inputs in eval mode to see where, and pass a tensor, a tuple of arguments, a dict, or a forward_fn"
    ) from failure


def _apart(model: nn.Module, example_inputs: Inputs) -> str:
    """A clause that says so where the model and its inputs are on different devices."""
    own, given = ({str(t.device) for t in tensors} for tensors in (model.parameters(), tensors_in(example_inputs)))
    if given <= own or not own:
        return ""
    return f"the inputs are on {', '.join(sorted(given))} and the model is on {', '.join(sorted(own))}: move them; "


_Modes: TypeAlias = "Callable[[Tracer], Sequence[AbstractContextManager[Any]]]"


class _Way(NamedTuple):
    """A way to run a model: how gradients are kept out, the modes that watch, and whether costly kernels run."""

    guard: Callable[[], AbstractContextManager[Any]]
    modes: _Modes
    hollow: bool = False


def _modes(tracer: Tracer) -> Sequence[AbstractContextManager[Any]]:
    return FunctionMode(tracer), tracer


def _modes_without_data(tracer: Tracer) -> Sequence[AbstractContextManager[Any]]:
    return MetaFunctionMode(tracer), tracer, MetaMode(tracer, strict=False)


def _strictly_without_data(tracer: Tracer) -> Sequence[AbstractContextManager[Any]]:
    return MetaFunctionMode(tracer), tracer, MetaMode(tracer, strict=True)


def _trace(
    model: nn.Module,
    modules: Modules,
    example_inputs: Inputs,
    forward_fn: ForwardFn | None,
    output_transform: Callable[[Any], Any] | None,
    layers: Sequence[Customized],
    way: _Way,
    recall: Recall | None = None,
) -> Trace:
    """One recorded run, without gradients; only with ``recall`` may sizes be looked up in what remembers."""
    ledger = Ledger()
    held, index = held_tensors(modules)
    once: Modules = [(path, m) for m, path in {m: path for path, m in reversed(modules)}.items()]
    own = stand_in(layers, held, index) if layers else None
    tracer = (
        Tracer(ledger, held, index, once, hollow=way.hollow)
        if own is None
        else OpaqueTracer(ledger, held, index, once, own)
    )
    visible = once if own is None else own.visible(once)

    @contextmanager
    def recording() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(_marked(visible, ledger))
            if recall is not None:
                stack.enter_context(recall.suspended())
            stack.enter_context(_keys_watched(ledger, recall is not None))
            for context in (way.guard(), without_mha_fastpath(), tracer.following_modules(), *way.modes(tracer)):
                stack.enter_context(context)
            yield

    def run() -> None:
        output = call_model(model, example_inputs, forward_fn)
        if output_transform is not None:
            output = output_transform(output)
        ledger.step = len(tracer.events)
        for tensor in tensors_in(output):
            known = tracer.labels_of(tensor)
            for label in (*known.dims, known.numbers):
                if label is not None:
                    ledger.freeze(label.ids, "it is an output of the model")

    with untouched(model, [m for _, m in once], values=False), tracer.protecting():
        with recording():
            run()
        ledger.evaluated = len(tracer.events)
        if _unread(held):
            counted = len(ledger.macs)
            with _in_training(model), recording(), suppress(Exception):  # it may want targets; what is not read is told
                run()
            unread = {id(h.tensor) for h in held if max(h.starts, default=-1) < 0}
            with recording():
                tracer.siblings.call_unreached(unread, tracer.labels_of, tensors_in, ledger)
            del ledger.macs[counted:]
        if isinstance(tracer, OpaqueTracer):
            tracer.close()
    unsupported = {name: tuple(dict.fromkeys(where)) for name, where in tracer.unsupported.items()}
    pruned = {layer.path: layer.pruner for layer in layers}
    return Trace(model, tuple(held), ledger, tuple(tracer.events), unsupported, _unread(held), dict(modules), pruned)


def _unread(held: Sequence[Held]) -> tuple[str, ...]:
    """The parameters that no op has read."""
    return tuple(
        h.name
        for h in held
        if h.starts and max(h.starts) < 0 and h.places[0].kind == "parameter" and h.follows is None and max(h.shape) > 1
    )


@contextmanager
def _in_training(model: nn.Module) -> Iterator[None]:
    """Training mode, for layers that only train (auxiliary heads); statistics that change with it are put back."""
    with untouched(model):
        for module in model.modules():
            module.training = True
        yield


@contextmanager
def _marked(modules: Modules, ledger: Ledger) -> Iterator[None]:
    """The model's ints as sizes that remember where they came from, and then as plain ints again."""
    marked = mark_attributes(modules, ledger)
    try:
        yield
    finally:
        marked.undo()


@contextmanager
def _keys_watched(ledger: Ledger, allowed: bool) -> Iterator[None]:
    """Whether sizes may be looked up during the run; afterwards they may."""
    ledger.keys_allowed = allowed
    try:
        yield
    finally:
        ledger.keys_allowed = True


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists, dicts, dataclasses and plain objects.

    Those in caches are left out: an object that tells how long a sequence it holds is state that the next call reads,
    neither input nor output, and its sizes follow the model's.
    """
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield value
        return
    if value is None or isinstance(value, (str, bytes, int, float, bool, type, nn.Module)) or id(value) in seen:
        return
    if hasattr(type(value), "get_seq_length"):
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
