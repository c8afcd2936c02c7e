"""Solving: what the attributes of modules must be so that expressions of sizes have the values that they need."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import TypeAlias

from prunus.labels import Ids
from prunus.sizes import Attribute, Binary, Expression, Extent, leaves

Lookup: TypeAlias = "Callable[[Attribute | Extent], float | None]"
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": lambda left, right: left / right if right else float("nan"),
}
_INVERSE_LEFT: dict[str, Callable[[float, float], float]] = {  # x in: x operator right == value
    "+": lambda value, right: value - right,
    "-": lambda value, right: value + right,
    "*": lambda value, right: value / right if right else float("nan"),
    "//": lambda value, right: value * right,
}
_INVERSE_RIGHT: dict[str, Callable[[float, float], float]] = {  # x in: left operator x == value
    "+": lambda value, left: value - left,
    "-": lambda value, left: left - value,
    "*": lambda value, left: value / left if left else float("nan"),
    "//": lambda value, left: left / value if value else float("nan"),
}


def evaluate(expression: Expression, known: Lookup) -> float | None:
    """The value (``//`` divides exactly), or None if a leaf is unknown."""
    if not isinstance(expression, Binary):
        return expression if isinstance(expression, int) else known(expression)
    left, right = evaluate(expression.left, known), evaluate(expression.right, known)
    return None if left is None or right is None else _ARITHMETIC[expression.operator](left, right)


def solve(expression: Expression, value: float, known: Lookup) -> tuple[Attribute, float] | None:
    """The one unknown attribute that makes ``expression == value``, and its value."""
    while isinstance(expression, Binary):
        left, right = evaluate(expression.left, known), evaluate(expression.right, known)
        if left is None and right is not None:
            value, expression = _INVERSE_LEFT[expression.operator](value, right), expression.left
        elif right is None and left is not None:
            value, expression = _INVERSE_RIGHT[expression.operator](value, left), expression.right
        else:
            return None
    if isinstance(expression, Attribute) and known(expression) is None and not isnan(value):
        return expression, value
    return None


def solve_all(
    demands: Sequence[tuple[Expression, float]],
    extent: Callable[[Ids], float],
    read: Callable[[Attribute], int],
    stays: Callable[[Expression, float, Attribute], bool] | None = None,
    *,
    bending: bool = False,
) -> tuple[dict[Attribute, float], list[float | None]]:
    """Set attributes so that every expression equals its size, as far as that can be.

    Args:
        demands: pairs of an expression and the size that it must have.
        extent: how many positions a labelled dim has.
        read: the present value of an attribute; those that nothing determines keep it.
        stays: whether an attribute keeps its value although a demand would change it (default: never).
        bending: where nothing else tells, one factor of a product may change beside another one.

    Returns:
        The attributes that are determined, and the value that each expression then has.
    """
    solved: dict[Attribute, float] = {}
    known = _Known(extent)
    waiting = [demand for demand in demands if isinstance(demand[0], (Attribute, Binary))]
    waiting.sort(key=lambda demand: not isinstance(demand[0], Attribute))
    bends = False
    while waiting:
        left = []
        for demand in waiting:
            found = solve(*demand, known.__getitem__)
            bent = found is not None and not bends and _bends(demand[0], *found, solved, read)
            if found is None or bent or (stays and stays(*demand, found[0])):
                left.append(demand)
            else:
                known[found[0]] = solved[found[0]] = found[1]
                bends = False
        if len(left) == len(waiting):
            if bends or not bending:
                break
            bends = True
        waiting = left
    known.update((leaf, read(leaf)) for leaf, value in known.items() if value is None and isinstance(leaf, Attribute))
    return solved, [evaluate(expression, known.__getitem__) for expression, _ in demands]


class _Known(dict["Attribute | Extent", "float | None"]):
    """The sizes of extents, looked up when they are asked for, and of the attributes that are solved (others: None)."""

    def __init__(self, extent: Callable[[Ids], float]) -> None:
        self.extent = extent

    def __missing__(self, leaf: Attribute | Extent) -> float | None:
        found = self[leaf] = self.extent(leaf.ids) if isinstance(leaf, Extent) else None
        return found


def _bends(
    expression: Expression,
    attribute: Attribute,
    value: float,
    solved: Mapping[Attribute, float],
    read: Callable[[Attribute], int],
) -> bool:
    """Whether an attribute (a ratio of widths) would change beside another factor that does; widths shrink in step."""
    if not isinstance(expression, Binary) or value == read(attribute):
        return False
    others = (leaf for leaf in leaves(expression) if leaf != attribute and isinstance(leaf, Attribute))
    return expression.operator in "*//" and any(leaf in solved and solved[leaf] != read(leaf) for leaf in others)
