"""Modules of a list that the example run did not reach, such as experts that no token was sent to.

Modules of one class and one shape in a ``ModuleList`` (or ``ModuleDict``) are taken for alternatives: one that did not
run is called with the arguments of one that did, and what it returns is tied to what that one returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from prunus.labels import Labelled
from prunus.ledger import Ledger

LabelsOf = Callable[[torch.Tensor], Labelled]
TensorsIn = Callable[[Any], Iterator[torch.Tensor]]


class Call(NamedTuple):
    """One call of a module."""

    module: nn.Module
    args: Any
    kwargs: Any
    output: Any


class Siblings:
    """The lists of a model, and the first call of a module of each."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        lists = [m for m in modules if isinstance(m, (nn.ModuleList, nn.ModuleDict)) and len(m) > 1]
        self._children = {id(m): list(m.children()) for m in lists}
        self._list_of = {id(child): key for key, children in self._children.items() for child in children}
        self._calls: dict[int, Call] = {}

    def note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A module has run."""
        home = self._list_of.get(id(module))
        if home is not None and home not in self._calls:
            self._calls[home] = Call(module, args, kwargs, output)

    def call_unreached(self, unread: set[int], labels_of: LabelsOf, tensors_in: TensorsIn, ledger: Ledger) -> None:
        """Call every module none of whose parameters was read (``unread``: by identity), and tie what it returns."""
        with torch._C.DisableTorchFunction():  # looking at shapes must not count as reading
            missing = [
                (module, call)
                for home, call in self._calls.items()
                for module in self._children[home]
                if module is not call.module and _all_unread(module, unread) and _alike(module, call.module)
            ]
        for module, call in missing:
            with suppress(Exception):  # it is then reported as not read
                output = module(*call.args, **call.kwargs)
                _tie(list(tensors_in(call.output)), list(tensors_in(output)), labels_of, ledger)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have one class and parameters of the same shapes."""
    shapes = [[(name, p.shape) for name, p in m.named_parameters()] for m in (one, other)]
    return type(one) is type(other) and shapes[0] == shapes[1]


def _all_unread(module: nn.Module, unread: set[int]) -> bool:
    found = [id(p) for p in module.parameters() if max(p.shape, default=1) > 1]
    return bool(found) and unread.issuperset(found)


def _tie(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor], labels_of: LabelsOf, ledger: Ledger) -> None:
    """Outputs of alternatives are used alike, so their dims live and die together."""
    reason = "modules beside each other in a list return different sizes"
    if [t.dim() for t in one] != [t.dim() for t in other]:
        for label in (d for t in (*one, *other) for d in labels_of(t).dims if d is not None):
            ledger.freeze(label.ids, reason)
        return
    for a, b in zip(one, other, strict=True):
        for left, right in zip(labels_of(a).dims, labels_of(b).dims, strict=True):
            if left is not None and right is not None and left.size == right.size:
                ledger.couple(left, right)
                continue
            for one_sided in (left, right):
                if one_sided is not None:
                    ledger.freeze(one_sided.ids, reason)
