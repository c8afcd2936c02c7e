"""Repair without training: the layers that read removed channels are refitted in closed form on a few samples."""

from prunus.repair.closed_form import repair
from prunus.repair.constants import find_constants, fold_constants
from prunus.repair.report import LayerRepair, RepairReport
from prunus.repair.samples import Batch, CannotRunError, explained, read
from prunus.repair.suspects import may_have_constants
from prunus.repair.twins import frozen, takeover

__all__ = [
    "Batch",
    "CannotRunError",
    "LayerRepair",
    "RepairReport",
    "explained",
    "find_constants",
    "fold_constants",
    "frozen",
    "may_have_constants",
    "read",
    "repair",
    "takeover",
]
