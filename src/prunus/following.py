"""Attributes that follow: what the integers that modules keep must be when some positions are gone."""

from __future__ import annotations

from collections.abc import Callable

from prunus.coupling import Coupling
from prunus.errors import SurgeryError
from prunus.labels import Ids
from prunus.ledger import Requirement
from prunus.sizes import Attribute, Expression, Extent, expression_of, leaves, read_attribute
from prunus.solving import evaluate, solve_all

TINY = 1e-6


def followed(coupling: Coupling, count: Callable[[Ids], int]) -> list[tuple[Attribute, int]]:
    """The attributes that change when of some ids as many atoms are left as ``count`` says, each with its new value.

    Raises:
        SurgeryError: a size cannot be what the code needs, or the code would take another path.
    """
    ledger = coupling.trace.ledger

    def read(attribute: Attribute) -> int:
        return read_attribute(coupling.trace.model, attribute)

    demands: dict[tuple[Expression, int], Requirement] = {}  # each with the first that asks for it
    for requirement in ledger.requirements:
        expression, size = expression_of(requirement.asked), count(requirement.ids)
        if size == 0 and requirement.ids.size:
            raise SurgeryError(f"a part sized by {expression} would lose its last position; remove fewer")
        demands.setdefault((expression, size), requirement)
    solved, values = solve_all(tuple(demands), count, read, bending=True)
    for ((expression, size), requirement), value in zip(demands.items(), values, strict=True):
        if value is None or abs(value - size) > TINY:
            raise SurgeryError(
                f"{expression} would be {value} where the code needs {size} "
                f"({requirement.place or 'step ' + str(requirement.step)}); the plan was not made"
            )
    for attribute, new in solved.items():
        if abs(new - round(new)) > TINY:
            raise SurgeryError(f"{attribute} would have to be {new:g}, which is no whole number; remove another number")
    if ledger.equal or ledger.unequal:
        asked = {leaf for expression, _ in demands for leaf in leaves(expression)}
        for pair in ledger.equal:
            for one, other in (pair, pair[::-1]):  # nothing but the comparison is known of the other
                if one in solved and other not in asked:
                    solved[other] = solved[one]
        _keep_apart(coupling, solved, asked, count)
    return [(a, round(v)) for a, v in solved.items() if round(v) != read(a)]


def _keep_apart(
    coupling: Coupling, solved: dict[Attribute, float], asked: set[Attribute | Extent], extent: Callable[[Ids], float]
) -> None:
    """Sizes that the code compared, and that differed, differ still: an attribute that nothing else asks for follows.

    Raises:
        SurgeryError: they would be equal, and the code would take another path.
    """

    def known(leaf: Attribute | Extent) -> float:
        if isinstance(leaf, Extent):
            return extent(leaf.ids)
        return solved.get(leaf, read_attribute(coupling.trace.model, leaf))

    for pair, sizes in coupling.trace.ledger.unequal.items():
        values = [evaluate(expression, known) for expression in pair]
        if values[0] is None or values[0] != values[1]:
            continue
        for k, other in enumerate(pair):
            if isinstance(other, Attribute) and other not in asked:
                scaled = round(sizes[k] * values[0] / sizes[1 - k])
                solved[other] = scaled if scaled != values[0] else values[0] + (1 if sizes[k] > sizes[1 - k] else -1)
                break
        else:
            raise SurgeryError(
                f"{pair[0]} and {pair[1]}, which the code compares, would both be {values[0]:g}, and the code would "
                "take another path; remove another number"
            )
