"""How every face begins: the graph of the model, and what of it may be removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from prunus.errors import InputError, NothingToPruneError
from prunus.graph import DependencyGraph
from prunus.heads import Offer
from prunus.hints import Frozen
from prunus.report import frozen_text
from prunus.sizes import Fact
from prunus.soft import masked
from prunus.tracing import ForwardFn, Inputs


def model_in(model: Any) -> nn.Module:
    """The model itself, where `torch.compile` wraps it.

    Raises:
        InputError: it is no module, or is spread over processes, which keep the sizes of its parameters.
        NothingToPruneError: it has no parameters.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}: pass the model itself")
    whole: nn.Module = getattr(model, "_orig_mod", model)
    if type(whole).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise InputError(
            f"the model is wrapped in {type(whole).__name__}, which keeps the sizes of its parameters: prune what is "
            "inside (model.module) in every process, then wrap it again"
        )
    if next(whole.parameters(), None) is None:
        raise NothingToPruneError(f"this {type(whole).__name__} has no parameters, so nothing can be removed")
    return whole


def listed(layers: Any) -> tuple[Any, ...]:
    """Ignored layers as a tuple; one alone is understood."""
    if layers is None:
        return ()
    if isinstance(layers, (str, type, nn.Module, torch.Tensor, Frozen)):
        return (layers,)
    if not isinstance(layers, Iterable):
        raise InputError(f"ignored_layers={layers!r}: pass a list of modules, names, name patterns or types")
    return tuple(layers)


def types_of(given: Any) -> tuple[type, ...]:
    """Types of modules as a tuple; one alone is understood.

    Raises:
        InputError: something is no type.
    """
    found = (given,) if isinstance(given, type) else tuple(given) if isinstance(given, Iterable) else (given,)
    wrong = [one for one in found if not isinstance(one, type)]
    if wrong:
        raise InputError(f"root_module_types holds {wrong[0]!r}: pass types of modules, such as torch.nn.Linear")
    return found


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
        NothingToPruneError: the model has no parameters.
    """
    whole = model_in(model)
    if masked(whole):
        raise InputError("the model is soft-pruned, which hides what belongs together: lift that mask first")
    graph = DependencyGraph().build_dependency(
        whole,
        example_inputs,
        forward_fn,
        output_transform,
        unwrapped_parameters,
        customized_pruners,
        listed(ignored_layers),
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


__all__ = ["graph_of", "listed", "model_in", "something", "types_of"]
