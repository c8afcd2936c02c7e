"""A model before and after pruning, line by line."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from prunus.errors import InputError

_BEFORE: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()  # the two calls share nothing but the model


def before_pruning(model: nn.Module) -> None:
    """Remember how a model prints."""
    _BEFORE[model] = str(model)


def after_pruning(model: nn.Module, do_print: bool = True) -> str:
    """How a model prints now, with ``before => after`` in the lines that changed; printed unless told otherwise.

    Raises:
        InputError: :func:`before_pruning` was not called for this model.

    Example:
        >>> from torch import nn
        >>> import prunus as tp
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> tp.utils.print_tool.before_pruning(model)
        >>> tp.prune_linear_out_channels(model[0], [0])
        Linear(in_features=4, out_features=7, bias=True)
        >>> text = tp.utils.print_tool.after_pruning(model)
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True) => (0): Linear(in_features=4, out_features=7, bias=True)
          (1): ReLU()
        )
    """
    before = _BEFORE.get(model)
    if before is None:
        raise InputError("print_tool.before_pruning(model) was not called for this model")
    old, new = before.splitlines(), str(model).splitlines()
    if len(old) == len(new):
        new = [b if a == b else f"{a} => {b.strip()}" for a, b in zip(old, new, strict=True)]
    text = "\n".join(new)
    if do_print:
        print(text)
    return text


__all__ = ["after_pruning", "before_pruning"]
