"""Prunus: structured pruning of any PyTorch network.

``prunus.prune(model, example_inputs, prunus.Target(macs=0.5))`` is the one verb; the classes below it have the names
that users of structured pruning know, so that ``import prunus as tp`` runs the scripts they have.
"""

from prunus import cost, functions, importance, pruner, utils
from prunus._version import __version__
from prunus.errors import InputError, NothingToPruneError, PrunusError, SurgeryError, TargetError
from prunus.functions import *  # noqa: F403 - the prune_* family; functions.__all__ is the list
from prunus.graph import DependencyGraph
from prunus.group import Dependency, Group
from prunus.hints import freeze
from prunus.plan import Plan
from prunus.pruning import PruneResult, prune
from prunus.repair import LayerRepair, RepairReport, repair
from prunus.rules import remove_rule, rule
from prunus.selection import Target
from prunus.sizes import Fact
from prunus.surgery import Receipt, apply
from prunus.verification import VerifyReport, verify

__all__ = [
    "Dependency",
    "DependencyGraph",
    "Fact",
    "Group",
    "InputError",
    "LayerRepair",
    "NothingToPruneError",
    "Plan",
    "PruneResult",
    "PrunusError",
    "Receipt",
    "RepairReport",
    "SurgeryError",
    "Target",
    "TargetError",
    "VerifyReport",
    "__version__",
    "apply",
    "cost",
    "freeze",
    "functions",
    "importance",
    "prune",
    "pruner",
    "remove_rule",
    "repair",
    "rule",
    "utils",
    "verify",
]
__all__ += functions.__all__
