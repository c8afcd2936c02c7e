"""From ties between atoms to units, bundles and groups."""

from prunus.coupling.families import Family
from prunus.coupling.groups import Coupling, Slice, UnitGroup, couple

__all__ = ["Coupling", "Family", "Slice", "UnitGroup", "couple"]
