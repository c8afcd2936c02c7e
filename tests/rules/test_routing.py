"""Routing: what is chosen by value and looked up by number stays symmetric; any other use of the numbers freezes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prunus
from prunus.coupling import couple
from prunus.coupling.explain import frozen
from prunus.tracing import trace

GOLDEN = [
    pytest.param(lambda a, b: b[a.argmax(1)], [(2, 3), (3, 4)], "a0, b1 ; b0=a1", id="argmax-index"),
    pytest.param(lambda a, b: F.embedding(a.max(1).indices, b), [(2, 3), (3, 4)], "a0, b1 ; b0=a1", id="max-embedding"),
    pytest.param(lambda a, b: b[a.argmax(1)], [(2, 3), (5, 4)], "a0, b1 ; a1! ; b0!", id="another-size"),
    pytest.param(lambda a, b: b[a.argmax(1) + 1], [(2, 3), (4, 3)], "a0, b1 ; a1! ; b0!", id="computed-with"),
    pytest.param(lambda a: a.argmax(1) == 1, [(2, 3)], "a0 ; a1!", id="compared"),
    pytest.param(lambda a: torch.tensor(a.argmax(1).tolist()), [(2, 3)], "- ; a0! ; a1!", id="read-by-python"),
    pytest.param(lambda a: a.max(1).values, [(2, 3)], "a0", id="max-values-only"),
    pytest.param(lambda a: a.gather(1, a.topk(2, 1)[1]), [(2, 3)], "a0, -", id="topk-gather"),
    pytest.param(lambda a: torch.zeros_like(a).scatter(1, a.topk(2, 1)[1], 1.0), [(2, 3)], "a0, a1", id="topk-scatter"),
    pytest.param(
        lambda a, b: b.index_select(0, a.topk(2, 1)[1].flatten()),
        [(2, 3), (3, 4)],
        "a0[0,0,1,1], b1 ; b0=a1",
        id="select",
    ),
    pytest.param(lambda a: F.one_hot(a.argmax(1), a.shape[1]), [(2, 3)], "a0, a1", id="one_hot"),
    pytest.param(lambda a: F.one_hot(a.argmax(1)).shape, [(2, 3)], " ; a0! ; a1!", id="one_hot-counted"),
    pytest.param(
        lambda a, b: torch.bincount((torch.randn(3, 5) @ a).argmax(1).sort()[0], minlength=a.shape[1]) * b,
        [(5, 4), (4,)],
        "a1 ; a0! ; b0=a1",
        id="bincount",
    ),
    pytest.param(lambda a: a.sort(1)[0], [(2, 3)], "a0, - ; a1!", id="sort-values"),
    pytest.param(lambda a, b: b[torch.arange(a.shape[0])] + a, [(3, 4), (3, 4)], "a0, a1 ; b0=a0 ; b1=a1", id="arange"),
    pytest.param(lambda a: a * torch.arange(a.shape[0]), [(4,)], "a0! ; a0!", id="arange-computed-with"),
]


@pytest.mark.parametrize(("function", "shapes", "expected"), GOLDEN)
def test_labels(golden, function, shapes, expected) -> None:
    """The output's labels, what is tied and what stays are exactly these (see conftest for the notation)."""
    assert golden(function, *shapes).text() == expected


class Experts(nn.Module):
    """Experts behind a router, called in one of the ways that are met in the wild."""

    def __init__(self, how: str, experts: int = 6, width: int = 8, hidden: int = 12, k: int = 2) -> None:
        super().__init__()
        self.how, self.k, self.experts = how, k, experts
        self.stem = nn.Linear(5, width)
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, 2 * hidden, width) / 4)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) / 4)
        self.order = nn.Parameter(torch.randn(24))
        self.head = nn.Linear(width, 3)

    def act(self, x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, x):
        x = self.stem(x)
        weights, chosen = self.router(x).softmax(-1).topk(self.k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.head(x + getattr(self, self.how)(x, weights, chosen))

    def batched(self, x, weights, chosen):
        flat = chosen.reshape(-1)
        h = self.act(torch.bmm(self.up[flat], x.repeat_interleave(self.k, 0).unsqueeze(-1)).squeeze(-1))
        out = torch.bmm(self.down[flat], h.unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
        return out.view(x.shape[0], self.k, -1).sum(1)

    def grouped(self, x, weights, chosen, twist=None):
        numbers, perm = torch.sort(chosen.reshape(-1))
        counts = torch.histc(numbers.float(), bins=self.experts, min=0, max=self.experts - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        h = self.act(F.grouped_mm(x[perm // self.k], self.up.transpose(-2, -1), offs=ends))
        out = F.grouped_mm(h, self.down.transpose(-2, -1), offs=ends)
        out = out * weights.reshape(-1)[perm].unsqueeze(-1)
        out = twist(out) if twist is not None else out
        back = torch.empty_like(perm)
        back[perm] = torch.arange(perm.size(0))
        return out[back].view(x.shape[0], self.k, -1).sum(1)

    def grouped_weighed_by_place(self, x, weights, chosen):
        return self.grouped(x, weights, chosen, lambda out: out * self.order.unsqueeze(-1))

    def grouped_summed_up(self, x, weights, chosen):
        return self.grouped(x, weights, chosen, lambda out: out.cumsum(0))

    def grouped_first_dropped(self, x, weights, chosen):
        return self.grouped(x, weights, chosen, lambda out: torch.cat([out[:1] * 0, out[1:]]))

    def grouped_turned(self, x, weights, chosen):
        return self.grouped(x, weights, chosen, lambda out: out + out.flip(0))

    def loop(self, x, weights, chosen):
        out = torch.zeros_like(x)
        hits = F.one_hot(chosen, num_classes=self.experts).permute(2, 1, 0)
        for expert in (hits.sum(dim=(-1, -2)) > 0).nonzero():
            place, token = torch.where(hits[expert[0]])
            h = F.linear(self.act(F.linear(x[token], self.up[expert[0]])), self.down[expert[0]])
            out.index_add_(0, token, h * weights[token, place, None])
        return out

    def masks(self, x, weights, chosen):
        out = torch.zeros_like(x)
        for k in range(self.experts):
            weight = ((chosen == k) * weights).sum(-1, keepdim=True)
            out = out + weight * F.linear(self.act(F.linear(x, self.up[k])), self.down[k])
        return out

    def dense(self, x, weights, chosen):
        every = torch.zeros(x.shape[0], self.router(x).shape[1]).scatter(1, chosen, weights)
        h = self.act(torch.einsum("th,efh->tef", x, self.up))
        return torch.einsum("te,tef,ehf->th", every, h, self.down)


FREE = ["batched", "grouped", "dense"]
KEPT = ["loop", "masks", "grouped_weighed_by_place", "grouped_summed_up", "grouped_first_dropped", "grouped_turned"]


def kept_dims(model, inputs) -> set[str]:
    return {f"{name}:{dim}" for name, dim, _, _ in frozen(couple(trace(model, inputs)))}


@pytest.mark.parametrize("how", FREE)
def test_experts_and_their_neurons_may_go(oracle, how) -> None:
    """Width, neurons and whole experts (with the router's rows) are prunable, and the graph proves itself."""
    found = oracle(Experts(how), torch.randn(12, 5))
    assert not {"router.weight:0", "up:0", "up:1", "up:2", "down:0", "down:1"} & found.frozen
    assert found.share > 0.9
    shapes = {r.tensor: r.size - len(r.positions) for r in found.result.plan.removals if r.dim == 0}
    assert shapes["up"] == shapes["down"] == shapes["router.weight"] == 3


@pytest.mark.parametrize("how", KEPT)
def test_experts_stay_where_their_numbers_matter(oracle, how) -> None:
    """Where code counts on the numbering or on an order that follows from it, experts stay, neurons go."""
    model, inputs = Experts(how), torch.randn(12, 5)
    found = oracle(model, inputs)
    assert {"router.weight:0", "up:0", "down:0"} <= found.frozen
    assert not {"up:1", "up:2", "down:1", "down:2"} & found.frozen


def test_at_least_as_many_experts_stay_as_are_chosen() -> None:
    """However much is asked for, ``topk(3)`` finds three experts; a plan that leaves fewer is refused."""
    inputs = torch.randn(12, 5)
    model = Experts("batched", k=3)
    prunus.prune(model, inputs, prunus.Target(ratio=0.9))
    assert model.router.out_features == 3
    assert torch.isfinite(model(inputs)).all()
    model = Experts("batched", k=3)
    graph = prunus.DependencyGraph().build_dependency(model, inputs)
    group = graph.get_pruning_group(model.router, prunus.prune_linear_out_channels, [0, 1, 2, 3])
    assert not graph.check_pruning_group(group)
    assert graph.check_pruning_group(graph.get_pruning_group(model.router, prunus.prune_linear_out_channels, [0, 4]))


@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.6, 0.7])
def test_grouped_products_keep_rows_of_whole_sixteen_bytes(ratio) -> None:
    """Whatever share goes, the kernel of ``grouped_mm`` takes the widths that stay."""
    inputs = torch.randn(12, 5)
    model = Experts("grouped", width=24, hidden=20)
    prunus.prune(model, inputs, prunus.Target(ratio=ratio), ignored_layers=[model.router])
    assert model.up.shape[2] % 4 == model.down.shape[2] % 4 == 0
    assert model.up.shape[2] < 24 and torch.isfinite(model(inputs)).all()


def test_a_codebook_shrinks_with_the_scores() -> None:
    """The nearest entry is looked up by its number: entries may go."""

    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.book, self.head = nn.Linear(5, 8), nn.Parameter(torch.randn(16, 8)), nn.Linear(8, 3)

        def forward(self, x):
            x = self.stem(x)
            return self.head(self.book[torch.cdist(x, self.book).argmin(-1)])

    model = Codebook()
    report = prunus.verify(model, torch.randn(12, 5))
    assert report.ok, str(report)


def test_numbers_that_the_model_returns_keep_their_positions() -> None:
    """A model that answers with the number of a class keeps its classes."""

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 8)

        def forward(self, x):
            return self.fc(x).argmax(-1)

    assert "fc.weight:0" in kept_dims(Classes(), torch.randn(12, 5))
