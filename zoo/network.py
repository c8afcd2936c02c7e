"""What the tables of networks are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Network:
    """A network, what it runs on, and how it is run.

    Args:
        model: freshly initialised; nothing is downloaded.
        inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        forward_fn: runs the model where calling it is not enough.
        output_transform: picks the outputs that matter.
        rows_vary: the number of rows of the outputs depends on the data (detections after suppression).
    """

    model: nn.Module
    inputs: Any
    forward_fn: Callable[[nn.Module, Any], Any] | None = None
    output_transform: Callable[[Any], Any] | None = None
    rows_vary: bool = False


Builder = Callable[[], Network]
Table = dict[str, Builder]
