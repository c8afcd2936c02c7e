"""A thin alias for the names that users of structured pruning import from ``utils``."""

from prunus.cost import count_ops_and_params, count_params

__all__ = ["count_ops_and_params", "count_params"]
