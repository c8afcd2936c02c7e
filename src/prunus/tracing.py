"""Tracing: run the model once, see every ATen op, and let the rules say what it does to labels.

Two modes work together. A *function mode* sees the torch functions that the model's Python code calls: it hands out
sizes that remember their source and keeps the arguments of the running call, so that a rule can ask how a size was
written. A *dispatch mode* sees the ATen ops that really run and applies the rule of each. The model leaves tracing as
it came: training flags, attributes and caches, buffers, random state.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from prunus.errors import InputError, PrunusError
from prunus.labels import Dims, Ids, Label, Labelled, Ledger, unlabelled
from prunus.rules import Op, lookup
from prunus.rules.table import Rule
from prunus.sizes import PythonCall, mark_attributes, shape_of

MARK = "_prunus_labels"
_GET_SHAPE = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_COMPOSED_IN_PYTHON = frozenset({nn.functional.multi_head_attention_forward})
_MAKES = frozenset(
    ["zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty"]
)


class Place(NamedTuple):
    """Where a tensor hangs: ``module`` (its path) and ``name`` in it; ``kind`` is parameter, buffer or attribute."""

    module: str
    name: str
    kind: str

    @property
    def full(self) -> str:
        """The dotted name in the model."""
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclasses.dataclass(frozen=True)
class Held:
    """A tensor that the model keeps, every place where it hangs, and the first atom of each of its dims (-1: none)."""

    tensor: torch.Tensor
    places: Sequence[Place]
    shape: tuple[int, ...]
    starts: list[int]

    @property
    def name(self) -> str:
        """The dotted name of its first place."""
        return self.places[0].full


class Event(NamedTuple):
    """One recorded op: its name, the module in whose forward it ran, what it read, and its output's labels."""

    name: str
    module: str
    sources: tuple[int, ...]  # steps (>= 0) and held tensors (-2 - index)
    outputs: tuple[Dims | None, ...]


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one run of the model taught."""

    model: nn.Module
    held: tuple[Held, ...]
    ledger: Ledger
    events: tuple[Event, ...]
    unsupported: Mapping[str, tuple[str, ...]]  # op without rule -> modules in which it ran
    last_module_step: Mapping[str, int] = dataclasses.field(default_factory=dict)


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
    ledger = Ledger()
    modules = list(model.named_modules(remove_duplicate=False))
    held, index = _held_tensors(modules)
    once: Modules = [(path, m) for m, path in {m: path for path, m in reversed(modules)}.items()]
    tracer = _Tracer(ledger, held, index, once)
    with _left_as_it_came(once, tracer), ExitStack() as stack:
        mark_attributes(once, ledger)
        for _, module in once:  # not eval(): some classes merge or freeze weights there
            module.training = False
        stack.enter_context(torch.inference_mode())
        stack.enter_context(_without_mha_fastpath())
        stack.enter_context(tracer.following_modules())
        stack.enter_context(_FunctionMode(tracer))
        stack.enter_context(tracer)
        try:
            output = call_model(model, example_inputs, forward_fn)
            if output_transform is not None:
                output = output_transform(output)
        except PrunusError:
            raise
        except Exception as error:
            raise InputError(
                f"the model cannot run on the example inputs ({type(error).__name__}: {error}); call it with the same "
                "inputs in eval mode to see where, and pass a tensor, a tuple of arguments, a dict, or a forward_fn"
            ) from error
    ledger.step = len(tracer.events)
    for tensor in tensors_in(output):
        for label in tracer.labels_of(tensor).dims:
            if label is not None:
                ledger.freeze(label.ids, "it is an output of the model")
    unsupported = {name: tuple(dict.fromkeys(where)) for name, where in tracer.unsupported.items()}
    return Trace(model, tuple(held), ledger, tuple(tracer.events), unsupported)


Modules = list[tuple[str, nn.Module]]  # every path of every module


def _held_tensors(modules: Modules) -> tuple[list[Held], dict[int, int]]:
    """Every tensor the model keeps, once, and the index of each by identity.

    Two parameters over the same memory are one tensor by two names.
    """
    held: list[Held] = []
    index: dict[int, int] = {}
    by_memory: dict[int, list[int]] = {}
    places: list[list[Place]] = []
    for path, module in modules:
        kinds = (("parameter", module._parameters), ("buffer", module._buffers), ("attribute", module.__dict__))
        for kind, fields in kinds:
            for name, tensor in fields.items():
                if not isinstance(tensor, torch.Tensor) or name.startswith("__"):
                    continue
                if is_lazy(tensor):
                    raise InputError(f"{path}.{name} is not initialised yet: run the model once before pruning it")
                k = index.get(id(tensor))
                if k is None:
                    twins = by_memory.setdefault(_address(tensor), [])
                    k = next((t for t in twins if _same_view(held[t].tensor, tensor)), len(held))
                    index[id(tensor)] = k
                    if k == len(held):
                        twins.append(k)
                        places.append([])
                        held.append(Held(tensor, places[k], tuple(tensor.shape), [-1] * tensor.dim()))
                places[k].append(Place(path, name, kind))
    return held, index


def _address(tensor: torch.Tensor) -> int:
    if tensor.is_meta or tensor.layout != torch.strided or tensor.numel() == 0:
        return -id(tensor)
    return tensor.data_ptr()


def _same_view(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


class _Entry(NamedTuple):
    """What to do with an op, decided once."""

    name: str
    rule: Rule | None
    composite: bool
    mutable: bool
    makes: bool


class _Tracer(TorchDispatchMode):
    """Applies the rule of every op that runs."""

    def __init__(self, ledger: Ledger, held: Sequence[Held], index: dict[int, int], modules: Modules) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger
        self.held = held
        self.events: list[Event] = []
        self.unsupported: dict[str, list[str]] = {}
        self.call = PythonCall(None, (), {})
        self.changed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._modules = {id(m): path for path, m in modules}
        self._stack: list[str] = [""]
        self._entries: dict[Any, _Entry] = {}
        self._known: dict[int, Labelled] = {}
        self._index = index
        self._storages: dict[int, torch.Tensor] | None = None

    @contextmanager
    def following_modules(self) -> Iterator[None]:
        """Know, during the run, in which module's forward an op runs."""

        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(self._modules.get(id(module), self._stack[-1]))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def labels_of(self, tensor: torch.Tensor) -> Labelled:
        """What is known of a tensor."""
        found: Labelled | None = tensor.__dict__.get(MARK)
        if found is None:
            found = self._known.get(id(tensor))
        if found is None:
            index = self._index.get(id(tensor))
            if index is None:
                return unlabelled(tensor.shape)
            found = self._known[id(tensor)] = self._held_labels(index)
        return found

    def _held_labels(self, index: int) -> Labelled:
        """Fresh atoms for the dims of a tensor that the model keeps, at its first use."""
        held = self.held[index]
        dims: list[Label | None] = []
        for d, size in enumerate(held.shape):
            if held.starts[d] < 0 and size > 1:
                held.starts[d] = self.ledger.size
                dims.append(Label(self.ledger.fresh(size)))
            else:
                dims.append(self._again(held, d) if size > 1 else None)
        if not held.tensor.is_floating_point() and not held.tensor.is_complex():
            self.ledger.step = len(self.events)
            for label in dims:
                if label is not None:
                    self.ledger.freeze(label.ids, f"{held.name} holds integers, which are read by position")
        return Labelled(held.shape, tuple(dims), -2 - index)

    def _again(self, held: Held, d: int) -> Label:
        for known in self._known.values():
            label = known.dims[d] if d < len(known.dims) else None
            if label is not None and int(label.ids.flat[0]) == held.starts[d]:
                return label
        raise AssertionError(f"{held.name}: atoms without a label")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        entry = self._entries.get(func) or self._classify(func)
        if entry.composite:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if entry.mutable:
            self._protect(args)
        result = func(*args, **kwargs)
        self._record(entry, func, args, kwargs, result)
        return result

    def _classify(self, func: Any) -> _Entry:
        rule = lookup(func)
        composite = rule is None and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        )
        name = func.overloadpacket.__name__
        entry = _Entry(name.rstrip("_") or name, rule, composite, func._schema.is_mutable, name in _MAKES)
        self._entries[func] = entry
        return entry

    def _protect(self, args: Sequence[Any]) -> None:
        """Keep the values of a held tensor that the op is about to overwrite."""
        for target in args[:1]:
            if isinstance(target, torch.Tensor) and target.device.type != "meta" and target.layout == torch.strided:
                held = self._by_storage().get(target.untyped_storage().data_ptr())
                if held is not None and id(held) not in self.changed:
                    self.changed[id(held)] = (held, held.detach().clone())

    def _by_storage(self) -> dict[int, torch.Tensor]:
        if self._storages is None:
            kept = (h.tensor for h in self.held if not h.tensor.is_meta and h.tensor.layout == torch.strided)
            self._storages = {t.untyped_storage().data_ptr(): t for t in kept if t.numel()}
        return self._storages

    def _record(self, entry: _Entry, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        inputs: list[Labelled] = []
        lowered = [self._lower(a, inputs) for a in args]
        named = {k: self._lower(v, inputs) for k, v in kwargs.items()} if kwargs else {}
        if not entry.makes and not any(i.labelled for i in inputs):
            return
        outputs = [r for r in result if isinstance(r, torch.Tensor)] if isinstance(result, (tuple, list)) else [result]
        outputs = [r for r in outputs if isinstance(r, torch.Tensor)]
        self.ledger.step = len(self.events)
        op = Op(entry.name, self.ledger, inputs, [tuple(r.shape) for r in outputs], self.call)
        found = self._apply(entry, op, lowered, named)
        labels = found if isinstance(found, list) else [found]
        for tensor, dims in zip(outputs, labels, strict=False):
            if dims is not None:
                setattr(tensor, MARK, Labelled(tuple(tensor.shape), dims, len(self.events)))
        sources = tuple(i.source for i in inputs if i.source != -1)
        self.events.append(Event(entry.name, self._stack[-1], sources, tuple(labels)))

    def _apply(self, entry: _Entry, op: Op, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The rule's answer; an op without a rule, or one whose rule fails on it, freezes what flows into it."""
        reason = f"no rule for {entry.name}"
        if entry.rule is not None:
            try:
                return entry.rule(op, *args, **kwargs)
            except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
                reason = f"the rule for {entry.name} cannot read this call ({type(error).__name__}: {error})"
        for tensor in op.inputs:
            op.freeze(tensor.dims, reason)
        self.unsupported.setdefault(reason.removeprefix("no rule for "), []).append(self._stack[-1])
        return [None] * len(op.shapes)

    def _lower(self, value: Any, inputs: list[Labelled]) -> Any:
        if isinstance(value, torch.Tensor):
            labelled = self.labels_of(value)
            inputs.append(labelled)
            return labelled
        if isinstance(value, (list, tuple)) and value and any(isinstance(v, (torch.Tensor, type(None))) for v in value):
            return [self._lower(v, inputs) for v in value]
        return value


class _FunctionMode(TorchFunctionMode):
    """Sees the torch functions that Python code calls."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tracer = self.tracer
        if func == _GET_SHAPE or func is torch.Tensor.size:
            labelled = tracer.labels_of(args[0])
            if not labelled.labelled:
                return func(*args, **kwargs)
            shape = shape_of(labelled, tracer.ledger)
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return shape if dim is None else shape[dim]
        if func in _COMPOSED_IN_PYTHON:
            with self:
                return _unguarded(func)(*args, **kwargs)
        before, tracer.call = tracer.call, PythonCall(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            tracer.call = before


def _unguarded(func: types.FunctionType) -> Callable[..., Any]:
    """A copy of a torch function written in Python that does not hand itself over to the mode a second time."""
    never = {name: _never for name in func.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(func.__code__, {**func.__globals__, **never}, func.__name__, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _never(*args: Any) -> bool:
    return False


@contextmanager
def _without_mha_fastpath() -> Iterator[None]:
    """The fused path of multi-head attention hides its ops."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _left_as_it_came(modules: Modules, tracer: _Tracer) -> Iterator[None]:
    """Put back every module's attributes and containers, overwritten tensors and the random state."""
    kept = [(m.__dict__, dict(m.__dict__), _containers(m.__dict__)) for _, m in modules]
    configs = _config_fields(modules)
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        for fields, before, containers in kept:
            fields.clear()
            fields.update(before)
            for live, copy in containers:
                _refill(live, copy)
        for fields, before in configs:
            fields.clear()
            fields.update(before)
        for tensor, values in tracer.changed.values():
            with torch.no_grad():
                tensor.copy_(values)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def _containers(fields: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Lists, sets and dicts that a module keeps, each with a copy."""
    return [(v, v.copy()) for v in fields.values() if type(v) in (list, dict, set) and v]


def _refill(live: Any, copy: Any) -> None:
    if isinstance(live, list):
        live[:] = copy
    else:
        live.clear()
        live.update(copy)


def _config_fields(modules: Modules) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    configs = {id(c): c for _, m in modules for c in (m.__dict__.get("config"), m.__dict__.get("cfg"))}
    fields = [c.__dict__ for c in configs.values() if hasattr(c, "__dict__") and not isinstance(c, (nn.Module, type))]
    return [(f, dict(f)) for f in fields]


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


def axis_of(held: Sequence[Held]) -> tuple[Ids, Ids, Ids]:
    """For every used dim of every held tensor, sorted by first atom: the atom, the tensor's index, the dim."""
    rows = [(start, k, d) for k, h in enumerate(held) for d, start in enumerate(h.starts) if start >= 0]
    table = np.array(sorted(rows), dtype=np.int64).reshape(-1, 3).T
    return table[0], table[1], table[2]
