"""The rule table: what each ATen op does to labels.

How to add an op
----------------
A rule is a function ``rule(op, *args, **kwargs)`` registered with ``@rule(aten.name)``. It receives the op's arguments
as the model passed them, with every tensor replaced by a :class:`~prunus.labels.Labelled` (a shape and one label for
each dim, never data), and an :class:`Op`, which knows the output shapes and takes what the rule has to say::

    @rule(aten.glu)
    def glu(op: Op, x: Labelled, dim: int = -1) -> Dims:
        "The two halves of the dim are paired: position k lives with position k + n/2."

It returns one tuple of labels for each output (a bare tuple if there is one output; ``None`` means that no dim of the
output is labelled). A rule may only tie, freeze, pin, make rows, balance, require a size and count MACs.
What it cannot say, it freezes with a reason. Ops that PyTorch tags as pointwise need no entry; a composite op without
an entry is decomposed and traced again; any other op without an entry freezes what flows into it and is reported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from torch._ops import OpOverload, OpOverloadPacket

from prunus.errors import InputError
from prunus.labels import Dims, Ids, Label, Labelled
from prunus.ledger import Ledger

Result: TypeAlias = "Dims | list[Dims | None] | None"
Rule: TypeAlias = Callable[..., Result]
F = TypeVar("F", bound=Rule)

_TABLE: dict[OpOverload | OpOverloadPacket | str, Rule] = {}
_REPLACED: dict[OpOverload | OpOverloadPacket | str, list[Rule]] = {}

NEEDS_DTYPES = frozenset(["index", "index_put", "_grouped_mm", "as_strided"])
"""Ops that mean another thing for masks than for numbers, are limited by the size of an element, or read memory."""

MOVES = frozenset(
    [
        *("clone", "alias", "detach", "contiguous", "to", "_to_copy", "lift_fresh", "lift_fresh_copy"),
        *("permute", "transpose", "t", "movedim", "unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to"),
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "view_as", "reshape_as", "flatten", "unflatten"),
        *("select", "unbind", "slice", "narrow", "split", "split_with_sizes", "chunk", "repeat", "repeat_interleave"),
        *("flip", "roll", "index", "index_select", "gather", "take_along_dim"),
    ]
)
"""Ops whose output holds values of their first tensor, moved: what these number, the output's values number."""

READS_NUMBERS = frozenset(
    [
        *("index", "index_select", "gather", "take_along_dim", "embedding", "scatter", "scatter_add", "scatter_reduce"),
        *("index_add", "index_copy", "index_reduce", "index_fill", "index_put", "sort", "argsort"),
        *("one_hot", "histc", "bincount", "_grouped_mm"),
    ]
)
"""Ops whose rules know what to do with numbers of positions; any other use of them keeps the positions."""


MAKES = frozenset(
    [
        *("zeros", "ones", "full", "empty", "rand", "randn", "new_zeros", "new_ones", "new_full", "new_empty"),
        *("empty_strided", "new_empty_strided"),
        *("arange", "eye", "expand", "repeat"),
    ]
)
"""Ops whose output may have labels where no input has any: their sizes are what is labelled."""

SIZED = frozenset(
    [
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "repeat", "slice", "narrow"),
        *("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "unflatten", "as_strided"),
        *("repeat_interleave", "tile", "roll", "constant_pad_nd", "topk"),
    ]
)
"""Ops that the model's code gives sizes: where nothing is labelled, those stay as they are."""

MULTIPLIES = frozenset(["prunus.rules.contractions", "prunus.rules.recurrent"])
"""Modules whose rules count multiply-adds, whether anything is labelled or not."""


class Call(Protocol):
    """The call in the model's Python code that led to an op: where the ints among its arguments came from."""

    def sizes(self, values: Sequence[int]) -> Sequence[Any] | None:
        """The ints that the code passed for ``values``, or None if no Python code named them."""

    def argument(self, value: int, name: str, position: int) -> Any | None:
        """The int that the code passed as the argument ``name`` (or at ``position``), or None."""

    def mapped(self) -> Any | None:
        """How often a vectorised function repeats what does not depend on the dim over which it is mapped, or None."""

    def pointwise(self) -> bool:
        """Whether the code called a pointwise function, which may look at a number's type but at no position."""

    def bounds(self, start: int, end: int, size: int) -> tuple[Any, Any] | None:
        """Start and end of the slice that the code wrote (None where left out), or None if it wrote none."""

    def place(self) -> str:
        """File and line of the code that is running."""


class Op:
    """One call of an ATen op, as a rule sees it."""

    __slots__ = ("call", "dtypes", "inputs", "layouts", "ledger", "name", "shapes")

    def __init__(
        self,
        name: str,
        ledger: Ledger,
        inputs: list[Labelled],
        shapes: list[tuple[int, ...]],
        call: Call,
    ) -> None:
        self.name = name
        self.ledger = ledger
        self.inputs = inputs
        self.shapes = shapes
        self.call = call
        self.dtypes: list[torch.dtype] = []  # of ``inputs``; only for the ops in NEEDS_DTYPES
        self.layouts: list[tuple[tuple[int, ...], int]] = []  # strides and offset of those; likewise

    def look_at(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note the dtypes of the op's inputs, and how they lie in memory."""
        self.dtypes = [t.dtype for t in tensors]
        self.layouts = [(t.stride(), int(t.storage_offset())) for t in tensors if t.layout is torch.strided]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the (first) output."""
        return self.shapes[0]

    def freeze(self, labels: Iterable[Label | None], reason: str) -> None:
        """Freeze every given label."""
        for label in labels:
            if label is not None:
                self.ledger.freeze(label.ids, reason)

    def couple(self, a: Label | None, b: Label | None, why: str = "") -> Label | None:
        """Tie two labels of one dim and return the more detailed one; a label that meets none is frozen."""
        if a is None or b is None:
            known = a if b is None else b
            if known is not None:
                self.ledger.freeze(known.ids, why or f"{self.name} combines it with a dimension of fixed size")
            return known
        self.ledger.couple(a, b)
        best, other = (a, b) if len(a.context) >= len(b.context) else (b, a)
        uniform = self.ledger.uniform
        if uniform and id(best.ids) in uniform and id(other.ids) not in uniform:
            return other if len(other.context) == len(best.context) else Label(best.ids[...], best.context)
        return best

    def require(self, asked: Any, ids: Ids) -> None:
        """The code sizes a labelled dim, whose rows are ``ids``, by ``asked``."""
        self.ledger.require(asked, ids, self.call.place() if type(asked) is int else "")

    def require_sizes(self, sizes: Sequence[int], dims: Sequence[Label | None]) -> None:
        """The op was called with ``sizes`` for ``dims``: require those that the model's code named itself."""
        for wanted, size, label in zip(self.call.sizes(sizes) or (), sizes, dims, strict=False):
            if label is None or size == -1:
                self.require_same(wanted)
            elif wanted != -1:
                self.require(wanted, label.ids)

    def require_same(self, asked: Any) -> None:
        """The code sizes a dim that stays by ``asked``, which must keep its value, whatever it is computed from."""
        if type(asked) is not int and isinstance(asked, int) and asked > 0:
            self.require(asked, np.zeros(asked, dtype=np.int64))  # atom 0 stays for ever

    def require_argument(self, value: int, name: str, position: int, ids: Ids) -> None:
        """Like :meth:`require_sizes` for one int argument of the call, such as ``groups``."""
        asked = self.call.argument(value, name, position)
        if asked is not None:
            self.require(asked, ids)

    def require_attribute(self, name: str, size: int, ids: Ids) -> None:
        """The module that called the op keeps ``name`` for users to read: it follows the dim, if it equals its size."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not isinstance(frame.f_locals.get("self"), torch.nn.Module):
            frame = frame.f_back
        asked = vars(frame.f_locals["self"]).get(name) if frame is not None else None
        if isinstance(asked, int) and type(asked) is not int and int(asked) == size:
            self.require(asked, ids)

    def hands_on(self, label: Label | None) -> None:
        """The dim of a weight is the op's output: its layer produces it."""
        if label is not None:
            self.ledger.passed.append(label.ids)

    def reads(self, label: Label | None) -> None:
        """The op sums over the dim."""
        if label is not None:
            self.ledger.contracted.append(label.ids)

    def averages(self, label: Label | None) -> None:
        """The op averages over the dim: removing a position is not the same as silencing it."""
        if label is not None:
            self.ledger.averaged.append(label.ids)

    def count(self, *dims: tuple[int, Label | None] | int) -> None:
        """Record multiply-adds: the product of sizes, given as ints or as (size, label)."""
        factor, rows = 1, []
        for item in dims:
            size, label = (item, None) if isinstance(item, int) else item
            if label is None:
                factor *= size
            else:
                rows.append(label.ids)
        self.ledger.count_macs(factor, rows)


def rule(*ops: Any, override: bool = False) -> Callable[[F], F]:
    """Register the decorated function as the rule of ``ops``.

    Args:
        ops: overloads, packets for all their overloads, what ``torch.library.custom_op`` returns, or names such as
            ``"torchvision::nms"`` for ops of a library that may not be there.
        override: replace the rule that an op has; :func:`remove_rule` brings the old one back.

    Raises:
        InputError: one of the ops has a rule already, or is no op.

    Example:
        >>> import torch, prunus
        >>> from prunus.rules import pointwise
        >>> prunus.rules.lookup(torch.ops.aten.relu.default) is pointwise.pointwise
        True
    """
    found = [_registered(op) for op in ops]

    def register(function: F) -> F:
        for op in found:
            if op in _TABLE and not override:
                raise InputError(
                    f"{op} has a rule already: {_TABLE[op].__module__}.{_TABLE[op].__name__}; "
                    "pass override=True to replace it, or call prunus.remove_rule first"
                )
        for op in found:
            if op in _TABLE:
                _REPLACED.setdefault(op, []).append(_TABLE[op])
            _TABLE[op] = function
        _forget()
        return function

    return register


def remove_rule(*ops: Any) -> None:
    """Take back the rule of ``ops``; where it had replaced another one, that one counts again.

    Raises:
        InputError: one of the ops has no rule of its own.
    """
    found = [_registered(op) for op in ops]
    for op in found:
        if op not in _TABLE:
            raise InputError(f"{op} has no rule of its own")
    for op in found:
        del _TABLE[op]
        if _REPLACED.get(op):
            _TABLE[op] = _REPLACED[op].pop()
    _forget()


def _forget() -> None:
    """The table has changed."""
    _lookup_cache.clear()
    derived.clear()


def _registered(op: Any) -> OpOverload | OpOverloadPacket | str:
    """The op that a user means."""
    op = getattr(op, "_opoverload", op)
    if not isinstance(op, (OpOverload, OpOverloadPacket)) and not (isinstance(op, str) and "::" in op):
        raise InputError(
            f"{op!r} is no op: pass torch.ops.<library>.<name>, '<library>::<name>', or what "
            "torch.library.custom_op returned"
        )
    found: OpOverload | OpOverloadPacket | str = op
    return found


_lookup_cache: dict[OpOverload, Rule | None] = {}
derived: dict[int, Any] = {}
"""What others found out about ops with the help of the table, by the op's identity; emptied when the table changes."""


def lookup(op: OpOverload) -> Rule | None:
    """The rule of an op: its own, its packet's, the pointwise rule if PyTorch tags it so, or that of its base form."""
    if op in _lookup_cache:
        return _lookup_cache[op]
    found = _TABLE.get(op) or _TABLE.get(op.overloadpacket) or _TABLE.get(op._schema.name)
    if found is None and torch.Tag.pointwise in op.tags:
        found = _TABLE[torch.ops.aten.clone]
    for suffix in ("_", "_copy"):
        if found is None and op.overloadpacket.__name__.endswith(suffix):
            found = _base_rule(op, suffix)
    _lookup_cache[op] = found
    return found


def _base_rule(op: OpOverload, suffix: str) -> Rule | None:
    """The rule of ``relu`` for ``relu_``, and of ``view`` for ``view_copy``."""
    namespace = getattr(torch.ops, op.namespace)
    packet = getattr(namespace, op.overloadpacket.__name__.removesuffix(suffix), None)
    if packet is None:
        return None
    overload = getattr(packet, op._overloadname, None) or getattr(packet, packet.overloads()[0])
    return lookup(overload)
