"""What tracing does with an op: decided once for each op, from the rule table and from what PyTorch says of the op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from prunus.higher import inside
from prunus.rules import lookup
from prunus.rules.table import MAKES, MULTIPLIES, NEEDS_DTYPES, Rule, derived
from prunus.standins import Standin, decides, standin_for


class Entry(NamedTuple):
    """What to do with an op, decided once."""

    op: Any
    name: str
    rule: Rule | None
    composite: bool
    writes: tuple[int, ...]  # which of its arguments it changes
    makes: bool
    dtypes: bool
    standin: Standin | None
    decides: bool


def entry_of(op: Any) -> Entry:
    """What to do with an op."""
    return derived.get(id(op)) or _classify(op)  # by identity: an op's own hash is slow


def _classify(func: Any) -> Entry:
    """Decide what to do with an op."""
    if inside(func) is not None:
        entry = Entry(func, str(func), None, True, (), False, False, None, False)
    else:
        rule = lookup(func)
        composite = rule is None and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        )
        spelled = func.overloadpacket.__name__
        name = spelled.rstrip("_") or spelled
        entry = Entry(
            func,
            name,
            rule,
            composite,
            written(func) if func._schema.is_mutable else (),
            name in MAKES or getattr(rule, "__module__", "") in MULTIPLIES,
            name in NEEDS_DTYPES,
            standin_for(func),
            decides(func),
        )
    derived[id(func)] = entry
    return entry


def written(func: Any) -> tuple[int, ...]:
    """The places of the arguments that an op changes."""
    arguments = func._schema.arguments
    return tuple([k for k, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write])
