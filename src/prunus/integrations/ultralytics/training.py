"""A trainer that trains the network it is given, and not one rebuilt from ``model.yaml``.

``get_model`` is the single place where ultralytics builds the network to be trained: ``YOLO.train``, ``resume=True``,
training over several data sets and the workers of distributed training all pass through it, under this name and with
these arguments since 8.0. So that one method is overridden and nothing else.
"""

import copy
import functools
from typing import Any

from torch import nn
from ultralytics import YOLO
from ultralytics.models import yolo as tasks

from prunus.errors import InputError
from prunus.integrations.ultralytics.checkpoint import is_pruned

_PREFIX = "Pruned"


class KeepArchitecture:
    """Mixin for any ultralytics trainer: train the module that was handed over, at the widths that it has."""

    args: Any
    data: dict[str, Any]

    def get_model(self, cfg: Any = None, weights: nn.Module | None = None, verbose: bool = True) -> nn.Module:
        """Return a trainable copy of ``weights``; ``cfg`` and ``verbose`` are what the stock method takes, and unused.

        Raises:
            InputError: There is no module, it is not a pruned one, or it predicts other classes than the data has.
        """
        if not isinstance(weights, nn.Module):
            raise InputError(
                "a pruned model is trained from its file: save(yolo, 'pruned.pt'), then yolo = YOLO('pruned.pt') and "
                "yolo.train(trainer=trainer(yolo), ...)"
            )
        if not is_pruned(weights):
            raise InputError(
                "this model is not pruned (it has no marker 'model.pruned'): prune it with "
                "prunus.integrations.ultralytics.prune first, or train it without trainer=..."
            )
        model = copy.deepcopy(weights).float()  # as in stock trainers the caller's module is not trained in place
        classes = len(model.names)  # type: ignore[arg-type]
        if classes != self.data["nc"]:
            raise InputError(
                f"the pruned model predicts {classes} classes and the data has {self.data['nc']}: train the unpruned "
                "model on this data first, then prune it"
            )
        model.criterion = None  # type: ignore[assignment]  # a cached loss holds the arguments of another run
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)  # checkpoints are saved with all gradients off
        if rate := getattr(self.args, "dropout", None):
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = rate
        return model


def trainer(yolo: YOLO) -> type[Any]:
    """Return the trainer class to fine-tune a pruned model with: ``yolo.train(trainer=trainer(yolo), ...)``.

    Args:
        yolo: The model, loaded from the file that :func:`prunus.integrations.ultralytics.save` wrote, of any task.

    Example:
        >>> yolo = YOLO("pruned.pt")                                             # doctest: +SKIP
        >>> yolo.train(trainer=trainer(yolo), data="coco8.yaml", epochs=10)      # doctest: +SKIP
        >>> yolo = YOLO("runs/detect/train/weights/last.pt")                     # doctest: +SKIP
        >>> yolo.train(trainer=trainer(yolo), resume=True)                       # doctest: +SKIP
    """
    return _keeping(yolo.task_map[yolo.task]["trainer"])


@functools.cache
def _keeping(stock: type[Any]) -> type[Any]:
    return type(_PREFIX + stock.__name__, (KeepArchitecture, stock), {"__module__": __name__, "__doc__": stock.__doc__})


def __getattr__(name: str) -> Any:
    """Find a generated class by name, because workers of distributed training import it from this module."""
    if name.startswith(_PREFIX):
        for task in (tasks.detect, tasks.segment, tasks.pose, tasks.obb, tasks.classify):
            if stock := getattr(task, name.removeprefix(_PREFIX), None):
                return _keeping(stock)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
