"""Refinement: nearer to the dense model on new inputs, undone bit for bit, and no trace where it fails."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prunus
from prunus.distill import refine
from prunus.errors import InputError


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(width, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.two, self.norm2 = nn.Conv2d(24, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu_(x + self.norm2(self.two(F.relu(self.norm1(self.one(x))))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(Block(16), Block(16))
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, 0.1, batch_first=True)
        self.norm2, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x, scale=1.0):
        y = self.norm1(x)
        x = x + scale * self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(2)), nn.Linear(16, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, scale=2.0)
        return self.head(x.mean(1))


CASES = {"cnn": (Net, (3, 8, 8)), "transformer": (Transformer, (7, 16))}


def batches(*shape: int, count: int = 6, size: int = 24, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, *shape, generator=generator) for _ in range(count)]


def distance(one: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((one(x) - other(x)).square().mean())


def cut(name: str) -> tuple[nn.Module, nn.Module, prunus.Plan, list[torch.Tensor]]:
    """A dense model with statistics of its own, what is left of it (repaired), the plan, and data."""
    torch.manual_seed(0)
    build, shape = CASES[name]
    model, data = build(), batches(*shape)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() > 1 else 1)  # far from linear: least squares leave something to do
        for x in data * 3:
            model(x)
    model.eval()
    dense = copy.deepcopy(model)
    plan = prunus.prune(model, data[0][:1], prunus.Target(ratio=0.5), data=data).plan
    return model, dense, plan, data


@pytest.mark.parametrize("name", CASES)
def test_refinement_comes_nearer_on_new_inputs_and_is_undone(name, model_state, states_equal) -> None:
    model, dense, plan, data = cut(name)
    x = batches(*CASES[name][1], count=1, size=128, seed=2)[0]
    before, own, random = distance(model, dense, x), model_state(model), torch.get_rng_state()
    buffers = {key: b.clone() for key, b in model.named_buffers()}
    theirs, parameters = model_state(dense), {key: id(p) for key, p in model.named_parameters()}
    report = refine(model, dense, plan, data, steps=50)
    assert distance(model, dense, x) < 0.95 * before
    assert report.accepted
    assert report.after < report.before
    part = {"cnn": "blocks", "transformer": "layers"}[name]
    assert [b.block for b in report.blocks] == [f"{part}.0", f"{part}.1", ""]
    assert any(b.accepted and b.after < b.before for b in report.blocks)
    assert all(torch.equal(b, buffers[key]) for key, b in model.named_buffers())
    assert parameters == {key: id(p) for key, p in model.named_parameters()}
    assert states_equal(theirs, model_state(dense))
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m.training for m in model.modules())
    assert "held out" in str(report)
    report.undo()
    assert states_equal(own, model_state(model))


def test_a_model_without_containers_is_refined_as_a_whole() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 64), nn.Linear(64, 3)

        def forward(self, x, shift):
            return self.two(torch.tanh(self.one(x + shift)))

    torch.manual_seed(0)
    model, data = Plain(), [(x, y) for x, y in zip(batches(8), batches(8, seed=3), strict=True)]
    dense = copy.deepcopy(model)
    plan = prunus.prune(model, data[0], data=data).plan
    report = refine(model, dense, plan, [{"x": x, "shift": y} for x, y in data], steps=50)
    assert [b.block for b in report.blocks] == [""]
    assert report.after < report.before
    assert "as a whole" in str(report)


def test_what_does_not_get_better_goes_back(model_state, states_equal) -> None:
    model, dense, plan, data = cut("cnn")
    before = model_state(model)
    report = refine(model, dense, plan, data, steps=3, rate=30.0)
    assert not report.accepted
    assert all(b.reason and b.after == b.before for b in report.blocks)
    assert report.after == report.before
    assert states_equal(before, model_state(model))
    assert report.receipt.changes == []


def test_only_named_blocks_and_parameters_that_may_be_trained_change() -> None:
    model, dense, plan, data = cut("transformer")
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    model.layers[0].up.weight.requires_grad_(False)
    assert refine(model, dense, plan, data, steps=50, blocks=["layers.0"]).accepted
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == {f"layers.0.{key}" for key, _ in model.layers[0].named_parameters()} - {"layers.0.up.weight"}


def test_tied_parameters_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2)))
    model[1][2].weight = model[0][2].weight
    dense, data = copy.deepcopy(model), batches(8)
    plan = prunus.prune(model, data[0], data=data).plan
    tied = model[0][2].weight.detach().clone()
    report = refine(model, dense, plan, data, steps=50)
    assert any(b.accepted for b in report.blocks)
    assert torch.equal(model[0][2].weight, tied)
    assert model[1][2].weight is model[0][2].weight


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 9, 30])
def test_an_interrupt_leaves_the_model_as_it_was(error, call, model_state, states_equal) -> None:
    model, dense, plan, data = cut("cnn")
    before, theirs = model_state(model), model_state(dense)
    calls = iter(range(1, 10_000))

    def forward(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        if next(calls) == call:
            raise error("stop")
        return model(inputs)

    with pytest.raises(InputError if error is RuntimeError else error):
        refine(model, dense, plan, data, steps=5, forward_fn=forward)
    assert next(calls) == call + 1
    assert states_equal(before, model_state(model))
    assert states_equal(theirs, model_state(dense))


def failing(data: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    yield data[0]
    raise OSError("disk")


def test_wrong_arguments_are_told_and_nothing_changes(model_state, states_equal) -> None:
    model, dense, plan, data = cut("transformer")
    before = model_state(model)
    with pytest.raises(InputError, match="at least one step"):
        refine(model, dense, plan, data, steps=0)
    with pytest.raises(InputError, match="are the same"):
        refine(model, model, plan, data)
    with pytest.raises(InputError, match="no module 'nowhere'"):
        refine(model, dense, plan, data, blocks=["nowhere"])
    with pytest.raises(InputError, match="twice"):
        refine(model, dense, plan, data, blocks=["layers.0", "layers.0.up"])
    with pytest.raises(InputError, match="0 times"):
        refine(model, dense, plan, data, blocks=["layers"])
    with pytest.raises(InputError, match="input_fn"):
        refine(model, dense, plan, [(x, torch.zeros(24)) for x in data])
    with pytest.raises(OSError, match="disk"):
        refine(model, dense, plan, failing(data))
    assert states_equal(before, model_state(model))


def test_few_batches_and_no_grad_mode_will_do() -> None:
    model, dense, plan, data = cut("transformer")
    with torch.inference_mode():
        report = refine(model, dense, plan, [(x,) for x in data[:2]], steps=50, blocks=["layers.0"])
    assert report.samples == (48, 10)
    assert report.blocks[0].after < report.blocks[0].before
