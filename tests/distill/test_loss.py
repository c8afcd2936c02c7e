"""The loss of distillation: kept channels are compared, weights add up, and nothing stays on the model."""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks_of

import prunus
from prunus.distill import DistillationLoss
from prunus.errors import InputError
from prunus.repair import frozen


class Branched(nn.Module):
    """Concatenated and added branches, so that no weight of "join" tells what is left of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.two = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.join, self.mix = nn.Identity(), nn.Conv2d(20, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = self.join(torch.cat((F.relu(self.one(x)), self.two(x)), 1))
        return self.head((x + self.mix(y)).mean((2, 3)))


@pytest.fixture
def cut() -> tuple[nn.Module, nn.Module, prunus.Plan]:
    """A dense model, what is left of it, and the plan."""
    torch.manual_seed(0)
    model = Branched().eval()
    dense = copy.deepcopy(model)
    plan = prunus.prune(model, torch.randn(1, 3, 8, 8), prunus.Target(ratio=0.5)).plan
    return dense, model, plan


def silenced(dense: nn.Module, plan: prunus.Plan) -> nn.Module:
    """The dense model with the removed channels' readers at zero: it computes what the cut one does."""
    silent = copy.deepcopy(dense)
    for removal in plan.removals:
        if removal.dim == 1:
            weight = silent.get_parameter(removal.tensor)
            weight.data.index_fill_(1, torch.tensor(removal.positions), 0.0)
    return silent


x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["stem", "norm", "one", "two", "join", "mix", "head", ""])
def test_kept_channels_of_any_module_are_compared(cut, name) -> None:
    dense, model, plan = cut
    with DistillationLoss(silenced(dense, plan), model, plan=plan, features=[name]) as loss:
        assert loss(x, model(x)).item() < 1e-10
        assert loss(x, model(x)).item() < 1e-10


@pytest.mark.parametrize("name", ["stem", "join"])
def test_other_channels_are_told_apart(cut, name) -> None:
    dense, model, plan = cut
    permuted = copy.deepcopy(model)
    order = torch.arange(model.stem.weight.shape[0]).roll(1)
    with torch.no_grad():
        permuted.stem.weight.copy_(model.stem.weight[order])
        permuted.norm.weight.copy_(model.norm.weight[order])
    with DistillationLoss(silenced(dense, plan), permuted, plan=plan, features=[name]) as loss:
        assert loss(x, permuted(x)).item() > 0.1


def test_an_equal_model_has_no_loss_and_features_of_equal_width_need_no_plan(cut) -> None:
    dense, _, _ = cut
    twin = copy.deepcopy(dense)
    with DistillationLoss(dense, twin, logits=1, features=["one", "mix"]) as loss:
        assert loss(x, twin(x)).item() == pytest.approx(0, abs=1e-6)


def test_weights_add_up_and_parts_tell(cut) -> None:
    dense, model, plan = cut
    values = {}
    for weights in ({"logits": 1.0}, {"features": ["mix"]}, {"logits": 3.0, "features": {"mix": 0.5}}):
        with DistillationLoss(dense, model, plan=plan, temperature=4.0, **weights) as loss:
            values[str(weights)] = loss(x, model(x)).item()
    logits, features, both = values.values()
    assert both == pytest.approx(3 * logits + 0.5 * features, rel=1e-5)
    assert loss.parts == pytest.approx({"logits": logits, "mix": features}, rel=1e-5)
    assert logits > 0 < features


def test_training_by_it_comes_nearer_and_leaves_the_dense_model_alone(cut, model_state, states_equal) -> None:
    dense, model, plan = cut
    before = model_state(dense)
    model.train()
    with DistillationLoss(dense, model, plan=plan, logits=1, features=["", "norm"]) as loss:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        values = []
        for _ in range(40):
            optimizer.zero_grad()
            value = loss(x, model(x))
            value.backward()
            optimizer.step()
            values.append(value.item())
    assert values[-1] < 0.3 * values[0]
    assert states_equal(before, model_state(dense))
    assert all(p.grad is None for p in dense.parameters())


def test_a_dense_model_that_shares_memory_keeps_its_values(cut) -> None:
    _, model, _ = cut
    dense = frozen(model)
    with DistillationLoss(dense, model) as loss:
        with torch.no_grad():
            model.head.weight.mul_(-1)
        assert loss(x, model(x)).item() > 1e-3


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def test_the_model_and_its_files_carry_nothing_of_it(cut) -> None:
    dense, model, plan = cut
    plain, count = len(saved(model)), _hooks()
    loss = DistillationLoss(dense, model, plan=plan, features=["join"])
    averaged = copy.deepcopy(model)
    assert _hooks() == count + 2
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in (*model.modules(), *averaged.modules()))
    loss(x, model(x))
    assert len(saved(model)) == plain
    loss.close()
    loss.close()
    assert _hooks() == count
    with pytest.raises(InputError, match="closed"):
        loss(x, model(x))


def test_hooks_go_when_the_loss_is_forgotten(cut) -> None:
    dense, model, plan = cut
    count = _hooks()
    loss = DistillationLoss(dense, model, plan=plan, features=["join"])
    assert _hooks() == count + 2
    del loss
    gc.collect()
    assert _hooks() == count


def _hooks() -> int:
    return len(hooks_of._global_forward_hooks) + len(hooks_of._global_forward_pre_hooks)


def test_runs_without_gradients_or_before_the_last_one_do_not_count(cut) -> None:
    dense, model, plan = cut
    with DistillationLoss(dense, model, plan=plan, features=["join"]) as loss:
        expected = loss(x, model(x)).item()
        with torch.no_grad():
            model(x + 1)
        model(x + 1)
        outputs = model(x)
        assert loss(x, outputs).item() == pytest.approx(expected, rel=1e-6)
        with pytest.raises(InputError, match="run the pruned model on the inputs"):
            loss(x, outputs)


def test_names_from_before_dropped_blocks_are_found() -> None:
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), *(Residual(nn.Linear(16, 16), nn.ReLU()) for _ in range(3)))
    dense, inputs = copy.deepcopy(model), torch.randn(4, 8)
    plan = prunus.drop_blocks(model, inputs, blocks=["1"]).plan
    with DistillationLoss(dense, model, plan=plan, features=["3"]) as loss:
        assert loss(inputs, model(inputs)).item() > 0
    with pytest.raises(InputError, match="was dropped"):
        DistillationLoss(dense, model, plan=plan, features=["1"])


def test_a_detector_is_drawn_to_the_dense_one() -> None:
    torch.manual_seed(0)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.boxes, self.scores = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1), nn.Conv2d(16, 3, 1)

        def forward(self, x):
            x = F.relu(self.body(x))
            raw = {"boxes": self.boxes(x).flatten(2), "scores": self.scores(x).flatten(2)}
            return raw if self.training else (raw["boxes"].sum(1), raw)

    model = Head().eval()
    dense = copy.deepcopy(model)
    prunus.prune(model, x[:1], prunus.Target(ratio=0.5))
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    values = []
    with DistillationLoss(dense, model, detection=1.0) as loss:
        for _ in range(30):
            optimizer.zero_grad()
            value = loss(x, model(x))
            value.backward()
            optimizer.step()
            values.append(value.item())
    assert list(loss.parts) == ["detection"]
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": ["nowhere"]}, "no module 'nowhere'"),
        ({"logits": -1.0}, "weight of logits is -1"),
        ({"logits": 0.0}, "all weights are 0"),
        ({"temperature": 0.0}, "temperature=0"),
    ],
)
def test_wrong_arguments_are_told(cut, arguments, message) -> None:
    dense, model, plan = cut
    with pytest.raises(InputError, match=message):
        DistillationLoss(dense, model, plan=plan, **arguments)
    with pytest.raises(InputError, match="are the same"):
        DistillationLoss(model, model)


def test_narrower_features_without_the_plan_or_with_another_are_told(cut) -> None:
    dense, model, plan = cut
    with DistillationLoss(dense, model, features=["join"]) as loss, pytest.raises(InputError, match="pass plan="):
        loss(x, model(x))
    other = prunus.Plan(plan.removals[:1], plan.settings, plan.before, plan.after)
    with (
        DistillationLoss(dense, model, plan=other, features=["join"]) as loss,
        pytest.raises(InputError, match="shape"),
    ):
        loss(x, model(x))
