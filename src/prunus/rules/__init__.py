"""What each ATen op does to labels: one table, one small function for each family of ops."""

from prunus.rules import (
    contractions,
    factories,
    indexing,
    joins,
    matrices,
    norms,
    patches,
    pointwise,
    recurrent,
    reductions,
    routing,
    signals,
    spatial,
    views,
    writing,
)
from prunus.rules.table import Op, lookup, remove_rule, rule

__all__ = [
    "Op",
    "contractions",
    "factories",
    "indexing",
    "joins",
    "lookup",
    "matrices",
    "norms",
    "patches",
    "pointwise",
    "recurrent",
    "reductions",
    "remove_rule",
    "routing",
    "rule",
    "signals",
    "spatial",
    "views",
    "writing",
]
