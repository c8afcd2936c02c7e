"""Products: merged dims must stay the product of what is left of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prunus.coupling.pieces import Pieces, stretches
from prunus.labels import Ids, distinct
from prunus.ledger import Product


def breaking(products: Sequence[Product], pieces: Pieces, sources: Ids, classes: Ids) -> list[Ids]:
    """For each product the sources that cannot go: they take a position of it without one of the dims merged there.

    Args:
        products: what views merged.
        pieces: the pieces of the ledger that holds them.
        sources: fine atoms, each as often as it takes something.
        classes: a class that each takes; pairs with ``sources`` are in order.
    """
    count = pieces.class_count
    taken = sources * count + classes
    return [_breaking(product, pieces, taken, count) for product in products]


def _breaking(product: Product, pieces: Pieces, taken: Ids, count: int) -> Ids:
    parts = np.column_stack((product.cells, product.factors))
    cells = np.unique(pieces.classes[pieces.of(parts.reshape(-1))].reshape(parts.shape), axis=0)
    source, member = np.divmod(taken, count)
    first = np.searchsorted(cells[:, 0], member)
    many = np.searchsorted(cells[:, 0], member, side="right") - first
    touched = many > 0
    source, first, many = source[touched], first[touched], many[touched]
    spread = np.repeat(source, many)
    whole = np.isin(spread[:, None] * count + cells[stretches(first, many), 1:], taken).any(axis=1)
    return distinct(spread[~whole])
