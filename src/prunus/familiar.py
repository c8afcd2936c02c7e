"""What scripts read from a graph, besides its groups: attributes that users of structured pruning know."""

from __future__ import annotations

from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from prunus import ops
from prunus.errors import InputError
from prunus.functions import PrunerBox, PruningFn, is_in_channel_fn, is_out_channel_fn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prunus.group import Node, Sides


class UnwrappedParameter(NamedTuple):
    """A parameter that belongs to no layer that the graph knows, and the dim of it that may shrink."""

    parameters: torch.Tensor
    pruning_dim: int


class Familiar:
    """Read-only views of a graph under the names that scripts use."""

    verbose: bool = True
    ignored_params: tuple[Any, ...] = ()
    IGNORED_LAYERS_IN_TRACING: tuple[Any, ...] = ()
    ops: ModuleType = ops
    _customized: Mapping[Any, Any] = MappingProxyType({})

    if TYPE_CHECKING:

        @property
        def sides(self) -> Sides:
            """The layers as the graph sees them."""
            raise NotImplementedError

        @property
        def module2node(self) -> dict[Any, Node]:
            """The layers, each with its node."""
            raise NotImplementedError

    @property
    def unwrapped_parameters(self) -> list[UnwrappedParameter]:
        """The bare parameters that the graph found, each with the last dim of it that may shrink."""
        last = {s.node.module: s.dims[0][1] for s in self.sides.ordered if isinstance(s.node.module, torch.Tensor)}
        return [UnwrappedParameter(parameter, dim) for parameter, dim in last.items()]

    @property
    def REGISTERED_PRUNERS(self) -> Mapping[Any, Any]:  # noqa: N802 - the name that scripts use
        """What prunes each kind of layer, customised ones included."""
        return MappingProxyType({**PrunerBox, **self._customized})

    @property
    def CUSTOMIZED_PRUNERS(self) -> Mapping[Any, Any]:  # noqa: N802 - the name that scripts use
        """The customised pruners."""
        return MappingProxyType(self._customized)

    def is_out_channel_pruning_fn(self, fn: PruningFn) -> bool:
        """Whether ``fn`` cuts what a layer makes."""
        return is_out_channel_fn(fn)

    def is_in_channel_pruning_fn(self, fn: PruningFn) -> bool:
        """Whether ``fn`` cuts what a layer reads."""
        return is_in_channel_fn(fn)

    @property
    def _module2name(self) -> dict[Any, str]:
        return {module: node.name for module, node in self.module2node.items()}

    @property
    def _param_to_name(self) -> dict[Any, str]:
        return {p: name for p, name in self._module2name.items() if isinstance(p, torch.Tensor)}


def joined(registered: Mapping[Any, Any], given: Any) -> dict[Any, Any]:
    """The customised pruners of a graph and those of a call.

    Raises:
        InputError: what was given is no dict.
    """
    if given is not None and not hasattr(given, "items"):
        raise InputError(f"customized_pruners is a {type(given).__name__}: pass a dict from layers to their pruners")
    return {**registered, **(given or {})}


__all__ = ["Familiar", "UnwrappedParameter", "joined"]
