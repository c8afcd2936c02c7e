"""One run of a model as a list of steps: which tensor each op read and made, and in which module."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from prunus.held import Modules, held_tensors
from prunus.higher import SeesInside
from prunus.modes import tensors_among
from prunus.tracing import ForwardFn, Inputs, call_model, tensors_in
from prunus.untouched import untouched, without_mha_fastpath

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


class Step(NamedTuple):
    """An op that ran; tensors are numbers, a new one each time that a tensor is written."""

    name: str
    module: str
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    pointwise: bool


@dataclass
class Call:
    """One call of a child of a container: the steps in it, and the float tensors that went in and came out."""

    path: str
    start: int
    ins: tuple[int, ...]
    end: int = -1
    outs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Flow:
    """What one run showed."""

    steps: Sequence[Step]
    calls: Mapping[str, Sequence[Call]]  # by the path of the child
    outputs: tuple[int, ...]  # the float tensors that the model returned
    shapes: Mapping[int, torch.Size]
    kept: frozenset[int]  # tensors that the model keeps, and what is computed of nothing else
    active: frozenset[int]
    names: Mapping[int, str]  # of the tensors that the model keeps


@dataclass(frozen=True)
class Subject:
    """A model, and how it is run."""

    model: nn.Module
    inputs: Inputs
    forward_fn: ForwardFn | None = None
    output_transform: Callable[[Any], Any] | None = None

    def run(self, *contexts: Any) -> list[torch.Tensor]:
        """The float tensors that the model returns in evaluation mode; it is left as it came."""
        with untouched(self.model), torch.no_grad(), ExitStack() as stack:
            stack.enter_context(without_mha_fastpath())
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for context in contexts:
                stack.enter_context(context)
            output = call_model(self.model, self.inputs, self.forward_fn)
            if self.output_transform is not None:
                output = self.output_transform(output)
            return [t for t in tensors_in(output) if t.is_floating_point()]


def children_of_containers(modules: Modules) -> dict[str, nn.Module]:
    """The children of all containers, by path; modules that hang in several places by their first one."""
    first = {id(m): path for path, m in reversed(modules)}
    found = {}
    for path, module in modules:
        if isinstance(module, CONTAINERS) and first[id(module)] == path:
            for name, child in module._modules.items():
                if child is not None:
                    found[f"{path}.{name}" if path else name] = child
    return found


def floats(value: Any) -> list[torch.Tensor]:
    """The float tensors in arguments, in order."""
    return [t for t in tensors_in(value) if t.is_floating_point()]


def float_leaves(value: Any) -> list[torch.Tensor]:
    """The float tensors in what a module returned, in order; those inside objects do not count."""
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point()]


class Recorder(SeesInside):
    """Numbers tensors and notes steps and calls; the same numbers in every run that does the same."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        modules: Modules = list(subject.model.named_modules(remove_duplicate=False))
        self.children = children_of_containers(modules)
        self.steps: list[Step] = []
        self.calls: dict[str, list[Call]] = {}
        self.shapes: dict[int, torch.Size] = {}
        self._paths = {id(m): path for path, m in reversed(modules)}
        held, self._held = held_tensors(modules)
        self._held_names = [h.name for h in held]
        self._names: dict[int, str] = {}
        self._stack: list[str] = [""]
        self._numbers: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._kept: set[int] = set()
        self._active: set[int] = set()
        self._paused = False

    # -- what subclasses see ----------------------------------------------------------------------------------------

    def entered(self, call: Call, tensors: list[torch.Tensor]) -> None:
        """A child is about to run on these float tensors."""

    def left(self, call: Call, output: Any) -> Any:
        """A child ran; what is returned, unless None, replaces its output."""

    def computing(self, step: int, func: Any, args: Any) -> None:
        """An op is about to run."""

    def computed(self, step: int, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """An op ran; what is returned replaces its result."""
        return result

    # ---------------------------------------------------------------------------------------------------------------

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs meanwhile is not part of the model's run."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def number(self, tensor: torch.Tensor) -> int:
        """The tensor's number."""
        known = self._numbers.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        fresh = self._renumber(tensor)
        index = self._held.get(id(tensor))
        if index is None:
            self._active.add(fresh)
        else:
            self._kept.add(fresh)
            self._names[fresh] = self._held_names[index]
        return fresh

    def _renumber(self, tensor: torch.Tensor) -> int:
        fresh = len(self.shapes)
        self._numbers[id(tensor)] = (weakref.ref(tensor), fresh)
        self.shapes[fresh] = tensor.shape
        return fresh

    def see(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Note the op as a step."""
        if self._paused:
            return func(*args, **kwargs)
        ins = [*tensors_among(args), *tensors_among(kwargs.values())] if kwargs else [*tensors_among(args)]
        numbers = tuple([self.number(t) for t in ins])
        step = len(self.steps)
        with self.paused():
            self.computing(step, func, args)
        result = func(*args, **kwargs)
        with self.paused():
            result = self.computed(step, func, args, kwargs, result)
        made = [*tensors_among((result,))]
        outs = tuple([self._renumber(t) for t in made])
        kinds = [kind for kind in (self._active, self._kept) if any(n in kind for n in numbers)]
        if kinds:
            kinds[0].update(outs)  # what comes of kept tensors alone is kept too
        spelled = func.overloadpacket.__name__
        pointwise = torch.Tag.pointwise in func.tags
        self.steps.append(Step(spelled.rstrip("_") or spelled, self._stack[-1], numbers, outs, pointwise))
        return result

    def record(self, subject: Subject) -> Flow:
        """Run the model and say what happened."""
        outputs = subject.run(self.following(), self)
        numbers = tuple(self._numbers[id(t)][1] if id(t) in self._numbers else -1 for t in outputs)
        kept, active = frozenset(self._kept), frozenset(self._active)
        return Flow(self.steps, self.calls, numbers, self.shapes, kept, active, self._names)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Know, during the run, which module runs, and when children of containers begin and end."""

        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(self._paths.get(id(module), self._stack[-1]))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            path = self._paths.get(id(module))
            while len(self._stack) > 1 and self._stack.pop() != path and path is not None:
                pass  # modules whose forward raised, and whose caller went on

        with ExitStack() as stack:
            for handle in (register_module_forward_pre_hook(enter), register_module_forward_hook(leave)):
                stack.callback(handle.remove)
            for path, child in self.children.items():
                if self._paths.get(id(child)) == path:
                    begin, end = self._hooks(path)
                    stack.callback(child.register_forward_pre_hook(begin, with_kwargs=True).remove)
                    stack.callback(child.register_forward_hook(end, with_kwargs=True).remove)
            yield

    def _hooks(self, path: str) -> tuple[Callable[..., None], Callable[..., Any]]:
        calls = self.calls.setdefault(path, [])

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = floats((args, kwargs))
            calls.append(Call(path, len(self.steps), tuple(self.number(t) for t in tensors)))
            with self.paused():
                self.entered(calls[-1], tensors)

        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            call = next(c for c in reversed(calls) if c.end < 0)
            call.end = len(self.steps)
            call.outs = tuple(self.number(t) for t in float_leaves(output))
            with self.paused():
                return self.left(call, output)

        return begin, end
