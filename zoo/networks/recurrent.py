"""Recurrent networks: every kernel of torch with its options, cells in a loop, and what people build from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from zoo.network import Builder, Network, Table


class Classifier(nn.Module):
    """Tokens in, classes out."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.rnn = kind(16, 24, **options)
        directions = 2 if self.rnn.bidirectional else 1
        self.head = nn.Linear((self.rnn.proj_size or 24) * directions, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.rnn(self.embedding(tokens))
        return self.head(states[:, -1] if self.rnn.batch_first else states[-1])


def _classifier(kind: type[nn.RNNBase], **options: Any) -> Builder:
    return lambda: Network(Classifier(kind, **options), torch.randint(0, 20, (3, 7)))


class LastState(nn.Module):
    """Reads the final state instead of the outputs."""

    def __init__(self, kind: type[nn.RNNBase], bidirectional: bool) -> None:
        super().__init__()
        self.rnn = kind(8, 24, num_layers=2, bidirectional=bidirectional, batch_first=True)
        self.head = nn.Linear(48 if bidirectional else 24, 5)

    def forward(self, x: Tensor) -> Tensor:
        _, state = self.rnn(x)
        state = state[0] if isinstance(state, tuple) else state
        last = torch.cat([state[-2], state[-1]], dim=-1) if self.rnn.bidirectional else state[-1]
        return self.head(last)


class Packed(nn.Module):
    """Sequences of several lengths, packed and padded again."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.rnn = kind(16, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(48, 5)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(states)


class Cells(nn.Module):
    """A cell in a Python loop."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell = kind(8, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class CellsWithZeros(nn.Module):
    """Two cells, whose first states the code makes from an attribute."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.hidden = hidden
        self.first, self.second = nn.LSTMCell(8, hidden), nn.GRUCell(hidden, hidden)
        self.head = nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], self.hidden, dtype=x.dtype)
        g = x.new_zeros(x.shape[0], self.hidden)
        found = []
        for part in x.unbind(1):
            h, c = self.first(part, (h, c))
            g = self.second(h, g)
            found.append(self.head(g))
        return torch.stack(found, dim=1)


class GivenState(nn.Module):
    """The first state is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(2, 1, 24))
        self.rnn = nn.GRU(8, 24, num_layers=2)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x, self.start.expand(-1, x.shape[1], -1).contiguous())[0])


class ConvLSTMCell(nn.Module):
    """Gates from one convolution, cut in four."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.conv = nn.Conv2d(width + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if state is None:
            zeros = torch.zeros(x.shape[0], self.hidden, *x.shape[2:], dtype=x.dtype)
            state = (zeros, zeros)
        h, c = state
        i, f, o, g = torch.split(self.conv(torch.cat([x, h], dim=1)), self.hidden, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class ConvLSTM(nn.Module):
    """Two convolutional LSTM layers over frames."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ConvLSTMCell(3, 12), ConvLSTMCell(12, 16)])
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, frames: Tensor) -> Tensor:
        states: list[Any] = [None, None]
        x = frames[:, 0]
        for step in range(frames.shape[1]):
            x = frames[:, step]
            for k, layer in enumerate(self.layers):
                states[k] = layer(x, states[k])
                x = states[k][0]
        return self.head(x)


class Seq2Seq(nn.Module):
    """Encoder, decoder that starts with its state, and dot-product attention over the encoder's outputs."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention
        self.source, self.target = nn.Embedding(20, 16), nn.Embedding(20, 16)
        self.encoder = nn.LSTM(16, 24, batch_first=True)
        self.decoder = nn.LSTM(16, 24, batch_first=True)
        self.mix = nn.Linear(48, 24) if attention else nn.Identity()
        self.head = nn.Linear(24, 20)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, state = self.encoder(self.source(source))
        states, _ = self.decoder(self.target(target), state)
        if self.attention:
            weights = torch.softmax(torch.bmm(states, memory.transpose(1, 2)), dim=-1)
            states = self.mix(torch.cat([states, torch.bmm(weights, memory)], dim=-1)).tanh()
        return self.head(states)


class Additive(nn.Module):
    """A decoder cell with additive attention, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(8, 12, bidirectional=True, batch_first=True)
        self.key, self.query, self.score = nn.Linear(24, 16), nn.Linear(20, 16), nn.Linear(16, 1)
        self.cell = nn.GRUCell(24, 20)
        self.head = nn.Linear(44, 5)

    def forward(self, x: Tensor) -> Tensor:
        memory, _ = self.encoder(x)
        keys = self.key(memory)
        state = memory.new_zeros(memory.shape[0], self.cell.hidden_size)
        found = []
        for _ in range(3):
            weights = self.score((keys + self.query(state).unsqueeze(1)).tanh()).softmax(1)
            context = (weights * memory).sum(1)
            state = self.cell(context, state)
            found.append(self.head(torch.cat([state, context], dim=-1)))
        return torch.stack(found, 1)


class Speech(nn.Module):
    """Convolutions over a spectrogram, channels times bands into a recurrent net, a norm, a head (DeepSpeech)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 8, 3, (2, 1), 1), nn.BatchNorm2d(8), nn.Hardtanh(0, 20))
        self.rnn = nn.GRU(8 * 8, 24, bidirectional=True, num_layers=2)
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, c, bands, time = x.shape
        x, _ = self.rnn(x.view(n, c * bands, time).permute(2, 0, 1))
        x = x.view(x.shape[0], n, 2, -1).sum(2)
        return self.head(self.norm(x)).log_softmax(-1)


class Tagger(nn.Module):
    """Characters by convolution, words by embedding, bidirectional LSTM, tags."""

    def __init__(self) -> None:
        super().__init__()
        self.chars, self.words = nn.Embedding(20, 8), nn.Embedding(30, 12)
        self.conv = nn.Conv1d(8, 16, 3, padding=1)
        self.rnn = nn.LSTM(28, 24, bidirectional=True, batch_first=True)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(48, 7)

    def forward(self, words: Tensor, chars: Tensor) -> Tensor:
        n, t, c = chars.shape
        x = self.conv(self.chars(chars.view(n * t, c)).transpose(1, 2)).amax(-1).view(n, t, -1)
        return self.head(self.drop(self.rnn(torch.cat([self.words(words), x], -1))[0]))


class ByHand(nn.Module):
    """An LSTM written out, with one matrix for all gates and layer norms (chunked)."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 4 * hidden, bias=False), nn.Linear(hidden, 4 * hidden)
        self.start = nn.Parameter(torch.randn(hidden) * 0.1)
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = c = self.start.expand(x.shape[0], -1)
        for step in range(x.shape[1]):
            i, f, g, o = (self.inner(x[:, step]) + self.outer(h)).chunk(4, dim=-1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * self.norm(c).tanh()
        return self.head(h)


class MinimalGated(nn.Module):
    """A minimal gated unit whose weights are plain parameters, used through functional calls and matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(torch.randn(8, 32) * 0.2), nn.Parameter(torch.randn(16, 32) * 0.2)
        self.b, self.head = nn.Parameter(torch.zeros(32)), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.u.shape[0])
        for step in range(x.shape[1]):
            gate, candidate = (x[:, step] @ self.w + h @ self.u + self.b).chunk(2, -1)
            h = torch.lerp(h, candidate.tanh(), gate.sigmoid())
        return self.head(h)


def _numbers() -> Tensor:
    return torch.randn(3, 6, 8)


def table() -> Table:
    """Every network of the family, by name."""
    found: Table = {}
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        name = kind.__name__.lower()
        for layers in (1, 2, 3):
            found[f"{name}_{layers}"] = _classifier(kind, num_layers=layers, batch_first=True)
        found[f"{name}_bidirectional"] = _classifier(kind, num_layers=2, bidirectional=True, batch_first=True)
        found[f"{name}_time_first"] = _classifier(kind, num_layers=2)
        found[f"{name}_no_bias"] = _classifier(kind, bias=False, batch_first=True)
        found[f"{name}_last_state"] = lambda kind=kind: Network(LastState(kind, False), _numbers())
        found[f"{name}_last_states"] = lambda kind=kind: Network(LastState(kind, True), _numbers())
        found[f"{name}_packed"] = lambda kind=kind: Network(
            Packed(kind), (torch.randint(0, 20, (3, 7)), torch.tensor([7, 4, 5]))
        )
    found["lstm_projected"] = _classifier(nn.LSTM, num_layers=2, proj_size=12, batch_first=True)
    found["lstm_projected_bidirectional"] = _classifier(
        nn.LSTM, num_layers=2, proj_size=12, bidirectional=True, batch_first=True
    )
    for cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        found[cell.__name__.lower()] = lambda cell=cell: Network(Cells(cell), _numbers())
    found["cells_with_zeros"] = lambda: Network(CellsWithZeros(), _numbers())
    found["given_state"] = lambda: Network(GivenState(), _numbers())
    found["conv_lstm"] = lambda: Network(ConvLSTM(), torch.randn(2, 3, 3, 8, 8))
    tokens = (3, 6)
    for name, attention in (("seq2seq", False), ("seq2seq_attention", True)):
        found[name] = lambda attention=attention: Network(
            Seq2Seq(attention), (torch.randint(0, 20, tokens), torch.randint(0, 20, tokens))
        )
    found["additive_attention"] = lambda: Network(Additive(), _numbers())
    found["speech"] = lambda: Network(Speech(), torch.randn(2, 1, 16, 10))
    found["tagger"] = lambda: Network(Tagger(), (torch.randint(0, 30, (2, 5)), torch.randint(0, 20, (2, 5, 6))))
    found["lstm_by_hand"] = lambda: Network(ByHand(), _numbers())
    found["minimal_gated"] = lambda: Network(MinimalGated(), _numbers())
    return found
