"""How every face begins: the graph of the model, and what of it may be removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from prunus.errors import NothingToPruneError
from prunus.graph import DependencyGraph
from prunus.heads import Offer
from prunus.report import frozen_text
from prunus.sizes import Fact
from prunus.tracing import ForwardFn, Inputs


def graph_of(  # noqa: PLR0913 - what the faces have in common
    model: nn.Module,
    example_inputs: Inputs,
    ignored_layers: Iterable[Any] | None = (),
    *,
    forward_fn: ForwardFn | None = None,
    output_transform: Callable[[Any], Any] | None = None,
    unwrapped_parameters: Any = None,
    customized_pruners: Mapping[Any, Any] | None = None,
    facts: Sequence[Fact] = (),
    device: Any = None,
) -> DependencyGraph:
    """The graph of a model, from the arguments that the faces have in common.

    Args:
        model: see :meth:`DependencyGraph.build_dependency`, as for all others but the last two.
        example_inputs: the same.
        ignored_layers: the same.
        forward_fn: the same.
        output_transform: the same.
        unwrapped_parameters: the same.
        customized_pruners: the same.
        facts: attributes that equal a width by construction.
        device: "meta" to trace without data.

    Raises:
        InputError: the model cannot run on the inputs, or an ignored layer is not part of it.
    """
    graph = DependencyGraph().build_dependency(
        model,
        example_inputs,
        forward_fn,
        output_transform,
        unwrapped_parameters,
        customized_pruners,
        tuple(ignored_layers or ()),
        device=device,
    )
    graph.facts = tuple(facts)
    return graph


def something(graph: DependencyGraph, found: Offer) -> Offer:
    """What may be removed, if there is anything.

    Raises:
        NothingToPruneError: there is nothing; it says what stays and why.
    """
    if not found:
        raise NothingToPruneError(f"nothing in this model may be removed:\n{frozen_text(graph.coupling)}")
    return found


__all__ = ["graph_of", "something"]
