"""Check one network: the graph is proved, half of every group is cut, and what is left runs, trains and undoes."""

from __future__ import annotations

import copy
import gc
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import prunus
from prunus.cost import count
from prunus.tracing import call_model, tensors_in
from zoo.network import Builder, Network

OK, FROZEN, FAILED, NOT_BUILT = "ok", "frozen", "failed", "cannot build"
RATIO = 0.5
LEAST_REMOVED = 0.25
SINGLE, DOUBLE = 1e-5, 1e-9
SEED = 0
ENGINE = str(Path(prunus.__file__).parent)
"""Which Prunus was checked: an installed copy is easily mistaken for the one that is being worked on."""


@dataclass
class Row:
    """What was found on one network; times are in seconds, shares are of the parameters."""

    name: str
    family: str
    status: str = FAILED
    stage: str = "start"
    problems: list[str] = field(default_factory=list)
    traceback: str = ""
    params_before: int = 0
    params_after: int = 0
    removed: float = 0.0
    prunable: float | None = None
    groups: int = 0
    symmetry: float | None = None
    silence: float | None = None
    dtype: str = "float32"
    culprits: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    unsupported: dict[str, list[str]] = field(default_factory=dict)
    trained_in: str = ""
    blocks: int | None = None
    blocks_kept: list[str] = field(default_factory=list)
    forward_s: float | None = None
    graph_s: float | None = None
    in_forward_passes: float | None = None
    total_s: float | None = None
    memory_mib: int = 0
    engine: str = ENGINE


class Halt(Exception):
    """Nothing more can be learnt about this network."""


def check(name: str, family: str, build: Builder, save: Callable[[dict[str, Any]], None]) -> Row:
    """Run every stage, as far as it goes; `save` is called with what is known before each of them."""
    row = Row(name, family)
    work = _Work(row, build, save)
    start = time.perf_counter()
    try:
        for stage in (
            work.build,
            work.run_dense,
            work.time_graph,
            work.verify,
            work.depth,
            work.prune,
            work.undo,
            work.train,
        ):
            row.stage = stage.__name__
            save(asdict(row))
            stage()
        row.stage = "done"
    except Halt:
        pass
    except Exception as error:
        work.problem(error)
    row.total_s = round(time.perf_counter() - start, 2)
    row.memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (
        1 << (20 if sys.platform == "darwin" else 10)
    )
    row.status = verdict(row)
    save(asdict(row))
    return row


def verdict(row: Row) -> str:
    """The status that a finished row deserves."""
    if row.stage in {"build", "run_dense"}:
        return NOT_BUILT
    if row.problems:
        return FAILED
    return OK if row.removed >= LEAST_REMOVED else FROZEN


class _Work:
    """The stages, and what one leaves for the next."""

    def __init__(self, row: Row, build: Builder, save: Callable[[dict[str, Any]], None]) -> None:
        self.row, self.builder, self.save = row, build, save
        self.net: Network

    def problem(self, error: Exception | str) -> None:
        """Note what went wrong in the present stage; the last lines of the first traceback are kept."""
        if isinstance(error, Exception):
            text = f"{type(error).__name__}: {str(error)[:1500]}"
            if not self.row.traceback:
                self.row.traceback = "".join(traceback.format_exception(error)[-14:])
        else:
            text = error
        self.row.problems.append(f"{self.row.stage}: {text}")

    def outputs(self, net: Network) -> list[Tensor]:
        """Every tensor that the network returns."""
        torch.manual_seed(SEED)
        found = call_model(net.model, net.inputs, net.forward_fn)
        return list(tensors_in(found if net.output_transform is None else net.output_transform(found)))

    def make(self) -> Network:
        """A new network, the same each time."""
        torch.manual_seed(SEED)
        return self.builder()

    def build(self) -> None:
        """Build it."""
        self.net = self.make()
        self.net.model.eval().requires_grad_(True)
        self.row.params_before = sum(p.numel() for p in self.net.model.parameters())

    def run_dense(self) -> None:
        """Run it, and keep what it gives."""
        with torch.no_grad():
            self.outputs(self.net)
            times = []
            for _ in range(3):
                start = time.perf_counter()
                found = self.outputs(self.net)
                times.append(time.perf_counter() - start)
        self.row.forward_s = min(times)
        self.dense = [t.detach().clone() for t in found]
        if not any(t.is_floating_point() and t.numel() for t in self.dense):
            raise ValueError("the network gives no numbers: nothing can be compared")
        self.values = {k: v.clone() for k, v in self.net.model.state_dict().items() if isinstance(v, Tensor)}
        self.sizes = _sizes(self.net.model)

    def graph(self) -> prunus.DependencyGraph:
        """The dependency graph, built anew."""
        net = self.net
        return prunus.DependencyGraph().build_dependency(net.model, net.inputs, net.forward_fn, net.output_transform)

    def time_graph(self) -> None:
        """Build the graph twice; the better time counts."""
        times = []
        for _ in range(2):
            start = time.perf_counter()
            graph = self.graph()
            times.append(time.perf_counter() - start)
        row = self.row
        row.graph_s = min(times)
        row.in_forward_passes = row.graph_s / max(row.forward_s or 0.0, 1e-9)
        row.unsupported = {op: list(where[:4]) for op, where in graph.unsupported.items()}
        self._unchanged("building the graph")

    def verify(self) -> None:
        """Symmetry and silence, in float64 where float32 is too coarse to tell."""
        row, net = self.row, self.net
        with self._reporting():
            report = prunus.verify(net.model, net.inputs, net.forward_fn, net.output_transform)
            row.prunable, row.groups = report.prunable_share, report.groups
            row.frozen = report.frozen.splitlines()
            row.symmetry, row.silence, row.culprits = report.symmetry_error, report.silence_error, list(report.culprits)
            limit = SINGLE
            if not _within(report, limit) and (precise := self._verify_in_double()) is not None:
                row.dtype, report, limit = "float64", precise, DOUBLE
                row.symmetry, row.silence = report.symmetry_error, report.silence_error
                row.culprits = list(report.culprits)
            if not report.symmetry_error <= limit:
                self.problem(
                    f"not symmetric: {report.symmetry_error:.1e} in {row.dtype}; {'; '.join(row.culprits[:4])}"
                )
            if not (report.silence_error or 0.0) <= limit:
                self.problem(f"not silent: {report.silence_error:.1e} in {row.dtype}")
        self._unchanged("verifying")

    def _verify_in_double(self) -> prunus.VerifyReport | None:
        try:
            net = self.make()
            model, inputs = net.model.eval().double(), _double(net.inputs)
            with _Widened():
                return prunus.verify(model, inputs, net.forward_fn, net.output_transform)
        except Exception:  # not every model runs in double precision; what float32 said then stands
            return None

    def depth(self) -> None:
        """Whole blocks: the least important one is dropped, which is proved to be silence, counted, and undone."""
        row, net = self.row, self.net
        how = {"forward_fn": net.forward_fn, "output_transform": net.output_transform}
        with self._reporting():
            found = prunus.find_blocks(net.model, net.inputs, **how)
            row.blocks = sum(block.droppable for block in found)
            row.blocks_kept = [str(block) for block in found if not block.droppable]
            if row.blocks:
                names = [block.name for block in sorted(found, key=lambda b: b.influence) if block.droppable]
                result = prunus.drop_blocks(net.model, net.inputs, blocks=names[:1], **how)
                cost = count(net.model, net.inputs, net.forward_fn)
                said, counted = (result.after.macs, result.after.params), (cost.macs, cost.params)
                if said != counted:
                    self.problem(f"without {names[0]} the plan says {said} MACs and parameters, counted are {counted}")
                result.undo()
                with torch.no_grad():
                    if not all(_equal(a, b) for a, b in zip(self.dense, self.outputs(net), strict=True)):
                        self.problem(f"after undoing {names[0]} the outputs are not those of the dense network")
        self._unchanged("dropping blocks")

    def prune(self) -> None:
        """Half of every group goes: outputs keep their shapes, and the cost is what the plan said."""
        row, net = self.row, self.net
        try:
            result = prunus.prune(
                net.model,
                net.inputs,
                prunus.Target(ratio=RATIO),
                forward_fn=net.forward_fn,
                output_transform=net.output_transform,
            )
        except prunus.NothingToPruneError:
            row.params_after = row.params_before
            row.stage = "done"
            raise Halt from None
        result.undo()
        self._unchanged("undo")
        self.plan, self.receipt = result.plan, result.plan.apply(net.model)
        row.params_after = sum(p.numel() for p in net.model.parameters())
        row.removed = 1 - row.params_after / max(row.params_before, 1)
        with self._reporting(), torch.no_grad():
            self.pruned = [t.detach().clone() for t in self.outputs(net)]
            self._same_shapes()
            cost = count(net.model, net.inputs, net.forward_fn)
            said, found = (result.after.macs, result.after.params), (cost.macs, cost.params)
            if said != found:
                self.problem(f"the plan says {said} MACs and parameters, counted are {found}")

    def _same_shapes(self) -> None:
        first = 1 if self.net.rows_vary else 0
        before, after = ([tuple(t.shape[first:]) for t in found] for found in (self.dense, self.pruned))
        if before != after:
            wrong = [f"{a} became {b}" for a, b in zip(before, after, strict=False) if a != b]
            self.problem(f"the outputs changed their shapes: {'; '.join(wrong[:3]) or 'another number of them'}")
        if all(_finite(t) for t in self.dense) and not all(_finite(t) for t in self.pruned):
            self.problem("the pruned network gives numbers that are not finite")

    def undo(self) -> None:
        """Everything is as before, bit for bit; then the plan is applied again, and does the same."""
        self.receipt.undo()
        with self._reporting():
            with torch.no_grad():
                again = self.outputs(self.net)  # also makes caches anew that the pruned network has filled
            self._unchanged("undo")
            if not all(_equal(a, b) for a, b in zip(self.dense, again, strict=True)):
                self.problem("after undo the outputs are not those of the dense network")
        self.plan.apply(self.net.model)
        with self._reporting(), torch.no_grad():
            replayed = self.outputs(self.net)
            if hasattr(self, "pruned") and not all(_equal(a, b) for a, b in zip(self.pruned, replayed, strict=True)):
                self.problem("the plan, applied a second time, gives other outputs")

    def train(self) -> None:
        """One step, in training mode if the dense network runs in it without targets, else with eval-mode outputs."""
        try:
            self._step(self.net, training=True)
            self.row.trained_in = "train"
            return
        except Exception as error:
            wrong = error
        try:
            self._step(self.make(), training=True)
        except Exception:  # the network needs targets to run in training mode
            self._step(self.net, training=False)
            self.row.trained_in = "eval"
            return
        self.problem(wrong)

    def _step(self, net: Network, training: bool) -> None:
        net.model.train(training).requires_grad_(True)
        net.model.zero_grad()
        found = [t for t in self.outputs(net) if t.is_floating_point() and t.requires_grad and t.numel()]
        if not found:
            raise ValueError("no output has a gradient")
        torch.stack([t.float().square().mean() for t in found]).sum().backward()
        touched = [p for p in net.model.parameters() if p.grad is not None]
        if any(p.grad is None or p.grad.shape != p.shape for p in touched):
            raise ValueError("a gradient has another shape than its parameter")
        torch.optim.SGD(touched, lr=1e-6).step()

    def _unchanged(self, what: str) -> None:
        values = self.net.model.state_dict()
        changed = [k for k, v in self.values.items() if k not in values or not _equal(v, values[k])]
        if changed:
            self.problem(f"{what} changed {', '.join(changed[:4])}")
        sizes = _sizes(self.net.model)
        changed = [k for k in self.sizes if sizes.get(k) != self.sizes[k]]
        if changed:
            self.problem(f"{what} changed the attributes {', '.join(changed[:4])}")

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """An exception is a problem, but the stages after this one may still say something."""
        try:
            yield
        except Exception as error:
            self.problem(error)
        gc.collect()


class _Widened(TorchFunctionMode):
    """Code that turns its numbers to single precision, as many norms do, turns them to double precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "float" and isinstance(args[0], Tensor):
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **{k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()})


def _within(report: prunus.VerifyReport, limit: float) -> bool:
    return report.symmetry_error <= limit and (report.silence_error or 0.0) <= limit


def _double(value: Any) -> Any:
    """Inputs with every float tensor in double precision."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_double(item) for item in value)
    return copy.copy(value)


def _equal(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    same = one == other
    return bool((same | ((one != one) & (other != other))).all())  # noqa: PLR0124 - NaN is what differs from itself


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _sizes(model: nn.Module) -> dict[str, Any]:
    """Every int, and every tuple of ints, that a module holds, with its exact type."""
    return {
        f"{path}.{name}": (type(value), value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int) or (isinstance(value, tuple) and value and all(isinstance(v, int) for v in value))
    }
