"""Recurrent layers as what they are made of: products with inputs and products with states, layer by layer.

A recurrent op hides its products. Here it is run one layer and one direction at a time, so that each product can be
seen, and refitted before it runs. What a product with states should read is known: the dense model's states at the
positions that are left (teacher forcing), since the pruned model shall have these. Inputs are those that the pruned
model gets, and their products make up for what the states no longer say, where both are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunus.repair.sites import Call, arguments

aten: Any = torch.ops.aten
NETWORKS = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
CELLS = frozenset({"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"})


@dataclass(frozen=True)
class Gates(Call):
    """A product in a recurrent layer.

    Args:
        forced: its inputs are states, to be taken from the dense model.
        beside: for products with inputs, that with states.
        added: how many of the outputs of both are added to each other, from the first on.
    """

    forced: bool = False
    beside: Call | None = None
    added: int = 0

    def product(self) -> Tensor:
        """What it computes."""
        return torch.nn.functional.linear(self.x, self.weight, self.bias)

    def forced_by(self, dense: Call, states: Tensor | None) -> Gates:
        """The same with the dense model's states at the positions that are left."""
        return replace(self, x=dense.x if states is None else dense.x[..., states]) if self.forced else self

    def missing(self, dense: Gates, states: Tensor, kept: Tensor, picked: Tensor) -> Tensor:
        """What the products with states lack, in rows of outputs: (rows, kept outputs)."""
        if dense.beside is None or self.beside is None:
            return self.weight.new_zeros(len(picked), len(kept))
        rows = dense.beside.x.reshape(-1, dense.beside.x.shape[-1])[picked]
        full = replace(Gates(**vars(dense.beside)), x=rows)
        left = replace(Gates(**vars(self.beside)), x=rows[:, states])
        return (full.product()[:, kept] - left.product()) * (kept < dense.added)


Before = Callable[[Gates], None]
After = Callable[[Gates], None]


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], before: Before, after: After) -> Any:
    """What a recurrent op returns; each product is shown to ``before``, and to ``after`` once its inputs are known."""
    a = arguments(func, args, kwargs)
    name = func.overloadpacket.__name__
    if name in CELLS:
        return _cell(name, func, a, before, after)
    if a["train"] and a["dropout"]:
        return func(*args, **kwargs)
    order = _Order.of(a)
    layers, ways = a["num_layers"], 1 + a["bidirectional"]
    each = len(a["params"]) // (layers * ways)
    states = a["hx"] if name == "lstm" else [a["hx"]]
    x = order.first(a["input"] if "input" in a else a["data"])
    lasts: list[list[Tensor]] = []
    for layer in range(layers):
        outs = []
        for way in range(ways):
            k = layer * ways + way
            one = _Layer(name, order, a["params"][k * each : (k + 1) * each], [s[k : k + 1] for s in states], way == 1)
            out, *last = one.run(x, a["has_biases"], before, after)
            outs.append(out)
            lasts.append(last)
        x = outs[0] if ways == 1 else torch.cat(outs, -1)
    return (order.back(x), *(torch.cat(parts) for parts in zip(*lasts, strict=True)))


@dataclass(frozen=True)
class _Order:
    """How samples and times are laid out: (samples, times, ...) inside, or rows of a packed sequence."""

    batch_first: bool
    sizes: Tensor | None

    @classmethod
    def of(cls, a: Mapping[str, Any]) -> _Order:
        return cls(a.get("batch_first", True), a.get("batch_sizes"))

    def first(self, x: Tensor) -> Tensor:
        return x if self.sizes is not None or self.batch_first else x.transpose(0, 1)

    back = first

    def turned(self, x: Tensor) -> Tensor:
        """The other way round in time; twice is nothing."""
        return x.flip(1) if self.sizes is None else x[self._opposite().to(x.device)]

    def before(self, out: Tensor, start: Tensor) -> Tensor:
        """The states before each step: ``start`` (samples, states), then those that the steps before gave."""
        if self.sizes is None:
            return torch.cat([start.unsqueeze(1), out[:, :-1]], 1)
        first = int(self.sizes[0])
        steps = torch.repeat_interleave(self.sizes[:-1], self.sizes[1:]).to(out.device)
        rows = torch.arange(first, len(out), device=out.device) - steps
        return torch.cat([start[:first], out[rows]])

    def cells(self, gates: Tensor, start: Tensor) -> Tensor:
        """What an LSTM projects at each step, from its gates and the first cells (samples, cells)."""
        steps = gates.unbind(1) if self.sizes is None else gates.split(self.sizes.tolist())
        found, cell = [], start
        for step in steps:
            enter, keep, new, leave = step.chunk(4, -1)
            cell = keep.sigmoid() * cell[: len(step)] + enter.sigmoid() * new.tanh()
            found.append(leave.sigmoid() * cell.tanh())
        return torch.stack(found, 1) if self.sizes is None else torch.cat(found)

    def _opposite(self) -> Tensor:
        sizes = self.sizes if self.sizes is not None else torch.zeros(0, dtype=torch.long)
        starts = sizes.cumsum(0) - sizes
        time = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        sample = torch.arange(int(sizes.sum())) - starts[time]
        lengths = (sizes.unsqueeze(1) > torch.arange(int(sizes[0]))).sum(0)
        return starts[lengths[sample] - 1 - time] + sample


@dataclass(frozen=True)
class _Layer:
    """One layer in one direction."""

    kind: str
    order: _Order
    params: Sequence[Tensor]
    states: Sequence[Tensor]
    turned: bool

    def run(self, x: Tensor, biases: bool, before: Before, after: After) -> tuple[Tensor, ...]:
        """Outputs, and the last states."""
        last_weight = self.params[-1] if len(self.params) in {3, 5} else None
        blank = x[..., :1].expand(*x.shape[:-1], self.params[1].shape[1])
        hidden, inputs = _pair(self.kind, x, blank, self.params, biases)
        before(hidden)
        before(inputs)
        if last_weight is not None:
            before(Gates(x[..., :1].expand(*x.shape[:-1], last_weight.shape[1]), last_weight, None, forced=True))
        way = self.order.turned if self.turned else _same
        out, *last = self._op(way(x), biases)
        passed = way(self.order.before(out, self.states[0][0]))
        hidden, inputs = _pair(self.kind, x, passed, self.params, biases)
        after(hidden)
        after(inputs)
        if last_weight is not None:
            cells = self.order.cells(way(hidden.product() + inputs.product()), self.states[1][0])
            after(Gates(way(cells), last_weight, None, forced=True))
        return way(out), *last

    def _op(self, x: Tensor, biases: bool) -> Any:
        op = getattr(aten, self.kind)
        hx = list(self.states) if self.kind == "lstm" else self.states[0]
        if self.order.sizes is not None:
            return op.data(x, self.order.sizes, hx, list(self.params), biases, 1, 0.0, False, False)
        return op.input(x, hx, list(self.params), biases, 1, 0.0, False, False, True)


def _same(x: Tensor) -> Tensor:
    return x


def _pair(kind: str, x: Tensor, states: Tensor, params: Sequence[Any], biases: bool) -> tuple[Gates, Gates]:
    """The products with states and with inputs; in a GRU, the third gate does not add them."""
    weight, own = params[0], params[1]
    bias, other = (params[2], params[3]) if biases else (None, None)
    added = weight.shape[0] * 2 // 3 if kind.startswith("gru") else weight.shape[0]
    hidden = Call(states, own, other)
    return Gates(states, own, other, forced=True), Gates(x, weight, bias, beside=hidden, added=added)


def _cell(name: str, func: Any, a: Mapping[str, Any], before: Before, after: After) -> Any:
    states = a["hx"][0] if name == "lstm_cell" else a["hx"]
    params = [a["w_ih"], a["w_hh"], a["b_ih"], a["b_hh"]]
    products = _pair(name, a["input"], states, params, True)
    for product in products:
        before(product)
    result = func(a["input"], a["hx"], *params)
    for product in products:
        after(product)
    return result
