"""What a user knows and no graph can: which layers, parameters and dims have to stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from prunus.errors import InputError
from prunus.held import Held
from prunus.opaque import matching
from prunus.tracing import Trace


@dataclass(frozen=True)
class Frozen:
    """A hint that :func:`freeze` makes."""

    parameter: torch.Tensor | str
    dim: int | None = None
    positions: tuple[int, ...] | None = None


def freeze(parameter: torch.Tensor | str, dim: int | None = None, positions: Sequence[int] | None = None) -> Frozen:
    """A hint for ``ignored_layers`` or ``ignored_params``: this parameter (or one dim, or some positions) stays.

    Args:
        parameter: a parameter or buffer of the model, or its name (patterns are allowed).
        dim: the dim that stays (default: all of them).
        positions: the positions of that dim that stay (default: all of them).

    Example:
        >>> import torch, prunus
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = prunus.DependencyGraph().build_dependency(
        ...     model, torch.randn(1, 4), ignored_layers=[prunus.freeze("0.weight", 0)]
        ... )
        >>> list(graph.get_all_groups())
        []
    """
    if positions is not None and dim is None:
        raise InputError("freeze: positions are along a dim; say which one, as freeze(parameter, dim, positions)")
    return Frozen(parameter, dim, None if positions is None else tuple(int(p) for p in positions))


def chosen_layers(model: nn.Module, layers: Sequence[Any], what: str) -> tuple[set[int], list[Any]]:
    """The modules (by identity, all inside them included) that a list means, and its entries that are no modules.

    Raises:
        InputError: an entry is not understood, or means nothing in the model.
    """
    if not layers:
        return set(), []
    paths = dict(model.named_modules(remove_duplicate=False))
    inside = {id(m) for m in paths.values()}
    chosen: set[int] = set()
    others: list[Any] = []
    for layer in layers:
        if isinstance(layer, (torch.Tensor, Frozen)):
            others.append(layer)
            continue
        if isinstance(layer, nn.Module):
            if id(layer) not in inside:
                raise InputError(f"{what} holds a {type(layer).__name__} that is not part of the model")
            found = [layer]
        elif isinstance(layer, str):
            names = [*paths, *(n for n, _ in (*model.named_parameters(), *model.named_buffers()))]
            fits = matching(names, layer, what)
            found = [paths[name] for name in fits if name in paths]
            others += [Frozen(name) for name in fits if name not in paths]
        elif isinstance(layer, type) and issubclass(layer, nn.Module):
            found = [m for m in paths.values() if isinstance(m, layer)]
        else:
            raise InputError(
                f"{what} holds {layer!r}, which is no module; pass modules of the model, their names, name patterns or "
                "types, parameters, or prunus.freeze(...)"
            )
        chosen |= {id(m) for module in found for m in module.modules()}
    return chosen, others


def apply_hints(trace: Trace, layers: Sequence[Any], params: Sequence[Any], unwrapped: Any) -> dict[int, int]:
    """Freeze what the caller wants to keep; give, by held tensor, the only dim that may shrink of unwrapped ones."""
    chosen, others = chosen_layers(trace.model, layers, "ignored_layers")
    for entry in params:
        if isinstance(entry, str):
            model = trace.model
            names = [name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]
            others += [Frozen(name) for name in matching(names, entry, "ignored_params")]
        elif isinstance(entry, (torch.Tensor, Frozen)):
            others.append(entry)
        else:
            raise InputError(f"ignored_params holds {entry!r}; pass parameters, their names, or prunus.freeze(...)")
    read = trace.ledger.only_read if chosen else set()
    for held in trace.held:
        if chosen and any(id(trace.modules[p.module]) in chosen for p in held.places):
            for dim, start in enumerate(held.starts):
                if start not in read:
                    _freeze(trace, held, dim, None, "the caller asked to leave this layer alone")
    for hint in others:
        _apply(trace, hint if isinstance(hint, Frozen) else Frozen(hint))
    return _apply_unwrapped(trace, unwrapped)


def _freeze(trace: Trace, held: Held, dim: int, positions: Sequence[int] | None, why: str) -> None:
    start = held.starts[dim]
    if start >= 0:
        places = np.arange(held.shape[dim]) if positions is None else np.array(positions, dtype=np.int64)
        trace.ledger.freeze(start + places, why)


def _apply(trace: Trace, hint: Frozen) -> None:
    for held in _find(trace, hint.parameter, "ignored_layers"):
        dims = range(len(held.shape)) if hint.dim is None else [_dim(held, hint.dim)]
        for dim in dims:
            outside = [p for p in hint.positions or () if not 0 <= p < held.shape[dim]]
            if outside:
                raise InputError(f"freeze: {held.name} dim {dim} has {held.shape[dim]} positions, not {outside[:8]}")
            _freeze(trace, held, dim, hint.positions, "the caller asked to keep it")


def _find(trace: Trace, parameter: Any, what: str) -> list[Held]:
    """The held tensors that a parameter, or the name or pattern of some, means."""
    if isinstance(parameter, str):
        names = {place.full: held for held in trace.held for place in held.places}
        return list({id(h): h for h in (names[n] for n in matching([*names], parameter, what))}.values())
    if not isinstance(parameter, torch.Tensor):
        raise InputError(f"{what} holds {parameter!r}; pass parameters of the model or their names")
    home = next((h for h in trace.held if h.tensor is parameter), None)
    if home is None:  # another name of memory that the model keeps
        paths = {id(p): name for name, p in trace.model.named_parameters(remove_duplicate=False)}
        if id(parameter) not in paths:
            raise InputError(
                f"{what} holds a parameter of shape {tuple(parameter.shape)} that is not part of the model"
            )
        return _find(trace, paths[id(parameter)], what)
    return [home]


def _dim(held: Held, dim: Any) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int) or not -len(held.shape) <= dim < len(held.shape):
        raise InputError(f"{held.name} has shape {held.shape}: it has no dim {dim!r}")
    return dim % len(held.shape)


def _apply_unwrapped(trace: Trace, unwrapped: Any) -> dict[int, int]:
    """Only the given dim of each parameter may shrink."""
    if not unwrapped:
        return {}
    pairs = unwrapped.items() if isinstance(unwrapped, Mapping) else unwrapped
    if not isinstance(pairs, Iterable):
        raise InputError(f"unwrapped_parameters={unwrapped!r}: pass pairs (parameter, dim) or {{parameter: dim}}")
    place = {id(h): k for k, h in enumerate(trace.held)}
    found: dict[int, int] = {}
    for pair in pairs:
        if isinstance(pair, nn.Parameter):
            _find(trace, pair, "unwrapped_parameters")  # found by itself: nothing to add, but it must be there
            continue
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(f"unwrapped_parameters holds {pair!r}; pass pairs (parameter, dim) or {{parameter: dim}}")
        for held in _find(trace, pair[0], "unwrapped_parameters"):
            only = _dim(held, pair[1])
            found[place[id(held)]] = only
            for dim in range(len(held.shape)):
                if dim != only:
                    _freeze(trace, held, dim, None, f"unwrapped_parameters: only dim {only} of it may shrink")
    return found
