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
    signals,
    spatial,
    views,
)
from prunus.rules.table import Op, lookup, rule

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
    "rule",
    "signals",
    "spatial",
    "views",
]
