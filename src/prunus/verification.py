"""Proof on the user's own model that the graph is right.

*Symmetry*: a group is right only if permuting its units (and whole heads) leaves the outputs unchanged. *Silence*:
removing units gives the same outputs as setting their slices to zero, where no norm averages over the pruned dim.
Both run with the parameters slightly disturbed, so that no two positions are alike by chance (as the entries of a
freshly initialised batch norm are); the model's own values are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isnan, prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prunus.coupling import Coupling, Family
from prunus.errors import PrunusError
from prunus.graph import DependencyGraph
from prunus.higher import SeesInside
from prunus.labels import Ids
from prunus.report import frozen_text
from prunus.selection import default_families
from prunus.sizes import Extent, expression_of, leaves
from prunus.surgery import borrowed
from prunus.tracing import ForwardFn, Inputs, call_model, tensors_in
from prunus.untouched import eagerly, untouched

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SMALL = 0.02  # tensors without larger entries are scaled up to it while a model is verified


@dataclass(frozen=True)
class VerifyReport:
    """What :func:`verify` found; errors are relative to the largest output."""

    symmetry_error: float
    silence_error: float | None
    prunable_share: float
    groups: int
    tolerance: float
    unsupported: dict[str, tuple[str, ...]]
    frozen: str = field(repr=False)
    culprits: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether both tests hold."""
        return self.symmetry_error <= self.tolerance and (self.silence_error or 0.0) <= self.tolerance

    def __str__(self) -> str:
        silence = "not applicable" if self.silence_error is None else f"{self.silence_error:.1e}"
        lines = [
            f"{'verified' if self.ok else 'NOT VERIFIED'}: {self.groups} groups, "
            f"{self.prunable_share:.2%} of the parameters are prunable",
            f"  symmetry error {self.symmetry_error:.1e}, silence error {silence} (tolerance {self.tolerance:.0e})",
        ]
        lines += [f"  not symmetric: {c}" for c in self.culprits]
        lines += [f"  {line}" for line in self.frozen.splitlines()]
        return "\n".join(lines)


def verify(
    model: nn.Module,
    example_inputs: Inputs,
    forward_fn: ForwardFn | None = None,
    output_transform: Callable[[Any], Any] | None = None,
    *,
    seed: int = 0,
) -> VerifyReport:
    """Check the graph of ``model`` numerically; the model is left as it came.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        forward_fn: ``forward_fn(model, example_inputs)`` to use instead of calling the model.
        output_transform: picks from the output what must keep its sizes and values (default: every tensor in it).
        seed: of the disturbance and the permutations.

    Example:
        >>> import torch, prunus
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> prunus.verify(model, torch.randn(1, 8)).ok
        True
    """
    graph = DependencyGraph().build_dependency(model, example_inputs, forward_fn, output_transform)
    coupling = graph.coupling
    generator = torch.Generator().manual_seed(seed)
    values = _disturbed(coupling, generator)
    run = _Runner(model, example_inputs, forward_fn, output_transform)
    reference = run(values)
    permuted = _permuted(coupling, coupling.families, values, generator)
    symmetry = _distance(reference, run(permuted))
    tolerance = max((TOLERANCE.get(t.dtype, 0.0) for t in reference), default=1e-5)
    culprits: tuple[str, ...] = ()
    if symmetry > tolerance:
        culprits = _culprits(coupling, values, run, reference, generator, tolerance)
    return VerifyReport(
        symmetry,
        _silence(graph, values, run, tolerance),
        prunable_share(coupling),
        len(coupling.groups),
        tolerance,
        graph.unsupported,
        frozen_text(coupling),
        culprits,
    )


class _Runner:
    """Runs the model in eval mode, without gradients, on given values of its tensors."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        forward_fn: ForwardFn | None,
        output_transform: Callable[[Any], Any] | None,
    ) -> None:
        self.model, self.inputs, self.forward_fn, self.output_transform = model, inputs, forward_fn, output_transform
        self.buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}

    def __call__(self, values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        values = {k: v.clone() if k in self.buffers else v for k, v in values.items()}  # a run may write to them
        with untouched(self.model), torch.no_grad(), eagerly(), borrowed(self.model, values), _WithoutNoise():  # type: ignore[no-untyped-call]
            output = call_model(self.model, self.inputs, self.forward_fn)
            if self.output_transform is not None:
                output = self.output_transform(output)
            found = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors_in(output))
            return [t.clone() for t in found if t.is_floating_point()]


class _WithoutNoise(SeesInside):
    """Random numbers are replaced by their mean: noise belongs to positions, which units change."""

    def see(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(result, torch.Tensor):
            name = func.overloadpacket.__name__
            if name == "normal" and isinstance(args[0], torch.Tensor):
                return args[0].clone()
            if name in _MEANS and result.is_floating_point():
                result.fill_(_MEANS[name])
        return result


_MEANS = {
    **dict.fromkeys(("rand", "rand_like", "uniform", "uniform_", "bernoulli", "bernoulli_"), 0.5),
    **dict.fromkeys(("randn", "randn_like", "normal", "normal_", "normal_functional"), 0.0),
}


def _disturbed(coupling: Coupling, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Copies of all used tensors in which no two numbers are alike, and none is all but zero; signs stay.

    What a layer scale of 1e-6 multiplies would not be seen in the outputs, whatever happens to it.
    """
    values = {}
    for held in coupling.trace.held:
        tensor = held.tensor.detach()
        if all(s < 0 for s in held.starts):
            continue
        if not (tensor.is_floating_point() or tensor.is_complex()):
            values[held.name] = tensor
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).clamp(-3, 3).to(tensor)
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        visible = SMALL / largest if 0 < largest < SMALL else 1.0
        values[held.name] = tensor * visible * (1 + 0.1 * noise) + SMALL * noise * (tensor == 0)
    return values


def _permuted(
    coupling: Coupling, families: Sequence[Family], values: dict[str, torch.Tensor], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The values after a random cyclic permutation of the units of every lane."""
    source = np.arange(coupling.units.total)
    for family in families:
        for lane in family.lanes:
            order = torch.randperm(len(lane), generator=generator).numpy()
            source[lane[order]] = lane[np.roll(order, 1)]  # one cycle through all: never the identity
    out = dict(values)
    for coarse in (False, True):
        for group in coupling.groups:
            if group.coarse == coarse:
                rows = np.searchsorted(group.units, source[group.units])
                _move(coupling, group.slices, rows, out)
    return out


def _move(coupling: Coupling, slices: Sequence[Any], rows: Ids, values: dict[str, torch.Tensor]) -> None:
    for part in slices:
        name = coupling.trace.held[part.held].name
        if name in values:
            order = torch.arange(coupling.trace.held[part.held].shape[part.dim])
            order[torch.from_numpy(part.positions.reshape(-1))] = torch.from_numpy(part.positions[rows].reshape(-1))
            values[name] = values[name].index_select(part.dim, order.to(values[name].device))


def _distance(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """The largest difference relative to the largest output; infinite where shapes or finiteness differ."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            scale = max(float(a.abs().max()), 1e-6)
            error = float((a - b).abs().max()) / scale
            worst = max(worst, float("inf") if isnan(error) else error)
    return worst


def _culprits(
    coupling: Coupling,
    values: dict[str, torch.Tensor],
    run: _Runner,
    reference: Sequence[torch.Tensor],
    generator: torch.Generator,
    tolerance: float,
) -> tuple[str, ...]:
    """The families whose own permutation changes the outputs."""
    found = []
    for family in coupling.families:
        if _distance(reference, run(_permuted(coupling, [family], values, generator))) > tolerance:
            group = coupling.groups[int(coupling.group_of_unit[family.units].max())]
            part = group.slices[0]
            found.append(f"{coupling.trace.held[part.held].name} dim {part.dim} ({len(family.units)} units)")
    return tuple(found)


def _averaged(coupling: Coupling) -> NDArray[np.bool_]:
    """Atoms of dims whose size enters the numbers that are computed: means, norms, scales of attention."""
    ledger = coupling.trace.ledger
    found = np.zeros(ledger.size, dtype=bool)
    sizes = {leaf for k, n in enumerate(ledger.numbers) if k not in ledger.matched for leaf in leaves(n.expression)}
    for ids in (
        *ledger.averaged,
        *(fold.ids for fold in coupling.folds if fold.why),
        *(leaf.ids for leaf in sizes if isinstance(leaf, Extent)),
        *(r.ids for r in ledger.requirements if sizes.intersection(leaves(expression_of(r.asked)))),
    ):
        found[ids] = True
    return found


def _silent_units(coupling: Coupling) -> list[Ids]:
    """A bundle of every family over which nothing averages."""
    averaged = _averaged(coupling)
    chosen = []
    for family in default_families(coupling):
        units = np.concatenate([lane[: len(lane) // family.count] for lane in family.lanes])
        if family.count > 1 and not averaged[coupling.atoms_of(units)].any():
            chosen.append(units)
    return chosen


def _silence(graph: DependencyGraph, values: dict[str, torch.Tensor], run: _Runner, tolerance: float) -> float | None:
    """Remove a bundle of every family over which nothing averages, and compare with zeros in its place.

    Over dims along which two activations are multiplied, zeros are silent only if what made them keeps zero zero (in
    linear attention it does not): they count if they pass.
    """
    coupling = graph.coupling
    chosen = _silent_units(coupling)
    error = _against_zeros(graph, chosen, values, run)
    if error is None or error <= tolerance:
        return error
    paired = np.zeros(coupling.trace.ledger.size, dtype=bool)
    for ids in coupling.trace.ledger.paired:
        paired[ids] = True
    rest = [units for units in chosen if not paired[coupling.atoms_of(units)].any()]
    return error if len(rest) == len(chosen) else _against_zeros(graph, rest, values, run)


def _against_zeros(
    graph: DependencyGraph, chosen: Sequence[Ids], values: dict[str, torch.Tensor], run: _Runner
) -> float | None:
    """The distance of the outputs after removing units from those with zeros in their place (None: not comparable)."""
    if not chosen:
        return None
    units = np.concatenate(chosen)
    expected = run(_silenced(graph.coupling, values, units))
    if any(bool(t.isnan().any()) for t in expected):  # something divides by the length of what was silenced
        return None
    with borrowed(graph.model, values):
        receipt = graph._prune(units, record_history=False)
        try:
            found = run({})
        finally:
            receipt.undo()
    return _distance(expected, found)


def _silenced(coupling: Coupling, values: dict[str, torch.Tensor], units: Ids) -> dict[str, torch.Tensor]:
    """The values with zeros in everything that goes with ``units``."""
    silent = dict(values)
    gone = np.zeros(coupling.trace.ledger.size, dtype=bool)
    gone[coupling.atoms_of(units)] = True
    for held in coupling.trace.held:
        if held.name not in values:
            continue
        for dim, start in enumerate(held.starts):
            places = (
                np.flatnonzero(gone[start : start + held.shape[dim]]) if start >= 0 else np.empty(0, dtype=np.int64)
            )
            if places.size:
                index = torch.from_numpy(places).to(values[held.name].device)
                silent[held.name] = silent[held.name].index_fill(dim, index, 0)
    return silent


def prunable_share(coupling: Coupling) -> float:
    """The share of the parameters that some removable unit touches."""
    free = np.zeros(coupling.trace.ledger.size, dtype=bool)
    for family in coupling.families:
        free[coupling.atoms_of(family.units)] = True
    total = fixed = 0
    for held in coupling.trace.held:
        if held.places[0].kind == "parameter":
            total += prod(held.shape)
            fixed += prod(held.left(~free))
    if not total:
        raise PrunusError("the model has no float parameters; prune a model before it is quantised")
    return 1 - fixed / total
