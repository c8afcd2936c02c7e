"""Ranks of a process group come to the same weights, those of one process with all samples; errors are shared."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

import prunus
from prunus import distributed
from prunus.repair.norms import reestimate
from prunus.repair.samples import read
from prunus.tracing import call_model

LOADER = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(10)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[str, list[Any]]:
    """What each function of ``WORK`` returns on each of two ranks, which are processes of their own."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = [
        subprocess.Popen([sys.executable, __file__, str(folder), str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [run.communicate(timeout=240)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], "\n".join(said)
    both = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return {name: [one[name] for one in both] for name in both[0]}


class Net(nn.Module):
    """A stream, norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.one, self.two = nn.Conv2d(12, 24, 3, padding=1), nn.Conv2d(24, 12, 3, padding=1, bias=False)
        self.norm2, self.head = nn.BatchNorm2d(12), nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images in, numbers out."""
        x = F.relu(self.norm(self.stem(x)))
        return self.head((x + self.norm2(self.two(F.relu(self.one(x))))).mean((2, 3)))


def network() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for _ in range(5):
            model(torch.randn(32, 3, 8, 8))
    return model.eval()


def plan() -> prunus.Plan:
    with distributed.alone():
        return prunus.prune(network(), torch.randn(1, 3, 8, 8)).plan


def repaired(loader: list[torch.Tensor]) -> tuple[prunus.RepairReport, dict[str, torch.Tensor]]:
    model = network()
    return prunus.repair(model, plan(), loader), model.state_dict()


def renormed(loader: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model = network()
    reestimate(model, read(loader, None, 256, model), call_model, [0, 0], 1 << 30)
    return model.state_dict()


def share(rank: int) -> list[torch.Tensor]:
    return LOADER[5 * rank : 5 * rank + 5]


def repairs(rank: int) -> Any:
    report, weights = repaired(share(rank))
    return weights, (report.before, report.after, report.samples), renormed(share(rank))


def test_two_ranks_repair_as_one_process_with_all_samples(ranks) -> None:
    (weights, said, renewed), (others, again, renewed_too) = ranks["repairs"]
    report, expected = repaired(LOADER)
    assert said == again
    assert said[2] == report.samples
    assert said[1] == pytest.approx(report.after, rel=1e-3)
    for one, other, right in ((weights, others, expected), (renewed, renewed_too, renormed(LOADER))):
        for name, value in right.items():
            assert torch.equal(one[name], other[name])
            assert torch.allclose(one[name], value, rtol=1e-3, atol=1e-4), name
    assert not torch.allclose(renewed["norm2.running_var"], network().norm2.running_var, rtol=1e-3)


def prunes(rank: int) -> Any:
    model = network()
    result = prunus.prune(model, torch.randn(1, 3, 8, 8), data=LOADER[: 3 + 4 * rank])
    assert result.repair is not None
    return model.state_dict(), result.plan.to_json()


def test_ranks_with_other_numbers_of_batches_choose_and_repair_alike(ranks) -> None:
    (weights, chosen), (others, other) = ranks["prunes"]
    assert chosen == other
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def calibrations(rank: int) -> Any:
    x, y = torch.cat(share(rank)), torch.arange(80) % 5
    return prunus.calibrate(network(), [(x[:48], y[:48]), (x[48:], y[48:])][: 1 + rank], F.cross_entropy)


def test_calibration_is_that_of_all_samples(ranks) -> None:
    one, other = ranks["calibrations"]
    x, y = torch.cat((torch.cat(share(0))[:48], torch.cat(share(1)))), torch.arange(80) % 5
    expected = prunus.calibrate(network(), [(x, torch.cat((y[:48], y)))], F.cross_entropy)
    assert one.samples == other.samples == expected.samples == 128
    assert one.loss == pytest.approx(expected.loss, rel=1e-4)
    for name, gradient in expected.gradients.items():
        for found, right in zip(one.gradients[name].masks, gradient.masks, strict=True):
            assert right is None or torch.allclose(found, right, rtol=1e-3, atol=1e-5)
        assert torch.allclose(one.gradients[name].square, gradient.square, rtol=1e-3, atol=1e-7)
        assert torch.equal(one.gradients[name].square, other.gradients[name].square)
    for name, reading in expected.readings.items():
        for what in ("mean", "moment", "energy", "means"):
            assert torch.allclose(getattr(one.readings[name], what), getattr(reading, what), rtol=1e-3, atol=1e-6)
        assert torch.allclose(one.readings[name].covariance(), reading.covariance(), rtol=1e-3, atol=1e-5)


def failing(rank: int) -> Any:
    model = network()
    before = copy.deepcopy(model.state_dict())
    bad = [torch.full((16, 3, 8, 8), float("nan"))]
    wide = [torch.randn(16, 4, 8, 8)] * 5
    found = []
    for loader in (bad, wide, []):
        for way in (
            lambda data: prunus.repair(model, plan(), data),
            lambda data: prunus.prune(model, torch.randn(1, 3, 8, 8), data=data),
        ):
            with pytest.raises(prunus.InputError) as error:
                way(loader if rank else share(0))
            found.append(str(error.value))
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(prunus.InputError) as error:
        prunus.repair(model, plan(), share(0)) if rank else prunus.calibrate(model, share(0))
    return [*found, str(error.value)]


def test_what_fails_on_one_rank_fails_on_all_and_changes_nothing(ranks) -> None:
    one, other = ranks["failing"]
    assert "holds NaN" in other[0]
    assert one[0].startswith("on rank 1, prunus.repair failed: InputError: ")
    assert all(a.startswith("on rank 1, ") and b in a for a, b in zip(one[:-1], other[:-1], strict=True))
    assert "all ranks must call the same functions" in one[-1]


def test_one_process_is_a_sum_of_its_own() -> None:
    tensor = torch.ones(2)
    distributed.summed([tensor], "here")
    distributed.copied([tensor], "here")
    assert (distributed.count(), distributed.rank(), tensor.tolist()) == (1, 0, [1.0, 1.0])
    assert distributed.gathered("x", "here") == ["x"]


WORK = (repairs, prunes, calibrations, failing)

if __name__ == "__main__":
    place, number = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=number, world_size=2)
    torch.save({work.__name__: work(number) for work in WORK}, place / f"{number}.pt")
    dist.destroy_process_group()
