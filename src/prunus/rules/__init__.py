"""What each ATen op does to labels: one table, one small function for each family of ops."""

from prunus.rules import (
    contractions,
    factories,
    indexing,
    joins,
    norms,
    pointwise,
    recurrent,
    reductions,
    spatial,
    views,
)
from prunus.rules.table import Op, lookup, remove_rule, rule

__all__ = [
    "Op",
    "contractions",
    "factories",
    "indexing",
    "joins",
    "lookup",
    "norms",
    "pointwise",
    "recurrent",
    "reductions",
    "remove_rule",
    "rule",
    "spatial",
    "views",
]
