"""Pictures of a graph as matrices: which layers are in which group, and which layers go together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from prunus.graph import DependencyGraph

Size = tuple[float, float]


def draw_groups(
    DG: DependencyGraph,
    save_as: str | Path,
    title: str = "Group",
    figsize: Size = (16, 16),
    dpi: int = 200,
    cmap: Any = None,
) -> None:
    """Save a picture of which layers are in one group; needs matplotlib.

    Args:
        DG: the graph.
        save_as: the file to write.
        title: above the picture.
        figsize: inches.
        dpi: dots per inch.
        cmap: a colour map of matplotlib.
    """
    names, members = _memberships(DG)
    _draw((members @ members.T > 0).astype(int), names, save_as, title, figsize, dpi, cmap)


def draw_dependency_graph(
    DG: DependencyGraph,
    save_as: str | Path,
    title: str = "Group",
    figsize: Size = (16, 16),
    dpi: int = 200,
    cmap: Any = None,
) -> None:
    """Save a picture of how many groups two layers share; see :func:`draw_groups`."""
    names, members = _memberships(DG)
    _draw(members @ members.T, names, save_as, title, figsize, dpi, cmap)


def draw_computational_graph(
    DG: DependencyGraph,
    save_as: str | Path,
    title: str = "Computational Graph",
    figsize: Size = (16, 16),
    dpi: int = 200,
    cmap: Any = None,
) -> None:
    """Save a picture of which layer reads what another makes (row: maker, column: reader); see :func:`draw_groups`."""
    names, _ = _memberships(DG)
    place = {name: k for k, name in enumerate(names)}
    found = np.zeros((len(names), len(names)), dtype=int)
    for group in DG.get_all_groups(root_module_types=(object,)):
        makers = [d.target.name for d, _ in group if not DG.is_in_channel_pruning_fn(d.handler)]
        readers = [d.target.name for d, _ in group if DG.is_in_channel_pruning_fn(d.handler)]
        for maker in makers:
            for reader in readers:
                found[place[maker], place[reader]] = 1
    _draw(found, names, save_as, title, figsize, dpi, cmap)


def _memberships(graph: DependencyGraph) -> tuple[list[str], NDArray[np.int64]]:
    """The layers, and for each (row) whether each group (column) cuts it."""
    names = list(dict.fromkeys(side.node.name for side in graph.sides.ordered))
    place = {name: k for k, name in enumerate(names)}
    groups = list(graph.get_all_groups(root_module_types=(object,)))
    found = np.zeros((len(names), len(groups)), dtype=np.int64)
    for k, group in enumerate(groups):
        for dep, _ in group:
            found[place[dep.target.name], k] = 1
    return names, found


def _draw(
    matrix: NDArray[Any], names: list[str], save_as: str | Path, title: str, figsize: Size, dpi: int, cmap: Any
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize)
    axes = figure.subplots()
    axes.imshow(matrix, cmap=cmap)
    axes.set_title(title)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=4)
    axes.set_yticks(range(len(names)), names, fontsize=4)
    figure.savefig(save_as, dpi=dpi)


__all__ = ["draw_computational_graph", "draw_dependency_graph", "draw_groups"]
