"""Plans: which positions of which tensors go, and which attributes change, as data.

A plan can be printed, costed without touching the model, merged with the next one, saved as JSON, and applied to any
copy of the model that it was made for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prunus.coupling import Coupling
from prunus.drops import Cut, Drop, cuts_then, drops_then, earlier_name, read_drops
from prunus.errors import InputError, SurgeryError
from prunus.following import followed
from prunus.labels import Ids, Survivors, surviving
from prunus.sizes import Attribute, Fact

if TYPE_CHECKING:
    from prunus.surgery import Receipt

FORMAT = 1
Alive = NDArray[np.bool_]


@dataclass(frozen=True)
class Footprint:
    """What a model costs: multiply-adds of one run on the example inputs, parameters, and their bytes."""

    macs: int
    params: int
    bytes: int


@dataclass(frozen=True)
class Removal:
    """Positions of one dim of one tensor that go (numbered as the tensor is before the plan)."""

    tensor: str
    dim: int
    size: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Setting:
    """An int attribute that changes: ``index`` picks it out of a tuple or list."""

    path: str
    name: str
    index: int | None
    value: int

    @property
    def attribute(self) -> Attribute:
        """The attribute without its value."""
        return Attribute(self.path, self.name, self.index)


@dataclass(frozen=True)
class Mirror:
    """An attribute to be set, after the cut, to the size of a tensor's dim divided by ``divide``."""

    path: str
    name: str
    tensor: str
    dim: int
    divide: int


@dataclass(frozen=True)
class Scaling:
    """Positions of one dim of one tensor that are multiplied (numbered as the tensor is before the plan).

    It makes up for a number that the model computes from a size which the plan changes, such as the scale of attention.
    With ``onto``, the products are added to these other positions: what read a copy of a channel now reads the channel.
    """

    tensor: str
    dim: int
    positions: tuple[int, ...]
    factor: float
    onto: tuple[int, ...] = ()

    @property
    def what(self) -> str:
        """What is done to the positions."""
        return "added to others" if self.onto else f"times {self.factor:.4g}"


@dataclass(frozen=True)
class Plan:
    """What to remove from a model, and what it will cost then."""

    removals: tuple[Removal, ...]
    settings: tuple[Setting, ...]
    before: Footprint
    after: Footprint
    mirrors: tuple[Mirror, ...] = field(default=())
    pruners: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # of customised layers
    scalings: tuple[Scaling, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())  # what could not be made up for, and why
    drops: tuple[Drop, ...] = field(default=())  # done last: all names are those from before
    cuts: tuple[Cut, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.removals) + len(self.drops)

    def __str__(self) -> str:
        lines = [
            f"Plan: MACs {self.before.macs:,} -> {self.after.macs:,}, "
            f"parameters {self.before.params:,} -> {self.after.params:,}"
        ]
        lines += [f"  {r.tensor} dim {r.dim}: {r.size} -> {r.size - len(r.positions)}" for r in self.removals]
        lines += [f"  {s.attribute} = {s.value}" for s in self.settings]
        lines += [f"  {s.tensor} dim {s.dim}: {len(s.positions)} {s.what}" for s in self.scalings]
        lines += [f"  {text}" for text in (*self.drops, *self.cuts, *self.notes)]
        return "\n".join(lines)

    def apply(self, model: Any, optimizer: Any = None, customized_pruners: Mapping[Any, Any] | None = None) -> Receipt:
        """Cut ``model`` in place; see :func:`prunus.surgery.apply`."""
        from prunus.surgery import apply

        return apply(model, self, optimizer, customized_pruners)

    def then(self, later: Plan) -> Plan:
        """One plan that does this one and then ``later``."""
        later = _named_before(self.drops, later)
        first = {(r.tensor, r.dim): r for r in self.removals}
        merged = dict(first)
        for r in later.removals:
            old = first.get((r.tensor, r.dim))
            if old is None:
                merged[r.tensor, r.dim] = r
                continue
            left = np.delete(np.arange(old.size), old.positions)
            if len(left) != r.size:
                raise SurgeryError(
                    f"{r.tensor} dim {r.dim}: the first plan leaves {len(left)}, the second needs {r.size}"
                )
            gone = sorted([*old.positions, *left[list(r.positions)].tolist()])
            merged[r.tensor, r.dim] = Removal(r.tensor, r.dim, old.size, tuple(gone))
        settings = {s.attribute: s for s in (*self.settings, *later.settings)}
        mirrors = tuple(dict.fromkeys((*self.mirrors, *later.mirrors)))
        pruners = {**self.pruners, **later.pruners}
        scalings = (*self.scalings, *(_earlier(s, first.get((s.tensor, s.dim))) for s in later.scalings))
        notes = tuple(dict.fromkeys((*self.notes, *later.notes)))
        return Plan(
            tuple(merged.values()),
            tuple(settings.values()),
            self.before,
            later.after,
            mirrors,
            pruners,
            scalings,
            notes,
            drops_then(self.drops, later.drops),
            cuts_then(self.cuts, later.cuts),
        )

    def to_json(self) -> str:
        """The plan as a JSON text."""
        data = asdict(replace(self, pruners={}))  # code is not written: pass customized_pruners to apply()
        del data["pruners"]
        return json.dumps({"format": FORMAT, **data}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: the text is not a plan of this format.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != FORMAT:
                raise ValueError("another format version")
            drops, cuts = read_drops(data)
            return cls(
                tuple(Removal(r["tensor"], r["dim"], r["size"], tuple(r["positions"])) for r in data["removals"]),
                tuple(Setting(**s) for s in data["settings"]),
                Footprint(**data["before"]),
                Footprint(**data["after"]),
                tuple(Mirror(**m) for m in data["mirrors"]),
                scalings=tuple(
                    Scaling(s["tensor"], s["dim"], tuple(s["positions"]), s["factor"], tuple(s.get("onto", ())))
                    for s in data.get("scalings", ())
                ),
                notes=tuple(data.get("notes", ())),
                drops=drops,
                cuts=cuts,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"this is not a plan (format {FORMAT}) as Plan.to_json writes it: {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def _named_before(drops: Sequence[Drop], plan: Plan) -> Plan:
    """The plan by the names that modules had before ``drops`` (its own drops are merged later)."""
    if not drops:
        return plan

    def back(name: str) -> str:
        return earlier_name(drops, name) if name else name

    return replace(
        plan,
        removals=tuple(replace(r, tensor=back(r.tensor)) for r in plan.removals),
        settings=tuple(replace(s, path=back(s.path)) for s in plan.settings),
        mirrors=tuple(replace(m, path=back(m.path), tensor=back(m.tensor)) for m in plan.mirrors),
        scalings=tuple(replace(s, tensor=back(s.tensor)) for s in plan.scalings),
        pruners={back(path): pruner for path, pruner in plan.pruners.items()},
        cuts=tuple(replace(c, path=back(c.path)) for c in plan.cuts),
    )


def _earlier(scaling: Scaling, removal: Removal | None) -> Scaling:
    """The scaling with its positions numbered as they were before ``removal``."""
    if removal is None:
        return scaling
    left = np.delete(np.arange(removal.size), removal.positions)
    positions, onto = (tuple(left[list(found)].tolist()) for found in (scaling.positions, scaling.onto))
    return replace(scaling, positions=positions, onto=onto)


def everything_alive(coupling: Coupling) -> Alive:
    """The state of a model that nothing was cut from."""
    return np.ones(coupling.trace.ledger.size, dtype=bool)


def footprint(coupling: Coupling, alive: Alive) -> Footprint:
    """The cost of the model with only the ``alive`` atoms, from what was recorded while tracing."""
    living = _living(alive)
    return _cost(coupling, Survivors(alive), (living[coupling.axis_end] - living[coupling.axis_start]).tolist())


def macs_by_step(coupling: Coupling, alive: Alive) -> Iterator[tuple[int, int]]:
    """The steps of the trace that multiply, and the multiply-adds of each with only the ``alive`` atoms."""
    return _macs_by_step(coupling, Survivors(alive))


def _macs_by_step(coupling: Coupling, count: Survivors) -> Iterator[tuple[int, int]]:
    return ((term.step, term.factor * prod(map(count, term.rows))) for term in coupling.trace.ledger.macs)


def _cost(coupling: Coupling, count: Survivors, left: Sequence[int]) -> Footprint:
    """The cost of the model of which so many positions are ``left`` along each axis."""
    macs = sum(macs for _, macs in _macs_by_step(coupling, count))
    widths = dict(zip(coupling.axis_start.tolist(), left, strict=True))
    params = size = 0
    for held in coupling.trace.held:
        if held.places[0].kind == "parameter":
            entries = prod(held.of_widths(widths))
            params += entries
            size += entries * held.tensor.element_size()
    return Footprint(macs, params, size)


def make_plan(coupling: Coupling, alive: Alive, units: Ids, facts: Sequence[Fact] = ()) -> tuple[Plan, Alive]:
    """The plan that removes ``units`` from a model of which the ``alive`` atoms are left, and what is left then.

    Raises:
        SurgeryError: a layer would lose its last position, or a size of the model's code cannot follow.
    """
    after, gone = alive.copy(), coupling.atoms_of(units)
    after[gone] = False
    removals, before, left = _removals(coupling, alive, gone[alive[gone]])
    count = Survivors(after)
    _check_parts(coupling, count)
    settings = tuple(Setting(a.path, a.name, a.item, value) for a, value in followed(coupling, count))
    mirrors = _mirrors(coupling, facts)
    scalings, notes = _scalings(coupling, alive, after)
    costs = _cost(coupling, Survivors(alive), before), _cost(coupling, count, left)
    return Plan(removals, settings, *costs, mirrors, coupling.trace.pruners, scalings, notes), after


def _living(alive: Alive) -> Ids:
    """How many living atoms there are before each atom, and in all."""
    return np.concatenate(([0], np.cumsum(alive)))


def _removals(coupling: Coupling, alive: Alive, gone: Ids) -> tuple[tuple[Removal, ...], list[int], list[int]]:
    """Which positions of which dims go with the living atoms ``gone`` (ascending), in the order of the tensors.

    Returns:
        The removals; how many positions there are along each axis, and how many are left.
    """
    start, end, living = coupling.axis_start, coupling.axis_end, _living(alive)
    first, last = np.searchsorted(gone, start), np.searchsorted(gone, end)
    begin = living[start]
    sizes = living[end] - begin
    positions = (living[gone] - begin[np.searchsorted(start, gone, side="right") - 1]).tolist()
    cut = np.flatnonzero(last > first)
    cut = cut[np.lexsort((coupling.axis_dim[cut], coupling.axis_held[cut]))]
    found = []
    columns = (column[cut].tolist() for column in (coupling.axis_held, coupling.axis_dim, sizes, first, last))
    for k, dim, size, low, high in zip(*columns, strict=True):
        name = coupling.trace.held[k].name
        if high - low == size:
            raise SurgeryError(f"{name} dim {dim} would lose its last position; remove fewer")
        found.append(Removal(name, dim, size, tuple(positions[low:high])))
    return tuple(found), sizes.tolist(), (sizes - (last - first)).tolist()


def _check_parts(coupling: Coupling, count: Survivors) -> None:
    """Parts that the code cuts out keep a position, and widths that an op limits stay within the limit."""
    if any(ids.size and count(ids) == 0 for ids in coupling.trace.ledger.parts):
        raise SurgeryError("a part that the code cuts out would lose its last position; remove fewer")
    for limit in coupling.trace.ledger.limits:
        left = count(limit.ids)
        if left < limit.least or (limit.ids.shape[-1] % limit.multiple == 0 and left % limit.multiple):
            raise SurgeryError(f"{left} positions would be left where {limit.reason}; the plan was not made")


def _scalings(coupling: Coupling, alive: Alive, after: Alive) -> tuple[tuple[Scaling, ...], tuple[str, ...]]:
    """What makes up for numbers that are computed from sizes which change, and what nothing makes up for."""
    found = []
    missed: dict[str, int] = {}
    for fold in coupling.folds:
        before, now = surviving(alive, fold.ids), surviving(after, fold.ids)
        if now in (before, 0):
            continue
        if fold.why:
            event = coupling.trace.events[fold.step]
            text = (
                f"{event.name} computes with a size that changes, and the weights could not make up for it: {fold.why}"
            )
            missed[text] = missed.get(text, 0) + 1
            continue
        for target in fold.targets:
            held = coupling.trace.held[target.held]
            start = held.starts[target.dim]
            atoms = np.array(target.atoms)
            rank = np.cumsum(alive[start : start + held.shape[target.dim]]) - 1
            positions = rank[atoms[after[atoms]] - start]
            factor = (now / before) ** -fold.power
            found.append(Scaling(held.name, target.dim, tuple(positions.tolist()), factor))
    return tuple(found), tuple(f"{text} ({times} times)" if times > 1 else text for text, times in missed.items())


def _mirrors(coupling: Coupling, facts: Sequence[Fact]) -> tuple[Mirror, ...]:
    paths = {id(m): path for path, m in coupling.trace.model.named_modules()} if facts else {}
    found = []
    for fact in facts:
        if id(fact.module) not in paths:
            raise InputError(f"the fact about {fact.attribute!r} names a module that is not in the model")
        path = paths[id(fact.module)]
        tensor = f"{path}.{fact.parameter}" if path else fact.parameter
        found.append(Mirror(path, fact.attribute, tensor, fact.dim, fact.divide))
    return tuple(found)


__all__ = [
    "Alive",
    "Footprint",
    "Mirror",
    "Plan",
    "Removal",
    "Scaling",
    "Setting",
    "everything_alive",
    "footprint",
    "macs_by_step",
    "make_plan",
]
