"""What a model costs: `count` for MACs, parameters and bytes, `latency` for time, `MemoryModel` for plans."""

from prunus.cost.counting import Cost, count, count_ops_and_params, count_params
from prunus.cost.memory import MemoryModel
from prunus.cost.prediction import LatencyModel
from prunus.cost.table import LatencyTable
from prunus.cost.timing import latency

__all__ = [
    "Cost",
    "LatencyModel",
    "LatencyTable",
    "MemoryModel",
    "count",
    "count_ops_and_params",
    "count_params",
    "latency",
]
