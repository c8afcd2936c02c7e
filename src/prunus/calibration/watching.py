"""Watch layers while the caller runs the model by hand: hooks instead of a pass of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from prunus.calibration.recording import Recorder
from prunus.calibration.statistics import Calibration

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


class ModuleWatch:
    """Sums up what linear and convolutional layers read, and the energy of the gradients of what they make.

    The caller runs mean losses backward and counts each batch with :meth:`step`.
    """

    def __init__(self, model: nn.Module, max_gram: int = 2304) -> None:
        parameters = list(model.named_parameters())
        self._names = [(n, p) for n, p in model.named_parameters(remove_duplicate=False)]
        self._own = {id(p): n for n, p in parameters}
        self._recorder = Recorder(self._own, {n: tuple(p.shape) for n, p in parameters}, max_gram)
        self._recorder.energies = True
        self._samples, self._last = 0, 0
        self._handles = [
            m.register_forward_hook(self._seen)
            for m in model.modules()
            if isinstance(m, (nn.Linear, _ConvNd)) and not isinstance(m, _ConvTransposeNd)
        ]

    def _seen(self, module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, recorder = inputs[0], self._recorder
        self._last = output.shape[0]
        recorder.scale = float(self._last)
        if isinstance(module, nn.Linear):
            recorder._linear(F.linear, (x, module.weight), {}, output)
            return
        padding: Any = module.padding
        if module.padding_mode != "zeros":
            x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
        rest = (module.stride, padding, module.dilation, module.groups)
        recorder._convolution(_CONVOLUTIONS[x.dim() - 3], (x, module.weight, None, *rest), {}, output)

    def step(self) -> None:
        """Count the samples of the batch that was just run backward."""
        self._samples += self._last

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def calibration(self) -> Calibration:
        """What was seen so far."""
        own = self._recorder.readings
        readings = {n: own[self._own[id(p)]] for n, p in self._names if self._own[id(p)] in own}
        shapes = {n: tuple(p.shape) for n, p in self._names}
        collected = frozenset({"activations", "grams", "gradients"})
        return Calibration(max(self._samples, 1), 0.0, collected, {}, readings, shapes)


@contextmanager
def recording(model: nn.Module, grams: int = 0) -> Iterator[Recorder]:
    """Sum up what all weights of ``model`` read while the caller runs it inside the context."""
    parameters = list(model.named_parameters())
    recorder = Recorder({id(p): n for n, p in parameters}, {n: tuple(p.shape) for n, p in parameters}, grams)
    with recorder:
        yield recorder
