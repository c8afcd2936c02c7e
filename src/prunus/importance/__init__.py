"""Criteria that score the units of a group.

Weights alone: Random, Magnitude, InvariantMagnitude, BNScale, LAMP, FPGM. Gradients: Taylor, Hessian, Fisher, OBDC.
Activations: Wanda, FLAP, Activation. The error after compensation: OutputError. Or any ``f(group) -> one score for each
unit``.
"""

from prunus.importance.activations import ActivationImportance, FLAPImportance, ReadersImportance, WandaImportance
from prunus.importance.criteria import Importance, LayerwiseImportance, ScoredGroup, normalize
from prunus.importance.gradients import FisherImportance, HessianImportance, OBDCImportance, TaylorImportance
from prunus.importance.members import Member, current_positions, members_of
from prunus.importance.outputs import ErrorCurve, OutputErrorImportance
from prunus.importance.weights import (
    BNScaleImportance,
    FPGMImportance,
    InvariantMagnitudeImportance,
    LAMPImportance,
    MagnitudeImportance,
    RandomImportance,
)

GroupMagnitudeImportance = MagnitudeImportance
GroupNormImportance = MagnitudeImportance
GroupTaylorImportance = TaylorImportance
GroupHessianImportance = HessianImportance
OBSImportance = OutputErrorImportance

__all__ = [
    "ActivationImportance",
    "BNScaleImportance",
    "ErrorCurve",
    "FLAPImportance",
    "FPGMImportance",
    "FisherImportance",
    "GroupHessianImportance",
    "GroupMagnitudeImportance",
    "GroupNormImportance",
    "GroupTaylorImportance",
    "HessianImportance",
    "Importance",
    "InvariantMagnitudeImportance",
    "LAMPImportance",
    "LayerwiseImportance",
    "MagnitudeImportance",
    "Member",
    "OBDCImportance",
    "OBSImportance",
    "OutputErrorImportance",
    "RandomImportance",
    "ReadersImportance",
    "ScoredGroup",
    "TaylorImportance",
    "WandaImportance",
    "current_positions",
    "members_of",
    "normalize",
]
