"""What counts the children of a container: numbers of layers in modules and configurations, lists, own numbers.

Names alone prove nothing. A number in a configuration is taken for the counter of a container if a model that is built
anew from the changed configuration (without data, on the meta device) has the tensors that the cut model has.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import nn

from prunus.drops import Cut, Drop, joined, later_name, within
from prunus.plan import Setting
from prunus.sizes import Attribute, attribute_home

_COUNTS = re.compile(r"layer|depth|block|stack", re.IGNORECASE)
_NUMBERS = re.compile(r"(^|_)(i|id|idx|index|layer|block|depth|number|num)(_|$)", re.IGNORECASE)
_USUAL = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
_MOST = 6  # candidates of which all combinations are tried


@dataclass(frozen=True)
class Counters:
    """What counts the children of one container."""

    counts: tuple[Attribute, ...]
    lists: tuple[Attribute, ...]
    rebuilt: bool | None = None  # whether a model built from its configuration is the cut one; None: nothing to build


def find_counters(model: nn.Module, drop: Drop) -> Counters:
    """Everything that counts the children of ``drop.container``, tried out with ``drop``; the model is left as it came.

    Args:
        model: the whole model, before the drop.
        drop: what goes from the container.
    """
    size, less = len(drop.gone) + len(drop.names), len(drop.names)
    counts: list[Attribute] = []
    lists: list[Attribute] = []
    rebuilt: bool | None = None
    owners = _owners(model, drop.container)
    if owners:
        counts += _counts(vars(owners[0][1]), owners[0][0], "", size)
        lists += _lists(vars(owners[0][1]), owners[0][0], "", size)
    for holders in _configurations(owners):
        path, name, fields = holders[0]
        prefix = f"{name}."
        lists += _lists(fields, path, prefix, size)
        candidates = _counts(fields, path, prefix, size)
        whole = {place: _rebuilt_keys(model, place, key) for place, key, _ in holders}
        with _set(model, counts, less), _cut(model, lists, _spots(model, drop)):
            chosen, fits = _chosen(model, name, whole, candidates, drop)
        counts += chosen
        rebuilt = rebuilt if fits is None else fits
    return Counters(tuple(counts), tuple(lists), rebuilt)


def _configurations(owners: Sequence[tuple[str, nn.Module]]) -> list[list[tuple[str, str, dict[str, Any]]]]:
    """Each configuration that modules around a container hold: all its places, the nearest first, and its fields."""
    found: dict[int, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, module in owners:
        for name in ("config", "cfg"):
            config = vars(module).get(name)
            fields = getattr(config, "__dict__", None)
            if fields and not isinstance(config, (nn.Module, type)):
                found.setdefault(id(config), []).append((path, name, fields))
    return list(found.values())


def followers(model: nn.Module, drop: Drop, counters: Counters) -> tuple[list[Setting], list[Cut]]:
    """The attributes that change when ``drop`` is done."""
    size, less = len(drop.gone) + len(drop.names), len(drop.names)
    settings = [Setting(a.path, a.name, a.item, less) for a in counters.counts]
    spots = _spots(model, drop)
    cuts = [Cut(a.path, a.name, size, spots) for a in counters.lists]
    return settings + _numbers(model, drop), cuts


def _spots(model: nn.Module, drop: Drop) -> tuple[int, ...]:
    order = list(model.get_submodule(drop.container)._modules)
    return tuple(k for k, name in enumerate(order) if name in drop.gone)


def _owners(model: nn.Module, container: str) -> list[tuple[str, nn.Module]]:
    """The modules around a container, the nearest first."""
    found, path = [], container
    while path:
        path = path.rpartition(".")[0]
        found.append((path, model.get_submodule(path)))
    return found


def _counts(fields: dict[str, Any], path: str, prefix: str, size: int) -> list[Attribute]:
    found = []
    for name, value in fields.items():
        if not _COUNTS.search(name):
            continue
        if type(value) is int and value == size:
            found.append(Attribute(path, prefix + name))
        elif type(value) in (list, tuple):
            found += [Attribute(path, prefix + name, k) for k, v in enumerate(value) if type(v) is int and v == size]
    return found


def _lists(fields: dict[str, Any], path: str, prefix: str, size: int) -> list[Attribute]:
    """Lists with an entry for each child."""
    return [
        Attribute(path, prefix + name)
        for name, value in fields.items()
        if type(value) in (list, tuple) and len(value) == size and _COUNTS.search(name)
        if not all(type(v) is int for v in value) or "layer" in name
    ]


def _numbers(model: nn.Module, drop: Drop) -> list[Setting]:
    """The children's own numbers (``layer_idx``): ints that count up with the child's place go on counting up."""
    container = model.get_submodule(drop.container)
    order = list(container._modules)
    place = {name: k for k, name in enumerate(order)}
    values: dict[tuple[str, str], dict[str, int]] = {}
    for name, child in container._modules.items():
        for inside, module in child.named_modules() if child is not None else ():
            for key, value in vars(module).items():
                if type(value) is int and _NUMBERS.search(key):
                    values.setdefault((inside, key), {})[name] = value
    after = {old: k for k, (old, _) in enumerate(drop.names)}
    found = []
    for (inside, key), by_child in values.items():
        bases = {value - place[name] for name, value in by_child.items()}
        if len(by_child) < 2 or len(bases) > 1:
            continue
        base = bases.pop()
        for name, value in by_child.items():
            if name in after and value != base + after[name]:
                path = joined(joined(drop.container, name), inside) if inside else joined(drop.container, name)
                found.append(Setting(path, key, None, base + after[name]))
    return found


def _chosen(
    model: nn.Module, name: str, whole: Mapping[str, set[str] | None], candidates: Sequence[Attribute], drop: Drop
) -> tuple[list[Attribute], bool | None]:
    """Those of the candidates that count the container: with them, a model built anew has lost the same tensors.

    Returns:
        The counters, and whether that is proved (None: the configuration has nothing to do with it).
    """
    few = list(candidates)[:_MOST]
    relevant = bool(few)
    for path, before in whole.items():
        if before is None or not any(within(key, drop.container) for key in before):
            continue
        relevant = True
        wanted = {later for key in before if (later := later_name([drop], key)) is not None}
        for many in range(len(few) + 1):
            for chosen in combinations(few, many):
                with _set(model, chosen, len(drop.names)):
                    if _rebuilt_keys(model, path, name) == wanted:
                        return list(chosen), True
    usual = [a for a in few if a.name.rpartition(".")[2] in _USUAL]
    return (usual if len(usual) == 1 else []), False if relevant else None


def _rebuilt_keys(model: nn.Module, path: str, name: str) -> set[str] | None:
    """The tensors of a module of the same class that is built from its configuration alone, if that can be done."""
    owner = model.get_submodule(path)
    config = vars(owner)[name]
    try:
        fresh = copy.deepcopy(config)
        if hasattr(config, "to_dict") and hasattr(config, "from_dict"):
            fresh = type(config).from_dict(config.to_dict())
        with torch.device("meta"), torch.random.fork_rng(devices=[]), torch.no_grad():
            return {joined(path, key) for key in type(owner)(fresh).state_dict()}
    except Exception:  # any code may run here: what cannot be built is not compared
        return None


@contextmanager
def _set(model: nn.Module, attributes: Sequence[Attribute], value: int) -> Iterator[None]:
    before = []
    try:
        for attribute in attributes:
            home, key = attribute_home(model, attribute)
            before.append((home, key, home[key]))
            old, k = home[key], attribute.item
            home[key] = value if k is None else type(old)([*old[:k], value, *old[k + 1 :]])
        yield
    finally:
        for home, key, old in reversed(before):
            home[key] = old


@contextmanager
def _cut(model: nn.Module, lists: Sequence[Attribute], spots: Sequence[int]) -> Iterator[None]:
    before = []
    try:
        for attribute in lists:
            home, key = attribute_home(model, attribute)
            before.append((home, key, home[key]))
            home[key] = type(home[key])(v for k, v in enumerate(home[key]) if k not in spots)
        yield
    finally:
        for home, key, old in reversed(before):
            home[key] = old
