"""Surgery: all or nothing, and everything can be undone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import prunus
from prunus import surgery
from prunus.plan import Footprint, Plan, Removal, Setting


class Mixed(nn.Module):
    """Convolutions, a batch norm, a buffer, a bare parameter, heads sized by attributes and a list of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.register_buffer("shift", torch.randn(8, 1, 1))
        self.split = [4, 4]
        self.heads, self.width = 2, 4
        self.mix = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn(self.conv(x)) * self.scale + self.shift
        a, b = x.split(self.split, 1)
        x = self.mix(torch.cat([b, a.relu()], 1)).mean((2, 3))
        return self.head(x.view(-1, self.heads, self.width).flatten(1))


X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def plan_for(model: nn.Module, inputs=X) -> Plan:
    """The plan of pruning half of every group of a copy of ``model``."""
    return prunus.prune(copy.deepcopy(model), inputs, prunus.Target(ratio=0.5)).plan


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step, so that gradients and the optimizer's state exist."""
    model.train()
    model(X).square().sum().backward()
    optimizer.step()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None):
    """Every bit: values, gradients, attributes, optimizer state."""
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    grads = {k: None if p.grad is None else p.grad.clone() for k, p in model.named_parameters()}
    plain = {
        f"{path}.{k}": copy.copy(v)
        for path, m in model.named_modules()
        for k, v in vars(m).items()
        if isinstance(v, (int, float, tuple)) or (isinstance(v, list) and all(isinstance(i, int) for i in v))
    }
    moments = {}
    if optimizer is not None:
        for name, p in model.named_parameters():
            for key, value in optimizer.state[p].items():
                moments[name, key] = value.clone() if isinstance(value, torch.Tensor) else value
    return tensors, grads, plain, moments


def same(one, other) -> bool:
    """Bit for bit."""

    def equal(a, b) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return type(a) is type(b) and a == b

    return all(x.keys() == y.keys() and all(equal(x[k], y[k]) for k in x) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", [torch.optim.Adam, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)])
def test_apply_then_undo_is_the_identity(kind) -> None:
    """Values, gradients, attributes and optimizer state come back bit for bit, and training goes on."""
    model = Mixed()
    optimizer = kind(model.parameters())
    trained(model, optimizer)
    before = snapshot(model, optimizer)
    receipt = surgery.apply(model, plan_for(model), optimizer)
    assert not same(before, snapshot(model, optimizer))
    for p in model.parameters():
        assert p.grad is None or p.grad.shape == p.shape
        assert all(
            not isinstance(v, torch.Tensor) or v.dim() == 0 or v.shape == p.shape for v in optimizer.state[p].values()
        )
    receipt.undo()
    assert same(before, snapshot(model, optimizer))
    receipt.undo()
    assert same(before, snapshot(model, optimizer))
    trained(model, optimizer)


def test_training_goes_on_after_the_cut() -> None:
    """The optimizer that was given steps the pruned parameters, which keep their identity."""
    model = Mixed()
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, optimizer)
    own = {name: id(p) for name, p in model.named_parameters()}
    surgery.apply(model, plan_for(model), optimizer)
    assert {name: id(p) for name, p in model.named_parameters()} == own
    weight = model.conv.weight.detach().clone()
    optimizer.zero_grad()
    trained(model, optimizer)
    assert not torch.equal(weight, model.conv.weight)


def test_fault_at_every_change_leaves_the_model_as_it_was(monkeypatch) -> None:
    """Whichever change fails, those already made are taken back and the error says so."""
    model = Mixed()
    plan = plan_for(model)
    prepare = surgery._prepare
    total = len(prepare(model, plan, None, surgery._targets(model, plan), surgery._places(model)))
    assert total > 8
    before = snapshot(model)

    def fail() -> None:
        raise OSError("no more memory")

    for k in range(total):

        def broken(*args, k=k):
            changes = prepare(*args)
            changes[k] = changes[k]._replace(do=fail)
            return changes

        monkeypatch.setattr(surgery, "_prepare", broken)
        with pytest.raises(prunus.SurgeryError, match="taken back"):
            surgery.apply(model, plan)
        assert same(before, snapshot(model))


def test_fault_in_mirrored_attributes_is_taken_back_too(monkeypatch) -> None:
    """Attributes that repeat a width are part of the same all-or-nothing."""
    model = Mixed()
    before, plan = snapshot(model), plan_for(model)

    def broken(*args):
        raise RuntimeError("unexpected")

    monkeypatch.setattr(surgery, "_mirror_changes", broken)
    with pytest.raises(prunus.SurgeryError, match="unexpected"):
        surgery.apply(model, plan)
    assert same(before, snapshot(model))


def test_interrupt_is_taken_back_and_passed_on(monkeypatch) -> None:
    """Ctrl-C in the middle leaves the model as it was."""
    model = Mixed()
    before, plan = snapshot(model), plan_for(model)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(surgery, "_mirror_changes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        surgery.apply(model, plan)
    assert same(before, snapshot(model))


def test_stale_model_is_refused() -> None:
    """A plan fits a model once; the second time it names tensor, sizes and cure, and nothing changes."""
    model = Mixed()
    plan = plan_for(model)
    surgery.apply(model, plan)
    before = snapshot(model)
    with pytest.raises(prunus.SurgeryError, match=r"has shape \(4.* the plan needs 8 .* build the graph again"):
        surgery.apply(model, plan)
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    ("removal", "words"),
    [
        (Removal("nowhere.weight", 0, 8, (0,)), "no tensor nowhere.weight"),
        (Removal("conv.out_channels", 0, 8, (0,)), "is no tensor"),
        (Removal("conv.weight", 0, 8, (8,)), "positions that do not exist"),
        (Removal("conv.weight", 0, 8, tuple(range(8))), "would lose its last position"),
        (Removal("conv.weight", 5, 8, (0,)), "has shape"),
    ],
)
def test_wrong_plans_are_refused(removal, words) -> None:
    """Whatever does not fit is said before anything changes."""
    model = Mixed()
    before = snapshot(model)
    nothing = Footprint(0, 0, 0)
    with pytest.raises(prunus.SurgeryError, match=words):
        Plan((Removal("bn.weight", 0, 8, (0,)), removal), (), nothing, nothing).apply(model)
    assert same(before, snapshot(model))


def test_setting_of_a_missing_attribute_is_refused() -> None:
    """A plan that sets an entry of a list which is none is not applied."""
    model = Mixed()
    nothing = Footprint(0, 0, 0)
    with pytest.raises(prunus.SurgeryError, match="no list or tuple"):
        Plan((), (Setting("", "heads", 0, 1),), nothing, nothing).apply(model)


def test_setting_of_a_missing_module_is_refused() -> None:
    """A plan that sets an attribute of a module which the model does not have is a SurgeryError."""
    nothing = Footprint(0, 0, 0)
    with pytest.raises(prunus.SurgeryError):
        Plan((), (Setting("gone", "heads", None, 1),), nothing, nothing).apply(Mixed())


def test_attributes_and_mirrors_follow() -> None:
    """Sizes in attributes and lists, and the counters of torch's own layers, are plain ints of the new size."""
    model = Mixed()
    surgery.apply(model, plan_for(model))
    assert (model.conv.out_channels, model.bn.num_features) == (model.conv.weight.shape[0],) * 2
    assert (model.mix.in_channels, model.mix.out_channels) == (model.mix.weight.shape[1], model.mix.weight.shape[0])
    assert model.head.in_features == model.head.weight.shape[1] == model.heads * model.width
    assert sum(model.split) == model.conv.out_channels
    assert all(type(v) is int for v in (*model.split, model.heads, model.width, model.bn.num_features))
    assert type(model.split) is list


def test_tied_weights_stay_one() -> None:
    """A weight under two names is cut once and stays shared, and so is its gradient."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.mid = nn.Linear(8, 8)
            self.out = nn.Linear(8, 10, bias=False)
            self.out.weight = self.table.weight

        def forward(self, i):
            return self.out(self.mid(self.table(i)))

    model, inputs = Tied(), torch.tensor([[1, 2, 3]])
    model(inputs).sum().backward()
    plan_for(model, inputs).apply(model)
    assert model.out.weight is model.table.weight
    assert model.table.embedding_dim == model.out.weight.shape[1] < 8
    assert model.out.weight.grad.shape == model.out.weight.shape
    assert model(inputs).shape == (1, 3, 10)


def test_views_of_one_memory_stay_one() -> None:
    """Two parameters over the same memory are cut alike and still share it."""

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 8, bias=False)
            self.b = nn.Linear(6, 8, bias=False)
            self.b.weight = nn.Parameter(self.a.weight.detach())
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.a(x).relu() + self.b(x))

    model = Twin()
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr()
    plan_for(model, torch.randn(2, 6)).apply(model)
    assert model.a.weight.data_ptr() == model.b.weight.data_ptr()
    assert model.b.weight.shape == (4, 6)


def test_attributes_follow_at_every_place_of_a_tied_weight() -> None:
    """Both layers of a tied weight report its new size."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 8)
            self.mid = nn.Linear(8, 8)
            self.out = nn.Linear(8, 10, bias=False)
            self.out.weight = self.table.weight

        def forward(self, i):
            return self.out(self.mid(self.table(i)))

    model, inputs = Tied(), torch.tensor([[1, 2, 3]])
    plan_for(model, inputs).apply(model)
    assert model.table.embedding_dim == model.out.in_features == 4


def test_shared_module_is_cut_once() -> None:
    """A module under two names is one module."""
    layer = nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(6, 8), layer, nn.ReLU(), layer, nn.Linear(8, 3))
    plan_for(model, torch.randn(2, 6)).apply(model)
    assert model[1] is model[3]
    assert layer.weight.shape == (4, 4)
    assert model(torch.randn(2, 6)).shape == (2, 3)


def test_recurrent_aliases_follow() -> None:
    """``nn.LSTM`` keeps a list of its weights: it is the list of the cut ones."""
    model = nn.Sequential(nn.Linear(6, 6), nn.LSTM(6, 8, batch_first=True))

    def forward(m, x):
        return m[1](m[0](x))[1][0].sum()

    x = torch.randn(2, 5, 6)
    result = prunus.prune(model, x, prunus.Target(ratio=0.5), forward_fn=forward)
    assert model[1].hidden_size == 4
    assert all(a is b for a, b in zip(model[1]._flat_weights, model[1].parameters(), strict=True))
    forward(model, x).backward()
    result.undo()
    assert model[1].weight_hh_l0.shape == (32, 8)


def test_parametrised_weight_is_refused_with_the_cure() -> None:
    """A removal on a parametrised weight says which call takes the parametrisation away."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    plan = plan_for(model, torch.randn(2, 6))
    parametrizations.weight_norm(model[0])
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    with pytest.raises(prunus.SurgeryError, match="remove_parametrizations"):
        plan.apply(model)
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes


def test_memory_format_is_kept() -> None:
    """A channels-last weight is channels-last after the cut."""
    model = Mixed().to(memory_format=torch.channels_last)
    plan_for(model).apply(model)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_requires_grad_and_dtype_are_kept() -> None:
    """Frozen parameters stay frozen, halves stay halves."""
    model = Mixed().double()
    model.conv.weight.requires_grad_(False)
    plan_for(model, X.double()).apply(model)
    assert not model.conv.weight.requires_grad
    assert model.mix.weight.requires_grad
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_the_old_tensors_are_not_written_to() -> None:
    """References that the user kept to ``.data`` still hold the dense values."""
    model = Mixed()
    kept = model.conv.weight.data
    values = kept.clone()
    plan_for(model).apply(model)
    assert torch.equal(kept, values)
    assert kept.shape[0] == 8
