"""Prunus: structured pruning of any PyTorch network.

``prunus.prune(model, example_inputs, prunus.Target(macs=0.5))`` is the one verb; the classes below it have the names
that users of structured pruning know, so that ``import prunus as tp`` runs the scripts they have.
"""

from prunus import (
    cost,
    dependency,
    distill,
    distributed,
    functions,
    importance,
    ops,
    pruner,
    regularize,
    serialization,
    utils,
)
from prunus import functions as function
from prunus import pruner as algorithms
from prunus._version import __version__
from prunus.blocks import Block, DropResult, drop_blocks, find_blocks
from prunus.budget import Target
from prunus.calibration import Calibration, calibrate
from prunus.dependency import INDEX_MAPPING_PLACEHOLDER, MAX_RECURSION_DEPTH, MAX_VALID_DIM
from prunus.errors import InputError, NothingToPruneError, PrunusError, SurgeryError, TargetError
from prunus.functions import *  # noqa: F403 - the prune_* family; functions.__all__ is the list
from prunus.graph import DependencyGraph
from prunus.group import Dependency, Group, Node
from prunus.hints import freeze
from prunus.plan import Plan
from prunus.pruner import (
    BasePruner,
    BNScalePruner,
    GroupNormPruner,
    GrowingRegPruner,
    MagnitudePruner,
    MetaPruner,
    scheduler,
)
from prunus.pruning import PruneResult, prune
from prunus.repair import LayerRepair, RepairReport, repair
from prunus.rules import remove_rule, rule
from prunus.sensitivity import Sensitivity, sensitivity
from prunus.serialization import load, load_state_dict, save, state_dict
from prunus.sizes import Fact
from prunus.soft import SoftPruning, soft_prune
from prunus.surgery import Receipt, apply
from prunus.verification import VerifyReport, verify

__all__ = [
    "INDEX_MAPPING_PLACEHOLDER",
    "MAX_RECURSION_DEPTH",
    "MAX_VALID_DIM",
    "BNScalePruner",
    "BasePruner",
    "Block",
    "Calibration",
    "Dependency",
    "DependencyGraph",
    "DropResult",
    "Fact",
    "Group",
    "GroupNormPruner",
    "GrowingRegPruner",
    "InputError",
    "LayerRepair",
    "MagnitudePruner",
    "MetaPruner",
    "Node",
    "NothingToPruneError",
    "Plan",
    "PruneResult",
    "PrunusError",
    "Receipt",
    "RepairReport",
    "Sensitivity",
    "SoftPruning",
    "SurgeryError",
    "Target",
    "TargetError",
    "VerifyReport",
    "__version__",
    "algorithms",
    "apply",
    "calibrate",
    "cost",
    "dependency",
    "distill",
    "distributed",
    "drop_blocks",
    "find_blocks",
    "freeze",
    "function",
    "functions",
    "importance",
    "load",
    "load_state_dict",
    "ops",
    "prune",
    "pruner",
    "regularize",
    "remove_rule",
    "repair",
    "rule",
    "save",
    "scheduler",
    "sensitivity",
    "serialization",
    "soft_prune",
    "state_dict",
    "utils",
    "verify",
]
__all__ += functions.__all__
