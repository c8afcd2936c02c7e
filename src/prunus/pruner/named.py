"""The pruners that users know by name: the base with a regulariser each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from math import log2
from typing import Any, TypeVar

from torch import nn

from prunus.importance import BNScaleImportance
from prunus.pruner.scoring import Criterion
from prunus.pruner.steps import BasePruner
from prunus.regularize import GroupLasso, GrowingL2, Regularizer, ScaleL1
from prunus.tracing import Inputs

P = TypeVar("P", bound=type[BasePruner])


def _setting(part: str, name: str, what: str) -> Any:
    """A field of the pruner's own penalty, to read and to set while training goes on."""

    def write(pruner: Any, value: float) -> None:
        old = getattr(pruner, part)
        new = replace(old, **{name: value})
        setattr(pruner, part, new)
        pruner._penalties.regularizers = [new if one is old else one for one in pruner._penalties.regularizers]

    return property(lambda pruner: getattr(getattr(pruner, part), name), write, doc=what)


class MagnitudePruner(BasePruner):
    """The base under the name that most scripts use."""


MetaPruner = BasePruner


def _like_the_base(pruner: P) -> P:
    """Show the whole signature: the pruner's own arguments come after ``importance``, then those of the base."""
    init: Callable[..., None] = pruner.__init__
    own = [p for p in inspect.signature(init).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    rest = [
        p for p in inspect.signature(BasePruner.__init__).parameters.values() if p.name not in {o.name for o in own}
    ]
    init.__signature__ = inspect.Signature([*own, *rest])  # type: ignore[attr-defined]
    return pruner


@_like_the_base
class GroupNormPruner(BasePruner):
    """The base with a group lasso for sparse training; see :class:`~prunus.regularize.GroupLasso`.

    Args:
        model: see :class:`BasePruner`, as for all others.
        example_inputs: the same.
        importance: the same.
        reg: strength of the penalty.
        alpha: how much faster the weakest unit shrinks than the strongest, in powers of 2.
        rest: the arguments of :class:`BasePruner` after ``importance``, in its order.
        options: the same by name.

    Example:
        >>> import torch, prunus as tp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> pruner = tp.pruner.GroupNormPruner(model, torch.randn(1, 8), reg=1e-3)
        >>> pruner.update_regularizer()
        >>> model(torch.randn(2, 8)).sum().backward()
        >>> before = model[0].weight.grad.clone()
        >>> pruner.regularize(model)
        >>> bool((model[0].weight.grad != before).all())
        True
    """

    reg = _setting("lasso", "reg", "Strength of the penalty.")
    alpha = _setting("lasso", "alpha", "How much faster the weakest unit shrinks, in powers of 2.")

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        importance: Criterion | None = None,
        reg: float = 1e-4,
        alpha: float = 4,
        *rest: Any,
        **options: Any,
    ) -> None:
        self.lasso = GroupLasso(reg, alpha)
        super().__init__(model, example_inputs, importance, *rest, **_with(self.lasso, options))

    def regularize(
        self,
        model: Any = None,
        alpha: float | None = None,
        bias: bool = False,
        *,
        scaler: Any = None,
        weight: float = 1.0,
    ) -> None:
        """See :meth:`BasePruner.regularize`; ``alpha`` is here the base of the power, 16 by default."""
        changed = self.lasso if alpha is None else replace(self.lasso, alpha=log2(alpha))
        chosen = [changed if one is self.lasso else one for one in self._penalties.regularizers]
        self._penalties.add(scaler, weight, bias, chosen)


@_like_the_base
class GrowingRegPruner(BasePruner):
    """The base with a decay that grows; see :class:`~prunus.regularize.GrowingL2`.

    Args:
        model: see :class:`BasePruner`, as for all others.
        example_inputs: the same.
        importance: the same.
        reg: the decay of every unit at first.
        delta_reg: the most that it grows by in one :meth:`update_reg`.
        rest: the arguments of :class:`BasePruner` after ``importance``, in its order.
        options: the same by name.
    """

    reg = _setting("decay", "reg", "The decay of every unit at first.")
    delta_reg = _setting("decay", "delta", "The most that the decay grows by at once.")

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        importance: Criterion | None = None,
        reg: float = 1e-5,
        delta_reg: float = 1e-5,
        *rest: Any,
        **options: Any,
    ) -> None:
        self.decay = GrowingL2(reg, delta_reg)
        super().__init__(model, example_inputs, importance, *rest, **_with(self.decay, options))

    def update_reg(self) -> None:
        """Strengthen the decay, of weak units more than of strong ones; call it every few steps of training."""
        self.decay.grow(self._penalties.groups)

    def regularize(self, model: Any = None, bias: bool = False, *, scaler: Any = None, weight: float = 1.0) -> None:
        """See :meth:`BasePruner.regularize`."""
        self._penalties.add(scaler, weight, bias)


@_like_the_base
class BNScalePruner(BasePruner):
    """The base with an L1 penalty on the scales of batch norms; see :class:`~prunus.regularize.ScaleL1`.

    Args:
        model: see :class:`BasePruner`, as for all others.
        example_inputs: the same.
        importance: by default the scales themselves, :class:`~prunus.importance.BNScaleImportance`.
        reg: strength of the penalty.
        group_lasso: the scales of coupled norms shrink together instead.
        rest: the arguments of :class:`BasePruner` after ``importance``, in its order.
        options: the same by name.
    """

    reg = _setting("scales", "reg", "Strength of the penalty.")
    group_lasso = _setting("scales", "group_lasso", "Whether the scales of coupled norms shrink together.")

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        importance: Criterion | None = None,
        reg: float = 1e-5,
        group_lasso: bool = False,
        *rest: Any,
        **options: Any,
    ) -> None:
        self.scales = ScaleL1(reg, group_lasso)
        importance = BNScaleImportance() if importance is None else importance
        super().__init__(model, example_inputs, importance, *rest, **_with(self.scales, options))

    def regularize(
        self,
        model: Any = None,
        reg: float | None = None,
        bias: bool = False,
        *,
        scaler: Any = None,
        weight: float = 1.0,
    ) -> None:
        """See :meth:`BasePruner.regularize`; ``reg`` is another strength for this once."""
        changed = self.scales if reg is None else replace(self.scales, reg=reg)
        chosen = [changed if one is self.scales else one for one in self._penalties.regularizers]
        self._penalties.add(scaler, weight, bias, chosen)


def _with(regularizer: Regularizer, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with the pruner's own penalty besides those of the user."""
    others = options.get("regularizer") or ()
    others = others if isinstance(others, (list, tuple)) else (others,)
    return {**options, "regularizer": [regularizer, *others]}


__all__ = ["BNScalePruner", "GroupNormPruner", "GrowingRegPruner", "MagnitudePruner", "MetaPruner"]
