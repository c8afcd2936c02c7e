"""Pruners: a score, a scope, a schedule and regularisers, in steps."""

import sys

from prunus import functions as function
from prunus import importance
from prunus.functions import *  # noqa: F403 - old scripts look for the prune_* family here
from prunus.pruner import schedules as scheduler
from prunus.pruner.named import BNScalePruner, GroupNormPruner, GrowingRegPruner, MagnitudePruner, MetaPruner
from prunus.pruner.schedules import (
    Schedule,
    cosine_scheduler,
    cubic_scheduler,
    exponential_scheduler,
    linear_scheduler,
)
from prunus.pruner.scopes import HeadShares
from prunus.pruner.scoring import Criterion, score_offer, score_with
from prunus.pruner.steps import BasePruner

algorithms = sys.modules[__name__]  # the path of old scripts: pruner.algorithms.scheduler

__all__ = [
    "BNScalePruner",
    "BasePruner",
    "Criterion",
    "GroupNormPruner",
    "GrowingRegPruner",
    "HeadShares",
    "MagnitudePruner",
    "MetaPruner",
    "Schedule",
    "algorithms",
    "cosine_scheduler",
    "cubic_scheduler",
    "exponential_scheduler",
    "function",
    "importance",
    "linear_scheduler",
    "scheduler",
    "score_offer",
    "score_with",
]
__all__ += function.__all__
