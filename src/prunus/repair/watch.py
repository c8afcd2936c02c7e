"""See every op of a run, and know which part of which parameter a multiplication reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunus.higher import SeesInside
from prunus.repair.recurrent import CELLS, NETWORKS, Gates, run
from prunus.repair.sites import Call, Region, locate, parse


class Key(NamedTuple):
    """The ``nth`` multiplication of a run that reads the parameter ``name``."""

    name: str
    nth: int


@dataclass(frozen=True)
class Use:
    """A multiplication by a parameter: what it computes, and which parts of which parameters it reads."""

    key: Key
    call: Call
    region: Region
    bias: tuple[str, Region] | None
    step: int
    beside: tuple[str, Region] | None = None  # of the product that is added to this one in a recurrent layer


class Weights:
    """The parameters of a model by the memory that holds them."""

    def __init__(self, model: nn.Module) -> None:
        self.by_name = dict(model.named_parameters())
        self.names: dict[str, tuple[str, ...]] = {}
        self._in_memory: dict[int, list[tuple[int, int, str]]] = {}  # by storage: begin, end, name
        first: dict[tuple[int, int], str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            begin = int(parameter.storage_offset())
            known = first.setdefault((_memory(parameter), begin), name)
            self.names[known] = (*self.names.get(known, ()), name)
            if known == name and parameter.numel():
                parts = self._in_memory.setdefault(_memory(parameter), [])
                parts.append((begin, begin + parameter.numel(), name))

    def whole(self, tensor: Tensor) -> tuple[str, Tensor] | None:
        """The parameter in whose memory a tensor begins."""
        parts = self._in_memory.get(_memory(tensor), ()) if tensor.numel() else ()
        begin = int(tensor.storage_offset()) if parts else 0
        name = next((name for start, end, name in parts if start <= begin < end), None)
        return None if name is None else (name, self.by_name[name])


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Watch(SeesInside):
    """Numbers the ops of a run, and tells of multiplications before and of all ops after they run.

    Args:
        weights: the parameters of the model that runs.
        before: called with each multiplication by a parameter.
        after: called with the op, its arguments, its result, and the use if it is one; what it returns, if anything,
            is taken for the result.
    """

    def __init__(
        self,
        weights: Weights,
        before: Callable[[Use], None] | None = None,
        after: Callable[[int, Any, Any, Any, Any, Use | None], Any] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights, self.before, self.after = weights, before, after
        self.step = -1
        self._counts: dict[str, int] = {}
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}  # by memory: a parameter in another dtype

    def see(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Number the op, and tell of it."""
        self.step += 1
        if func.overloadpacket.__name__ in RECURRENT:
            return self._recurrent(func, args, kwargs)
        use = self._use(parse(func, args, kwargs), self.step)
        if use is not None and self.before is not None:
            self.before(use)
        result = func(*args, **kwargs)
        if func.overloadpacket.__name__ in _CASTS and isinstance(result, Tensor) and args and result is not args[0]:
            self._cast(result, args[0])
        if self.after is not None:
            other = self.after(self.step, func, args, kwargs, result, use)
            return result if other is None else other
        return result

    def find(self, tensor: Tensor) -> tuple[str, Region] | None:
        """The parameter, and the part of it, that a tensor shows (itself or in another dtype)."""
        cast = self._casts.get(_memory(tensor)) if tensor.numel() else None
        if cast is not None:
            outer, inner = self.find(cast[1]), locate(tensor, cast[0])
            return None if outer is None or inner is None else (outer[0], inner.inside(outer[1]))
        found = self.weights.whole(tensor)
        region = None if found is None else locate(tensor, found[1])
        return None if found is None or region is None else (found[0], region)

    def _cast(self, result: Tensor, source: Any) -> None:
        if isinstance(source, Tensor) and self.find(source) is not None and _memory(result) != _memory(source):
            self._casts[_memory(result)] = (result, source)

    def _use(self, call: Call | None, step: int) -> Use | None:
        found = None if call is None else self.find(call.weight)
        if call is None or found is None:
            return None
        name, region = found
        nth = self._counts[name] = self._counts.get(name, -1) + 1
        bias = None if call.bias is None else self.find(call.bias)
        beside = None if not isinstance(call, Gates) or call.beside is None else self.find(call.beside.weight)
        return Use(Key(name, nth), call, region, bias, step, beside)

    def _recurrent(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Each product of a recurrent op counts as an op of its own."""
        waiting: list[Use | None] = []

        def before(call: Gates) -> None:
            use = self._use(call, self.step + len(waiting))
            waiting.append(use)
            if use is not None and self.before is not None:
                self.before(use)

        def after(call: Gates) -> None:
            use = waiting.pop(0)
            if self.after is not None:
                use = None if use is None else replace(use, call=call)
                self.after(self.step, func, (call.x,), {}, call.product(), use)
            self.step += 1

        result = run(func, args, kwargs, before, after)
        if self.after is not None:
            self.after(self.step, func, args, kwargs, result, None)
        return result


RECURRENT = NETWORKS | CELLS
_CASTS = frozenset({"to", "_to_copy", "type_as"})


def guarded() -> Any:
    """Without gradients, as all runs of this package are."""
    return torch.inference_mode()
