"""Recurrent kernels."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import prunus

NETWORKS = [
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.l(s.p(x))[0]), p=nn.Linear(6, 6), l=nn.LSTM(6, 8, batch_first=True), q=nn.Linear(8, 3)
        ),
        torch.randn(2, 5, 6),
        14,
        0.995,
        id="lstm",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.l(s.p(x))[0]), p=nn.Linear(6, 6), l=nn.LSTM(6, 8, 2, batch_first=True), q=nn.Linear(8, 3)
        ),
        torch.randn(2, 5, 6),
        14,
        0.997,
        id="lstm2",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.l(s.p(x))[0]), p=nn.Linear(6, 6), l=nn.LSTM(6, 8, bidirectional=True), q=nn.Linear(16, 3)
        ),
        torch.randn(2, 5, 6),
        14,
        0.997,
        id="lstm-bi",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.l(s.p(x))[0]), p=nn.Linear(6, 6), l=nn.LSTM(6, 8, proj_size=4), q=nn.Linear(4, 3)
        ),
        torch.randn(2, 5, 6),
        18,
        0.994,
        id="lstm-proj",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.l(s.p(x))[0]),
            p=nn.Linear(6, 6),
            l=nn.LSTM(6, 8, 2, bidirectional=True, proj_size=4),
            q=nn.Linear(8, 3),
        ),
        torch.randn(2, 5, 6),
        18,
        0.998,
        id="lstm-bi2-proj",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.l(s.p(x))[0]), p=nn.Linear(6, 6), l=nn.GRU(6, 8), q=nn.Linear(8, 3)),
        torch.randn(2, 5, 6),
        14,
        0.993,
        id="gru",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.l(s.p(x))[0]),
            p=nn.Linear(6, 6),
            l=nn.GRU(6, 8, 2, bidirectional=True),
            q=nn.Linear(16, 3),
        ),
        torch.randn(2, 5, 6),
        14,
        0.999,
        id="gru-bi2",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.l(s.p(x))[0]), p=nn.Linear(6, 6), l=nn.RNN(6, 8), q=nn.Linear(8, 3)),
        torch.randn(2, 5, 6),
        14,
        0.985,
        id="rnn",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.l(s.p(x))[0]), p=nn.Linear(6, 6), l=nn.RNN(6, 8, nonlinearity="relu"), q=nn.Linear(8, 3)
        ),
        torch.randn(2, 5, 6),
        14,
        0.985,
        id="rnn-relu",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.l(s.p(x))[0]), p=nn.Linear(6, 6), l=nn.LSTM(6, 8, bias=False), q=nn.Linear(8, 3)
        ),
        torch.randn(2, 5, 6),
        14,
        0.994,
        id="lstm-nobias",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.l(x)[1][0][-1]), l=nn.LSTM(6, 8, 2), q=nn.Linear(8, 3)),
        torch.randn(2, 5, 6),
        8,
        0.997,
        id="lstm-hn",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(
                nn.utils.rnn.pad_packed_sequence(
                    s.l(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True))[0],
                    batch_first=True,
                )[0]
            ),
            l=nn.LSTM(6, 8, batch_first=True),
            q=nn.Linear(8, 3),
        ),
        torch.randn(2, 5, 6),
        8,
        0.994,
        id="lstm-packed",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.l(x, s.h0.expand(-1, x.shape[1], -1).contiguous())[0]),
            l=nn.GRU(6, 8),
            h0=nn.Parameter(torch.randn(1, 1, 8)),
            q=nn.Linear(8, 3),
        ),
        torch.randn(2, 5, 6),
        8,
        0.993,
        id="gru-h0",
    ),
    pytest.param(
        lambda net: net.Net(
            lambda s, x: s.q(s.l(x, torch.zeros(1, x.shape[1], s.l.hidden_size))[0]), l=nn.GRU(6, 8), q=nn.Linear(8, 3)
        ),
        torch.randn(2, 5, 6),
        8,
        0.993,
        id="gru-h0-zeros-attr",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.l(x, s.l(x))[0]), l=nn.LSTMCell(6, 8), q=nn.Linear(8, 3)),
        torch.randn(3, 6),
        8,
        0.994,
        id="lstm-cell",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.l(x, s.l(x))), l=nn.GRUCell(6, 8), q=nn.Linear(8, 3)),
        torch.randn(3, 6),
        8,
        0.993,
        id="gru-cell",
    ),
    pytest.param(
        lambda net: net.Net(lambda s, x: s.q(s.l(x, s.l(x))), l=nn.RNNCell(6, 8), q=nn.Linear(8, 3)),
        torch.randn(3, 6),
        8,
        0.981,
        id="rnn-cell",
    ),
]


@pytest.mark.parametrize(("build", "inputs", "bundles", "share"), NETWORKS)
def test_network(oracle, networks, build, inputs, bundles, share) -> None:
    """Symmetry, silence, cost, replay and undo hold around the op, and as much can be removed as expected."""
    if bundles == 0:
        with pytest.raises(prunus.NothingToPruneError):
            oracle(build(networks), inputs)
        return
    if bundles is None:  # it must be sound; how much can be removed is open
        with contextlib.suppress(prunus.NothingToPruneError):
            oracle(build(networks), inputs)
        return
    found = oracle(build(networks), inputs)
    assert (found.bundles, round(found.share, 3)) == (bundles, share)


OPTIONS = [
    {"batch_first": first, "bidirectional": both, "num_layers": layers}
    for first, both, layers in itertools.product((False, True), (False, True), (1, 2))
]
KINDS = [
    *((nn.LSTM, options) for options in OPTIONS),
    *((nn.LSTM, {**options, "proj_size": 4}) for options in OPTIONS),
    *((nn.GRU, options) for options in OPTIONS),
    *((nn.RNN, options) for options in OPTIONS),
]


def batch_of(s, x):
    return x.shape[0] if s.l.batch_first else x.shape[1]


def packed(s, x):
    """Sequences of several lengths."""
    lengths = torch.tensor([5, 3] if s.l.batch_first else [2, 2, 2, 1, 1])
    first = s.l.batch_first
    out, _ = s.l(pack_padded_sequence(s.p(x), lengths, batch_first=first, enforce_sorted=False))
    return s.q(pad_packed_sequence(out, batch_first=first)[0])


def from_zeros(s, x):
    """Initial states of sizes that the code computes from the layer's own."""
    layers = s.l.num_layers * (2 if s.l.bidirectional else 1)
    h = torch.zeros(layers, batch_of(s, x), s.l.proj_size or s.l.hidden_size)
    state = (h, torch.zeros(layers, batch_of(s, x), s.l.hidden_size)) if isinstance(s.l, nn.LSTM) else h
    return s.q(s.l(s.p(x), state)[0])


def from_learned(s, x):
    """Initial states that are parameters."""
    h, c = (t.expand(-1, batch_of(s, x), -1).contiguous() for t in (s.h, s.c))
    return s.q(s.l(s.p(x), (h, c) if isinstance(s.l, nn.LSTM) else h)[0])


def from_computed(s, x):
    """Initial states that another layer computes, all layers at once."""
    b = batch_of(s, x)
    h = s.i(x.mean(1 if s.l.batch_first else 0)).view(b, s.parts, -1).transpose(0, 1).contiguous()
    c = s.c.expand(-1, b, -1).contiguous()
    return s.q(s.l(s.p(x), (h, c) if isinstance(s.l, nn.LSTM) else h)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("forward", [packed, from_zeros, from_learned, from_computed])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_every_way_to_run_a_layer(oracle, networks, kind, options, forward) -> None:
    """Layouts, directions, layers, projections and initial states: sound, and nearly everything may be pruned."""
    width = options.get("proj_size", 8)
    parts = options["num_layers"] * (2 if options["bidirectional"] else 1)
    members = {"h": nn.Parameter(torch.randn(parts, 1, width)), "c": nn.Parameter(torch.randn(parts, 1, 8))}
    if forward is from_computed:
        members = {**members, "i": nn.Linear(6, width * parts), "parts": parts}
        del members["h"]
    model = networks.Net(
        forward,
        p=nn.Linear(6, 7),
        l=kind(7, 8, **options),
        q=nn.Linear(width * (2 if options["bidirectional"] else 1), 3),
        **(members if forward in (from_learned, from_computed) else {}),
    )
    if forward is from_computed and kind is not nn.LSTM:
        del model.c
        model.c = torch.zeros(1, 1, 1)
    assert oracle(model, torch.randn(2, 5, 6)).share > 0.9


def one_by_one(s, x):
    state, out = None, []
    for t in range(x.shape[1]):
        state = s.c(s.p(x[:, t]), state)
        out.append(state[0] if isinstance(state, tuple) else state)
    return s.q(torch.stack(out, 1))


def one_by_one_from_zeros(s, x):
    h = x.new_zeros(x.shape[0], s.c.hidden_size)
    state, out = (h, h.clone()) if isinstance(s.c, nn.LSTMCell) else h, []
    for t in range(x.shape[1]):
        state = s.c(s.p(x[:, t]), state)
        out.append(state[0] if isinstance(state, tuple) else state)
    return s.q(torch.stack(out, 1))


@pytest.mark.parametrize("forward", [one_by_one, one_by_one_from_zeros])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_in_a_loop(oracle, networks, kind, forward) -> None:
    """A cell that runs step by step, with and without an initial state."""
    model = networks.Net(forward, p=nn.Linear(6, 7), c=kind(7, 8), q=nn.Linear(8, 3))
    assert oracle(model, torch.randn(2, 5, 6)).share > 0.9
