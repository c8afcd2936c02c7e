"""Slices of groups: which positions of which tensors belong to which unit."""

from __future__ import annotations

import numpy as np
import pytest
from zoo.networks import builders

import prunus as tp

NETWORKS = ("mlp", "grouped", "channel_shuffle", "tied", "set_transformer")


@pytest.mark.parametrize("rows", [False, True], ids=["positions", "rows"])
@pytest.mark.parametrize("name", NETWORKS)
def test_slices_hold_what_goes_with_each_unit(name: str, rows: bool) -> None:
    """What the slices of a group give to a unit is all that goes with it, dim by dim."""
    net = builders("handwritten")[name]()
    graph = tp.DependencyGraph().build_dependency(net.model, net.inputs, net.forward_fn, net.output_transform)
    coupling = graph.coupling.by_rows if rows else graph.coupling
    for group in coupling.groups:
        for k in (0, len(group.units) // 2, len(group.units) - 1):
            atoms = coupling.atoms_of(group.units[k : k + 1])
            axis = np.searchsorted(coupling.axis_start, atoms, side="right") - 1
            held = [coupling.trace.held[h] for h in coupling.axis_held[axis].tolist()]
            size = np.array([h.shape[d] for h, d in zip(held, coupling.axis_dim[axis].tolist(), strict=True)])
            inside = (axis >= 0) & (atoms < coupling.axis_start[axis] + size)
            found = [
                (int(coupling.axis_held[a]), int(coupling.axis_dim[a]), int(atom - coupling.axis_start[a]))
                for a, atom in zip(axis[inside].tolist(), atoms[inside].tolist(), strict=True)
            ]
            assert found == [(s.held, s.dim, p) for s in group.slices for p in s.positions[k].tolist()]
