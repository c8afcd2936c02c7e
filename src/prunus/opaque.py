"""Layers that tracing does not look into, because a user says how they are pruned.

While the forward of such a layer runs, its ops are not interpreted. The layer has two axes instead, the channels that
it makes and the channels that it reads, which stand in the trace like the two dims of one more tensor, named
``<layer>.<channels>``. Whatever flows in is tied to the one, whatever flows out carries the other.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from prunus.errors import InputError
from prunus.held import CHANNELS, Held, Modules, Place
from prunus.labels import Label, Labelled, unlabelled
from prunus.ledger import Ledger, MacTerm
from prunus.modes import MARK, Event, Tracer
from prunus.rules import Op

METHODS = ("prune_out_channels", "prune_in_channels", "get_out_channels", "get_in_channels")


def matching(names: Sequence[str], wanted: str, what: str) -> list[str]:
    """The names that equal ``wanted`` or fit it as a pattern (``*``, ``?``, ``[...]``).

    Raises:
        InputError: none does.
    """
    found = [name for name in names if name == wanted] or fnmatch.filter(names, wanted)
    if not found:
        close = get_close_matches(wanted, names, 3)
        hint = f"; did you mean {', '.join(close)}?" if close else "; see model.named_modules()"
        raise InputError(f"{what}: nothing in the model is called {wanted!r}{hint}")
    return found


@dataclass(frozen=True)
class Customized:
    """A layer, where it is, and the object that prunes it."""

    path: str
    module: nn.Module
    pruner: Any

    @property
    def place(self) -> str:
        """How errors call it."""
        return f"customised layer {self.path or 'the model'} ({type(self.module).__name__})"

    @property
    def one_axis(self) -> bool:
        """Whether what it reads is what it makes."""
        kind = type(self.pruner)
        return kind.prune_in_channels is kind.prune_out_channels

    @property
    def coupled(self) -> bool:
        """Whether its input and output channels go together."""
        return self.one_axis or bool(getattr(self.pruner, "coupled", False))

    def channels(self) -> tuple[int, int]:
        """How many channels it makes and reads (1: none of its own)."""
        made, read = self.pruner.get_out_channels(self.module), self.pruner.get_in_channels(self.module)
        if self.coupled:
            made, read = made or read, read or made
        return int(made or 1), int(read or 1)


def find_customized(model: nn.Module, pruners: Mapping[Any, Any]) -> list[Customized]:
    """The layers that a mapping of modules, names or types to pruners means; a layer inside another is left to that.

    Raises:
        InputError: a pruner lacks a method, or a layer is not part of the model.
    """
    paths = {m: path for path, m in model.named_modules()}
    found: dict[nn.Module, Any] = {}
    for key, pruner in sorted(pruners.items(), key=lambda item: isinstance(item[0], nn.Module)):  # the last one counts
        missing = [name for name in METHODS if not callable(getattr(pruner, name, None))]
        if missing or isinstance(pruner, type):
            raise InputError(
                f"customized_pruners: {pruner!r} must be an instance of a class with the methods {', '.join(METHODS)}; "
                "derive it from prunus.BasePruningFunc"
            )
        if isinstance(key, nn.Module):
            chosen = [key]
        elif isinstance(key, str):
            chosen = [model.get_submodule(path) for path in matching([*paths.values()], key, "customized_pruners")]
        elif isinstance(key, type) and issubclass(key, nn.Module):
            chosen = [m for m in paths if isinstance(m, key)]
        else:
            raise InputError(f"customized_pruners: {key!r} is no module, no name of one and no type of modules")
        for module in chosen:
            if module not in paths:
                raise InputError(f"customized_pruners: a {type(module).__name__} is not part of the model")
            target = getattr(pruner, "TARGET_MODULES", None)
            if target is not None and not isinstance(module, target):
                raise InputError(f"{type(pruner).__name__} handles {target}, not {paths[module]}")
            found[module] = pruner
    inner = {m for layer in found for m in layer.modules() if m is not layer}
    return [Customized(paths[m], m, pruner) for m, pruner in found.items() if m not in inner]


@dataclass(frozen=True)
class Opaque:
    """The customised layers of one trace, and the held tensor that stands for the channels of each."""

    layers: Mapping[nn.Module, Customized]
    channels: Mapping[nn.Module, torch.Tensor]
    inside: frozenset[int]  # modules (by identity) in customised layers, themselves included

    def visible(self, modules: Modules) -> Modules:
        """The modules whose code is interpreted."""
        return [(path, m) for path, m in modules if id(m) not in self.inside]


def stand_in(layers: Sequence[Customized], held: list[Held], index: dict[int, int]) -> Opaque:
    """Give each customised layer a tensor for its channels, and let its own tensors follow them."""
    channels: dict[nn.Module, torch.Tensor] = {}
    for layer in layers:
        made, read = layer.channels()
        if layer.one_axis and made != read:
            raise InputError(f"{layer.place}: it makes {made} channels and reads {read}, so they cannot be the same")
        tensor = torch.empty((made,) if layer.one_axis else (made, read), device="meta")
        axes = Held(tensor, [Place(layer.path, CHANNELS, "channels")], tuple(tensor.shape), [-1] * tensor.dim())
        index[id(tensor)] = len(held)
        channels[layer.module] = tensor
        sizes: dict[str, list[tuple[int, Held, int, int]]] = {}
        for axis, method in enumerate(("out", "in")[: tensor.dim()]):
            for name, dim, step in _shrinking(layer, method):
                sizes.setdefault(name, []).append((dim, axes, axis, step))
        for name, own in (*layer.module.named_parameters(), *layer.module.named_buffers()):
            k = index.get(id(own))
            if k is not None:
                held[k] = held[k]._replace(follows=tuple(sizes.get(name, ())))
        held.append(axes)
    inside = frozenset(id(m) for layer in layers for m in layer.module.modules())
    return Opaque({layer.module: layer for layer in layers}, channels, inside)


def _shrinking(layer: Customized, side: str) -> list[tuple[str, int, int]]:
    """Which dims of which of its tensors get shorter, and by how much for each channel: tried on an empty copy."""
    pruner = layer.pruner
    count = layer.channels()[side == "in"]
    groups = int(getattr(pruner, f"get_{side}_channel_groups", lambda _: 1)(layer.module))
    if count // groups < 2:
        return []
    idxs = [g * (count // groups) for g in range(groups)]
    before = _shapes(layer.module)
    try:
        empty = {
            id(t): nn.Parameter(torch.empty_like(t, device="meta"), t.requires_grad) for t in layer.module.parameters()
        }
        twin = copy.deepcopy(layer.module, {**empty})
        with torch.no_grad():
            getattr(pruner, f"prune_{side}_channels")(twin, idxs)
        after = _shapes(twin)
    except Exception:  # what the user's function cannot do on a copy is counted as if it stayed
        return []
    found = []
    for name, shape in before.items():
        now = after.get(name, ())
        if len(now) == len(shape):
            steps = [(d, (n - m) // len(idxs)) for d, (n, m) in enumerate(zip(shape, now, strict=True))]
            found += [(name, d, step) for d, step in steps if step > 0]
    return found


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in (*module.named_parameters(), *module.named_buffers())}


class OpaqueTracer(Tracer):
    """A tracer that steps over customised layers."""

    def __init__(self, ledger: Ledger, held: list[Held], index: dict[int, int], modules: Modules, own: Opaque) -> None:
        super().__init__(ledger, held, index, modules)
        self._own = own
        self._inside: list[nn.Module] = []
        self._begun: set[nn.Module] = set()

    @contextmanager
    def following_modules(self) -> Iterator[None]:
        """Know where an op runs, and step over customised layers."""

        def enter(module: nn.Module, args: Any) -> None:
            if module in self._own.layers:
                self._inside.append(module)

        def leave(module: nn.Module, args: Any, *rest: Any) -> None:
            if self._inside and self._inside[-1] is module:
                self._inside.pop()
                if not self._inside and rest[-1] is not None:  # a forward that raised returns nothing
                    self._pass(self._own.layers[module], tree_leaves((args, rest[:-1])), tree_leaves(rest[-1]))

        handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, with_kwargs=True, always_call=True),
        ]
        try:
            with super().following_modules():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def labels_of(self, tensor: torch.Tensor) -> Labelled:
        """What is known of a tensor: nothing, inside a customised layer."""
        return unlabelled(tensor.shape) if self._inside else super().labels_of(tensor)

    def _record(self, entry: Any, func: Any, args: Any, kwargs: Any, result: Any, made_up: bool = False) -> None:
        if not self._inside:
            super()._record(entry, func, args, kwargs, result, made_up)
        elif entry.rule is not None:  # only what it multiplies is counted
            inputs: list[Labelled] = []
            scratch = Ledger()
            lowered = [self._lower(a, inputs) for a in args]
            outputs = [r for r in tree_leaves(result) if isinstance(r, torch.Tensor)]
            op = Op(entry.name, scratch, inputs, [tuple(r.shape) for r in outputs], self.call)
            with suppress(Exception):
                entry.rule(op, *lowered, **{k: self._lower(v, inputs) for k, v in kwargs.items()})
            self.ledger.macs += [MacTerm(term.factor, (), len(self.events)) for term in scratch.macs]

    def _pass(self, layer: Customized, given: list[Any], returned: list[Any]) -> None:
        """Tie what flows in to the channels that the layer reads, and label what flows out."""
        self.ledger.step = len(self.events)
        axes = self.labels_of(self._own.channels[layer.module])
        if layer.module not in self._begun:
            self._begun.add(layer.module)
            self._begin(layer, axes)
        op = Op(type(layer.module).__name__, self.ledger, [], [], self.call)
        sources, dim = [axes.source], None
        for tensor in (t for t in given if isinstance(t, torch.Tensor)):
            labelled = self.labels_of(tensor)
            sources += [labelled.source] if labelled.source != -1 else []
            here = _channel_dim(layer, labelled, axes.shape[-1]) if tensor.is_floating_point() else None
            for d, label in enumerate(labelled.dims):
                if d == here:
                    op.couple(label, axes.dims[-1], f"{layer.place} reads a dimension of fixed size")
                else:
                    op.freeze([label], f"{layer.place} reads it, and it is not its channel dimension")
            if dim is None and here is None and tensor.is_floating_point() and axes.shape[-1] > 1:
                raise self._misfit(layer, "get_in_channels", axes.shape[-1], "reads", labelled.shape)
            dim = here if dim is None and here is not None else dim
        self._label(layer, axes, [t for t in returned if isinstance(t, torch.Tensor)], dim, op, given)
        self.events.append(Event(op.name, layer.path, tuple(sources), ()))

    def _label(
        self,
        layer: Customized,
        axes: Labelled,
        outputs: list[torch.Tensor],
        read: int | None,
        op: Op,
        given: list[Any],
    ) -> None:
        placed = False
        for tensor in outputs:
            shape = tuple(int(n) for n in tensor.shape)
            dim = _channel_dim(layer, unlabelled(shape), axes.shape[0], read)
            placed = placed or dim is not None
            dims = [axes.dims[0] if d == dim else None for d in range(len(shape))]
            if any(tensor is t for t in given) and dim is not None:
                op.couple(self.labels_of(tensor).dims[dim], axes.dims[0])
            if id(tensor) not in self._index:
                setattr(tensor, MARK, Labelled(shape, tuple(dims), len(self.events)))
        if not placed and axes.shape[0] > 1 and outputs:
            raise self._misfit(layer, "get_out_channels", axes.shape[0], "makes", tuple(outputs[0].shape))

    def _begin(self, layer: Customized, axes: Labelled) -> None:
        """What holds of a layer's channels whatever flows through it."""
        made, read = axes.dims[0], axes.dims[-1]
        if layer.coupled and made is not None and read is not None:
            self.ledger.couple(made, read)
        if axes.ndim == 2:
            self._op_reads(read)
        if made is not None:
            self.ledger.passed.append(made.ids)
        for side, label in (("out", made), ("in", read))[: axes.ndim]:
            groups = int(getattr(layer.pruner, f"get_{side}_channel_groups", lambda _: 1)(layer.module))
            if label is not None and groups > 1:
                self.ledger.balance(label.ids.reshape(groups, -1), f"the channel groups of {layer.place}")

    def _op_reads(self, label: Label | None) -> None:
        if label is not None:
            self.ledger.contracted.append(label.ids)

    def close(self) -> None:
        """Freeze the channels of layers whose tensors are used outside them too."""
        for layer in self._begun:
            own = {id(t) for t in (*layer.parameters(), *layer.buffers())}
            used = next((h.name for h in self.held if id(h.tensor) in own and max(h.starts, default=-1) >= 0), None)
            if used is not None:
                why = f"{used} is used outside its customised layer too"
                for label in self.labels_of(self._own.channels[layer]).dims:
                    if label is not None:
                        self.ledger.freeze(label.ids, why)

    @staticmethod
    def _misfit(layer: Customized, method: str, size: int, verb: str, shape: tuple[int, ...]) -> InputError:
        return InputError(
            f"{layer.place}: {method} says {size}, but it {verb} a tensor of shape {tuple(shape)}; correct {method}, "
            "or set pruning_dim of the pruner to the dimension of the channels"
        )


def _channel_dim(layer: Customized, tensor: Labelled, size: int, like: int | None = None) -> int | None:
    """The dim of the channels: ``pruning_dim``; at its default of 1, dim 1 of feature maps and else the last one."""
    wanted = int(getattr(layer.pruner, "pruning_dim", 1))
    count = tensor.ndim
    if wanted == 1:
        spots = [1, count - 1] if count > 2 else [count - 1]
    else:
        spots = [wanted % count] if -count <= wanted < count else []
    fits = [d for d in dict.fromkeys(spots) if d >= 0 and tensor.shape[d] == size > 1]
    fits.sort(key=lambda d: (tensor.dims[d] is None, like is not None and d != like))
    return fits[0] if fits else None
