"""The command line: options reach the job, errors are one line, and asking for help loads nothing heavy."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import prunus
from prunus.cli import app
from prunus.errors import InputError, PrunusError

pytest.importorskip("ultralytics")

from prunus.integrations import ultralytics as integration
from prunus.integrations.ultralytics import Figures, Job, Result

FIGURES = Figures(params=3_011_433, macs=252_650_000, latency_ms=12.0, map50=0.9, map50_95=0.7)
HALF = Figures(params=1_500_000, macs=126_000_000, latency_ms=6.0, map50=0.81, map50_95=0.63)
WHOLE = ["yolo", "--model", "yolov8n.yaml", "--data", "shapes", "--out", "out"]


def plain(text: str) -> str:
    """Take colours and line breaks out of what was printed."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Job, bool]]:
    """The jobs that the command starts, in place of doing them."""
    started: list[tuple[Job, bool]] = []

    def note(job: Job, *, resume: bool = False, reporter: object = None) -> Result:
        started.append((job, resume))
        assert reporter is not None
        return Result(FIGURES, HALF, HALF, {}, {}, {}, {})

    monkeypatch.setattr(integration, "run", note)
    return started


def test_options_reach_the_job(jobs: list[tuple[Job, bool]]) -> None:
    """Every option arrives under its name, and what is not given is left open."""
    done = CliRunner().invoke(app, WHOLE)
    assert done.exit_code == 0, done.output
    options = "--macs 0.4 --epochs 3 --dense-epochs 5 --imgsz 320 --batch 4 --device cpu --seed 7 --resume"
    assert CliRunner().invoke(app, [*WHOLE, *options.split()]).exit_code == 0
    assert jobs == [
        (Job("yolov8n.yaml", "shapes", Path("out")), False),
        (Job("yolov8n.yaml", "shapes", Path("out"), 0.4, 3, 5, 320, 4, "cpu", 7), True),
    ]


def test_ends_with_the_table(jobs: list[tuple[Job, bool]]) -> None:
    """The last thing printed is a row for each model, the ratios, and where the files are."""
    printed = plain(CliRunner(env={"COLUMNS": "100"}).invoke(app, WHOLE).output)
    assert "3,011,433" in printed
    assert "252.65 M" in printed
    assert re.search(r"fine-tuned / dense \W+ 0\.498 \W+ 0\.499 \W+ 0\.500 \W+ 0\.900 \W+ 0\.900", printed)
    assert printed.endswith("written to out: best.pt, best.onnx, pruned.pt, plan.json, result.json")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("macs=2.0 is not between 0 and 1"), 2, "error: macs=2.0 is not between 0 and 1"),
        (PrunusError("[the onnx file] is off"), 1, "error: [the onnx file] is off"),
        (KeyboardInterrupt(), 130, "stopped; the same command with --resume goes on from here"),
    ],
)
def test_errors_are_one_line(error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong input ends with code 2, a failed stage with 1, a cut job with 130; no traceback."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(integration, "run", fail)
    done = CliRunner().invoke(app, WHOLE)
    assert done.exit_code == code
    assert plain(done.stderr) == message


def test_bad_input_from_the_real_job(tmp_path: Path) -> None:
    """The whole way down, nothing faked: a share of 1.5 is refused before the folder is made."""
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [*WHOLE[:-1], str(out), "--macs", "1.5"])
    assert done.exit_code == 2
    assert "macs=1.5 is not between 0 and 1" in plain(done.stderr)
    assert not out.exists()


def test_help_names_every_option_and_loads_no_ultralytics() -> None:
    """``prunus yolo --help`` works without importing ultralytics."""
    code = (
        "import json, sys\n"
        "from typer.testing import CliRunner\n"
        "from prunus.cli import app\n"
        "done = CliRunner(env={'COLUMNS': '120'}).invoke(app, ['yolo', '--help'])\n"
        "print(json.dumps([done.exit_code, done.output, 'ultralytics' in sys.modules]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(prunus.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    status, printed, loaded = json.loads(done.stdout)
    assert status == 0
    assert not loaded
    for option in ("model", "data", "out", "macs", "epochs", "dense-epochs", "imgsz", "batch", "device", "resume"):
        assert f"--{option}" in plain(printed)
