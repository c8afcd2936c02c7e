"""Attributes of ultralytics blocks that equal a width by construction.

The engine finds the attributes that a forward pass *reads*. ``C2f.c`` is not one of them: ``forward`` uses
``chunk(2, 1)``, and only the exporter, which swaps in ``forward_split``, uses ``c``. A model with a stale ``c`` trains
and validates, and breaks at export. Such attributes are listed here, each with the parameter that it follows.
"""

from collections.abc import Iterator

from torch import nn
from ultralytics.nn.modules import block

from prunus.sizes import Fact

# class name (with subclasses: C3k2, C2fCIB and C2fPSA are C2f), attribute, parameter whose dim 0 it follows, divisor
_TABLE = (
    ("C2", "c", "cv1.conv.weight", 2),
    ("C2f", "c", "cv1.conv.weight", 2),
    ("C2fAttn", "c", "cv1.conv.weight", 2),
    ("PSA", "c", "cv1.conv.weight", 2),
    ("C2PSA", "c", "cv1.conv.weight", 2),
    ("RepNCSPELAN4", "c", "cv1.conv.weight", 2),
    ("ELAN1", "c", "cv1.conv.weight", 2),
    ("ADown", "c", "cv1.conv.weight", 1),
    ("SPPELAN", "c", "cv1.conv.weight", 1),
    ("RepVGGDW", "dim", "conv.conv.weight", 1),
)


def width_facts(model: nn.Module) -> list[Fact]:
    """Return a fact for every attribute in a model that must follow a layer's width although no traced op reads it.

    Args:
        model: An ultralytics model, such as ``YOLO("yolov8n.pt").model``.

    Example:
        >>> prunus.prune(yolo.model, images, facts=width_facts(yolo.model))  # doctest: +SKIP
    """
    return [fact for module in model.modules() for fact in _of(module)]


def _of(module: nn.Module) -> Iterator[Fact]:
    for name, attribute, parameter, divide in _TABLE:
        kind = getattr(block, name, None)  # older and newer releases lack some of the classes
        if kind is None or not isinstance(module, kind):
            continue
        width = module.get_parameter(parameter).shape[0]
        if getattr(module, attribute, None) == width // divide and width % divide == 0:
            yield Fact(module=module, attribute=attribute, parameter=parameter, dim=0, divide=divide)
            return
