"""Repair without training: the layers that read removed channels are refitted in closed form on a few samples."""

from prunus.repair.closed_form import repair
from prunus.repair.report import LayerRepair, RepairReport

__all__ = ["LayerRepair", "RepairReport", "repair"]
