"""Real networks, whole: the graph is proved on each; cut to half it still trains, costs what was said, and undoes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunus
from prunus.cost import count
from prunus.tracing import tensors_in

models = pytest.importorskip("torchvision").models

SYMMETRY = 1e-5
SHARE, RECURRENT_SHARE = 0.99, 0.90


class Recurrent(nn.Module):
    """A classifier of token sequences: embedding, recurrent layers, linear."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.rnn = kind(16, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(64, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.rnn(self.embedding(tokens))[0][:, -1])


def _torchvision(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(models, name)(weights=None, **arguments)


def _yolo(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        tasks = pytest.importorskip("ultralytics.nn.tasks")
        return tasks.DetectionModel(name, nc=4, verbose=False)

    return build


def _image(size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, size, size)


def _tokens() -> Tensor:
    return torch.randint(0, 20, (2, 7))


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], float]] = {
    "resnet18": (_torchvision("resnet18"), _image(64), SHARE),
    "resnet50": (_torchvision("resnet50"), _image(64), SHARE),
    "vgg16_bn": (_torchvision("vgg16_bn"), _image(32), SHARE),
    "densenet121": (_torchvision("densenet121"), _image(64), SHARE),
    "mobilenet_v3_large": (_torchvision("mobilenet_v3_large"), _image(64), SHARE),
    "shufflenet_v2_x1_0": (_torchvision("shufflenet_v2_x1_0"), _image(64), SHARE),
    "resnext50_32x4d": (_torchvision("resnext50_32x4d"), _image(64), SHARE),
    "efficientnet_b0": (_torchvision("efficientnet_b0"), _image(64), SHARE),
    "convnext_tiny": (_torchvision("convnext_tiny"), _image(64), SHARE),
    "vit_b_16": (_torchvision("vit_b_16", image_size=32), _image(32), SHARE),
    "swin_t": (_torchvision("swin_t"), _image(64), SHARE),
    "yolov8n": (_yolo("yolov8n.yaml"), _image(64), SHARE),
    "yolo11n": (_yolo("yolo11n.yaml"), _image(64), SHARE),
    "lstm": (lambda: Recurrent(nn.LSTM), _tokens, RECURRENT_SHARE),
    "gru": (lambda: Recurrent(nn.GRU), _tokens, RECURRENT_SHARE),
}


@pytest.fixture(params=list(ZOO), scope="module")
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, float]:
    """A freshly initialised network, its input, and the share of its parameters that must be prunable."""
    torch.manual_seed(0)
    build, example, share = ZOO[request.param]
    return build().eval(), example(), share


def test_the_graph_is_right_and_reaches_the_parameters(case: tuple[nn.Module, Tensor, float]) -> None:
    """Symmetry and silence hold, no op is unknown, and (nearly) every parameter is in a prunable group."""
    model, inputs, share = case
    report = prunus.verify(model, inputs)
    assert report.ok, str(report)
    assert report.symmetry_error < SYMMETRY
    assert report.prunable_share >= share, str(report)
    assert not report.unsupported


def test_half_is_cut_counted_trained_and_undone(case: tuple[nn.Module, Tensor, float]) -> None:
    """At half of every group the model runs and trains, costs what the plan says, and undo restores every bit."""
    model, inputs, _ = case
    with torch.no_grad():
        reference = [t.clone() for t in tensors_in(model(inputs))]
    shapes = [t.shape for t in reference]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = _sizes(model)

    result = prunus.prune(model, inputs, prunus.Target(ratio=0.5))

    cost = count(model, inputs)
    assert (result.after.macs, result.after.params) == (cost.macs, cost.params)
    assert result.after.macs < 0.6 * result.before.macs
    assert result.after.params < 0.6 * result.before.params
    with torch.no_grad():
        assert [t.shape for t in tensors_in(model(inputs))] == shapes
    _train_one_step(copy.deepcopy(model), inputs)

    result.undo()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert _sizes(model) == attributes
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(reference, tensors_in(model(inputs)), strict=True))


def _sizes(model: nn.Module) -> dict[str, Any]:
    """Every int (or tuple of ints) that a module holds, with its exact type."""
    return {
        f"{path}.{name}": (type(value), value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(v, int) for v in value))
    }


def _train_one_step(model: nn.Module, inputs: Tensor) -> None:
    model.train().requires_grad_(True)
    loss = sum(t.float().square().mean() for t in tensors_in(model(inputs)) if t.requires_grad)
    assert isinstance(loss, Tensor)
    loss.backward()
    touched = [p for p in model.parameters() if p.grad is not None]
    assert touched
    assert all(p.grad is not None and p.grad.shape == p.shape for p in touched)
    torch.optim.SGD(touched, lr=1e-4).step()
    assert all(torch.isfinite(p).all() for p in touched)


def test_resnet18_at_half_of_every_group_has_the_published_size() -> None:
    """Two independent implementations agree: ResNet-18 with half of each group and fc's output kept has 3,055,880."""
    model = models.resnet18(weights=None)
    result = prunus.prune(model, torch.randn(1, 3, 64, 64), prunus.Target(ratio=0.5))
    assert result.after.params == 3_055_880
    assert sum(p.numel() for p in model.parameters()) == 3_055_880


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x1_0", "vit_b_16", "yolov8n", "lstm"])
@pytest.mark.parametrize("macs", [0.75, 0.5])
def test_a_budget_of_macs_is_met_closely(name: str, macs: float) -> None:
    """The cut is within the budget, and does not take far more than asked."""
    build, example, _ = ZOO[name]
    model, inputs = build().eval(), example()
    result = prunus.prune(model, inputs, prunus.Target(macs=macs))
    left = count(model, inputs).macs / result.before.macs
    assert macs - 0.1 < left <= macs
