"""The blocks of a model that are refined one after another: children of its containers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from prunus.distill.running import Run
from prunus.drops import joined, within
from prunus.errors import InputError

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(model: nn.Module, run: Run, names: Iterable[str] | None) -> list[str]:
    """The blocks that run once, in the order in which they run; none if there are no two of them.

    Without ``names``, they are the children, with two layers or more in them, of the outermost containers; of
    containers inside of them where there is only one such child.

    Raises:
        InputError: a name is no module, lies in another one, or does not run once.
    """
    if names is not None:
        chosen = list(names)
        _check(model, chosen)
        counts = run.counts(model, chosen)
        for name in chosen:
            if counts.get(name, 0) != 1:
                raise InputError(
                    f"{name} runs {counts.get(name, 0)} times in a call of the model, not once: leave it out"
                )
        return sorted(chosen, key=list(counts).index)
    found = _children(model, "")
    while len(found) == 1:
        inside = _children(model.get_submodule(found[0]), found[0])
        if not inside:
            break
        found = inside
    counts = run.counts(model, found)
    once = [name for name, count in counts.items() if count == 1]
    return once if len(once) > 1 else []


def _check(model: nn.Module, names: Sequence[str]) -> None:
    known = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in known or not name:
            raise InputError(f"the model has no module {name!r}: blocks= are names of named_modules()")
        outer = next((other for other in names if other != name and within(name, other)), None)
        if outer is not None or list(names).count(name) > 1:
            raise InputError(f"{name} is in blocks= twice, by itself or in {outer}: name each layer once")


def _children(module: nn.Module, path: str) -> list[str]:
    found = []
    for name, child in module.named_children():
        inside = joined(path, name)
        runs = not isinstance(child, (nn.ModuleList, nn.ModuleDict))
        if isinstance(module, CONTAINERS) and runs and _layers(child) > 1:
            found.append(inside)
        else:
            found += _children(child, inside)
    return found


def _layers(module: nn.Module) -> int:
    """How many layers with a matrix or a kernel there are in it."""
    return sum(any(p.dim() > 1 for p in m.parameters(recurse=False)) for m in module.modules())
