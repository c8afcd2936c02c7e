"""The networks of benchmarks/repair.py can be built and cut, and its verdicts say what the figures say."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import prunus
from prunus.cost import count

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def resnet():
    from tasks.digits import ResNet20

    return ResNet20(), torch.randn(4, 1, 16, 16)


def vit():
    pytest.importorskip("timm")
    from tasks.vit import transformer

    return transformer(), torch.randn(4, 1, 16, 16)


def lstm():
    from tasks.lstm import Listener

    return Listener(), torch.randn(4, 32, 2)


def gcn():
    pytest.importorskip("torch_geometric")
    from tasks.gcn import Sorter, graph

    return Sorter(), graph(torch.Generator().manual_seed(0))[0]


def minilm():
    transformers = pytest.importorskip("transformers")
    from tasks.minilm import Encoder

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=50, **sizes)
    tokens = torch.randint(50, (4, 8))
    return Encoder(transformers.BertModel(config)), (tokens, torch.ones_like(tokens))


def detector():
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolov8n.yaml", verbose=False), torch.rand(1, 3, 64, 64)


def called(model, inputs):
    with torch.no_grad():
        found = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return found if isinstance(found, torch.Tensor) else found[0]


@pytest.mark.parametrize("build", [resnet, vit, lstm, gcn, minilm, detector])
def test_networks_of_tasks_can_be_cut(build) -> None:
    from prunus.integrations.ultralytics.pruning import without_features

    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    before, dense = called(model, inputs).shape, count(model, inputs).macs
    forward_fn = without_features if build is detector else None
    prunus.prune(model, inputs, prunus.Target(macs=0.5), forward_fn=forward_fn)
    assert count(model, inputs).macs <= 0.5 * dense
    assert called(model, inputs).shape == before


def test_blocks_that_are_rewritten_for_torch_pruning_compute_the_same() -> None:
    from tasks.yolo import halved

    torch.manual_seed(0)
    model, inputs = detector()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.weight)
    model.eval()
    rewritten = halved(copy.deepcopy(model))
    assert not any(type(m).__name__ == "C2f" for m in rewritten.modules())
    assert torch.allclose(called(model, inputs), called(rewritten, inputs), rtol=1e-4, atol=1e-4)


def test_graph_convolutions_with_plain_layers_compute_the_same() -> None:
    model, inputs = gcn()
    from tasks.gcn import plain

    before = called(model, inputs)
    assert all(type(conv.lin) is nn.Linear for conv in plain(model).convs)
    assert torch.equal(before, called(model, inputs))


def test_norms_anew_are_exact_averages() -> None:
    from tasks.cuts import has_norms, renormed

    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    batches = [torch.randn(8, 3) + k for k in range(3)]
    found = renormed(model, batches)
    assert has_norms(model)
    assert torch.allclose(found[0].running_mean, torch.cat(batches).mean(0), atol=1e-6)
    assert torch.equal(model[0].running_mean, torch.zeros(3))


def test_training_of_tasks_lowers_the_loss() -> None:
    from tasks.task import fit

    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.randn(64, 4)

    def loss(network, batch):
        return (network(batch) - batch.sum(1, keepdim=True)).square().mean()

    before = float(loss(model, x).detach())
    fit(model, loss, itertools.repeat(x), 50, 0.1)
    assert float(loss(model, x).detach()) < 0.2 * before
    assert not model.training


def test_what_torch_pruning_cannot_do_is_told() -> None:
    pytest.importorskip("torch_pruning")
    from tasks.cuts import Cannot, theirs
    from tasks.task import Task

    model, inputs = lstm()
    task = Task(
        *("an LSTM", model.eval(), inputs[:1], [inputs]),
        loss=lambda m: m(inputs).sum(),
        score=lambda m: 0.0,
        tune=lambda m, rate: None,
        rates=(0.1,),
        keep=lambda m: [m.head],
    )
    with pytest.raises(Cannot, match="num_layers"):
        theirs(task, 0.5, "Torch-Pruning L2, local")


def test_verdicts_follow_the_figures() -> None:
    from tasks.verdicts import Rows

    local, taylor = "Torch-Pruning L2, local", "Torch-Pruning Taylor, global"
    dense = {"way": "dense", "seed": 0, "score": 95.0}

    def rows(repaired, tuned):
        theirs = {"way": local, "seed": 0, "speedup": 5.0, "as cut": 10.0, "norms anew": 75.0, "fine-tuned": 90.0}
        ours = {"way": "Prunus", "seed": 0, "speedup": 5.0, "as cut": 9.0, "repaired": repaired, "fine-tuned": tuned}
        refused = {"way": taylor, "seed": 0, "speedup": 5.0, "cannot": "IndexError: 3"}
        return Rows("digits", "digits", [dense, theirs, refused, ours])

    assert [good for good, _ in rows(91.5, 93.0).promises()] == [True, True, True]
    assert [good for good, _ in rows(90.9, 90.0).promises()] == [False, True, False]
    assert [good for good, _ in rows(89.0, 90.1).promises()] == [False, False, True]
    assert list(rows(91, 93).refusals()) == [f"{taylor} cannot do 5x: IndexError: 3"]
    ours = {"way": "Prunus", "seed": 0, "speedup": 2.0, "as cut": 60.0, "repaired": 89.9}
    assert [good for good, _ in Rows("minilm", "", [dense, ours]).promises()] == [False]
    assert [good for good, _ in Rows("yolo", "", [dense, ours]).promises()] == [True]
