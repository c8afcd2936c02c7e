"""Repair as a whole: it comes nearer to the dense model, undoes, refuses bad data, and leaves no trace if it fails."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prunus
from prunus.repair import closed_form


class Residual(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.one, self.norm1 = nn.Conv2d(width, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.two, self.norm2 = nn.Conv2d(12, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.two(F.relu(self.norm1(self.one(x))))))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x)


class Shared(nn.Module):
    """One layer runs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        return self.last(x)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 16, 3, stride=2, padding=1, padding_mode="reflect")
        self.grouped = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4)
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.last(F.silu(self.up(F.silu(self.grouped(F.silu(self.down(x)))))))


def settled(model: nn.Module, *shape: int) -> nn.Module:
    """With running statistics of its own."""
    model.train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, *shape))
    return model.eval()


CASES = {
    "residual": (Residual, (3, 8, 8)),
    "attention": (Attention, (7, 16)),
    "shared": (Shared, (6,)),
    "transposed": (Transposed, (3, 9, 9)),
}


def make(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    build, shape = CASES[name]
    return settled(build(), *shape), shape


def batches(*shape: int, count: int = 6, size: int = 24, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *shape, generator=generator) for _ in range(count)]


def distance(one: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((one(x) - other(x)).square().mean())


def plan_for(model: nn.Module, *shape: int, ratio: float = 0.4) -> prunus.Plan:
    result = prunus.prune(model, torch.randn(1, *shape), prunus.Target(ratio=ratio))
    result.undo()
    return result.plan


@pytest.mark.parametrize("name", CASES)
def test_repair_comes_nearer_to_the_dense_model_on_new_inputs(name, model_state, states_equal) -> None:
    model, shape = make(name)
    dense, cut, before = copy.deepcopy(model), copy.deepcopy(model), model_state(model)
    plan = plan_for(model, *shape)
    plan.apply(cut)
    report = prunus.repair(model, plan, batches(*shape))
    x = batches(*shape, count=1, size=64, seed=2)[0]
    assert distance(model, dense, x) < 0.8 * distance(cut, dense, x)
    assert report.accepted
    assert report.after < report.before
    assert any(layer.accepted and layer.after < layer.before for layer in report.layers)
    assert all(layer.after <= layer.before for layer in report.layers if layer.before is not None)
    report.undo()
    assert states_equal(before, model_state(model))


def test_the_repaired_model_verifies_and_saves(tmp_path) -> None:
    model, shape = make("residual")
    other = copy.deepcopy(model)
    result = prunus.prune(model, torch.randn(1, *shape), data=batches(*shape))
    assert prunus.verify(model, torch.randn(1, *shape)).ok
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    result.plan.save(tmp_path / "plan.json")
    prunus.Plan.load(tmp_path / "plan.json").apply(other)
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert distance(model, other, torch.randn(4, *shape)) == 0


def test_prune_with_data_repairs_and_undoes_all(model_state, states_equal) -> None:
    model, shape = make("residual")
    dense, before = copy.deepcopy(model), model_state(model)
    result = prunus.prune(model, torch.randn(1, *shape), data=batches(*shape))
    cut = copy.deepcopy(dense)
    result.plan.apply(cut)
    x = torch.randn(32, *shape)
    assert distance(model, dense, x) < 0.5 * distance(cut, dense, x)
    assert "Repaired layers" in str(result)
    assert "held out" in str(result)
    result.undo()
    assert states_equal(before, model_state(model))


def test_a_cut_model_is_repaired_beside_its_dense_original(model_state, states_equal) -> None:
    dense, shape = make("attention")
    model, plan = copy.deepcopy(dense), plan_for(dense, *shape)
    plan.apply(model)
    before, original = model_state(model), model_state(dense)
    report = prunus.repair(model, plan, batches(*shape), dense=dense)
    assert report.after < report.before
    report.undo()
    assert states_equal(before, model_state(model))
    assert states_equal(original, model_state(dense))


def test_streams_that_drifted_are_made_up_for() -> None:
    model, shape = make("residual")
    report = prunus.repair(model, plan_for(model, *shape), batches(*shape))
    assert {layer.layer for layer in report.layers if layer.corrected} == {"two"}


def test_a_layer_without_bias_uses_the_mean_of_its_norm() -> None:
    model, shape = make("residual")
    mean = model.norm2.running_mean.clone()
    report = prunus.repair(model, plan_for(model, *shape), batches(*shape), norms=False)
    assert next(layer for layer in report.layers if layer.layer == "two").accepted
    assert model.two.bias is None
    assert not torch.isclose(model.norm2.running_mean, mean[: len(model.norm2.running_mean)]).any()


def test_momentum_and_counts_of_norms_stay() -> None:
    model, shape = make("residual")
    before = int(model.norm1.num_batches_tracked), model.norm1.momentum, model.training
    prunus.repair(model, plan_for(model, *shape), batches(*shape))
    assert (int(model.norm1.num_batches_tracked), model.norm1.momentum, model.training) == before


def test_mixed_precision_models_are_repaired() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    model = Mixed().eval()
    report = prunus.repair(model, plan_for(model, 8), batches(8, size=64))
    assert report.after < report.before
    assert [layer.layer for layer in report.layers if layer.accepted] == ["inner.2", "inner.4"]


def test_batches_of_any_form_and_labels_are_taken() -> None:
    model, shape = make("residual")
    plan = plan_for(model, *shape)
    labelled = [(x, torch.zeros(len(x))) for x in batches(*shape)]
    report = prunus.repair(model, plan, iter(labelled), input_fn=lambda batch: {"x": batch[0]}, samples=100)
    assert report.samples == (120, 24)


def test_an_interrupt_while_layers_are_solved_leaves_the_model_as_it_was(
    model_state, states_equal, monkeypatch
) -> None:
    model, shape = make("residual")
    plan, before = plan_for(model, *shape), model_state(model)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["prunus.repair.sweep"], "refit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prunus.repair(model, plan, batches(*shape))
    assert states_equal(before, model_state(model))


def test_what_does_not_help_is_not_done() -> None:
    """Two samples to fit on say nothing about others: the weights that the cut left are no worse."""
    model, shape = make("residual")
    cut, dense = copy.deepcopy(model), copy.deepcopy(model)
    plan = plan_for(model, *shape)
    plan.apply(cut)
    report = prunus.repair(model, plan, batches(*shape, count=1, size=3))
    assert report.after <= report.before
    x = torch.randn(64, *shape)
    assert distance(model, dense, x) < 1.2 * distance(cut, dense, x)


def test_layers_that_are_too_wide_are_left_and_named() -> None:
    model, shape = make("residual")
    report = prunus.repair(model, plan_for(model, *shape), batches(*shape), widest=50)
    assert {layer.layer for layer in report.layers} == {"one", "head"}
    assert "two.weight keeps its weights: its outputs sum over" in str(report)


def test_a_layer_that_runs_several_times_may_go_on_without_beginning_anew(monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["prunus.repair.sweep"], "MOST_RESTARTS", 0)
    model, shape = make("shared")
    dense, cut, plan = copy.deepcopy(model), copy.deepcopy(model), plan_for(model, *shape)
    plan.apply(cut)
    report = prunus.repair(model, plan, batches(*shape))
    x = torch.randn(64, *shape)
    assert distance(model, dense, x) < distance(cut, dense, x)
    assert report.after < report.before


def test_weights_in_one_block_of_memory_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    plan, separate = plan_for(model, 6), copy.deepcopy(model)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    for parameter, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
        parameter.data = part.view(parameter.shape)
    one, other = (prunus.repair(m, plan, batches(6)) for m in (model, separate))
    assert one.after == pytest.approx(other.after, rel=1e-4)


def test_parameters_over_the_same_memory_stay_so() -> None:
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4)).eval()
    twin = nn.Linear(24, 24)
    twin.weight.data = model[2].weight.data
    model.insert(3, nn.Sequential(nn.ReLU(), twin))
    assert model[3][1].weight.data_ptr() == model[2].weight.data_ptr()
    report = prunus.repair(model, plan_for(model, 6), batches(6))
    assert any(layer.layer == "2" and layer.accepted for layer in report.layers)
    assert model[3][1].weight.data_ptr() == model[2].weight.data_ptr()


def test_a_repaired_model_can_be_trained() -> None:
    model, shape = make("residual")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    prunus.prune(model, torch.randn(1, *shape), data=batches(*shape), optimizer=optimizer)
    model.train()
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(8, *shape)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_page_about_repair_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "repair.md").read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile("\n" * text.count("\n", 0, block.start(1)) + block[1], "repair.md", "exec"), namespace)
    assert len(blocks) == 5


class Tied(nn.Module):
    """The head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.outer = nn.Embedding(30, 16), nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, tokens):
        x = self.embedding(tokens)
        return F.linear(x + self.outer(torch.tanh(self.inner(x))), self.embedding.weight)


def tokens(seed: int) -> torch.Tensor:
    return torch.randint(0, 30, (16, 6), generator=torch.Generator().manual_seed(seed))


def test_a_head_tied_to_an_embedding_keeps_its_weights_where_new_ones_harm_what_looks_them_up() -> None:
    model = Tied().eval()
    dense, cut = copy.deepcopy(model), copy.deepcopy(model)
    plan = prunus.prune(cut, tokens(0), prunus.Target(ratio=0.4)).plan
    report = prunus.repair(model, plan, [tokens(k) for k in range(5)])
    x = tokens(4)  # held out
    with torch.no_grad():
        error = float((model(x) - dense(x)).square().sum() / (dense(x) - dense(x).mean()).square().sum())
    assert report.after == pytest.approx(error, rel=1e-3)
    assert torch.equal(model.embedding.weight, cut.embedding.weight)
    assert "embedding looks up rows of it too" in str(report).replace("\n", " ")


class Inverted(nn.Module):
    """A norm that reads a stream, and one that reads a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(6, 24), nn.BatchNorm1d(24), nn.Linear(24, 24)
        self.norm2, self.three = nn.BatchNorm1d(24), nn.Linear(24, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.one(x)))
        return self.three(F.relu(self.norm2(x + self.two(x))))


@pytest.mark.parametrize("inverted", [False, True])
def test_norms_behind_fitted_layers_only_are_not_computed_anew(inverted, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(closed_form, "reestimate", lambda *args: calls.append(args) or 0)
    model, shape = (Inverted().eval(), (6,)) if inverted else make("residual")
    report = prunus.repair(model, plan_for(model, *shape), batches(*shape))
    assert report.accepted
    assert len(calls) == inverted
