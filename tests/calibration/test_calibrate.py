"""One pass over data: the same sums however the data is cut, the model as it was, errors in one sentence."""

from __future__ import annotations

from collections import UserDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import prunus as tp


class Net(nn.Module):
    """Convolutions (one grouped), norms, a residual stream, two readers, dropout, a buffer that every run changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 3, padding="same", groups=2, bias=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.side = nn.Linear(4, 3, bias=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = F.relu(self.norm(self.first(x)))
        x = self.drop(x + self.grouped(x)).mean(dim=(2, 3))
        return self.head(x) + self.side(x)


def data(count: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 2, 5, 5, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def loader(size: int, count: int = 32) -> DataLoader:
    return DataLoader(TensorDataset(*data(count)), batch_size=size)


def tensors(found: tp.Calibration) -> dict[str, torch.Tensor]:
    named: dict[str, torch.Tensor] = {}
    for name, gradient in found.gradients.items():
        named |= {f"{name} mean": gradient.mean, f"{name} square": gradient.square}
        named |= {f"{name} mask {d}": m.square().sum(dim=0) for d, m in enumerate(gradient.masks) if m is not None}
    for name, reading in found.readings.items():
        named |= {f"{name} rows": torch.tensor(reading.rows), f"{name} moment": reading.moment}
        named |= {f"{name} variance": reading.variance, f"{name} means": reading.means}
        more = {"energy": reading.energy, "covariance": reading.covariance(), "second": reading.second_moments()}
        named |= {f"{name} {key}": value for key, value in more.items() if value is not None}
    return named


class TestSplits:
    @pytest.mark.parametrize(
        ("loss_fn", "collect"),
        [
            (F.cross_entropy, ("activations", "gradients", "grams")),
            (partial(F.cross_entropy, reduction="sum"), ("gradients",)),
            (None, ("gradients", "grams")),
            (None, ("activations", "grams")),
        ],
    )
    def test_all_sums_are_the_same_for_any_batch_size(self, loss_fn, collect) -> None:
        net = Net()
        results = [tensors(tp.calibrate(net, loader(size), loss_fn, collect=collect)) for size in (1, 7, 32)]
        assert len(results[0]) > 20
        for other in results[1:]:
            assert other.keys() == results[0].keys()
            for name, wanted in results[0].items():
                assert torch.allclose(other[name], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())), name

    def test_beyond_those_kept_apart_samples_share_rows_of_the_same_energy_on_average(self) -> None:
        net = Net()
        exact = tp.calibrate(net, loader(8), F.cross_entropy, keep=32).gradients["head.weight"].masks[1]
        found = [
            tp.calibrate(net, loader(8), F.cross_entropy, keep=8, seed=seed).gradients["head.weight"].masks[1]
            for seed in range(8)
        ]
        assert exact is not None
        assert exact.shape == (32, 4)
        assert all(m is not None and m.shape == (8, 4) for m in found)
        mean = torch.stack([m.square().sum(dim=0) for m in found if m is not None]).mean(dim=0)
        assert torch.allclose(mean, exact.square().sum(dim=0), rtol=0.5)


class TestSums:
    def test_gradients_against_one_backward_pass_per_sample(self) -> None:
        net = Net().eval()
        found = tp.calibrate(net, loader(5), F.cross_entropy)
        gradients, losses = [], []
        for x, y in zip(*data(), strict=True):
            net.zero_grad()
            loss = F.cross_entropy(net(x[None]), y[None])
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append(net.head.weight.grad.clone())
        every = torch.stack(gradients)
        own = found.gradients["head.weight"]
        assert found.samples == 32
        assert found.loss == pytest.approx(sum(losses) / 32, rel=1e-5)
        assert torch.allclose(own.mean, every.mean(dim=0), atol=1e-6)
        assert torch.allclose(own.square, every.square().mean(dim=0), atol=1e-6)
        assert own.masks[1] is not None
        assert torch.allclose(own.masks[1], (every * net.head.weight).sum(dim=1), atol=1e-6)

    def test_random_projections_give_gauss_newton_on_average(self) -> None:
        net = nn.Linear(3, 2, bias=False)
        x = torch.randn(4, 3)
        found = tp.calibrate(net, x)  # the gradient of either output's row is the input, times a sign
        assert torch.allclose(found.gradients["weight"].square, x.square().mean(dim=0).expand(2, 3), atol=1e-6)
        assert not found.has_loss

    def test_random_projections_of_a_whole_batch_are_right_on_average(self) -> None:
        net = nn.Linear(3, 2, bias=False)
        x = torch.randn(4, 3)
        found = [tp.calibrate(net, x, per_sample=False, seed=seed) for seed in range(400)]
        assert {one.samples for one in found} == {4}
        assert not any(one.rows_are_samples for one in found)
        square = torch.stack([one.gradients["weight"].square for one in found]).mean(dim=0)
        assert torch.allclose(square, x.square().mean(dim=0).expand(2, 3), rtol=0.3)
        for one in found[:2]:
            assert one.readings["weight"].energies(net.weight, one.samples).tolist() == [[1.0, 1.0]]

    def test_patches_and_energies_of_a_grouped_convolution(self) -> None:
        net = Net().eval()
        found = tp.calibrate(net, loader(8), F.cross_entropy).readings["grouped.weight"]
        read, made = [], []

        def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            read.append(inputs[0])
            output.register_hook(made.append)

        net.grouped.register_forward_hook(keep)
        for x, y in zip(*data(), strict=True):
            F.cross_entropy(net(x[None]), y[None]).backward()
        columns = (
            F.unfold(torch.cat(read), 3, padding=1).unflatten(1, (2, 18)).movedim(1, 0).movedim(2, -1).flatten(1, 2)
        )
        assert found.gram is not None
        assert found.energy is not None
        moments = columns.mT @ columns / columns.shape[1]
        assert torch.allclose(found.second_moments().float(), moments, rtol=1e-4, atol=1e-5)
        assert torch.allclose(found.energy.float(), torch.cat(made).square().sum(dim=(0, 2, 3)), rtol=1e-4, atol=1e-7)
        x = torch.cat(read)
        assert torch.allclose(found.moment.flatten().float(), x.square().mean(dim=(0, 2, 3)), rtol=1e-5)
        assert torch.allclose(found.variance.flatten().float(), x.var(dim=(0, 2, 3), correction=0), rtol=1e-4)

    def test_places_that_do_not_count(self) -> None:
        net = nn.Linear(2, 2)
        x = torch.randn(3, 4, 2)
        mask = torch.arange(4).expand(3, 4) < torch.tensor([[1], [4], [2]])
        found = tp.calibrate(net, [(x, mask)], mask_fn=lambda batch: batch[1]).readings["weight"]
        assert found.rows == 7
        assert torch.allclose(found.moment[0].float(), x[mask].square().mean(dim=0))

    def test_spread_places_stand_for_all(self) -> None:
        net = nn.Linear(2, 2)
        x = torch.randn(3, 10, 2)
        found = tp.calibrate(net, x, gram_rows=4, collect=["grams"]).readings["weight"]
        assert found.gram_rows == 3 * 4
        rows = x[:, ::3].flatten(0, 1)
        assert torch.allclose(found.covariance()[0].float(), rows.T.cov(correction=0), atol=1e-5)

    def test_weights_too_wide_have_no_second_moments_but_those_between_channels(self) -> None:
        found = tp.calibrate(Net(), loader(8), max_gram=8, collect=["grams"])
        gram = found.readings["grouped.weight"].gram
        assert gram is not None
        assert gram.shape == (2, 2, 2)
        assert tp.calibrate(nn.Linear(9, 1), torch.ones(2, 9), max_gram=8).readings["weight"].gram is None


class Places(nn.Module):
    """Weights that are read in other ways than by layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(3, 3) if kind != "stack" else torch.randn(2, 3, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "left":
            return self.weight @ x.mT
        if self.kind == "transposed":
            return torch.mm(x[:, 0], self.weight.t())
        if self.kind == "addmm":
            return torch.addmm(self.bias, x[:, 0], self.weight)
        if self.kind == "stack":
            return torch.bmm(x[:, :2].transpose(0, 1), self.weight)
        if self.kind == "chunks":
            return sum(F.linear(x, part) for part in self.weight.chunk(3))
        return x @ self.weight


class TestUses:
    @pytest.mark.parametrize(
        ("kind", "dim", "rows"),
        [
            ("right", 0, 8),
            ("left", 1, 8),
            ("transposed", 1, 4),
            ("addmm", 0, 4),
            ("stack", 1, 4),
            ("chunks", 1, 24),
        ],
    )
    def test_weights_are_found_wherever_they_are_multiplied(self, kind, dim, rows) -> None:
        net, x = Places(kind), torch.randn(4, 2, 3)
        found = tp.calibrate(net, x).readings["weight"]
        assert (found.dim, found.rows) == (dim, rows)
        seen = x[:, :1] if kind in {"transposed", "addmm"} else x
        wanted = seen.square().mean(dim=0) if kind == "stack" else seen.square().mean(dim=(0, 1))[None]
        assert torch.allclose(found.moment.float(), wanted, atol=1e-6)
        if kind != "stack":
            assert found.energy is not None
            assert found.energy.shape == (3,)

    def test_attention_inside_torch(self) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        found = tp.calibrate(layer, torch.randn(4, 3, 8)).readings
        assert found.keys() == {
            *("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
        }
        energy = found["self_attn.in_proj_weight"].energy
        assert energy is not None
        assert energy.shape == (24,)
        assert bool((energy > 0).all())

    def test_recurrent_layers(self) -> None:
        net = nn.LSTM(3, 5, num_layers=2, bidirectional=True, batch_first=True)
        x = torch.randn(4, 6, 3)
        found = tp.calibrate(net, x)
        assert torch.allclose(found.readings["weight_ih_l0_reverse"].moment[0].float(), x.square().mean(dim=(0, 1)))
        states = net(x)[0][..., 5:]
        moment = found.readings["weight_hh_l1_reverse"].moment[0].float()
        assert torch.allclose(moment, states.square().mean(dim=(0, 1)), atol=1e-6)
        assert float(found.gradients["weight_hh_l0"].square.sum()) > 0

    @pytest.mark.parametrize("groups", [1, 2])
    def test_transposed_convolutions(self, groups) -> None:
        net = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups)
        x = torch.randn(3, 4, 5, 5)
        found = tp.calibrate(net, x).readings["weight"]
        assert (found.dim, found.first.shape) == (0, (1, 4))
        assert torch.allclose(found.moment[0].float(), x.square().mean(dim=(0, 2, 3)))
        assert (found.gram is None) == (groups == 2)

    def test_tied_weights_are_known_by_all_their_names(self) -> None:
        net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        net[2].weight = net[0].weight
        found = tp.calibrate(net, torch.randn(4, 3))
        assert found.readings["2.weight"] is found.readings["0.weight"]
        assert found.readings["0.weight"].rows == 8


class TestInputs:
    @pytest.mark.parametrize(
        ("batches", "arguments"),
        [
            (data()[0], {}),
            ([data()[0]], {}),
            ([data()], {"loss_fn": F.cross_entropy}),
            (
                [dict(zip("ab", data(), strict=True))],
                {"input_fn": lambda b: b["a"], "loss_fn": lambda out, b: F.cross_entropy(out, b["b"])},
            ),
            ([{"x": data()[0]}], {}),
            ([UserDict(x=data()[0])], {}),
            ([("unused", *data())], {"input_fn": lambda batch: (batch[1],)}),
        ],
    )
    def test_what_loaders_yield(self, batches, arguments) -> None:
        assert tp.calibrate(Net(), batches, **arguments).samples == 32

    def test_only_so_many_steps(self) -> None:
        assert tp.calibrate(Net(), loader(8), steps=2).samples == 16

    def test_losses_that_compare_samples(self) -> None:
        net = Net()

        def spread(out: torch.Tensor, targets: object) -> torch.Tensor:
            return -out.var(dim=0).sum()

        found = tp.calibrate(net, loader(8), spread, per_sample=False)
        assert found.samples == 4
        assert float(found.gradients["head.weight"].square.sum()) > 0

    def test_a_progress_bar_on_request(self, capsys) -> None:
        tp.calibrate(Net(), loader(8), progress=True)
        assert "calibrating" in capsys.readouterr().err
        tp.calibrate(Net(), loader(8))
        assert not capsys.readouterr().err


class TestLeavesTheModel:
    def test_as_it_came(self, model_state, states_equal) -> None:
        net = Net()
        net.first.weight.requires_grad_(False)
        net.norm.eval()
        net(data()[0]).sum().backward()
        before, gradient = model_state(net), net.head.weight.grad.clone()
        modes = [m.training for m in net.modules()]
        random = torch.get_rng_state()
        tp.calibrate(net, DataLoader(TensorDataset(*data()), batch_size=8, shuffle=True), F.cross_entropy)
        assert states_equal(before, model_state(net))
        assert [m.training for m in net.modules()] == modes
        assert torch.equal(net.head.weight.grad, gradient)
        assert net.first.weight.grad is None
        assert not net.first.weight.requires_grad
        assert torch.equal(torch.get_rng_state(), random)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

    def test_also_after_an_error(self) -> None:
        net = Net()

        def broken(out: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match="mine"):
            tp.calibrate(net, loader(8), broken)
        assert net.training
        assert float(net.calls) == 0


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: tp.calibrate(Net(), []), "yields nothing"),
            (lambda: tp.calibrate(Net(), 3), "yields no batches"),
            (lambda: tp.calibrate("net", loader(8)), r"expected a torch\.nn\.Module"),
            (lambda: tp.calibrate(Net(), loader(8), steps=0), "steps=0"),
            (lambda: tp.calibrate(Net(), loader(8), collect=["grams", "loss"]), "collect"),
            (
                lambda: tp.calibrate(Net(), loader(8), lambda out, y: out.sum() * float("nan")),
                "the loss is nan at batch 0",
            ),
            (lambda: tp.calibrate(Net(), torch.full((2, 2, 5, 5), float("nan"))), "returns NaN or infinity"),
            (lambda: tp.calibrate(Net(), loader(8), lambda out, y: 3.0), "must return a tensor"),
            (lambda: tp.calibrate(Net().to("meta"), loader(8)), "meta device"),
            (lambda: tp.calibrate(nn.Flatten(), torch.ones(2, 3)), "no output of the model depends"),
        ],
    )
    def test_one_sentence(self, call, message) -> None:
        with pytest.raises(tp.InputError, match=message):
            call()

    def test_a_calibration_of_another_model_or_size(self) -> None:
        found = tp.calibrate(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(2, 3))
        with pytest.raises(tp.InputError, match="another model"):
            found.gradient("2.weight", torch.zeros(3, 3))
        with pytest.raises(tp.InputError, match="calibrate again"):
            found.reading("1.weight", torch.zeros(3, 2))

    def test_statistics_that_were_not_collected(self) -> None:
        found = tp.calibrate(nn.Linear(3, 3), torch.randn(2, 3), collect=["activations"])
        with pytest.raises(tp.InputError, match="no gradients"):
            tp.importance.FisherImportance(found)
        with pytest.raises(tp.InputError, match="no grams"):
            tp.importance.OutputErrorImportance(found)
        assert "no gradients" in repr(found)


def test_a_tuple_of_inputs_without_targets_names_the_cure() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, a, b):
            return self.one(a) + b

    batches = [(torch.randn(3, 4), torch.randn(3, 4))]
    with pytest.raises(tp.InputError, match="input_fn=lambda batch: batch"):
        tp.calibrate(Two(), batches)
    assert tp.calibrate(Two(), batches, input_fn=lambda batch: batch).samples == 3
