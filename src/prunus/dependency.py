"""The graph's classes under the module name that scripts import them from."""

from prunus.graph import DependencyGraph
from prunus.group import Dependency, Group, GroupItem, Node

INDEX_MAPPING_PLACEHOLDER = None
MAX_RECURSION_DEPTH = 500
MAX_VALID_DIM = 100

__all__ = [
    "INDEX_MAPPING_PLACEHOLDER",
    "MAX_RECURSION_DEPTH",
    "MAX_VALID_DIM",
    "Dependency",
    "DependencyGraph",
    "Group",
    "GroupItem",
    "Node",
]
