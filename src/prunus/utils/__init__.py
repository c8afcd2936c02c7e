"""Names that users of structured pruning import from ``utils``: counting, timing, printing, drawing."""

from prunus.cost import count_ops_and_params, count_params
from prunus.ops import module2type
from prunus.tracing import tensors_in as _tensors_in
from prunus.utils import benchmark, print_tool
from prunus.utils.drawing import draw_computational_graph, draw_dependency_graph, draw_groups


def flatten_as_list(obj: object) -> list[object]:
    """Every tensor in nested tuples, lists and dicts.

    Example:
        >>> import torch
        >>> len(flatten_as_list([torch.zeros(1), {"a": (torch.zeros(2),)}]))
        2
    """
    return list(_tensors_in(obj))


__all__ = [
    "benchmark",
    "count_ops_and_params",
    "count_params",
    "draw_computational_graph",
    "draw_dependency_graph",
    "draw_groups",
    "flatten_as_list",
    "module2type",
    "print_tool",
]
