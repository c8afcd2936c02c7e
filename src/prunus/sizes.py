"""Sizes: where an integer came from.

While a model is traced, the ints it keeps as attributes (also in tuples, lists and config objects) and the sizes it
reads from labelled tensors are :class:`Size` objects: ints that remember an expression. Where such an int sizes a
dimension (a view, a split, a slice), the expression tells what must happen when that dimension shrinks: nothing (it
was read from a shape), an attribute must be set, or (a plain number in the code) the dimension must stay.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from types import FrameType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn

from prunus.held import submodule
from prunus.labels import Ids, Labelled, in_memory
from prunus.ledger import Ledger, Number


class SizeAsKeyError(BaseException):
    """The code looks a size up, perhaps in what a function remembers (see recall.py); no ``except Exception`` of it."""


_CONTAINS = dis.opmap["CONTAINS_OP"]
_CONFIGS = ("config", "cfg")
SMALLEST = 2  # a size of 1 cannot be pruned, so it is never followed
_HOUSEKEEPING = frozenset(
    [
        *("kernel_size", "stride", "padding", "dilation", "output_padding", "_reversed_padding_repeated_twice"),
        *("num_layers", "padding_idx", "output_size", "scale_factor", "training"),
    ]
)


class Attribute(NamedTuple):
    """An int that a module keeps: its path, the name in it (dotted through configs), the item of a list or tuple."""

    path: str
    name: str
    item: int | None = None

    def __str__(self) -> str:
        spot = f"{self.path}.{self.name}" if self.path else self.name
        return spot if self.item is None else f"{spot}[{self.item}]"


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """The number of surviving positions of a labelled dim (``ids``: its atoms, by rows)."""

    ids: Ids

    def __str__(self) -> str:
        return "a size of the tensor itself"


@dataclass(frozen=True, slots=True)
class Binary:
    """``left operator right``."""

    operator: str
    left: Expression
    right: Expression

    def __str__(self) -> str:
        return f"{self.left} {self.operator} {self.right}"


Expression: TypeAlias = "Attribute | Extent | Binary | int"


def leaves(expression: Expression) -> tuple[Attribute | Extent, ...]:
    """The attributes and extents that an expression mentions."""
    if isinstance(expression, Binary):
        return leaves(expression.left) + leaves(expression.right)
    return () if isinstance(expression, int) else (expression,)


class Size(int):
    """An int that remembers where it came from; arithmetic keeps the expression.

    Comparing an attribute with a size of a tensor, and finding them equal, is how modules check their inputs: it is
    noted as a requirement, so that the attribute follows the tensor.
    """

    expression: Expression
    ledger: Ledger

    def __new__(cls, value: int, expression: Expression, ledger: Ledger) -> Size:
        """An int of ``value`` that came from ``expression``."""
        self = super().__new__(cls, value)
        self.expression = expression
        self.ledger = ledger
        return self

    def _with(self, operator: str, other: Any, value: Any, swapped: bool = False) -> Any:
        if type(value) is not int or not isinstance(other, int) or isinstance(other, bool):
            return value
        if operator == "*" and type(other) is int and other == 1:
            return self
        mine, theirs = self.expression, other.expression if isinstance(other, Size) else int(other)
        pair = (theirs, mine) if swapped else (mine, theirs)
        return Size(value, Binary(operator, *pair), self.ledger)

    def __add__(self, other: Any) -> Any:
        return self._with("+", other, int.__add__(self, other))

    def __radd__(self, other: Any) -> Any:
        return self._with("+", other, int.__radd__(self, other), swapped=True)

    def __sub__(self, other: Any) -> Any:
        return self._with("-", other, int.__sub__(self, other))

    def __rsub__(self, other: Any) -> Any:
        return self._with("-", other, int.__rsub__(self, other), swapped=True)

    def __mul__(self, other: Any) -> Any:
        return self._with("*", other, int.__mul__(self, other))

    def __rmul__(self, other: Any) -> Any:
        return self._with("*", other, int.__rmul__(self, other), swapped=True)

    def __floordiv__(self, other: Any) -> Any:
        rest = int(self) % int(other) if isinstance(other, int) and other else 0
        if rest:  # expressions divide exactly
            return (self - rest) // other
        return self._with("//", other, int.__floordiv__(self, other))

    def __rfloordiv__(self, other: Any) -> Any:
        rest = int(other) % int(self) if isinstance(other, int) and self else 0
        return self._with("//", other - rest, int.__rfloordiv__(self, other), swapped=True)

    def enters_value(self) -> None:
        """The size enters a computed value (an attention scale): the function changes when the dim shrinks."""
        self.ledger.numbers.append(Number(self.ledger.step, self.expression, int(self)))

    def __float__(self) -> float:
        self.enters_value()
        return float(int(self))

    def __truediv__(self, other: Any) -> Any:
        self.enters_value()
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        self.enters_value()
        return other / int(self)

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        self.enters_value()
        return int.__pow__(self, other, modulo) if modulo is not None else int(self) ** other

    def __neg__(self) -> Any:
        return self._with("-", 0, int.__neg__(self), swapped=True)

    def __eq__(self, other: object) -> bool:
        same = int.__eq__(self, other)
        if same is True:
            self._follow(other)
        elif isinstance(other, Size):
            self.ledger.unequal[self.expression, other.expression] = (int(self), int(other))
        return same

    def _follow(self, other: Any) -> None:
        """An attribute and the size of a tensor, or two attributes, that were compared and are equal: they go along."""
        if isinstance(other, Size) and int.__eq__(self, other):
            if isinstance(self.expression, Attribute) and isinstance(other.expression, Attribute):
                self.ledger.equal.append((self.expression, other.expression))
            for told, extent in ((self, other), (other, self)):
                known = leaves(told.expression)
                if known and all(isinstance(k, Attribute) for k in known) and isinstance(extent.expression, Extent):
                    self.ledger.require(told, extent.expression.ids)

    def __lt__(self, other: int) -> bool:
        self._follow(other)
        return int.__lt__(self, other)

    def __gt__(self, other: int) -> bool:
        self._follow(other)
        return int.__gt__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        if not self.ledger.keys_allowed and not _asks_membership(sys._getframe(1)):
            raise SizeAsKeyError
        return int.__hash__(self)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """NumPy computes with the size, such as ``np.sqrt(self.head_dim)``."""
        self.enters_value()
        return getattr(ufunc, method)(*[int(v) if isinstance(v, Size) else v for v in inputs], **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)


def _asks_membership(frame: FrameType) -> bool:
    """Whether the code is at an ``in``, which remembers nothing."""
    return frame.f_code.co_code[frame.f_lasti] == _CONTAINS


def expression_of(asked: int) -> Expression:
    """What an int that sizes a dim was computed from; a plain int is its own expression."""
    return asked.expression if isinstance(asked, Size) else int(asked)


def shape_of(labelled: Labelled, ledger: Ledger) -> torch.Size:
    """A tensor's shape in which the sizes of labelled dims remember their dim."""
    return torch.Size(
        [n if d is None else Size(n, Extent(d.ids), ledger) for n, d in zip(labelled.shape, labelled.dims, strict=True)]
    )


def _numel(labelled: Labelled, ledger: Ledger, tensor: torch.Tensor) -> int:
    """The number of a tensor's elements, which remembers the sizes of its dims."""
    return prod(shape_of(labelled, ledger))


def _stride(labelled: Labelled, ledger: Ledger, tensor: torch.Tensor, dim: int | None = None) -> Any:
    """A tensor's strides, each of which remembers the sizes of the dims inside it, if the tensor has no gaps."""
    found: list[int] = list(tensor.stride())
    inside, shape = 1, shape_of(labelled, ledger)
    for d in in_memory(labelled.shape, found) or ():
        found[d] = inside
        inside = inside * shape[d]
    return tuple(found) if dim is None else found[dim]


MEASURES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.Tensor.numel, torch.Tensor.nelement, torch.numel), _numel),
    torch.Tensor.stride: _stride,
}
"""Functions that tell how much memory a tensor has and how it lies there: as they are for labelled tensors."""


class Marked(NamedTuple):
    """What was replaced, as (dictionary, key, old value), and the dictionaries of config objects with their keys."""

    replaced: list[tuple[dict[str, Any], str, Any]]
    configs: list[tuple[dict[str, Any], list[str]]]

    def undo(self) -> None:
        """Put back what was replaced, and drop what was added to configs meanwhile."""
        for fields, name, value in self.replaced:
            fields[name] = value
        for fields, names in self.configs:
            if len(fields) > len(names):
                for name in set(fields).difference(names):
                    del fields[name]


def mark_attributes(modules: Iterable[tuple[str, nn.Module]], ledger: Ledger) -> Marked:
    """Replace the ints that modules (given with their paths) and their configs keep by :class:`Size` objects."""
    marked = Marked([], [])
    seen: set[int] = set()
    handed: dict[type, list[str]] = {}  # what modules of a class hand out, perhaps without keeping it
    for path, module in modules:
        fields = module.__dict__
        kind = type(module)
        if kind not in handed:
            handed[kind] = [name for name in _CONFIGS if isinstance(getattr(kind, name, None), property)]
        configs = [(name, fields[name]) for name in _CONFIGS if name in fields]
        configs += [(name, _handed_out(module, name)) for name in handed[kind] if fields.get(name) is None]
        _mark(fields, path, "", ledger, marked.replaced)
        for name, config in configs:
            if id(config) in seen:
                continue
            seen.add(id(config))
            inner = getattr(config, "__dict__", None)
            if inner is not None and not isinstance(config, (nn.Module, type)):
                marked.configs.append((inner, list(inner)))
                _mark(inner, path, f"{name}.", ledger, marked.replaced)
    return marked


def _handed_out(module: nn.Module, name: str) -> Any:
    """What a property of a module gives, if it is the same object each time."""
    with suppress(Exception):  # of the property's own code
        found = getattr(module, name)
        return found if found is getattr(module, name) else None
    return None


def _mark(
    fields: dict[str, Any], path: str, prefix: str, ledger: Ledger, undo: list[tuple[dict[str, Any], str, Any]]
) -> None:
    changed: list[tuple[str, Any]] = []
    for name, value in fields.items():
        kind = type(value)
        if kind is int:
            if value >= SMALLEST and name not in _HOUSEKEEPING:
                changed.append((name, Size(value, Attribute(path, prefix + name), ledger)))
        elif (kind is tuple or kind is list) and value and name not in _HOUSEKEEPING:
            marked = [
                Size(v, Attribute(path, prefix + name, k), ledger) if type(v) is int and v >= SMALLEST else v
                for k, v in enumerate(value)
            ]
            if any(type(v) is Size for v in marked):
                changed.append((name, kind(marked)))
    for name, marked_value in changed:
        undo.append((fields, name, fields[name]))
        fields[name] = marked_value


def read_attribute(model: nn.Module, attribute: Attribute) -> int:
    """The attribute's present value."""
    holder, last = _holder(model, attribute)
    value = getattr(holder, last)
    return int(value if attribute.item is None else value[attribute.item])


def _holder(model: nn.Module, attribute: Attribute) -> tuple[Any, str]:
    holder: Any = submodule(model, attribute.path)
    *through, last = attribute.name.split(".")
    for name in through:
        holder = getattr(holder, name)
    return holder, last


def attribute_home(model: nn.Module, attribute: Attribute) -> tuple[dict[str, Any], str]:
    """The dictionary and the key under which the attribute (or the list that holds it) is stored."""
    holder, last = _holder(model, attribute)
    return holder.__dict__, last


@dataclass(frozen=True, slots=True)
class Fact:
    """An attribute that equals a width by construction: ``module.attribute == size of parameter's dim // divide``.

    For attributes that no traced op reads (``out_channels``, or ``C2f.c``, which only the exporter uses).

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(4, 8)
        >>> Fact(layer, "out_features", "weight", 0).value()
        8
    """

    module: nn.Module
    attribute: str
    parameter: str
    dim: int
    divide: int = 1

    def value(self) -> int:
        """What the attribute must be, from the parameter as it is."""
        tensor: Any = self.module
        for name in self.parameter.split("."):
            tensor = getattr(tensor, name)
        return int(tensor.shape[self.dim]) // self.divide
