"""Structured pruning of ultralytics models (YOLOv8, YOLO11, ...), with stock modules and stock files.

Nothing of ultralytics is replaced or patched. A pruned model keeps its modules, only narrower, so any installation of
ultralytics loads, validates, predicts with and exports its file. The one thing that stock ultralytics cannot do is to
*train* it: ``train()`` rebuilds the network from ``model.yaml``, at full width. :func:`trainer` is a trainer that does
not, and the file that :func:`save` writes refuses the other one with a message.

Example:
    >>> from ultralytics import YOLO                                                           # doctest: +SKIP
    >>> from prunus import Target
    >>> from prunus.integrations.ultralytics import prune, save, trainer
    >>> yolo = YOLO("yolov8n.pt")                                                              # doctest: +SKIP
    >>> print(prune(yolo, Target(macs=0.5), imgsz=640))                                        # doctest: +SKIP
    >>> save(yolo, "pruned.pt")                                                                # doctest: +SKIP
    >>> yolo = YOLO("pruned.pt")                                                               # doctest: +SKIP
    >>> yolo.train(trainer=trainer(yolo), data="coco8.yaml", epochs=10)                        # doctest: +SKIP

:func:`run` is the whole job (train, prune, fine-tune, validate, time, export) that ``prunus yolo`` starts.
"""

try:
    import ultralytics as _ultralytics  # noqa: F401
except ImportError as error:
    raise ImportError(
        "prunus.integrations.ultralytics needs the ultralytics package: pip install 'prunus[ultralytics]'"
    ) from error

from prunus.integrations.ultralytics.checkpoint import save
from prunus.integrations.ultralytics.facts import width_facts
from prunus.integrations.ultralytics.job import run
from prunus.integrations.ultralytics.pictures import Pictures
from prunus.integrations.ultralytics.preflight import Job
from prunus.integrations.ultralytics.pruning import prune
from prunus.integrations.ultralytics.result import Figures, Result
from prunus.integrations.ultralytics.training import trainer

__all__ = ["Figures", "Job", "Pictures", "Result", "prune", "run", "save", "trainer", "width_facts"]
