"""The two modes that see what a model does: the torch functions its code calls, and the ATen ops that run."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunus.calls import PythonCall
from prunus.entries import Entry, entry_of
from prunus.held import Held, Modules
from prunus.higher import inside
from prunus.labels import Dims, Label, Labelled, Numbered, unlabelled
from prunus.ledger import Ledger
from prunus.rules import Op
from prunus.rules.table import MOVES, READS_NUMBERS, SIZED
from prunus.siblings import Siblings
from prunus.sizes import MEASURES, Size, shape_of
from prunus.standins import HollowValueError, deciding
from prunus.untouched import put_back

MARK = "_prunus_labels"
COMPOSED_IN_PYTHON = frozenset({nn.functional.multi_head_attention_forward})  # functions whose parts are looked at
_PLAIN = frozenset({int, float, bool, type(None), str})
_NUMBERS = frozenset({int, float, bool})  # a list of an op that begins with one holds no tensors
_FROM_NUMBERS = frozenset({torch.tensor, torch.as_tensor, torch.scalar_tensor})
_READS = frozenset({torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.data_ptr})
_SIZES = frozenset({torch.Tensor.shape.__get__, torch.Tensor.size})  # type: ignore[attr-defined]
_WATCHED = frozenset({*_SIZES, *MEASURES, *COMPOSED_IN_PYTHON, *_READS, *_FROM_NUMBERS})


class Event(NamedTuple):
    """One recorded op: its name, the module in whose forward it ran, what it read, and its output's labels."""

    name: str
    module: str
    sources: tuple[int, ...]  # steps (>= 0) and held tensors (-2 - index)
    outputs: tuple[Dims | None, ...]
    inputs: tuple[Labelled, ...] = ()  # by identity: what one op makes (`results`) and another one reads is one object
    results: tuple[Labelled, ...] = ()  # without those of which nothing is known


class Tracer(TorchDispatchMode):
    """Applies the rule of every op that runs; with ``hollow``, costly kernels give zeros instead (see standins.py)."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled while tracing; torch's guard against it costs microseconds for every op."""
        return False

    def __init__(
        self, ledger: Ledger, held: Sequence[Held], index: dict[int, int], modules: Modules, *, hollow: bool = False
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._allows_hollow = hollow
        self._any_hollow = False
        self._leaked = False  # whether hollow values were written into a tensor that had real ones
        self.ledger = ledger
        self.held = held
        self.events: list[Event] = []
        self.unsupported: dict[str, list[str]] = {}
        self.call = PythonCall(None, (), {})
        self._modules = {id(m): path for path, m in modules}
        self._by_path = dict(modules)
        self._stack: list[str] = [""]
        self._known: dict[int, Labelled] = {}
        self._lasting: dict[int, tuple[torch.Tensor, Labelled]] = {}  # written in place: may outlive the run
        self._index = index
        self._storages: dict[int, torch.Tensor] = {}
        self._overwritten: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.siblings = Siblings([m for _, m in modules])
        self._numbered = False  # whether any tensor holds numbers of labelled positions

    @contextmanager
    def following_modules(self) -> Iterator[None]:
        """Know, during the run, in which module's forward an op runs."""

        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(self._modules.get(id(module), self._stack[-1]))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.siblings.note(module, args, kwargs, output)
            path = self._modules.get(id(module))
            while len(self._stack) > 1 and self._stack.pop() != path and path is not None:
                pass  # modules whose forward raised, and whose caller went on

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, with_kwargs=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def protecting(self) -> Iterator[None]:
        """Put back, afterwards, the values of tensors of the model that an op overwrote."""
        try:
            yield
        finally:
            for tensor, values in self._overwritten.values():
                put_back(tensor, values)

    def _keep(self, target: Any) -> None:
        """Keep the values of a held tensor that an op is about to overwrite."""
        if not isinstance(target, torch.Tensor) or target.is_meta or target.layout != torch.strided:
            return
        if not self._storages:
            kept = (h.tensor for h in self.held if not h.tensor.is_meta and h.tensor.layout == torch.strided)
            self._storages = {t.untyped_storage().data_ptr(): t for t in kept if t.numel()}
        empty = target if target.numel() == 0 and id(target) in self._index else None  # it may grow
        held = self._storages.get(target.untyped_storage().data_ptr(), empty)
        if held is not None and id(held) not in self._overwritten:
            self._overwritten[id(held)] = (held, held.detach().clone())

    def alias(self, tensor: torch.Tensor, twin: torch.Tensor) -> bool:
        """Let ``twin``, which the caller keeps, stand for a tensor that the model keeps; false if it keeps none."""
        index = self._index.get(id(tensor))
        if index is not None:
            self._index[id(twin)] = index
        return index is not None

    def labels_of(self, tensor: torch.Tensor) -> Labelled:
        """What is known of a tensor."""
        lasting = self._lasting.get(id(tensor)) if self._lasting else None
        if lasting is not None:
            return lasting[1]
        index = self._index.get(id(tensor))
        if index is None:
            marked: Labelled | None = tensor.__dict__.get(MARK)
            return unlabelled(tensor.shape) if marked is None else marked
        found = self._known.get(index)
        if found is None:
            found = self._known[index] = self._held_labels(index)
        return found

    def _held_labels(self, index: int) -> Labelled:
        """Fresh atoms for the dims of a tensor that the model keeps, at its first use; most integers get none."""
        held = self.held[index]
        dims: list[Label | None] = [None] * len(held.shape)
        if held.shrinks(self._by_path):
            for d, size in enumerate(held.shape):
                if size > 1:
                    held.starts[d] = self.ledger.size
                    self.ledger.kept.append((self.ledger.size, size))
                    dims[d] = Label(self.ledger.fresh(size))
        return Labelled(held.shape, tuple(dims), -2 - index)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        entry = entry_of(func)
        if entry.composite:
            kernel = inside(func)
            with self, nullcontext() if kernel is None else FunctionMode(self):
                result = (kernel or func.decompose)(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for k in entry.writes:
            if k < len(args):
                self._keep(args[k])
        if self._any_hollow and entry.decides:
            self._refuse_to_look(func, args, kwargs)
        result = entry.standin(*args, **kwargs) if self._allows_hollow and entry.standin is not None else None
        made_up = result is not None
        if not made_up:
            result = func(*args, **kwargs)
        self._record(entry, func, args, kwargs, result, made_up)
        return result

    def _refuse_to_look(self, func: Any, args: Any, kwargs: Any) -> None:
        """End the run if more than the values of the op's result depends on values that were not computed."""
        seen = deciding(func, args)
        named = kwargs.values() if seen is args else ()
        if any(self._leaked or self.labels_of(tensor).hollow for tensor in tensors_among((*seen, *named))):
            raise HollowValueError(func.name())

    def _record(self, entry: Entry, func: Any, args: Any, kwargs: Any, result: Any, made_up: bool = False) -> None:
        inputs: list[Labelled] = []
        lowered = [a if type(a) in _PLAIN else self._lower(a, inputs) for a in args]
        named = {k: self._lower(v, inputs) for k, v in kwargs.items()} if kwargs else {}
        several = result if isinstance(result, (tuple, list)) else (result,)
        outputs = [r for r in several if isinstance(r, torch.Tensor)]
        hollow = made_up or (self._any_hollow and any(i.hollow for i in inputs))
        if hollow:
            self._any_hollow = True
            self._leaked = self._leaked or (bool(entry.writes) and not inputs[0].hollow)
        if not entry.makes and not any(i.labelled for i in inputs):
            self._pass_over(entry, inputs, outputs if hollow else [])
            return
        self.ledger.step = len(self.events)
        op = Op(entry.name, self.ledger, inputs, [tuple(r.shape) for r in outputs], self.call)
        if entry.dtypes:
            op.look_at([*tensors_among((*args, *kwargs.values()))])
        found = self._apply(entry, op, lowered, named)
        if self._numbered:
            found = _numbers(op, found)
        labels = found if isinstance(found, list) else [found]
        results = self._hang(entry, outputs, labels, hollow)
        if self.ledger.numbers:
            self._match_number(entry.name, inputs)
        sources = tuple([i.source for i in inputs if i.source != -1])
        self.events.append(Event(entry.name, self._stack[-1], sources, tuple(labels), tuple(inputs), results))

    def _pass_over(self, entry: Entry, inputs: list[Labelled], hollow: Sequence[torch.Tensor]) -> None:
        """Nothing that the op reads is labelled: the sizes that the code gives it stay."""
        if entry.name in SIZED:
            for size in self.call.named():
                Op(entry.name, self.ledger, inputs, [], self.call).require_same(size)
        for tensor in hollow:
            self._mark(tensor, Labelled(tuple(tensor.shape), (None,) * tensor.dim(), hollow=True), entry)

    def _hang(
        self, entry: Entry, outputs: Sequence[torch.Tensor], labels: Sequence[Dims | None], hollow: bool
    ) -> tuple[Labelled, ...]:
        """Hang what the rule found on the results; gives that of the results of which something is known."""
        results: list[Labelled] = []
        for tensor, dims in zip(outputs, labels, strict=False):
            if id(tensor) in self._index:  # some ops return a held tensor itself
                continue
            shape = tuple(tensor.shape)
            if dims is not None:
                labelled = Labelled(shape, dims, len(self.events), hollow)
                self._numbered = self._numbered or labelled.numbers is not None
                self._mark(tensor, labelled, entry)
                results.append(labelled)
            elif hollow:
                self._mark(tensor, Labelled(shape, (None,) * len(shape), hollow=True), entry)
        return tuple(results)

    def _mark(self, tensor: torch.Tensor, labelled: Labelled, entry: Entry) -> None:
        """Remember what is known of a result."""
        if entry.writes and MARK not in tensor.__dict__:
            self._lasting[id(tensor)] = (tensor, labelled)
        else:
            setattr(tensor, MARK, labelled)

    def _match_number(self, name: str, inputs: list[Labelled]) -> None:
        """The op multiplies (or divides) by a number that was computed from a size just before."""
        if name in ("mul", "div", "scaled_dot_product_attention") and inputs:
            for value in (*self.call.args, *self.call.kwargs.values()):
                if type(value) is float:
                    self.ledger.match(value, inputs[0], -1.0 if name == "div" else 1.0)

    def _apply(self, entry: Entry, op: Op, args: list[Any], kwargs: dict[str, Any]) -> Any:
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

    def read(self, tensor: torch.Tensor, how: str) -> None:
        """Python reads all values of a tensor, which no op shows."""
        known = self.labels_of(tensor)
        if known.hollow or self._leaked:
            raise HollowValueError(how)
        for label in (*known.dims, known.numbers):
            if label is not None:
                self.ledger.freeze(label.ids, f"{how} hands its values to Python")

    def _lower(self, value: Any, inputs: list[Labelled]) -> Any:
        if isinstance(value, torch.Tensor):
            labelled = self.labels_of(value)
            inputs.append(labelled)
            return labelled
        if isinstance(value, (list, tuple)) and value and type(value[0]) not in _NUMBERS:
            return [self._lower(v, inputs) for v in value]
        return value


def tensors_among(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among an op's arguments, also in lists, in the order in which rules see them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_among(value)


def _numbers(op: Op, found: Any) -> Any:
    """Numbers of positions that the op moved still number them; an op that does not know them keeps the positions."""
    first = op.inputs[0].numbers if op.inputs else None
    for k, tensor in enumerate(op.inputs):
        numbers = tensor.numbers
        if numbers is not None and not (op.name in READS_NUMBERS or (k == 0 and op.name in MOVES)):
            op.freeze([numbers], f"{op.name} computes with the numbers of its positions")
    if first is not None and op.name in MOVES:
        several = found if isinstance(found, list) else [found]
        moved = [
            Numbered(dims if dims is not None else (None,) * len(shape), first)
            for dims, shape in zip(several, op.shapes, strict=False)
        ]
        return moved if isinstance(found, list) else moved[0]
    if type(found) is Numbered and op.name not in READS_NUMBERS and first is not None:
        return tuple(found)
    return found


class FunctionMode(TorchFunctionMode):
    """Sees the torch functions that Python code calls."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer
        self._unguarded: dict[Any, Callable[..., Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WATCHED:
            return self._watch(func, args, kwargs)
        return self._call(func, args, kwargs)

    def _call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Let it run, as the call that the ops which now follow belong to."""
        tracer = self.tracer
        before, tracer.call = tracer.call, PythonCall(func, args, kwargs)
        try:
            return func(*args, **kwargs)
        finally:
            tracer.call = before

    def _watch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A function that asks for sizes, hands values to Python, takes some from there, or is looked into."""
        tracer = self.tracer
        if func in _SIZES:
            labelled = tracer.labels_of(args[0])
            if not labelled.labelled:
                return func(*args, **kwargs)
            shape = shape_of(labelled, tracer.ledger)
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return shape if dim is None else shape[dim]
        if func in MEASURES:
            labelled = tracer.labels_of(args[0])
            if labelled.labelled:
                return MEASURES[func](labelled, tracer.ledger, *args, **kwargs)
            return func(*args, **kwargs)
        if func in COMPOSED_IN_PYTHON:
            if func not in self._unguarded:
                self._unguarded[func] = unguarded(func)
            with self:
                return self._unguarded[func](*args, **kwargs)
        if func in _READS:
            tracer.read(args[0], func.__name__)
        for size in tree_leaves((args, kwargs)) if func in _FROM_NUMBERS else ():
            if isinstance(size, Size):
                size.enters_value()
        return self._call(func, args, kwargs)


def unguarded(func: types.FunctionType) -> Callable[..., Any]:
    """A copy of a torch function written in Python that does not hand itself over to the mode a second time."""
    never = {name: _never for name in func.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(func.__code__, {**func.__globals__, **never}, func.__name__, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _never(*args: Any) -> bool:
    return False
