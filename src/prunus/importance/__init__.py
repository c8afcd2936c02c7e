"""Criteria that score the units of a group."""

from prunus.importance.criteria import Importance, MagnitudeImportance, RandomImportance, normalize
from prunus.importance.members import Member, current_positions, members_of

GroupMagnitudeImportance = MagnitudeImportance
GroupNormImportance = MagnitudeImportance

__all__ = [
    "GroupMagnitudeImportance",
    "GroupNormImportance",
    "Importance",
    "MagnitudeImportance",
    "Member",
    "RandomImportance",
    "current_positions",
    "members_of",
    "normalize",
]
