"""For those who train after a cut: losses against the dense model, and refinement block by block without labels."""

from prunus.distill.loss import DistillationLoss
from prunus.distill.refining import refine
from prunus.distill.report import BlockRefinement, RefineReport

__all__ = ["BlockRefinement", "DistillationLoss", "RefineReport", "refine"]
