"""Whole blocks: residual branches that are found from the graph, scored, and dropped (depth pruning)."""

from prunus.blocks.drop import DropResult, drop_blocks
from prunus.blocks.find import Block, find_blocks

__all__ = ["Block", "DropResult", "drop_blocks", "find_blocks"]
