"""Recurrent kernels: the gates are rows of the hidden dim, and all of them are tied to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from prunus.labels import Dims, Label, Labelled
from prunus.rules.table import Op, rule

aten = torch.ops.aten


class _Direction(NamedTuple):
    hidden: Label | None
    cell: Label | None


@rule(aten.lstm.input)
def lstm(
    op: Op, x: Labelled, hx: Sequence[Labelled], params: Sequence[Labelled], has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> list[Dims | None]:  # fmt: skip
    """A stack of LSTM layers on padded sequences."""
    return _stack(op, x, hx, params, has_biases, num_layers, bidirectional, 4)


@rule(aten.lstm.data)
def lstm_packed(
    op: Op, x: Labelled, batch_sizes: Labelled, hx: Sequence[Labelled], params: Sequence[Labelled], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool,
) -> list[Dims | None]:  # fmt: skip
    """A stack of LSTM layers on packed sequences."""
    return _stack(op, x, hx, params, has_biases, num_layers, bidirectional, 4)


@rule(aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def gru(
    op: Op, x: Labelled, hx: Labelled, params: Sequence[Labelled], has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> list[Dims | None]:  # fmt: skip
    """A stack of GRU or plain recurrent layers on padded sequences."""
    return _stack(op, x, [hx], params, has_biases, num_layers, bidirectional, 3 if op.name == "gru" else 1)


@rule(aten.gru.data, aten.rnn_tanh.data, aten.rnn_relu.data)
def gru_packed(
    op: Op, x: Labelled, batch_sizes: Labelled, hx: Labelled, params: Sequence[Labelled], has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool,
) -> list[Dims | None]:  # fmt: skip
    """A stack of GRU or plain recurrent layers on packed sequences."""
    return _stack(op, x, [hx], params, has_biases, num_layers, bidirectional, 3 if op.name == "gru" else 1)


@rule(aten._pack_padded_sequence)
def pack(op: Op, x: Labelled, lengths: Labelled, batch_first: bool) -> list[Dims | None]:
    """Time and batch become one dim; the features pass."""
    return [(None, *x.dims[2:]), None]


@rule(aten._pad_packed_sequence)
def unpack(op: Op, x: Labelled, *args: Any) -> list[Dims | None]:
    """One dim becomes time and batch again; the features pass."""
    return [(None, None, *x.dims[1:]), None]


def _stack(
    op: Op, x: Labelled, states: Sequence[Labelled], params: Sequence[Labelled], biased: bool, layers: int,
    bidirectional: bool, gates: int,
) -> list[Dims | None]:  # fmt: skip
    """All layers and directions; their hidden sizes are one number, so they stay equally wide."""
    directions = 2 if bidirectional else 1
    each = len(params) // (layers * directions)
    steps = int(np.prod(x.shape[:-1]))
    op.freeze(x.dims[:-1], f"{op.name} counts steps or sequences along it")
    signal = x.dims[-1]
    made: list[_Direction] = []
    for layer in range(layers):
        current = []
        for k in range(directions):
            first = (layer * directions + k) * each
            current.append(_layer(op, signal, params[first : first + each], biased, gates, steps))
        made += current
        signal = _join(op, [d.hidden for d in current])
    _keep_equal(op, [d.hidden for d in made], states[0])
    if len(states) > 1:
        _keep_equal(op, [d.cell for d in made], states[1])
    lead: Dims = (None,) * (x.ndim - 1)
    finals = [_final([d.hidden for d in made], states[0].ndim)]
    if len(states) > 1:
        finals.append(_final([d.cell for d in made], states[1].ndim))
    return [(*lead, signal), *finals]


def _layer(op: Op, x: Label | None, params: Sequence[Labelled], biased: bool, gates: int, steps: int) -> _Direction:
    """One layer in one direction: every gate's row j, the cell and the hidden state's j live together."""
    inputs, recurrent = params[0], params[1]
    biases = list(params[2:4]) if biased else []
    projection = params[-1] if len(params) > 2 + len(biases) else None
    if inputs.shape[1] > 1:
        op.couple(x, inputs.dims[1])
    hidden = recurrent.dims[1]
    cell = projection.dims[1] if projection is not None else hidden
    op.reads(inputs.dims[1])
    if cell is not None:
        for row in (inputs, recurrent, *biases):
            stacked = row.dims[0]
            if stacked is not None:
                op.ledger.tie(cell.ids, op.ledger.unite(stacked.ids.reshape(gates, -1), 0, fixed=True))
    else:
        op.freeze([row.dims[0] for row in (inputs, recurrent, *biases)], "they are the gates of a single hidden unit")
    if projection is not None and hidden is not None:
        op.couple(hidden, projection.dims[0])
    for weight in (inputs, recurrent, projection):
        if weight is not None:
            op.count(steps, (weight.shape[0], weight.dims[0]), (weight.shape[1], weight.dims[1]))
    return _Direction(hidden, cell)


def _join(op: Op, labels: Sequence[Label | None]) -> Label | None:
    known = [label for label in labels if label is not None]
    if len(known) < len(labels):
        return None
    return known[0] if len(known) == 1 else Label(np.concatenate([label.ids for label in known]))


def _keep_equal(op: Op, labels: Sequence[Label | None], state: Labelled) -> None:
    """The initial state has one width for all layers: each part is tied to its layer, or only as wide if uniform."""
    op.freeze(state.dims[:-1], "it counts layers, directions or sequences of an initial state")
    if any(label is None for label in labels):
        return
    known = [label for label in labels if label is not None]
    op.ledger.balance(np.stack([label.ids for label in known]), "the layers of a recurrent module have one hidden size")
    start = state.dims[-1]
    if start is not None and id(start.ids) in op.ledger.uniform:
        for label in known:
            op.ledger.balance(np.stack([start.ids, label.ids]), "the initial state is as wide as the hidden one")
        return
    if start is None:
        op.freeze(known, "the initial state has a fixed size")
        return
    parts = start.over(range(state.ndim - 1))  # one for each layer, or one for all
    for k, label in enumerate(known):
        part = parts[k % len(parts)]
        op.ledger.tie(np.broadcast_to(label.ids, part.shape), part)


def _final(labels: Sequence[Label | None], ndim: int) -> Dims:
    known = [label.ids for label in labels if label is not None]
    if len(known) < len(labels):
        return (None,) * ndim
    last = Label(known[0]) if len(known) == 1 else Label(np.stack(known), (0,))
    return (*[None] * (ndim - 1), last)
