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
    routing,
    spatial,
    views,
    writing,
)
from prunus.rules.table import Op, lookup, rule

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
    "routing",
    "rule",
    "spatial",
    "views",
    "writing",
]
