"""Recurrent kernels."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

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
