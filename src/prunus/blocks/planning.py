"""Plans that drop children of containers, with all that counts them, and what they cost before and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from prunus.blocks.counters import Counters, find_counters, followers
from prunus.blocks.flow import Subject
from prunus.blocks.shape import Beside
from prunus.cost import count
from prunus.drops import Cut, Drop, renamed, within
from prunus.graph import DependencyGraph
from prunus.plan import Footprint, Plan, Removal, Scaling, Setting, macs_by_step
from prunus.surgery import apply


class Planner:
    """Makes plans for one model."""

    def __init__(self, graph: DependencyGraph, subject: Subject) -> None:
        self.model, self._subject = graph.model, subject
        self.beside: dict[str, tuple[Beside, ...]] = {}  # by the path of the child
        self._counters: dict[str, Counters] = {}
        self._macs: dict[str, int] = {}
        for step, macs in macs_by_step(graph.coupling, graph.alive):
            module = graph.coupling.trace.events[step].module
            self._macs[module] = self._macs.get(module, 0) + macs

    def plan(self, names: Sequence[str], final: bool = False) -> Plan:
        """The plan that drops the children of containers with these paths; ``final`` proves counters for just these."""
        settings: list[Setting] = []
        cuts: list[Cut] = []
        notes: list[str] = []
        drops: list[Drop] = []
        by_container: dict[str, set[str]] = {}
        for path in names:
            container, _, name = path.rpartition(".")
            by_container.setdefault(container, set()).add(name)
        for container, gone in by_container.items():
            keys = list(self.model.get_submodule(container)._modules)
            drop = Drop(container, tuple(k for k in keys if k in gone), renamed(keys, gone))
            counters = self._counters.get(container)
            if counters is None or final:
                now = find_counters(self.model, drop)
                counters = replace(counters, rebuilt=False) if counters and now.rebuilt is False else now
                self._counters.setdefault(container, counters)
            more, lists = followers(self.model, drop, counters)
            settings += more
            cuts += lists
            drops.append(drop)
            if counters.rebuilt is False:
                notes.append(
                    f"the configuration cannot say which children of {container} are left: a model that is built from "
                    "it has others; save and load the model as a whole"
                )
        removals, scalings, widths = self._narrowed(names)
        nothing = Footprint(0, 0, 0)
        plan = Plan(
            removals,
            (*settings, *widths),
            nothing,
            nothing,
            scalings=scalings,
            notes=tuple(notes),
            drops=tuple(drops),
            cuts=tuple(cuts),
        )
        before, after = self._footprints(plan, names)
        return replace(plan, before=before, after=after)

    def _narrowed(self, names: Sequence[str]) -> tuple[tuple[Removal, ...], tuple[Scaling, ...], tuple[Setting, ...]]:
        """What becomes of convolutions that would read a stream twice: they read it once, with both weights added."""
        found = [beside for name in names for beside in self.beside.get(name, ())]
        gone: dict[tuple[str, int], set[int]] = {}
        scalings = []
        for where in sorted(found, key=lambda b: -b.after):  # from the last: what is added to one may go on to another
            source, onto = (tuple(range(first, first + where.size)) for first in (where.after, where.before))
            scalings.append(Scaling(where.weight, 1, source, 1.0, onto))
            gone.setdefault((where.weight, where.width), set()).update(source)
        removals = tuple(Removal(name, 1, width, tuple(sorted(places))) for (name, width), places in gone.items())
        settings = tuple(
            Setting(path, "in_channels", None, r.size - len(r.positions))
            for r in removals
            if vars(self.model.get_submodule(path := r.tensor.rpartition(".")[0])).get("in_channels") == r.size
        )
        return removals, tuple(scalings), settings

    def _footprints(self, plan: Plan, names: Sequence[str]) -> tuple[Footprint, Footprint]:
        """The cost before and after."""
        macs = sum(self._macs.values())
        whole = Footprint(macs, *_weigh(self.model.parameters()))
        if plan.removals or self._shared(names):
            receipt = apply(self.model, plan)
            try:
                less = count(self.model, self._subject.inputs, self._subject.forward_fn).macs
                return whole, Footprint(less, *_weigh(self.model.parameters()))
            finally:
                receipt.undo()
        less = macs - sum(n for module, n in self._macs.items() if any(within(module, name) for name in names))
        left = _parameters_without(self.model, {id(self.model.get_submodule(name)) for name in names})
        return whole, Footprint(less, *_weigh(left))

    def _shared(self, names: Sequence[str]) -> bool:
        """Whether a module that multiplies is inside the blocks and elsewhere too."""
        paths: dict[int, list[str]] = {}
        for path, module in self.model.named_modules(remove_duplicate=False):
            paths.setdefault(id(module), []).append(path)
        several = (found for found in paths.values() if len(found) > 1 and any(p in self._macs for p in found))
        return any(len({any(within(path, name) for name in names) for path in found}) > 1 for found in several)


def _weigh(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    sizes = [(p.numel(), p.element_size()) for p in parameters]
    return sum(n for n, _ in sizes), sum(n * size for n, size in sizes)


def _parameters_without(model: nn.Module, gone: set[int]) -> list[nn.Parameter]:
    """The parameters that are left without some modules."""
    found: dict[int, nn.Parameter] = {}
    waiting, seen = [model], set(gone)
    while waiting:
        module = waiting.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found.update({id(p): p for p in module._parameters.values() if p is not None})
            waiting += [child for child in module._modules.values() if child is not None]
    return list(found.values())
