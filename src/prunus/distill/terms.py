"""What a distillation loss is made of: distances between what the pruned and what the dense model compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from prunus.errors import InputError
from prunus.tracing import tensors_in

TINY = 1e-12


def floats(value: Any) -> list[Tensor]:
    """The float tensors in what a module returned, in order."""
    return [t for t in tensors_in(value) if t.is_floating_point()]


def softened(student: Tensor, dense: Tensor, temperature: float, dim: int | None = None) -> Tensor:
    """The divergence of softened classes, times the square of the temperature: zero where both agree.

    Args:
        student: logits, of any shape.
        dense: logits of the same shape.
        temperature: divides both.
        dim: the dim of the classes; by default the last, or dim 1 of tensors with four or more dims (maps of classes).

    Source: Hinton et al. 2015 (arXiv 1503.02531).

    Example:
        >>> softened(torch.tensor([[2.0, 1.0]]), torch.tensor([[3.0, 2.0]]), 2.0).item()
        0.0
    """
    if student.shape != dense.shape:
        raise InputError(
            f"the logits have shape {tuple(student.shape)} and those of the dense model {tuple(dense.shape)}: the "
            "outputs must stay whole in a cut; pass pick= to say what of the outputs are the logits"
        )
    dim = dim if dim is not None else 1 if student.dim() > 3 else -1
    own, theirs = (F.log_softmax(t.float() / temperature, dim) for t in (student, dense))
    return F.kl_div(own, theirs, reduction="none", log_target=True).sum(dim).mean() * temperature**2


def apart(student: Tensor, dense: Tensor) -> Tensor:
    """The mean squared difference, as a share of the variance of the dense values; 0 where those are all the same.

    Example:
        >>> apart(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 3.0])).item()
        0.5
    """
    dense = dense.float()
    spread = dense.var(unbiased=False)
    gap = (student.float() - dense).square().mean()
    return torch.where(spread > TINY, gap / spread.clamp(min=TINY), 0.0 * gap)


def logits_in(outputs: Any) -> Tensor:
    """The logits in what a model returned: the tensor itself, what is called so, or the first float tensor."""
    if isinstance(outputs, Tensor):
        return outputs
    named = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    found = named if isinstance(named, Tensor) else next(iter(floats(outputs)), None)
    if found is None:
        raise InputError(f"the outputs, a {type(outputs).__name__}, hold no float tensor: pass pick=, or logits=0")
    return found


def raw_predictions(outputs: Any) -> list[Mapping[str, Tensor]]:
    """The raw predictions of detection heads in what a model returned: mappings with ``boxes`` and ``scores``."""
    found = list(_raw(outputs))
    if not found:
        raise InputError(
            "the outputs hold no raw predictions of a detection head (a dict with tensors 'boxes' and 'scores', as "
            "detectors of Ultralytics 8.4 return them): pass pick= to make such a dict of the outputs, or detection=0"
        )
    return found


def _raw(outputs: Any) -> Iterator[Mapping[str, Tensor]]:
    if isinstance(outputs, Mapping):
        if all(isinstance(outputs.get(key), Tensor) for key in ("boxes", "scores")):
            yield outputs
            return
        outputs = tuple(outputs.values())
    if isinstance(outputs, (tuple, list)):
        for part in outputs:
            yield from _raw(part)


def detected(student: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> Tensor:
    """How far a detection head is from the dense one: zero where both predict the same.

    Boxes: the divergence of the distributions over bins, for each side of each anchor, weighted by the confidence of
    the dense model. Classes: binary cross-entropy against the dense sigmoids, less its least value, at all anchors (so
    that what the pruned model sees where the dense one sees nothing counts). Both are divided by the sum of the dense
    confidences, as detectors divide their own losses by the sum of their targets.

    Args:
        student: ``boxes`` (samples, 4 * bins, anchors) and ``scores`` (samples, classes, anchors), both before any
            softmax or sigmoid. With one bin the boxes are distances, and are compared by a smooth L1 loss.
        dense: the same of the dense model.

    Source: Zheng et al. 2022 (arXiv 2102.12252) for box distributions.
    """
    for key in ("boxes", "scores"):
        if student[key].shape != dense[key].shape:
            raise InputError(
                f"{key} have shape {tuple(student[key].shape)} and those of the dense model {tuple(dense[key].shape)}: "
                "run both on the same inputs, and keep the outputs of the head whole in a cut"
            )
    scores, wanted = student["scores"].float(), dense["scores"].float()
    target = wanted.sigmoid()
    confidence = target.amax(1)
    total = confidence.sum().clamp(min=TINY)
    cross = F.binary_cross_entropy_with_logits(scores, target, reduction="sum")
    least = F.binary_cross_entropy_with_logits(wanted, target, reduction="sum")
    boxes, theirs = (raw["boxes"].float().unflatten(1, (4, -1)) for raw in (student, dense))
    if boxes.shape[2] == 1:
        gap = F.smooth_l1_loss(boxes, theirs, reduction="none").sum(2)
    else:
        pair = boxes.log_softmax(2), theirs.log_softmax(2)
        gap = F.kl_div(*pair, reduction="none", log_target=True).sum(2)
    return (cross - least + (gap.mean(1) * confidence).sum()) / total


def share_apart(student: Sequence[Sequence[Tensor]], dense: Sequence[Sequence[Tensor]]) -> float | None:
    """Over batches: squared difference by variance, the mean over the tensors; None where they cannot be compared."""
    shares: list[float] = []
    for ones, others in zip(zip(*student, strict=True), zip(*dense, strict=True), strict=True):
        if any(a.shape != b.shape for a, b in zip(ones, others, strict=True)):
            return None
        own, theirs = (torch.cat([t.double().flatten() for t in part]) for part in (ones, others))
        spread = float((theirs - theirs.mean()).square().sum())
        shares.append(float((own - theirs).square().sum()) / max(spread, 1e-30))
    return sum(shares) / len(shares) if shares else None
