"""Units, bundles and groups: what may go, what goes with it, and why the rest stays."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus
from prunus.coupling import Coupling, couple
from prunus.coupling.explain import explain, frozen, why_not
from prunus.selection import default_families, rank
from prunus.tracing import trace


class Attention(nn.Module):
    """A residual stream of ``heads * dim`` channels around attention whose sizes are attributes."""

    def __init__(self, heads: int = 2, dim: int = 4, kv: int = 2, stream: int = 12) -> None:
        super().__init__()
        self.stem = nn.Linear(6, stream)
        self.q, self.k, self.v = (nn.Linear(stream, n * dim) for n in (heads, kv, kv))
        self.o = nn.Linear(heads * dim, stream)
        self.head = nn.Linear(stream, 3)
        self.heads, self.width, self.kv = heads, dim, kv

    def forward(self, x):
        x = self.stem(x)
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.width).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv, self.width).transpose(1, 2)
        v = self.v(x).view(b, t, self.kv, self.width).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv != self.heads)
        return self.head(x + self.o(y.transpose(1, 2).reshape(b, t, self.heads * self.width)))


TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


def coupled(model: nn.Module, inputs=TOKENS) -> Coupling:
    """The model, traced and coupled."""
    return couple(trace(model.eval(), inputs))


def names(coupling: Coupling, units) -> set[str]:
    """The tensors that removing ``units`` would cut."""
    atoms = coupling.atoms_of(np.asarray(units))
    axis = np.searchsorted(coupling.axis_start, atoms, side="right") - 1
    held = coupling.trace.held
    found = set()
    for atom, k in zip(atoms.tolist(), axis.tolist(), strict=True):
        if k < 0:
            continue
        h, d = int(coupling.axis_held[k]), int(coupling.axis_dim[k])
        if atom < coupling.axis_start[k] + held[h].shape[d]:
            found.add(f"{held[h].name}:{d}")
    return found


def test_plain_chain_has_one_family_per_width() -> None:
    """Channels between two layers are one family of as many bundles as channels, cut by one unit each."""
    found = coupled(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.Linear(10, 3)), torch.randn(2, 6))
    assert [(f.count, len(f.lanes), f.coarse) for f in found.families] == [(8, 1, False), (10, 1, False)]
    assert [len(g.units) for g in found.groups] == [8, 10]
    assert names(found, found.families[0].units[:1]) == {"0.weight:0", "0.bias:0", "2.weight:1"}


def test_heads_and_head_dims_are_families_of_their_own() -> None:
    """Attention offers whole heads, the dims of q with k, and those of v with o, and the stream."""
    found = coupled(Attention())
    heads = [f for f in found.families if f.coarse]
    assert len(heads) == 1
    assert heads[0].count == 2
    assert {"q.weight:0", "k.weight:0", "v.weight:0", "o.weight:1"} <= names(found, heads[0].units[:1])
    stream = next(f for f in found.families if len(f.lanes) == 1 and not f.coarse)
    assert (stream.count, len(stream.lanes[0])) == (12, 12)


def test_a_width_may_be_called_dim() -> None:
    """``self.dim`` is a common name for a width: it follows like any other."""

    class Dim(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.dim = 4

        def forward(self, x):
            return self.b(self.a(x).view(-1, 2, self.dim).flatten(1))

    assert [f.count for f in default_families(coupled(Dim(), torch.randn(2, 6)))] == [4]


def test_head_dims_are_joined_by_rank_over_heads() -> None:
    """One dim attribute sizes q, k and v: a bundle takes one position of every head of each."""
    found = coupled(Attention())
    dims = next(f for f in found.families if len(f.lanes) > 1)
    assert dims.count == 4
    assert {len(lane) for lane in dims.lanes} == {4}
    assert len(dims.lanes) == 4  # q with k, and v, in each of two heads


def test_default_families_prefer_single_positions() -> None:
    """Rows as a whole are offered only where their positions cannot go one by one."""
    found = coupled(Attention())
    assert all(not f.coarse for f in default_families(found))

    class OnlyHeads(Attention):
        def forward(self, x):
            x = self.stem(x)
            b, t, _ = x.shape
            q, k, v = (p(x).view(b, t, -1, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return self.head(x + self.o(y.flatten(2)))

    literal = coupled(OnlyHeads())
    assert [f.count for f in default_families(literal) if f.coarse] == [2]


def test_grouped_queries_go_with_their_keys() -> None:
    """A key head takes its query heads; a query head does not take the key head that others share."""
    found = coupled(Attention(heads=4, kv=2))
    heads = next(f for f in found.families if f.coarse)
    assert heads.count == 2
    gone = found.atoms_of(heads.units[:1])
    start = next(h.starts[0] for h in found.trace.held if h.name == "q.weight")
    assert np.count_nonzero((gone >= start) & (gone < start + 16)) == 8


def test_stream_and_heads_sized_by_one_product_shrink_together(oracle) -> None:
    """Where ``heads * dim`` also sizes the stream, they are one family whose quotas keep the ratio."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.p, self.o, self.head = (
                nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)
            )  # fmt: skip
            self.heads = 2

        def forward(self, x):
            x = self.stem(x)
            b, t, c = x.shape
            q, k, v = self.p(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
            return self.head(x + self.o(y))

    found = oracle(Tied(), TOKENS)
    assert found.bundles == 4
    model = Tied()
    family = default_families(coupled(model))[0]
    assert sorted(len(lane) // family.count for lane in family.lanes) == [1, 1, 1, 1, 2]
    prunus.prune(model, TOKENS, prunus.Target(ratio=0.5))
    assert (model.stem.out_features, model.p.out_features, model.heads) == (4, 12, 2)


def test_quota_is_the_gcd() -> None:
    """Lanes of 12 and 8 that one attribute joins have 4 bundles, of 3 and 2 units."""

    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(6, 8), nn.Linear(20, 3)
            self.width = 4

        def forward(self, x):
            return self.c(torch.cat([self.a(x).view(-1, 3, self.width).flatten(1),
                                     self.b(x).view(-1, 2, self.width).flatten(1)], 1))  # fmt: skip

    found = coupled(Uneven(), torch.randn(2, 6))
    assert [f.count for f in default_families(found)] == [4]
    assert sum(len(lane) for lane in default_families(found)[0].lanes) == 20


def test_rank_pairs_the_least_important_of_each_lane() -> None:
    """Bundles are made by rank within each lane, least important first."""
    model = nn.Sequential(nn.Conv1d(3, 6, 1), nn.GroupNorm(2, 6), nn.Conv1d(6, 3, 1))
    found = coupled(model, torch.randn(2, 3, 4))
    family = default_families(found)[0]
    assert (family.count, len(family.lanes)) == (3, 2)
    scores = np.full(found.units.total, np.nan)
    scores[family.lanes[0]], scores[family.lanes[1]] = [3.0, 1.0, 2.0], [10.0, 30.0, 20.0]
    ranking = rank(family, scores, np.ones(found.units.total, dtype=bool))
    expected = [
        {int(family.lanes[0][1]), int(family.lanes[1][0])},
        {int(family.lanes[0][2]), int(family.lanes[1][2])},
        {int(family.lanes[0][0]), int(family.lanes[1][1])},
    ]
    assert [set(b.tolist()) for b in ranking.bundles] == expected
    assert ranking.scores.tolist() == [5.5, 11.0, 16.5]


def test_no_part_of_a_split_vanishes() -> None:
    """However unimportant a part is, one position of it stays: layers do not run on nothing."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
            self.parts = [2, 6]

        def forward(self, x):
            left, right = self.a(x).split(self.parts, 1)
            return self.b(torch.cat([right, left], 1))

    model = Parts()
    with torch.no_grad():
        model.a.weight[:2] *= 1e-4
        model.a.bias[:2] *= 1e-4
    prunus.prune(model, torch.randn(2, 6), prunus.Target(ratio=0.5))
    assert min(model.parts) > 0


def test_uneven_free_parts_pin_a_balance() -> None:
    """If a part of one half has to stay, the halves cannot stay equal, so they stay."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            left, right = self.a(x).chunk(2, 1)
            return self.b(torch.cat([left, right], 1)), left[:, :2]

    found = coupled(Halves(), torch.randn(2, 6))
    assert found.families == ()
    reasons = {reason for _, _, reason, _ in frozen(found)}
    assert any("cuts it into equal parts, and a part of one of them has to stay" in r for r in reasons)


def test_frozen_closure_gives_reasons() -> None:
    """Whatever is tied to an output stays for that reason, through any number of ties."""

    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            x = self.n(self.a(x))
            return x + self.b(x)

    found = coupled(Through(), torch.randn(2, 6))
    reasons = {(name, dim): reason for name, dim, reason, _ in frozen(found)}
    for key in (("a.weight", 0), ("a.bias", 0), ("n.weight", 0), ("b.weight", 0), ("b.weight", 1)):
        assert reasons[key].startswith("it is an output of the model")
    assert reasons["a.weight", 1].startswith("linear combines it with a dimension of fixed size (linear in a)")
    assert found.families == ()


def test_why_not_names_op_and_module() -> None:
    """The reason of a unit names the op and the module that keep it."""

    class Running(nn.Module):
        def forward(self, x):
            return x.cumsum(-1)

    model = nn.Sequential(nn.Linear(6, 8), Running(), nn.Linear(8, 3))
    found = coupled(model, torch.randn(2, 6))
    start = next(h.starts[0] for h in found.trace.held if h.name == "0.weight")
    assert why_not(found, int(found.unit_of_atom[start])) == "cumsum compares its positions (cumsum in 1)"


def test_explain_tells_groups_ties_and_reasons() -> None:
    """For every dim of a layer: its group and the ops that tie it, or why it has to stay."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    found = coupled(model, torch.randn(2, 6))
    for layer in (model[0], "0"):
        text = explain(found, layer)
        assert "0.weight dim 0 (8 positions, made by its layer): group 0, 8 units; with it go" in text
        assert "weight dim 1; through linear in 2" in text
        assert "0.weight dim 1 (6 positions, read by its layer): 6 stay: linear combines it" in text
    assert "0.bias" in explain(found, "0.bias")
    for wrong in ("nowhere", nn.Linear(2, 2)):
        with pytest.raises(prunus.InputError):
            explain(found, wrong)


def test_explain_tells_positions_in_heads_from_whole_heads() -> None:
    """Where one unit takes a position of every head it says so, and that heads may go as a whole."""
    found = coupled(Attention(heads=4, kv=2))
    queries = explain(found, "q.weight")
    assert "group 1, 8 units of 2 positions; with it go" in queries
    assert re.search(r"or with prune_num_heads, \d whole heads of \d positions \(group \d+\)", queries)


def test_units_of_a_group_cut_alike() -> None:
    """Every unit of a group cuts the same dims equally often, and no position belongs to two of its units."""
    found = coupled(Attention(heads=4, kv=2))
    for group in found.groups:
        for part in group.slices:
            assert part.positions.shape[0] == len(group.units)
            assert len(np.unique(part.positions)) == part.positions.size


def test_atoms_of_nothing_and_of_everything() -> None:
    """No units take nothing; all units of a family take every position that the family may lose."""
    found = coupled(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), torch.randn(2, 6))
    assert found.atoms_of(np.empty(0, dtype=np.int64)).size == 0
    assert len(found.atoms_of(found.families[0].units)) == 24  # row, bias and column of each of eight units
    assert found.alive_units(np.ones(found.trace.ledger.size, dtype=bool)).all()
