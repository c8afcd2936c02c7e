"""The class that a user derives from to say how a layer of their own is pruned."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from prunus.errors import InputError
from prunus.functions._edit import keep_positions
from prunus.functions.dense import prune_parameter_out_channels

__all__ = ["BasePruningFunc"]


class BasePruningFunc(ABC):
    """How one kind of layer is pruned: derive from it, write the four methods, and register an instance with a graph.

    A layer whose inputs and outputs are the same channels (a scale, a norm) says so by `prune_in_channels =
    prune_out_channels` in the class body. The methods change one layer; dependencies are the graph's.

    Args:
        pruning_dim: The dimension of the channels in what flows through the layer; 1, the default, means dim 1 of
            tensors with more than two dims (the last one, where only that has as many positions), and else the last.

    Example:
        >>> import torch
        >>> class Scale(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(width))
        >>> class ScalePruner(BasePruningFunc):
        ...     def prune_out_channels(self, layer, idxs):
        ...         prune_parameter_out_channels(layer.weight, idxs)
        ...         return layer
        ...     def get_out_channels(self, layer):
        ...         return layer.weight.numel()
        ...     prune_in_channels = prune_out_channels
        ...     get_in_channels = get_out_channels
        >>> ScalePruner()(Scale(8), [0, 5]).weight.shape
        torch.Size([6])
    """

    TARGET_MODULES: ClassVar[type | tuple[type, ...] | None] = None
    """The layer types that the class handles; None for any."""

    coupled: ClassVar[bool] = False
    """Whether the input and output channels are the same ones, cut by different methods."""

    def __init__(self, pruning_dim: int = 1) -> None:
        self.pruning_dim = pruning_dim

    @abstractmethod
    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove output channels of `layer`, in place, and give it back."""

    @abstractmethod
    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove input channels of `layer`, in place, and give it back."""

    @abstractmethod
    def get_out_channels(self, layer: Any) -> int | None:
        """Count the output channels of `layer`; None where it has none of its own."""

    @abstractmethod
    def get_in_channels(self, layer: Any) -> int | None:
        """Count the input channels of `layer`; None where it has none of its own."""

    def get_out_channel_groups(self, layer: Any) -> int:
        """Count the groups that the output channels are divided in."""
        return 1

    def get_in_channel_groups(self, layer: Any) -> int:
        """Count the groups that the input channels are divided in."""
        return 1

    def check(self, layer: Any, idxs: Sequence[int], to_output: bool) -> None:
        """Refuse what cannot be pruned.

        Raises:
            InputError: The layer is of another type, an index is out of range or given twice, or no channel is left.
        """
        place = f"{type(self).__name__} on {type(layer).__name__}"
        if self.TARGET_MODULES is not None and not isinstance(layer, self.TARGET_MODULES):
            raise InputError(f"{place}: it handles {self.TARGET_MODULES}")
        size = self.get_out_channels(layer) if to_output else self.get_in_channels(layer)
        if size is not None:
            keep_positions(idxs, size, f"{place}, {'output' if to_output else 'input'} channels")

    def __call__(
        self, layer: Any, idxs: Sequence[int], to_output: bool = True, inplace: bool = True, dry_run: bool = False
    ) -> Any:
        """Check, then prune.

        Args:
            layer: The layer to prune.
            idxs: Channels to remove.
            to_output: Remove output channels (default) or input channels.
            inplace: Change `layer` itself (default) or a deep copy of it.
            dry_run: Only check, and give `layer` back as it is.

        Returns:
            The pruned layer.
        """
        ordered = sorted(idxs)
        self.check(layer, ordered, to_output)
        if dry_run:
            return layer
        target = layer if inplace else copy.deepcopy(layer)
        return self.prune_out_channels(target, ordered) if to_output else self.prune_in_channels(target, ordered)

    def _prune_parameter_and_grad(self, weight: nn.Parameter, keep_idxs: Sequence[int], pruning_dim: int) -> Tensor:
        """Keep some positions of a parameter, in place: a service to classes written for Torch-Pruning."""
        kept = set(keep_idxs)
        gone = [index for index in range(weight.shape[pruning_dim]) if index not in kept]
        return prune_parameter_out_channels(weight, gone, dim=pruning_dim)
