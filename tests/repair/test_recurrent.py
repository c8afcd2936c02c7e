"""Recurrent layers are refitted product by product; a trained tagger gets better by it on new sequences."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import prunus
from prunus.repair.recurrent import Gates
from prunus.repair.watch import Watch, Weights


class Tagger(nn.Module):
    """Tags each token by what came before (and after) it."""

    def __init__(self, kind=nn.LSTM, **options) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.rnn = kind(16, options.pop("width", 32), batch_first=True, **options)
        width = self.rnn.proj_size if getattr(self.rnn, "proj_size", 0) else self.rnn.hidden_size
        self.head = nn.Linear(width * (1 + self.rnn.bidirectional), 4)

    def forward(self, tokens):
        return self.head(self.rnn(self.embed(tokens))[0])


def sentences(count: int, seed: int, length: int = 14) -> torch.Tensor:
    return torch.randint(0, 12, (count, length), generator=torch.Generator().manual_seed(seed))


def tags(tokens: torch.Tensor) -> torch.Tensor:
    """A counter that some tokens move and some set back."""
    state, found = torch.zeros(len(tokens), dtype=torch.long), []
    for token in tokens.t():
        state = torch.where(token == 0, 0, (state + (token % 3 == 1) + 2 * (token == 5)) % 4)
        found.append(state)
    return torch.stack(found, 1)


def trained(model: nn.Module, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(steps):
        tokens = sentences(64, seed=step)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tags(tokens).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def right(model: nn.Module) -> float:
    tokens = sentences(256, seed=10_000)
    with torch.no_grad():
        return float((model(tokens).argmax(-1) == tags(tokens)).float().mean())


def data(first: int = 50_000) -> list[torch.Tensor]:
    return [sentences(64, seed=first + k) for k in range(6)]


def plan_for(model: nn.Module, ratio: float = 0.5) -> prunus.Plan:
    return prunus.prune(copy.deepcopy(model), sentences(2, seed=1), prunus.Target(ratio=ratio)).plan


def test_a_trained_tagger_gets_better_on_new_sequences(monkeypatch) -> None:
    model = trained(Tagger(), steps=120)
    plan = plan_for(model)
    cut, heads_only, repaired = (copy.deepcopy(model) for _ in range(3))
    plan.apply(cut)
    report = prunus.repair(repaired, plan, data())
    monkeypatch.setattr(sys.modules["prunus.repair.watch"], "RECURRENT", frozenset())
    prunus.repair(heads_only, plan, data())
    assert right(model) > 0.95
    assert right(repaired) > max(right(cut), right(heads_only)) + 0.05
    names = [layer.layer for layer in report.layers if layer.accepted]
    assert names == ["rnn.weight_hh_l0", "rnn.weight_ih_l0", "head"]


class Cells(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(12, 16), kind(16, 24), nn.Linear(24, 4)

    def forward(self, tokens):
        state = None
        for x in self.embed(tokens).unbind(1):
            state = self.cell(x, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Packed(nn.Module):
    """Sequences of several lengths, packed; also the last states count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.rnn = nn.GRU(16, 24, bidirectional=True)
        self.head = nn.Linear(48, 4)

    def forward(self, tokens):
        lengths = 5 + tokens[:, 0] % 9
        packed = pack_padded_sequence(self.embed(tokens).transpose(0, 1), lengths, enforce_sorted=False)
        found, last = self.rnn(packed)
        return self.head(pad_packed_sequence(found)[0].sum(0)), self.head(last.transpose(0, 1).flatten(1))


KINDS = {
    "LSTM in two directions and two layers": lambda: Tagger(nn.LSTM, num_layers=2, bidirectional=True),
    "GRU": lambda: Tagger(nn.GRU),
    "RNN without bias": lambda: Tagger(nn.RNN, bias=False),
    "LSTM with projections": lambda: Tagger(nn.LSTM, proj_size=12),
    "LSTM cells": lambda: Cells(nn.LSTMCell),
    "GRU cells": lambda: Cells(nn.GRUCell),
    "packed sequences": Packed,
}


def gap(one: nn.Module, other: nn.Module) -> float:
    tokens = sentences(64, seed=10_000)
    with torch.no_grad():
        pairs = zip(prunus.tracing.tensors_in(one(tokens)), prunus.tracing.tensors_in(other(tokens)), strict=True)
        return float(sum((a - b).square().mean() for a, b in pairs))


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers_of_every_kind_are_refitted(kind, model_state, states_equal) -> None:
    model = KINDS[kind]().eval()
    before, dense, cut, plan = model_state(model), copy.deepcopy(model), copy.deepcopy(model), plan_for(model)
    plan.apply(cut)
    report = prunus.repair(model, plan, data())
    assert gap(model, dense) < 0.7 * gap(cut, dense)
    refitted = {layer.layer.rpartition(".")[2] for layer in report.layers if layer.accepted}
    assert any(name.startswith("weight_hh") for name in refitted)
    assert any(name.startswith("weight_ih") for name in refitted)
    assert (kind == "LSTM with projections") == ("weight_hr_l0" in refitted)
    report.undo()
    assert states_equal(before, model_state(model))


class Bare(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x, *rest):
        return self.rnn(x, *rest)


def flat(value) -> list[torch.Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in flat(v)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"proj_size": 3, "bidirectional": True}),
        (nn.GRU, {"num_layers": 2, "bidirectional": True, "bias": False}),
        (nn.RNN, {"nonlinearity": "relu", "batch_first": True}),
    ],
)
def test_layer_by_layer_is_the_same_and_states_are_those_before_each_step(kind, options, packed) -> None:
    model, x = Bare(kind(5, 6, **options)), torch.randn(7, 4, 5)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([7, 2, 7, 4]), enforce_sorted=False)
    seen = []
    watch = Watch(Weights(model), after=lambda *a: seen.append((a[5], a[4])) if a[5] is not None else None)
    with torch.inference_mode():
        expected = flat(model(x))
        with watch:
            found = flat(model(x))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    ways = 1 + model.rnn.bidirectional
    projected = bool(getattr(model.rnn, "proj_size", 0))
    assert len(seen) == (2 + projected) * ways * model.rnn.num_layers
    hidden = [use for use, _ in seen if "weight_hh" in use.key.name]
    assert all(isinstance(use.call, Gates) for use, _ in seen)
    if projected:  # what is projected gives the outputs
        last = [output for use, output in seen if "weight_hr" in use.key.name]
        outs = expected[0] if packed else expected[0].transpose(0, 1)
        assert torch.allclose(torch.cat(last, -1), outs, atol=1e-6)
    if not packed:
        outs = expected[0] if model.rnn.batch_first else expected[0].transpose(0, 1)
        size = outs.shape[-1] // ways
        last = hidden[-ways:]
        assert torch.allclose(last[0].call.x[:, 1:], outs[:, :-1, :size], atol=1e-6)
        assert ways == 1 or torch.allclose(last[1].call.x[:, :-1], outs[:, 1:, size:], atol=1e-6)


def test_padding_does_not_count() -> None:
    """Noise where there is padding spoils the fit unless it is masked."""
    model = Tagger(nn.GRU).eval()
    plan, dense = plan_for(model), copy.deepcopy(model)

    def padded(k: int) -> torch.Tensor:
        tokens = sentences(64, seed=70_000 + k) % 4 + 8  # real tokens are 8 to 11
        tokens[:, 4:] = sentences(64, seed=80_000 + k)[:, 4:] % 8
        return tokens

    batches = [padded(k) for k in range(6)]

    def error(**options) -> float:
        repaired = copy.deepcopy(dense)
        report = prunus.repair(repaired, plan, batches, **options)
        assert options == {} or {layer.rows for layer in report.layers} == {4 * 51 * 4}
        tokens = padded(99)
        with torch.no_grad():
            return float((repaired(tokens) - dense(tokens))[:, :4].square().mean())

    def real(tokens: torch.Tensor) -> torch.Tensor:
        return torch.arange(14).expand(len(tokens), 14) < 4

    assert error(mask_fn=real) < error()
    with pytest.raises(prunus.InputError, match="samples, places"):
        prunus.repair(copy.deepcopy(dense), plan, batches, mask_fn=lambda tokens: True)
