"""Memory: what a model's weights take, and the most that activations take at once, from what was traced."""

from __future__ import annotations

from math import prod

import numpy as np

from prunus.cost.extents import Extents
from prunus.coupling import Coupling
from prunus.labels import Labelled
from prunus.plan import Alive, footprint

_VIEWS = frozenset(
    ["view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "expand", "expand_as", "slice"]
) | {
    *("select", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "chunk", "unbind", "squeeze", "unsqueeze"),
    *("alias", "detach", "unflatten", "flatten", "narrow", "as_strided", "diagonal", "movedim", "numpy_T", "mT"),
    *("dropout", "feature_dropout", "contiguous", "to", "view_as", "lift_fresh", "swapaxes", "unfold"),
}
"""Ops whose result lies in the memory of their first argument (in eval mode, and where no copy is needed)."""


class MemoryModel:
    """Bytes that one run of the model takes: parameters and buffers, and the peak of the activations.

    An activation is alive from the op that makes it to the last op that reads it, views are part of what they view,
    and the peak is the largest sum over all moments of the run. It is what a run without gradients needs at least:
    Python variables that live longer, the workspace of kernels and the allocator's rounding come on top, and ops that
    write in place are counted as if they made a new tensor; on eight torchvision networks it gave 0.7 to 1.0 times what
    was seen to be alive. Activations are taken to have the type of the model's
    first floating-point parameter; the inputs, and whatever is computed without any parameter, are left out.

    Args:
        coupling: a traced model.

    Example:
        >>> import torch, prunus
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        >>> graph = prunus.DependencyGraph().build_dependency(model, torch.randn(10, 8))
        >>> memory = MemoryModel(graph.coupling)
        >>> memory.activations(graph.alive) == 4 * (10 * 64 + 10 * 64)
        True
        >>> memory(graph.alive) == 4 * (8 * 64 + 64 + 64 * 2 + 2) + 4 * (10 * 64 + 10 * 64)
        True
    """

    def __init__(self, coupling: Coupling) -> None:
        self._coupling = coupling
        trace = coupling.trace
        floats = (h.tensor for h in trace.held if h.places[0].kind == "parameter" and h.tensor.is_floating_point())
        self._bytes = next((t.element_size() for t in floats), 4)
        self._extents = Extents()
        self._places: list[tuple[int, ...]] = []
        self._born: list[int] = []
        self._dies: list[int] = []
        root: dict[int, int] = {}  # tensor (by identity) -> the storage it lies in
        steps = trace.ledger.evaluated or len(trace.events)
        for step, event in enumerate(trace.events[:steps]):
            for tensor in event.inputs:
                if id(tensor) in root:
                    self._dies[root[id(tensor)]] = step
            for tensor in event.results:
                base = root.get(id(event.inputs[0])) if event.name in _VIEWS and event.inputs else None
                if base is None and event.name in _VIEWS and event.inputs and event.inputs[0].source <= -2:
                    continue  # a view of a parameter
                root[id(tensor)] = len(self._places) if base is None else base
                if base is None:
                    self._make(tensor, step)
        for event in trace.events[:steps][-1:]:
            for tensor in event.results:
                if id(tensor) in root:
                    self._dies[root[id(tensor)]] = steps
        self._steps = steps

    def _make(self, tensor: Labelled, step: int) -> None:
        self._places.append(self._extents.shape(tensor))
        self._born.append(step)
        self._dies.append(step)

    def activations(self, alive: Alive) -> int:
        """The most bytes that activations take at once with only the ``alive`` atoms."""
        if not self._places:
            return 0
        sizes = self._extents.sizes(alive).tolist()
        numbers = np.array([prod(sizes[k] for k in dims) for dims in self._places], dtype=np.int64)
        change = np.zeros(self._steps + 2, dtype=np.int64)
        np.add.at(change, self._born, numbers)
        np.add.at(change, np.array(self._dies) + 1, -numbers)
        return int(np.cumsum(change).max()) * self._bytes

    def weights(self, alive: Alive) -> int:
        """The bytes of parameters and buffers with only the ``alive`` atoms."""
        buffers = (h for h in self._coupling.trace.held if h.places[0].kind == "buffer")
        return footprint(self._coupling, alive).bytes + sum(
            prod(h.left(alive)) * h.tensor.element_size() for h in buffers
        )

    def __call__(self, alive: Alive) -> int:
        """Both together."""
        return self.weights(alive) + self.activations(alive)
