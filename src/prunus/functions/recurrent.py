"""One recurrent layer at a time: LSTM, GRU and RNN, every stacked layer and both directions of it.

A recurrent weight holds its gates one below the other, `(gates * hidden, width)`, so a hidden unit is one row of every
gate, one column of the recurrent weight, and one column of the layer stacked above it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import nn

from prunus.functions._edit import Edit, Indices

__all__ = [
    "prune_gru_in_channels",
    "prune_gru_out_channels",
    "prune_lstm_in_channels",
    "prune_lstm_out_channels",
    "prune_rnn_in_channels",
    "prune_rnn_out_channels",
]

RecurrentT = TypeVar("RecurrentT", bound=nn.RNNBase)


def prune_lstm_out_channels(layer: nn.LSTM, idxs: Indices, inplace: bool = True) -> nn.LSTM:
    """Remove hidden units of one LSTM, in place; whatever reads its output is the caller's to prune.

    All stacked layers and both directions lose the same units. With `proj_size` the output is the projection, so
    the indices are those of projected features, and the hidden units behind it stay.

    Args:
        layer: An LSTM with any number of layers and directions.
        idxs: Units to remove, each in `[0, layer.hidden_size)`, or in `[0, layer.proj_size)` where that is set. The
            output of a bidirectional layer is twice as wide: unit `u` is in its features `u` and `hidden_size + u`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, or no unit left; nothing was changed.

    Example:
        >>> prune_lstm_out_channels(nn.LSTM(10, 20, num_layers=2, bidirectional=True), range(5))
        LSTM(10, 15, num_layers=2, bidirectional=True)
    """
    return _prune_output(Edit(layer, nn.LSTM, "prune_lstm_out_channels", inplace), idxs)


def prune_lstm_in_channels(layer: nn.LSTM, idxs: Indices, inplace: bool = True) -> nn.LSTM:
    """Remove input features of one LSTM, in place; whatever produces them is the caller's to prune.

    Args:
        layer: An LSTM with any number of layers and directions.
        idxs: Input features to remove, each in `[0, layer.input_size)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, or no feature left; nothing was changed.
    """
    return _prune_input(Edit(layer, nn.LSTM, "prune_lstm_in_channels", inplace), idxs)


def prune_gru_out_channels(layer: nn.GRU, idxs: Indices, inplace: bool = True) -> nn.GRU:
    """Remove hidden units of one GRU, in place; whatever reads its output is the caller's to prune.

    Args:
        layer: A GRU with any number of layers and directions; all of them lose the same units.
        idxs: Units to remove, each in `[0, layer.hidden_size)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, or no unit left; nothing was changed.
    """
    return _prune_output(Edit(layer, nn.GRU, "prune_gru_out_channels", inplace), idxs)


def prune_gru_in_channels(layer: nn.GRU, idxs: Indices, inplace: bool = True) -> nn.GRU:
    """Remove input features of one GRU, in place, as `prune_lstm_in_channels` does; dependencies are the caller's."""
    return _prune_input(Edit(layer, nn.GRU, "prune_gru_in_channels", inplace), idxs)


def prune_rnn_out_channels(layer: nn.RNN, idxs: Indices, inplace: bool = True) -> nn.RNN:
    """Remove hidden units of one RNN, in place; whatever reads its output is the caller's to prune.

    Args:
        layer: An RNN with any number of layers and directions; all of them lose the same units.
        idxs: Units to remove, each in `[0, layer.hidden_size)`.
        inplace: Change `layer` itself (default) or a deep copy of it.

    Returns:
        The pruned layer.

    Raises:
        InputError: Wrong layer type, bad index, or no unit left; nothing was changed.
    """
    return _prune_output(Edit(layer, nn.RNN, "prune_rnn_out_channels", inplace), idxs)


def prune_rnn_in_channels(layer: nn.RNN, idxs: Indices, inplace: bool = True) -> nn.RNN:
    """Remove input features of one RNN, in place, as `prune_lstm_in_channels` does; dependencies are the caller's."""
    return _prune_input(Edit(layer, nn.RNN, "prune_rnn_in_channels", inplace), idxs)


def _parts(layer: nn.RNNBase) -> Iterator[tuple[int, str]]:
    """Give the depth and the name ending of every layer and direction inside `layer`."""
    for depth in range(layer.num_layers):
        yield depth, f"l{depth}"
        if layer.bidirectional:
            yield depth, f"l{depth}_reverse"


def _blocks(keep: Sequence[int], size: int, count: int) -> list[int]:
    """Repeat the kept positions in each of `count` consecutive blocks of `size`."""
    return [block * size + position for block in range(count) for position in keep]


def _gates(layer: nn.RNNBase) -> int:
    return 4 if isinstance(layer, nn.LSTM) else 3 if isinstance(layer, nn.GRU) else 1


def _prune_output(edit: Edit[RecurrentT], idxs: Indices) -> RecurrentT:
    layer = edit.layer
    width: int = layer.proj_size or layer.hidden_size
    keep = edit.keep(idxs, width, "projected feature" if layer.proj_size else "hidden unit")
    above = _blocks(keep, width, 2 if layer.bidirectional else 1)
    rows: list[tuple[int, Sequence[int]]] = [] if layer.proj_size else [(0, _blocks(keep, width, _gates(layer)))]
    for depth, name in _parts(layer):
        columns: list[tuple[int, Sequence[int]]] = [(1, above)] if depth else []
        edit.cut(f"weight_ih_{name}", *rows, *columns)
        edit.cut(f"weight_hh_{name}", *rows, (1, keep))
        if layer.bias:
            edit.cut(f"bias_ih_{name}", *rows)
            edit.cut(f"bias_hh_{name}", *rows)
        if layer.proj_size:
            edit.cut(f"weight_hr_{name}", (0, keep))
    edit.set(**{"proj_size" if layer.proj_size else "hidden_size": len(keep)})
    return _commit(edit)


def _prune_input(edit: Edit[RecurrentT], idxs: Indices) -> RecurrentT:
    keep = edit.keep(idxs, edit.layer.input_size, "input feature")
    for depth, name in _parts(edit.layer):
        if depth == 0:
            edit.cut(f"weight_ih_{name}", (1, keep))
    edit.set(input_size=len(keep))
    return _commit(edit)


def _commit(edit: Edit[RecurrentT]) -> RecurrentT:
    """Commit, then let cuDNN lay the weights out in one piece again (does nothing elsewhere)."""
    layer = edit.commit()
    layer.flatten_parameters()
    return layer
