"""The commands for any model: what they cut, show and measure, what they write and load again, and how they fail."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import prunus
from prunus.cli import app
from prunus.cli.screen import number, sizes
from prunus.errors import InputError
from prunus.integrations.sources import load

FACTORY = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8)

def bare():
    return net()[0]

def width(model):
    return float(model[0].out_features)

class Odd(nn.Sequential):
    def __reduce__(self):
        raise TypeError("no pickle")

def odd():
    return Odd(*net()[0]), torch.randn(2, 8)

there = bare()

def fails():
    return net().nothing
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a module of factories."""
    (tmp_path / "factories.py").write_text(FACTORY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "factories", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, list(arguments))


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).strip()


def test_prune_writes_a_model_that_all_commands_load_again() -> None:
    done = run("prune", "factories:net", "--target-macs", "50%", "--out", "small")
    assert done.exit_code == 0, done.output
    assert "192 of at most 192" in done.output
    assert plain(done.output).endswith("written to small: model.pt, inputs.pt, plan.json")
    model = torch.load("small/model.pt", weights_only=False)
    assert [tuple(p.shape) for p in model.parameters()] == [(8, 8), (8,), (4, 8), (4,)]
    assert prunus.Plan.load("small/plan.json").after.macs == 192
    again = run("prune", "small/model.pt", "--target-params", "0.6", "--out", "smaller")
    assert again.exit_code == 0, again.output
    assert 0.5 < prunus.Plan.load("smaller/plan.json").after.params / 108 <= 0.6
    assert "192 MACs, 108 parameters, 1 groups" in run("inspect", "small/model.pt").output


def test_prune_takes_every_option() -> None:
    options = (
        "--target-params 120 --importance random --allocation greedy --round-to 4 --max-ratio 0.8 --heads --seed 3"
    )
    done = run("prune", "factories:net", *options.split())
    assert done.exit_code == 0, done.output
    assert "108 of at most 120" in done.output
    refused = run("prune", "factories:bare", "--input-shape", "1,8", "--ignore", "0", "--ratio", "0.5")
    assert refused.exit_code == 1
    assert "nothing in this model may be removed" in refused.stderr


def test_inspect_shows_groups_costs_and_what_stays() -> None:
    done = run("inspect", "factories:net", "--layers", "--explain", "0", "--json", "net.json")
    assert done.exit_code == 0, done.output
    assert "384 MACs, 212 parameters, 1 groups" in done.output
    assert "it is an output of the model" in done.output
    found = json.loads(Path("net.json").read_text(encoding="utf-8"))
    assert found["groups"] == [
        {"layer": "0", "layers": ["0", "2"], "count": 16, "width": 1, "heads": False, "macs": 24, "params": 13}
    ]
    assert [(one["name"], one["macs"], one["free"]) for one in found["layers"]] == [
        ("0.weight", 256, 1.0),
        ("0.bias", 0, 1.0),
        ("2.weight", 128, 1.0),
        ("2.bias", 0, 0.0),
    ]
    assert {(one["tensor"], one["dim"]) for one in found["frozen"]} == {("0.weight", 1), ("2.weight", 0), ("2.bias", 0)}


def test_sensitivity_writes_its_curves() -> None:
    done = run(
        "sensitivity", "factories:net", "--metric", "factories:width", "--shares", "0.25,50%", "--out", "curves.csv"
    )
    assert done.exit_code == 0, done.output
    assert "0  25%: 12  50%: 8" in done.output
    with open("curves.csv", encoding="utf-8") as file:
        assert [row["metric"] for row in csv.DictReader(file)] == ["12.0", "8.0"]
    assert run("sensitivity", "factories:net", "--out", "curves.json").exit_code == 0
    found = json.loads(Path("curves.json").read_text(encoding="utf-8"))
    assert found["dense"] == 1.0
    assert all(row["metric"] <= 1.0 for row in found["rows"])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("prune nothing", 2, "'nothing' names no model"),
        ("prune factories:nowhere", 2, "cannot find 'nowhere'"),
        ("prune factories:bare", 2, "give the input shape"),
        ("prune factories:there", 2, "give the input shape"),
        ("prune factories:fails", 2, "factories:fails() failed (AttributeError: 'tuple' object has no attribute"),
        ("prune factories:width", 2, "it is called without arguments"),
        ("prune factories:bare --input-shape 1,y", 2, "is no shape"),
        ("prune factories:bare --input-shape 1,0", 2, "sizes of 1 or more"),
        ("prune factories:net --target-macs half", 2, "--target-macs='half' is no number"),
        ("prune factories:net --target-macs 1.0", 2, "between 0 and 1"),
        ("prune factories:net --target-params=-3", 2, "positive int"),
        ("prune factories:net --ratio 0.5 --target-macs 0.5", 2, "not both"),
        ("prune factories:net --importance foo", 2, "choose one of"),
        ("prune factories:net --allocation foo", 2, "choose one of"),
        ("prune factories:net --ignore nowhere", 2, "nowhere"),
        ("prune factories:net --max-ratio 0", 2, "max_pruning_ratio"),
        ("prune factories:net --weights none.pt", 2, "cannot load the weights of none.pt"),
        ("prune factories:net --weights DEFAULT", 2, "is no file"),
        ("prune factories:net --target-macs 0.01", 1, "cannot be met"),
        ("prune folder/none.pt", 2, "there is no file folder/none.pt"),
        ("prune factories:odd --out odd", 2, "cannot be pickled"),
        ("inspect factories:net --explain nowhere", 2, "'nowhere' holds no tensor"),
        ("sensitivity factories:net --metric factories:nowhere", 2, "cannot find it"),
        ("sensitivity factories:net --shares 2", 2, "below 1"),
        ("sensitivity factories:net --out curves.png", 2, ".csv, .json or .html"),
    ],
)
def test_errors_are_one_line_with_a_code(arguments: str, code: int, message: str) -> None:
    done = run(*arguments.split())
    assert done.exit_code == code, done.output
    printed = plain(done.stderr)
    assert message in printed
    assert printed.startswith("error: ")
    assert "\n" not in printed


def test_a_model_that_cannot_be_pickled_leaves_its_plan() -> None:
    run("prune", "factories:odd", "--out", "odd")
    assert sorted(path.name for path in Path("odd").iterdir()) == ["plan.json"]


def test_a_state_dict_is_loaded_and_a_file_of_one_is_no_model() -> None:
    model = load("factories:net").model
    torch.save(model.state_dict(), "weights.pt")
    done = run("prune", "factories:net", "--weights", "weights.pt", "--ratio", "0.5", "--out", "small")
    assert done.exit_code == 0, done.output
    kept = torch.load("small/model.pt", weights_only=False)[0].weight
    assert all((row == model[0].weight).all(dim=1).any() for row in kept)
    refused = run("prune", "weights.pt")
    assert refused.exit_code == 2
    assert "not a torch.nn.Module" in refused.stderr


def test_torchvision_and_timm_by_name() -> None:
    pytest.importorskip("torchvision")
    shape = ("--input-shape", "1x3x32x32")
    assert run("prune", "torchvision:mobilenet_v3_small", *shape, "--target-params", "0.5").exit_code == 0
    assert "torchvision has no model 'resnet0'" in run("inspect", "torchvision:resnet0").stderr
    pytest.importorskip("timm")
    assert "groups" in run("inspect", "timm:resnet10t", *shape).output
    assert "timm has no model 'foo'" in run("inspect", "timm:foo").stderr


def test_transformers_by_configuration() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    config.architectures = ["BertModel"]
    config.save_pretrained("bert")
    done = run("prune", "hf:bert/config.json", "--target-macs", "0.6", "--out", "small")
    assert done.exit_code == 0, done.output
    again = run("inspect", "small/model.pt")
    assert again.exit_code == 0, again.output
    assert "cannot build hf:none/none" in run("inspect", "hf:none/none/none").stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom prunus.cli import app\n"
        "assert CliRunner().invoke(app, ['sensitivity', '--help']).exit_code == 0\n"
        "print([name for name in ('torchvision', 'timm', 'transformers', 'pandas', 'plotly') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(prunus.__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", 0.5),
        ("50%", 0.5),
        ("3000000", 3_000_000),
        ("1.5G", 1_500_000_000),
        ("2MiB", 2 << 20),
        ("8ms", 8),
        ("0.4", 0.4),
        ("1.0", 1.0),
        ("-3", -3),
    ],
)
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    found = number("--x", text)
    assert found == value
    assert type(found) is type(value)


def test_what_is_no_number_or_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"--x='1\.5X' is no number"):
        number("--x", "1.5X")
    with pytest.raises(InputError, match="--s='a,b' is no shape"):
        sizes("--s", "a,b")


def test_a_model_that_is_there_needs_no_factory() -> None:
    done = run("prune", "factories:there", "--shape", "2,8", "--target-macs", "0.5")
    assert done.exit_code == 0 and "50.0% of the MACs" in done.output


def test_python_runs_the_package_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "prunus", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "sensitivity" in done.stdout
