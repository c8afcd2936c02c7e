"""The loss for those who train a pruned model: what the dense one says of the same inputs."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from prunus.distill.positions import Kept, Parts, kept_positions
from prunus.distill.terms import apart, detected, floats, logits_in, raw_predictions, softened
from prunus.drops import later_name
from prunus.errors import InputError
from prunus.plan import Plan
from prunus.repair import frozen
from prunus.tracing import ForwardFn, call_model, tensors_in

Seen = dict[str, list[Tensor]]


class DistillationLoss:
    """How far a pruned model is from the dense one, to be minimised: ``loss(inputs, outputs)``.

    The dense model runs once for each call, on a copy in eval mode and without gradients. Nothing is hung on the
    pruned model, so copies and files of it carry nothing of this. Use it as a context manager, or call :meth:`close`.

    Args:
        dense: the model as it was before the cut.
        model: the pruned model, which is trained.
        plan: what was removed; needed where features shrank, or blocks were dropped.
        logits: weight of the divergence of softened classes; 1 unless ``features`` or ``detection`` are given, 0 then.
        temperature: softens the classes of both.
        class_dim: the dim of the classes; by default the last, or dim 1 of outputs with four or more dims.
        features: names of modules of the dense model whose outputs are compared ("" for those of the whole model), or
            a weight for each. The difference is squared, and divided by the variance of the dense values. Where the cut
            took channels, the kept ones are compared: the plan knows them, and no adapter has to be learned.
        detection: weight of the distance between raw predictions of detection heads.
        pick: what of the outputs counts for ``logits`` and ``detection``, such as ``lambda outputs: outputs[0]``.
        forward_fn: ``forward_fn(dense, inputs)`` to use instead of calling the dense model.

    Raises:
        InputError: both are the same model, a name or a weight is wrong, or nothing would be compared.

    Source: Hinton et al. 2015 (arXiv 1503.02531); Romero et al. 2015 (arXiv 1412.6550) for features; Zheng et al. 2022
    (arXiv 2102.12252) for boxes.

    Example:
        >>> import copy, torch, prunus
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> dense = copy.deepcopy(model)
        >>> plan = prunus.prune(model, torch.randn(1, 8)).plan
        >>> x = torch.randn(16, 8)
        >>> with prunus.distill.DistillationLoss(dense, model, plan=plan, logits=1, features=["1"]) as loss:
        ...     loss(x, model(x)).backward()
        >>> sorted(loss.parts), model[0].weight.grad is not None
        (['1', 'logits'], True)
    """

    def __init__(  # noqa: PLR0913 - each keyword is a choice of the user
        self,
        dense: nn.Module,
        model: nn.Module,
        *,
        plan: Plan | None = None,
        logits: float | None = None,
        temperature: float = 2.0,
        class_dim: int | None = None,
        features: Sequence[str] | Mapping[str, float] = (),
        detection: float = 0.0,
        pick: Callable[[Any], Any] | None = None,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        names = [features] if isinstance(features, str) else features
        self.features = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
        self.logits = (0.0 if self.features or detection else 1.0) if logits is None else logits
        self.temperature, self.class_dim, self.detection = temperature, class_dim, detection
        self.parts: dict[str, float] = {}
        self._plan, self._pick, self._forward_fn = plan, pick, forward_fn
        self._check(dense, model)
        own = {id(t) for t in model.parameters()} | {t.data_ptr() for t in model.parameters() if t.numel()}
        shared = any(id(t) in own or t.data_ptr() in own for t in dense.parameters())
        copied = copy.deepcopy(dense) if shared else frozen(dense)  # training would write into what both hold
        self._dense: nn.Module | None = copied.eval().requires_grad_(False)
        self._theirs: Seen = {}
        self._ours: Seen = {}
        self._kept: Parts | None = None
        for name in self.features:
            _hear(self._dense.get_submodule(name), name, self._theirs)
        self._close = _listen(model, self._students(model), self._ours)
        self._finalize = weakref.finalize(self, self._close)

    def _check(self, dense: nn.Module, model: nn.Module) -> None:
        if dense is model:
            raise InputError("dense and model are the same: pass a copy.deepcopy of the model made before the cut")
        weights = {"logits": self.logits, "detection": self.detection, **self.features}
        for name, weight in weights.items():
            if not 0 <= weight < float("inf"):
                raise InputError(f"the weight of {name or 'the outputs'} is {weight}: give a number from 0 on")
        if not any(weights.values()):
            raise InputError("all weights are 0: give logits=, features= or detection=, or leave them at the defaults")
        if not 0 < self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature} must be a number above 0; 2 to 4 are usual")
        missing = [name for name in self.features if name not in dict(dense.named_modules(remove_duplicate=False))]
        if missing:
            raise InputError(f"the dense model has no module {missing[0]!r}: features= are names of named_modules()")

    def _students(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules of the pruned model, by their names in the dense one."""
        found = {}
        for name in self.features:
            later = later_name(self._plan.drops, name) if self._plan is not None and name else name
            try:
                found[name] = model.get_submodule(later or "") if later is not None else None
            except AttributeError:
                found[name] = None
            if found[name] is None:
                why = "was dropped by the plan" if later is None else f"has no counterpart {later!r} in the model"
                raise InputError(f"{name} {why}: leave it out of features= (and pass plan= where blocks were dropped)")
        return {name: module for name, module in found.items() if module is not None}

    def __call__(self, inputs: Any, outputs: Any) -> Tensor:
        """The loss of one batch.

        Args:
            inputs: what the pruned model was called with: a tensor, a tuple of arguments or a dict of them.
            outputs: what it returned.

        Raises:
            InputError: the outputs or features cannot be compared, or the loss is closed.
        """
        if self._dense is None:
            raise InputError("this DistillationLoss is closed: call it inside of its with block, or make a new one")
        try:
            return self._sum(self._dense, inputs, outputs)
        finally:
            self._theirs.clear()
            self._ours.clear()

    def _sum(self, dense: nn.Module, inputs: Any, outputs: Any) -> Tensor:
        self._theirs.clear()
        device = next((t.device for t in tensors_in(inputs)), None)
        if device is not None and any(p.device != device for p in dense.parameters()):
            dense.to(device)
        with torch.no_grad():
            answers = call_model(dense, inputs, self._forward_fn)
        ours, theirs = (outputs, answers) if self._pick is None else (self._pick(outputs), self._pick(answers))
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.logits:
            pair = logits_in(ours), logits_in(theirs)
            terms["logits"] = self.logits, softened(*pair, self.temperature, self.class_dim)
        if self.detection:
            heads = raw_predictions(ours), raw_predictions(theirs)
            if len(heads[0]) != len(heads[1]):
                raise InputError(f"the model has {len(heads[0])} heads' predictions, the dense one {len(heads[1])}")
            terms["detection"] = self.detection, sum(map(detected, *heads), torch.zeros((), device=device))
        for name, weight in self.features.items():
            terms[name or "outputs"] = weight, self._feature(name, dense, inputs)
        self.parts = {name: float(term.detach()) for name, (_, term) in terms.items()}
        return torch.stack([weight * term for weight, term in terms.values()]).sum()

    def _feature(self, name: str, dense: nn.Module, inputs: Any) -> Tensor:
        ours, theirs = (list(seen.get(name, ())) for seen in (self._ours, self._theirs))
        where = name or "the model"
        if len(ours) != len(theirs) or not ours:
            raise InputError(
                f"{where} gave {len(theirs)} tensors in the dense model and {len(ours)} in the pruned one: run the "
                "pruned model on the inputs, with gradients, before each call of the loss"
            )
        if any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
            kept = self._positions(dense, inputs).get(name, ())
            kept = kept if len(kept) == len(theirs) else (Kept(),) * len(theirs)
            theirs = [k.of(t) for k, t in zip(kept, theirs, strict=True)]
        for a, b in zip(ours, theirs, strict=True):
            if a.shape != b.shape:
                raise InputError(
                    f"the output of {where} has shape {tuple(a.shape)} where the plan says {tuple(b.shape)}: "
                    "pass the plan of the whole cut, or choose another layer"
                )
        return torch.stack([apart(a, b) for a, b in zip(ours, theirs, strict=True)]).mean()

    def _positions(self, dense: nn.Module, inputs: Any) -> Parts:
        if self._kept is None:
            if self._plan is None:
                raise InputError(
                    "features became narrower in the cut: pass plan=, which knows the channels that stayed"
                )
            heard = {name: list(tensors) for name, tensors in self._theirs.items()}
            self._kept = kept_positions(dense, self._plan, inputs, self.features, self._forward_fn)
            self._theirs.clear()  # of the traced run
            self._theirs.update(heard)
        return self._kept

    def close(self) -> None:
        """Let go of both models; a second call does nothing."""
        self._finalize()
        self._dense = None
        self._kept = None
        self._theirs.clear()

    def __enter__(self) -> DistillationLoss:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _hear(module: nn.Module, name: str, seen: Seen) -> None:
    """Note what a module of our own copy of the dense model returns."""
    module.register_forward_hook(lambda module, args, output: seen.setdefault(name, []).extend(floats(output)))


def _listen(model: nn.Module, modules: Mapping[str, nn.Module], seen: Seen) -> Callable[[], None]:
    """Note what modules of the pruned model return when it runs with gradients; gives what ends it.

    The hook is on all modules of the process, and heeds only those: one on the modules themselves would be copied with
    the model (averaged weights) and be written into files of it.
    """
    if not modules:
        return seen.clear
    names: dict[int, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(id(module), []).append(name)
    watched = [model, *modules.values()]  # held, so that no other module gets their identities

    def begin(module: nn.Module, args: Any) -> None:
        if module is watched[0]:
            seen.clear()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            for name in names.get(id(module), ()):
                seen.setdefault(name, []).extend(floats(output))

    handles = register_module_forward_pre_hook(begin), register_module_forward_hook(note)

    def end() -> None:
        for handle in handles:
            handle.remove()
        watched.clear()
        seen.clear()

    return end
