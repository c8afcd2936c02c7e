"""Golden labels: run a function on parameters whose atoms are known, and write its output's labels as text.

The parameters of ``golden(function, shape_a, shape_b)`` are called ``a``, ``b``, ... The text of a label names, for
each position, the first held position of its component: ``a1`` is dim 1 of ``a`` as a whole, ``a1[2:4]`` a part of it,
``a1[0:2]+b0`` a concatenation, ``new[0:4]`` atoms that no parameter holds, ``{a0[0:2]}{a0[2:4]}`` rows (heads),
``(x / y)`` ids that depend on a context, ``-`` no label; a trailing ``!`` says that it has to stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from prunus.coupling.pieces import Pieces, cut_into_pieces
from prunus.coupling.units import Units, find_units
from prunus.labels import Label, Labelled
from prunus.tracing import Trace, tensors_in, trace


class Around(nn.Module):
    """A module that calls a function on its parameters ``a``, ``b``, ..."""

    def __init__(self, function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in zip("abcdefghijkl", shapes, strict=False):
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self) -> Any:
        return self.function(*self._parameters.values())


@dataclass(frozen=True)
class Golden:
    """What one call of a function did to labels."""

    trace: Trace
    pieces: Pieces
    units: Units
    results: tuple[Labelled | None, ...]

    def name(self, atom: int) -> tuple[str, int]:
        """The axis and position of the first held atom that lives and dies with ``atom``."""
        if atom == 0:
            return "0", 0
        piece = int(self.pieces.of(np.array([atom]))[0])
        offset = atom - int(self.pieces.start[piece])
        for p in np.flatnonzero(self.pieces.fine == self.pieces.fine[piece]).tolist():
            first = int(self.pieces.start[p]) + offset
            for held in self.trace.held:
                for dim, (start, n) in enumerate(zip(held.starts, held.shape, strict=True)):
                    if 0 <= start <= first < start + n:
                        return f"{held.name}{dim}", first - start
        return "new", int(self.units.of_atom[atom])

    def row(self, ids: Any) -> str:
        """One row of ids as runs of positions."""
        coarse = {int(c): r.fine[k] for r in self.trace.ledger.rows_of for k, c in enumerate(r.coarse.tolist())}
        runs: list[tuple[str, list[int]]] = []
        for atom in ids.tolist():
            axis, position = self.name(atom)
            if axis == "new" and atom in coarse:
                runs.append(("{" + self.row(coarse[atom]).rstrip("!") + "}", []))
            elif runs and runs[-1][0] == axis and (position != 0 or runs[-1][1][-1] == 0):
                runs[-1][1].append(position)
            else:
                runs.append((axis, [position]))
        kept = self.units.stay[self.pieces.fine[self.pieces.of(ids)]] >= 0
        text = "+".join(self._run(*r) for r in runs).replace("}+{", "}{")
        return text + ("!" if kept.all() else "?!" if kept.any() else "")

    def _run(self, axis: str, positions: list[int]) -> str:
        if axis == "new":
            return f"new{len(positions)}"
        if not positions:
            return axis
        held = next(h for h in self.trace.held if axis == f"{h.name}{axis[-1]}")
        first, last = positions[0], positions[-1] + 1
        if positions != list(range(first, last)):
            return f"{axis}[{','.join(map(str, positions))}]"
        return axis if (first, last) == (0, held.shape[int(axis[-1])]) else f"{axis}[{first}:{last}]"

    def label(self, label: Label | None) -> str:
        """One dim's label."""
        if label is None:
            return "-"
        rows = label.ids.reshape(-1, label.ids.shape[-1])
        if not label.context:
            return self.row(rows[0])
        return "(" + " / ".join(self.row(r) for r in rows) + ")@" + ",".join(map(str, label.context))

    def text(self) -> str:
        """Every output's labels, then every held dim that is not its own (tied to an earlier one, or frozen)."""
        found = ["-" if r is None else ", ".join(self.label(d) for d in r.dims) for r in self.results]
        facts = []
        for held in self.trace.held:
            for dim, start in enumerate(held.starts):
                if start >= 0:
                    own, told = f"{held.name}{dim}", self.row(np.arange(start, start + held.shape[dim]))
                    if own != told:
                        facts.append(told if told == f"{own}!" else f"{own}={told}")
        balances = ["~".join(self.row(r) for r in b.ids) for b in self.trace.ledger.balances]
        return " ; ".join([" | ".join(found), *facts, *balances])


def run(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Golden:
    """Trace ``function`` on parameters of the given shapes; its outputs do not freeze."""
    results: list[Labelled | None] = []

    def keep(output: Any) -> tuple[()]:
        results.extend(next((v for v in vars(t).values() if isinstance(v, Labelled)), None) for t in tensors_in(output))
        return ()

    traced = trace(Around(function, shapes), (), output_transform=keep)
    pieces = cut_into_pieces(traced.ledger)
    return Golden(traced, pieces, find_units(traced.ledger, pieces), tuple(results))


@pytest.fixture
def golden() -> Callable[..., Golden]:
    """``golden(function, *shapes).text()``: the labels that a function's outputs carry."""
    return run


class Net(nn.Module):
    """Layers and attributes, and a function ``forward(self, *inputs)`` that uses them."""

    def __init__(self, function, **members) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def lin(function, m2=8, **members):
    """A linear layer, the function, a linear layer."""
    return Net(lambda s, x: s.q(function(s, s.p(x))), p=nn.Linear(6, 8), q=nn.Linear(m2, 4), **members)


def cc(middle, out=8):
    """A convolution, a module, a convolution."""
    return Net(lambda s, x: s.q(s.m(s.p(x))), p=nn.Conv2d(3, 8, 1), m=middle, q=nn.Conv2d(out, 4, 1))


def attention(how, h=2, d=4, kv=None):
    """Attention written in one of the ways that are met in the wild."""
    kv = kv or h

    def forward(s, x):
        b, n, _ = x.shape
        q = s.q(x).view(b, n, s.h, s.d).transpose(1, 2)
        k = s.k(x).view(b, n, s.kv, s.d).transpose(1, 2)
        v = s.v(x).view(b, n, s.kv, s.d).transpose(1, 2)
        if how == "mask":
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(n, n).tril().bool())
        elif how == "ri":
            k, v = (t.repeat_interleave(s.h // s.kv, 1) for t in (k, v))
            o = F.scaled_dot_product_attention(q, k, v)
        elif how == "expand":
            k, v = (t[:, :, None].expand(b, s.kv, s.h // s.kv, n, s.d).reshape(b, s.h, n, s.d) for t in (k, v))
            o = F.scaled_dot_product_attention(q, k, v)
        elif how == "manual":
            o = (q @ k.transpose(-2, -1) / s.d**0.5).softmax(-1) @ v
        elif how == "headscale":
            o = (q @ k.transpose(-2, -1) * s.scale).softmax(-1) @ v
        elif how == "bh":
            q, k, v = (t.reshape(b * s.h, n, s.d) for t in (q, k, v))
            o = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(b, s.h, n, s.d)
        else:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=how == "causal", enable_gqa=how == "gqa")
        return s.o(o.transpose(1, 2).reshape(b, n, s.h * s.d))

    layers = {"q": nn.Linear(6, h * d), "k": nn.Linear(6, kv * d), "v": nn.Linear(6, kv * d), "o": nn.Linear(h * d, 6)}
    scale = {"scale": nn.Parameter(torch.randn(h, 1, 1))} if how == "headscale" else {}
    return Net(forward, **layers, h=h, d=d, kv=kv, **scale)


@pytest.fixture
def networks() -> SimpleNamespace:
    """Small networks around an op."""
    return SimpleNamespace(Net=Net, lin=lin, cc=cc, attention=attention)
