"""The counter: what each op costs, that nothing of the model changes, and what a wrong call says."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import prunus
from prunus.cost import Cost, count, count_ops_and_params, count_params, latency
from prunus.cost.extents import PlanCost
from prunus.errors import InputError
from prunus.plan import footprint


class Function(nn.Module):
    """A module around a function, so that functional ops can be counted."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor):
        return self.function(*args)


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape)


# fmt: off
LAYERS = [
    # name, layer, input shape, multiply-accumulates by hand
    ("conv", nn.Conv2d(3, 8, 3, padding=1), (2, 3, 5, 5), 2 * 25 * 8 * 3 * 9),
    ("conv same", nn.Conv2d(3, 8, 3, padding="same"), (2, 3, 5, 5), 2 * 25 * 8 * 3 * 9),
    ("conv strided", nn.Conv2d(3, 8, 3, stride=2), (1, 3, 7, 7), 9 * 8 * 3 * 9),
    ("conv grouped", nn.Conv2d(4, 8, 3, groups=2, padding=1), (1, 4, 5, 5), 25 * 8 * 2 * 9),
    ("conv depthwise", nn.Conv2d(4, 4, 3, groups=4, padding=1), (1, 4, 5, 5), 25 * 4 * 9),
    ("conv 1d unbatched", nn.Conv1d(4, 6, 2), (4, 9), 8 * 6 * 4 * 2),
    ("conv 3d", nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 8 * 3 * 2 * 8),
    ("conv transposed", nn.ConvTranspose2d(3, 8, 2, stride=2), (2, 3, 5, 5), 2 * 25 * 3 * 8 * 4),
    ("conv transposed grouped", nn.ConvTranspose2d(4, 8, 3, groups=2), (1, 4, 5, 5), 25 * 4 * 4 * 9),
    ("linear", nn.Linear(5, 7), (2, 3, 5), 6 * 35),
    ("linear without bias", nn.Linear(5, 7, bias=False), (4, 5), 4 * 35),
    ("lstm", nn.LSTM(3, 4), (5, 2, 3), 10 * 4 * 4 * (3 + 4)),
    ("lstm unbatched", nn.LSTM(3, 4), (5, 3), 5 * 4 * 4 * (3 + 4)),
    ("lstm two layers, two directions", nn.LSTM(3, 4, 2, bidirectional=True), (5, 2, 3), 10 * 2 * 16 * (7 + 12)),
    ("lstm projected", nn.LSTM(3, 4, proj_size=2), (5, 2, 3), 10 * (16 * (3 + 2) + 8)),
    ("gru", nn.GRU(3, 4, batch_first=True), (2, 5, 3), 10 * 3 * 4 * (3 + 4)),
    ("rnn", nn.RNN(3, 4, nonlinearity="relu"), (5, 2, 3), 10 * 4 * (3 + 4)),
    ("lstm cell", nn.LSTMCell(3, 4), (2, 3), 2 * 16 * (3 + 4)),
    ("norms and activations", nn.Sequential(nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2)), (1, 4, 6, 6), 0),
    ("embedding bag", nn.EmbeddingBag(1, 4), (1, 1), 0),
]
FUNCTIONS = [
    # name, function, input shapes, multiply-accumulates by hand
    ("F.linear", F.linear, [(2, 5), (7, 5)], 70),
    ("F.conv2d", F.conv2d, [(1, 3, 5, 5), (8, 3, 3, 3)], 9 * 8 * 27),
    ("@", torch.matmul, [(2, 3, 4), (4, 5)], 2 * 3 * 4 * 5),
    ("@ of batches", torch.matmul, [(2, 6, 3, 4), (2, 6, 4, 5)], 12 * 60),
    ("@ of vectors", torch.matmul, [(4,), (4,)], 4),
    ("@ of a matrix and a vector", torch.matmul, [(3, 4), (4,)], 12),
    ("addmm", torch.addmm, [(3, 5), (3, 4), (4, 5)], 60),
    ("baddbmm", torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 120),
    ("addbmm", torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], 120),
    ("einsum", lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), [(1, 2, 3, 8), (1, 2, 5, 8)], 2 * 3 * 5 * 8),
    ("tensordot", lambda a, b: torch.tensordot(a, b, 1), [(2, 3, 4), (4, 5)], 120),
    ("bilinear", F.bilinear, [(2, 3), (2, 4), (5, 3, 4)], 2 * 60),
    ("attention", F.scaled_dot_product_attention, [(2, 4, 6, 8), (2, 4, 5, 8), (2, 4, 5, 7)], 8 * 30 * (8 + 7)),
    ("attention, shared keys", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
     [(1, 4, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8)], 4 * 36 * 16),
    ("elementwise", lambda a, b: a * b + a, [(3, 3), (3, 3)], 0),
]
# fmt: on


@pytest.mark.parametrize(("layer", "shape", "macs"), [row[1:] for row in LAYERS], ids=[row[0] for row in LAYERS])
def test_layer_macs(layer, shape, macs) -> None:
    inputs = torch.zeros(shape, dtype=torch.long) if isinstance(layer, nn.EmbeddingBag) else rand(*shape)
    assert count(layer, inputs).macs == macs


@pytest.mark.parametrize(
    ("function", "shapes", "macs"), [row[1:] for row in FUNCTIONS], ids=[row[0] for row in FUNCTIONS]
)
def test_functional_ops_count(function, shapes, macs) -> None:
    inputs = tuple(rand(*shape) for shape in shapes)
    assert count(Function(function), inputs).macs == macs


@pytest.mark.parametrize(
    ("function", "shapes", "macs"), [row[1:] for row in FUNCTIONS], ids=[row[0] for row in FUNCTIONS]
)
def test_decomposed_ops_count_the_same(function, shapes, macs) -> None:
    """Outside inference mode composite ops arrive taken apart; the sum is the same."""

    def outside(*args: Tensor):
        with torch.inference_mode(False), torch.no_grad():
            return function(*(torch.ones_like(arg) for arg in args))

    assert count(Function(outside), tuple(rand(*shape) for shape in shapes)).macs == macs


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_recurrent_kernels_count_the_same_as_their_steps(kind, options) -> None:
    layer = kind(3, 4, **options)

    def outside(x: Tensor):
        with torch.inference_mode(False), torch.no_grad():
            return layer(torch.ones_like(x))

    assert count(Function(outside), rand(5, 2, 3)).macs == count(layer, rand(5, 2, 3)).macs


def test_packed_sequences_count_their_own_steps() -> None:
    layer = nn.GRU(3, 4)
    packed = nn.utils.rnn.pack_padded_sequence(rand(5, 2, 3), [5, 3])
    cost = count(Function(lambda x: layer(packed)), rand(1))
    assert cost.macs == (5 + 3) * 12 * (3 + 4)


def test_transformer_encoder_counts_in_full() -> None:
    """The fused path of evaluation mode would hide every product."""
    width, hidden, tokens = 8, 16, 5
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True)
    per_token = 4 * width * width + 2 * width * hidden + 2 * tokens * width
    assert count(nn.TransformerEncoder(layer, 3), rand(2, tokens, width)).macs == 3 * 2 * tokens * per_token
    assert torch.backends.mha.get_fastpath_enabled()


def test_deformable_convolution_counts() -> None:
    layer = torchvision.ops.DeformConv2d(3, 8, 3)
    assert count(layer, (rand(1, 3, 5, 5), rand(1, 18, 3, 3))).macs == 9 * 8 * 27


def test_resnet18_has_the_published_cost() -> None:
    model = torchvision.models.resnet18()
    inputs = rand(1, 3, 224, 224)
    cost = count(model, inputs)
    assert (cost.macs, cost.params) == (1_814_073_344, 11_689_512)
    assert str(cost) == "1.81 G MACs, 11.69 M parameters, 46.80 MB"
    assert count_ops_and_params(model, inputs) == (1_822_177_768, 11_689_512)


def test_meta_device_counts_without_computing() -> None:
    with torch.device("meta"):
        cost = count(torchvision.models.vit_b_16(), torch.empty(1, 3, 224, 224))
    assert cost.params == 86_567_656
    assert cost.macs == pytest.approx(17.56e9, rel=1e-2)


@pytest.mark.parametrize(
    "inputs", [(rand(1, 4), rand(1, 4)), [rand(1, 4), rand(1, 4)], {"a": rand(1, 4), "b": rand(1, 4)}]
)
def test_inputs_by_position_and_by_name(inputs) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.fc(a) + self.fc(b)

    assert count(Two(), inputs) == Cost(macs=24, params=15, bytes=60)


def test_forward_fn_runs_the_model_its_own_way() -> None:
    model = nn.Linear(4, 3)
    assert count(model, 7, forward_fn=lambda m, n: [m(torch.zeros(1, 4)) for _ in range(n)]).macs == 7 * 12


def test_shared_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_params(model) == 16 + 4 + 4
    _, params, _, by_layer = count_ops_and_params(model, rand(1, 4), layer_wise=True)
    assert sum(by_layer.values()) == params == 24


def test_layer_wise_counts_sum_to_the_total() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    ops, params, layer_ops, layer_params = count_ops_and_params(model, rand(1, 3, 5, 5), layer_wise=True)
    assert [layer_ops[layer] for layer in model] == [9 * 4 * 27 + 36, 72, 36, 0, 74]
    assert [layer_params[layer] for layer in model] == [4 * 27 + 4, 8, 0, 0, 74]
    assert (sum(layer_ops.values()), sum(layer_params.values())) == (ops, params)


class Messy(nn.Module):
    """Does to itself whatever a model may do in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.zeros(1))
        self.table = torch.zeros(2)
        self.cache = {"size": 0}
        self.trace: list[int] = []
        self.shape: tuple[int, ...] | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.table.add_(1)
        self.cache["size"] += 1
        self.trace.append(1)
        self.shape = tuple(x.shape)
        self.grid = torch.arange(4)
        self.norm.running_mean = self.norm.running_mean + 1
        random.random(), np.random.rand()
        return F.dropout(self.norm(self.fc(x)), training=True)


@pytest.mark.parametrize("run", [count, count_ops_and_params, lambda model, x: latency({"it": model}, x, 1, 1)])
def test_the_model_is_left_as_it_came(run) -> None:
    model, inputs = Messy().train(), rand(2, 4)
    model.norm.eval()
    model.fc.weight.grad = torch.ones(4, 4)
    hooks = dict(model._forward_hooks)
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    versions = {name: value._version for name, value in model.named_parameters()}
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    run(model, inputs)

    assert model.training
    assert not model.norm.training
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    assert dict(model._forward_hooks) == hooks
    assert (model.cache, model.trace, model.shape) == ({"size": 0}, [], None)
    assert torch.equal(model.table, torch.zeros(2))
    assert not model.table.is_inference()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert {name: value._version for name, value in model.named_parameters()} == versions
    assert torch.equal(model.fc.weight.grad, torch.ones(4, 4))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert random.getstate() == python_state
    model(inputs).sum().backward()  # nothing of an inference pass is left to stop a training step


def test_the_model_is_restored_after_a_failure() -> None:
    model = Messy().train()
    with pytest.raises(InputError):
        count(model, rand(2, 5))
    assert model.training
    assert model.trace == []
    assert torch.equal(model.steps, torch.zeros(1))


@pytest.mark.parametrize("compiled", [False, True])
def test_counting_does_not_compile(compiled) -> None:
    model = nn.Linear(4, 3)
    assert count(torch.compile(model) if compiled else model, rand(1, 4)).macs == 12


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (nn.Linear(4, 3), rand(2, 5), ["Linear", "(2, 5)", "tuple of positional"]),
        (nn.Linear(4, 3), {"x": rand(2, 4)}, ["x: tensor of shape (2, 4)", "keyword"]),
        (nn.LazyLinear(3), rand(2, 4), ["weight", "run the model once"]),
        (len, rand(1), ["torch.nn.Module", "builtin_function_or_method"]),
    ],
)
def test_wrong_calls_say_what_to_do(model, inputs, words) -> None:
    with pytest.raises(InputError) as error:
        count(model, inputs)
    assert all(word in str(error.value) for word in words)


def test_latency_takes_turns_and_gives_medians() -> None:
    order: list[str] = []
    models = {name: (lambda x, name=name: order.append(name)) for name in "ab"}
    times = latency(models, rand(1), repeat=3, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert set(times) == {"a", "b"}
    assert all(value >= 0 for value in times.values())


def test_a_machine_that_changes_its_speed_does_not_change_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second model takes half as long as the first in each turn, whatever a turn takes."""
    now = [0.0]
    speeds = iter([1.0, 1.0, 9.0, 9.0, 2.0, 2.0, 1.0, 1.0])
    work = {"a": 2.0, "b": 1.0}

    def run(name: str) -> None:
        now[0] += work[name] * next(speeds)

    monkeypatch.setattr("prunus.cost.timing.time.perf_counter", lambda: now[0])
    times = latency({name: (lambda x, name=name: run(name)) for name in work}, rand(1), repeat=4, warmup=0)
    assert times == {"a": pytest.approx(3000.0), "b": pytest.approx(1500.0)}


def test_latency_tells_more_work_from_less() -> None:
    models = {"small": nn.Linear(512, 16), "large": nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))}
    times = latency(models, rand(64, 512), repeat=10, warmup=2)
    assert times["small"] < times["large"]


@pytest.mark.parametrize(("models", "options"), [({}, {}), ({"a": nn.Identity()}, {"repeat": 0})])
def test_latency_refuses_nothing_to_time(models, options) -> None:
    with pytest.raises(InputError, match="at least one turn"):
        latency(models, rand(1), **options)


@pytest.mark.parametrize("name", ["resnext50_32x4d", "shufflenet_v2_x1_0", "convnext_tiny", "swin_t", "vit_b_16"])
def test_agrees_with_the_flop_counter_of_torch(name) -> None:
    """An oracle that shares no code with ours; two FLOPs are one MAC."""
    with torch.device("meta"):
        model, inputs = getattr(torchvision.models, name)().eval(), torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    assert counter.get_total_flops() == 2 * count(model, inputs).macs


def test_detector_counts_and_keeps_its_caches() -> None:
    """A YOLO head caches anchors on itself; as inference tensors they would break the next training step."""
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    model = tasks.DetectionModel("yolov8n.yaml", verbose=False)
    before = dict(vars(model.model[-1]))
    cost = count(model, rand(1, 3, 640, 640))
    assert cost.params == 3_157_200
    assert cost.macs == pytest.approx(4.37e9, rel=5e-3)
    assert dict(vars(model.model[-1])) == before


@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_the_fast_count_of_a_plan_is_the_footprint(ratio: float) -> None:
    """Convolutions in groups, attention with head dims, and a recurrent layer, each cut."""
    from torchvision.models import VisionTransformer, shufflenet_v2_x0_5

    networks: list[tuple[nn.Module, torch.Tensor]] = [
        (shufflenet_v2_x0_5(), torch.randn(1, 3, 32, 32)),
        (VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), torch.randn(1, 3, 32, 32)),
        (nn.Sequential(nn.Linear(8, 16), nn.LSTM(16, 12, num_layers=2)), torch.randn(3, 2, 8)),
    ]
    for model, inputs in networks:
        graph = prunus.prune(model.eval(), inputs, prunus.Target(ratio=ratio)).graph
        expected = footprint(graph.coupling, graph.alive)
        assert PlanCost(graph.coupling)(graph.alive) == (expected.macs, expected.params)
