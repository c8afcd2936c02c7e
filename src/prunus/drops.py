"""Children of containers that go, as data: what is dropped, and what the others are called then."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunus.errors import SurgeryError


@dataclass(frozen=True)
class Drop:
    """Children of one container (``nn.Sequential``, ``nn.ModuleList``) that go.

    Args:
        container: the container's path before the plan.
        gone: the names of the children that go.
        names: pairs (before, after) of the names of the children that stay, in order.
    """

    container: str
    gone: tuple[str, ...]
    names: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        gone = ", ".join(joined(self.container, child) for child in self.gone)
        return f"{gone} of {len(self.gone) + len(self.names)} in {self.container or 'the model'}"


@dataclass(frozen=True)
class Cut:
    """Entries that go from a list or tuple with one for each child of a container (``config.layer_types``)."""

    path: str
    name: str
    size: int
    positions: tuple[int, ...]

    def __str__(self) -> str:
        return f"{joined(self.path, self.name)}: {self.size} -> {self.size - len(self.positions)} entries"


def joined(path: str, name: str) -> str:
    """The dotted path of ``name`` in ``path``, which is empty for the model itself."""
    return f"{path}.{name}" if path else name


def within(path: str, top: str) -> bool:
    """Whether a module is ``top`` or in it.

    Example:
        >>> within("layers.1.norm", "layers.1"), within("layers.10", "layers.1")
        (True, False)
    """
    return path == top or path.startswith(f"{top}.")


def renamed(keys: Sequence[str], gone: Collection[str]) -> tuple[tuple[str, str], ...]:
    """The children that stay, and what they are called then: names that count up go on counting up.

    Example:
        >>> renamed(["0", "1", "2"], {"1"})
        (('0', '0'), ('2', '1'))
        >>> renamed(["stem", "body", "head"], {"body"})
        (('stem', 'stem'), ('head', 'head'))
    """
    stay = [key for key in keys if key not in gone]
    stem = keys[0].rstrip("0123456789") if keys else ""
    first = keys[0][len(stem) :] if keys else ""
    if not first or list(keys) != [f"{stem}{int(first) + k}" for k in range(len(keys))]:
        return tuple((key, key) for key in stay)
    return tuple((key, f"{stem}{int(first) + k}") for k, key in enumerate(stay))


def earlier_name(drops: Iterable[Drop], name: str) -> str:
    """What a module, or a tensor in it, that is called ``name`` after the drops was called before."""
    back = {drop.container: {new: old for old, new in drop.names} for drop in drops}
    path = ""
    for part in name.split("."):
        path = joined(path, back.get(path, {}).get(part, part))
    return path


def later_name(drops: Iterable[Drop], name: str) -> str | None:
    """What a module, or a tensor in it, is called after the drops; None if it goes."""
    by_container = {drop.container: dict(drop.names) for drop in drops}
    before, after = "", []
    for part in name.split("."):
        names = by_container.get(before)
        if names is not None and part not in names:
            return None
        after.append(part if names is None else names[part])
        before = joined(before, part)
    return ".".join(after)


def drops_then(first: Sequence[Drop], second: Sequence[Drop]) -> tuple[Drop, ...]:
    """The drops that do ``first`` and then ``second``, all by the names from before."""
    found = {drop.container: drop for drop in first}
    for drop in second:
        container = earlier_name(first, drop.container) if drop.container else ""
        old = found.get(container)
        if old is None:
            found[container] = Drop(container, drop.gone, drop.names)
            continue
        after = dict(drop.names)
        if {new for _, new in old.names} != {*drop.gone, *after}:
            raise SurgeryError(f"{container}: the second plan was made for other children than the first one leaves")
        gone = tuple(before for before, name in old.names if name in drop.gone)
        names = tuple((before, after[name]) for before, name in old.names if name in after)
        found[container] = Drop(container, (*old.gone, *gone), names)
    return tuple(found.values())


def cuts_then(first: Sequence[Cut], second: Sequence[Cut]) -> tuple[Cut, ...]:
    """The cuts of lists that do ``first`` and then ``second`` (whose paths are those from before the first)."""
    found = {(cut.path, cut.name): cut for cut in first}
    for cut in second:
        old = found.get((cut.path, cut.name))
        if old is not None:
            left = np.delete(np.arange(old.size), old.positions)
            if len(left) != cut.size:
                raise SurgeryError(f"{cut.path}.{cut.name}: the first plan leaves {len(left)} entries, not {cut.size}")
            gone = (*old.positions, *left[list(cut.positions)].tolist())
            cut = Cut(cut.path, cut.name, old.size, tuple(sorted(gone)))  # noqa: PLW2901 - the same cut, renumbered
        found[cut.path, cut.name] = cut
    return tuple(found.values())


def read_drops(data: Mapping[str, Any]) -> tuple[tuple[Drop, ...], tuple[Cut, ...]]:
    """The drops and cuts in the JSON of a plan."""
    drops = (
        Drop(d["container"], tuple(d["gone"]), tuple((old, new) for old, new in d["names"]))
        for d in data.get("drops", ())
    )
    cuts = (Cut(c["path"], c["name"], c["size"], tuple(c["positions"])) for c in data.get("cuts", ()))
    return tuple(drops), tuple(cuts)
