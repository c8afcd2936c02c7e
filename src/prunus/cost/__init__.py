"""What a model costs: `count` for MACs, parameters and bytes, `latency` for time."""

from prunus.cost.counting import Cost, count, count_ops_and_params, count_params
from prunus.cost.timing import latency

__all__ = ["Cost", "count", "count_ops_and_params", "count_params", "latency"]
