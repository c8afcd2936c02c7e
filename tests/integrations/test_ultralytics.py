"""Pruning of ultralytics models: what stays, what the file says, who may train it, and a whole job that is cut."""

import json
import pickle
import pickletools
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("ultralytics")

from ultralytics import YOLO
from ultralytics.nn.modules import C2f, Detect, block
from ultralytics.nn.tasks import torch_safe_load

from prunus import Target
from prunus.errors import InputError
from prunus.integrations.shapes import shapes
from prunus.integrations.ultralytics import Job, Pictures, Result, prune, run, save, trainer, width_facts
from prunus.integrations.ultralytics import training as training_module
from prunus.integrations.ultralytics.stages import Reporter

SIZE = 64
QUICK = {"imgsz": SIZE, "batch": 8, "device": "cpu", "workers": 0, "plots": False, "verbose": False}

TINY = """
nc: 3
scales:
  t: [0.33, 0.125, 1024]
backbone:
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 3, C2f, [128, True]]
  - [-1, 1, Conv, [256, 3, 2]]
  - [-1, 3, C2f, [256, True]]
  - [-1, 1, Conv, [512, 3, 2]]
  - [-1, 3, C2f, [512, True]]
  - [-1, 1, SPPF, [512, 5]]
head:
  - [-1, 1, nn.Upsample, [None, 2, "nearest"]]
  - [[-1, 4], 1, Concat, [1]]
  - [-1, 3, C2f, [256]]
  - [[10, 7], 1, Detect, [nc]]
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(shapes(tmp_path_factory.mktemp("data"), size=SIZE, train=16, val=8))


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A detector with every part that a YOLOv8 has, an eighth as wide and with two pyramid levels."""
    file = tmp_path_factory.mktemp("model") / "tiny.yaml"
    file.write_text(TINY)
    return str(file)


@pytest.fixture
def tiny(description: str) -> YOLO:
    torch.manual_seed(0)
    return YOLO(description)


@pytest.fixture(scope="module")
def pruned_file(description: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    yolo = YOLO(description)
    prune(yolo, Target(macs=0.5), imgsz=SIZE)
    return save(yolo, tmp_path_factory.mktemp("pruned") / "pruned.pt")


class Recorder(Reporter):
    """Remembers what it hears, and cuts the job once it has heard a number of epochs of fine-tuning."""

    def __init__(self, cut_after: int | None = None) -> None:
        self.began: list[str] = []
        self.kept: list[str] = []
        self.epochs: list[tuple[str, int]] = []
        self.cut_after = cut_after

    def started(self, title: str) -> None:
        self.began.append(title)

    def skipped(self, title: str) -> None:
        self.kept.append(title)

    def epoch(self, number: int, total: int, map50: float | None) -> None:
        assert total == 2 or self.began[-1] != "fine-tune"
        self.epochs.append((self.began[-1], number))
        if self.began[-1] == "fine-tune" and number == self.cut_after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def job(description: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    out = tmp_path_factory.mktemp("out") / "job"
    return Job(description, data, out, epochs=2, dense_epochs=1, imgsz=SIZE, batch=8, device="cpu")


@pytest.fixture(scope="module")
def cut(job: Job) -> Recorder:
    """The job, cut after the first of its two epochs of fine-tuning."""
    recorder = Recorder(cut_after=1)
    with pytest.raises(KeyboardInterrupt):
        run(job, reporter=recorder)
    return recorder


@pytest.fixture(scope="module")
def resumed(job: Job, cut: Recorder) -> tuple[Result, Recorder]:
    """The same job, resumed and finished."""
    recorder = Recorder()
    return run(job, resume=True, reporter=recorder), recorder


# ---- widths


@pytest.mark.parametrize(
    "made",
    [
        block.C2(16, 16),
        block.C2f(16, 24),
        block.C3k2(16, 24),
        block.C2fCIB(16, 24),
        block.C2fPSA(128, 128),
        block.C2PSA(128, 128),
        block.PSA(128, 128),
        block.RepNCSPELAN4(16, 24, 16, 8),
        block.ELAN1(16, 24, 16, 8),
        block.ADown(16, 24),
        block.SPPELAN(16, 24, 8),
        block.RepVGGDW(16),
    ],
    ids=lambda made: type(made).__name__,
)
def test_width_facts_find_the_width_of_each_block(made: torch.nn.Module) -> None:
    """The block's own width is among the facts, with the value that the block was built with."""
    facts = [fact for fact in width_facts(torch.nn.Sequential(made)) if fact.module is made]
    assert [fact.attribute for fact in facts] == ["dim" if isinstance(made, block.RepVGGDW) else "c"]
    assert [fact.value() for fact in facts] == [getattr(made, fact.attribute) for fact in facts]


def test_width_facts_cover_a_whole_model() -> None:
    """No module of YOLO11 with an int ``c`` beside a ``cv1`` is left out."""
    model = YOLO("yolo11n.yaml").model
    covered = {id(fact.module) for fact in width_facts(model)}
    having = [m for m in model.modules() if isinstance(getattr(m, "c", None), int) and hasattr(m, "cv1")]
    assert len(having) == 9
    assert all(id(module) in covered for module in having)


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolo11n.yaml"])
def test_prune_keeps_outputs_and_follows_widths(name: str) -> None:
    """Half of the operations go, head included; what the head's code sizes stays; every width is true, a plain int."""
    yolo = YOLO(name)
    head = yolo.model.model[-1]
    before = [sequence[0].conv.out_channels for sequence in head.cv2]
    result = prune(yolo, Target(macs=0.5), imgsz=SIZE)
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.after.macs >= 0.4 * result.before.macs
    assert isinstance(head, Detect)
    assert all(sequence[-1].out_channels == 4 * head.reg_max for sequence in head.cv2)
    assert all(sequence[-1].out_channels == head.nc for sequence in head.cv3)
    assert head.dfl.conv.weight.shape == (1, head.reg_max, 1, 1)
    assert all(now[0].conv.out_channels < was for now, was in zip(head.cv2, before, strict=True))
    for module in yolo.model.modules():
        if isinstance(module, C2f):
            assert module.c * 2 == module.cv1.conv.out_channels
            module.forward = module.forward_split  # as the exporter does
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        for attribute in ("c", "out_channels", "in_channels", "groups", "num_features"):
            assert type(getattr(module, attribute, 0)) is int
    with torch.inference_mode():
        assert yolo.model.eval()(torch.zeros(1, 3, SIZE, SIZE))[0].shape[1] == 4 + head.nc


def test_prune_marks_and_forgets_the_cached_predictor(tiny: YOLO) -> None:
    """The marker is plain data with the costs in it, and predicting after pruning runs the pruned model."""
    picture = torch.rand(1, 3, SIZE, SIZE)
    tiny.predict(picture, verbose=False, imgsz=SIZE)
    result = prune(tiny, Target(macs=0.5), imgsz=SIZE)
    assert tiny.predictor is None
    assert tiny.model.pruned["macs"] == [result.before.macs, result.after.macs]
    assert json.loads(json.dumps(tiny.model.pruned)) == tiny.model.pruned
    assert sum(p.numel() for p in tiny.model.parameters()) == result.after.params


def test_pictures_are_what_the_model_sees_and_come_again(data: str) -> None:
    pictures = Pictures(data, imgsz=96, count=10)
    first, second = list(pictures), list(pictures)
    assert len(first) == len(pictures) == 1
    assert first[0].shape == (10, 3, 96, 96) and first[0].dtype == torch.float32
    assert 0 <= float(first[0].min()) < 0.5 < float(first[0].max()) <= 1
    assert torch.equal(first[0], second[0])
    assert list(pictures.numbers) == [0, 1, 3, 4, 6, 8, 9, 11, 12, 14]
    assert sum(len(batch) for batch in Pictures(data, imgsz=SIZE)) == 16


def test_large_pictures_are_fewer(data: str) -> None:
    assert len(Pictures(data, imgsz=2048).numbers) == 16


def test_repair_on_pictures_brings_the_outputs_nearer_and_undoes(tiny: YOLO, data: str, tmp_path: Path) -> None:
    with torch.no_grad():
        for layer in tiny.model.modules():  # as if it were trained: what comes in matters for what comes out
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.weight.uniform_(1.0, 3.0)
                layer.bias.normal_()
    before = {k: v.clone() for k, v in tiny.model.state_dict().items()}
    result = prune(tiny, Target(macs=0.5), imgsz=SIZE, data=Pictures(data, imgsz=SIZE), guard=False)
    assert result.repair is not None and result.repair.accepted
    assert result.repair.after < result.repair.before
    images = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = tiny.model.eval()(images)[0]
        loaded = YOLO(save(tiny, tmp_path / "repaired.pt")).model.float().eval()(images)[0]
    assert torch.allclose(loaded, expected, atol=2e-2, rtol=2e-2)  # the file holds half precision
    result.undo()
    assert all(torch.equal(v, before[k]) for k, v in tiny.model.state_dict().items())


def test_prune_needs_no_gradients(tiny: YOLO) -> None:
    """A checkpoint, whose parameters all have requires_grad=False, is pruned like any other."""
    tiny.model.requires_grad_(False)
    result = prune(tiny, Target(macs=0.5), imgsz=SIZE)
    assert result.after.macs <= 0.5 * result.before.macs


def test_fused_exported_and_misfit_models_are_refused(tiny: YOLO, tmp_path: Path) -> None:
    """Each is one clear error that says what to do."""
    with pytest.raises(InputError, match="not a multiple of the model's stride 32; use for example 96"):
        prune(tiny, imgsz=100)
    file = tmp_path / "best.onnx"
    file.touch()
    exported = YOLO(file, task="detect")
    with pytest.raises(InputError, match="exported model"):
        prune(exported)
    with pytest.raises(InputError, match="exported model"):
        save(exported, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"does not end in \.pt"):
        save(tiny, "model.pth")
    tiny.fuse(verbose=False)
    with pytest.raises(InputError, match=r"fused.*load the file again"):
        prune(tiny, imgsz=SIZE)


# ---- the file


def test_file_holds_only_stock_things(pruned_file: Path) -> None:
    """The pickle names torch, ultralytics and plain containers only, loads in safe mode, and has no second copy."""
    with zipfile.ZipFile(pruned_file) as archive:
        content = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    strings: list[str] = []
    modules = set()
    for operation, argument, _ in pickletools.genops(content):
        if isinstance(argument, str):
            strings.append(argument)
        if operation.name == "GLOBAL":
            modules.add(str(argument).split(" ")[0].split(".")[0])
        if operation.name == "STACK_GLOBAL":
            modules.add(strings[-2].split(".")[0])
    assert modules <= {"torch", "ultralytics", "collections", "builtins", "__builtin__"}
    loaded, _ = torch_safe_load(str(pruned_file), safe_only=True)
    numbers = [*loaded["model"].parameters(), *loaded["model"].buffers()]
    assert loaded["ema"] is None
    assert all(tensor.dtype == torch.float32 for tensor in numbers if tensor.is_floating_point())
    assert pruned_file.stat().st_size < 4 * sum(tensor.numel() for tensor in numbers) + 200_000


def test_stock_training_refuses_the_file(pruned_file: Path, data: str, tmp_path: Path) -> None:
    """Stock ``train()`` stops with the instruction, where it would have trained a model of full width."""
    with pytest.raises(KeyError, match=r"pruned.*yolo\.train\(trainer=trainer\(yolo\)"):
        YOLO(pruned_file).train(data=data, epochs=1, project=str(tmp_path), **QUICK)


def test_guard_can_be_left_out(tiny: YOLO) -> None:
    """With ``guard=False`` the description stays as it was; the marker is there all the same."""
    first = tiny.model.yaml["backbone"][0][2]
    prune(tiny, Target(macs=0.5), imgsz=SIZE, guard=False)
    assert tiny.model.yaml["backbone"][0][2] == first == "Conv"
    assert tiny.model.pruned


# ---- the trainer


def test_trainer_keeps_widths_and_the_callers_module(pruned_file: Path, data: str, tmp_path: Path) -> None:
    """One epoch: same widths, changed weights, marker kept, and the module that was handed over is as it was."""
    yolo = YOLO(pruned_file)
    module = yolo.model
    before = {name: value.clone() for name, value in module.state_dict().items()}
    yolo.train(trainer=trainer(yolo), data=data, epochs=1, project=str(tmp_path), warmup_epochs=0.0, **QUICK)
    after = yolo.model.state_dict()
    assert yolo.model is not module
    assert {name: value.shape for name, value in after.items()} == {name: v.shape for name, v in before.items()}
    assert not torch.equal(after["model.0.conv.weight"], before["model.0.conv.weight"])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert yolo.model.pruned == module.pruned


def test_trainer_refuses_what_it_cannot_keep(tiny: YOLO, pruned_file: Path, data: str, tmp_path: Path) -> None:
    """A dense model, a pruned one that was never saved, and data with other classes: a clear error each."""
    with pytest.raises(InputError, match=r"save\(yolo, 'pruned\.pt'\)"):
        tiny.train(trainer=trainer(tiny), data=data, epochs=1, project=str(tmp_path), **QUICK)
    dense = YOLO(save(tiny, tmp_path / "dense.pt"))
    with pytest.raises(InputError, match="not pruned"):
        dense.train(trainer=trainer(dense), data=data, epochs=1, project=str(tmp_path), **QUICK)
    other = Path(data).with_name("two.yaml")
    other.write_text(Path(data).read_text().replace("  2: triangle\n", ""))
    yolo = YOLO(pruned_file)
    with pytest.raises(InputError, match="predicts 3 classes and the data has 2"):
        yolo.train(trainer=trainer(yolo), data=str(other), epochs=1, project=str(tmp_path), **QUICK)


def test_trainer_class_can_be_imported_by_workers(tiny: YOLO) -> None:
    """Distributed workers import the class by module and name, or unpickle it; both give the one class."""
    kind = trainer(tiny)
    assert kind.__name__ == "PrunedDetectionTrainer"
    assert getattr(training_module, kind.__name__) is kind
    assert pickle.loads(pickle.dumps(kind)) is kind
    with pytest.raises(AttributeError, match="PrunedNothing"):
        _ = training_module.PrunedNothing


# ---- the job


def test_resume_goes_on_where_the_job_was_cut(cut: Recorder, resumed: tuple[Result, Recorder], job: Job) -> None:
    """Finished stages are kept, and fine-tuning goes on with its second epoch."""
    _, recorder = resumed
    assert recorder.kept == cut.began[: cut.began.index("fine-tune")]
    assert recorder.began[0] == "fine-tune"
    assert recorder.epochs == [("fine-tune", 2)]
    again = Recorder()
    assert run(job, resume=True, reporter=again) == resumed[0]
    assert again.began == []


def test_job_writes_its_figures(resumed: tuple[Result, Recorder], job: Job) -> None:
    """The file has the three models with their five figures, and everything needed to read them later."""
    result = resumed[0]
    content = json.loads((job.out / "result.json").read_text())
    for name in ("dense", "pruned", "finetuned"):
        assert set(content[name]) == {"params", "macs", "latency_ms", "map50", "map50_95"}
        assert 0 <= content[name]["map50_95"] <= content[name]["map50"] <= 1
        assert content[name]["latency_ms"] > 0
    assert content["finetuned"]["macs"] <= 0.5 * content["dense"]["macs"]
    assert content["finetuned"]["params"] == content["pruned"]["params"] < content["dense"]["params"]
    assert content["versions"]["ultralytics"] != "unknown"
    assert content["arguments"]["epochs"] == 2
    assert set(content["seconds"]) >= {"train_dense", "prune", "finetune", "latency", "onnx"}
    assert content["onnx"]["max_relative_difference"] <= content["onnx"]["tolerance"]
    assert json.loads((job.out / "plan.json").read_text())
    assert result.table().row_count == 5


FRESH = """
import json, sys
from ultralytics import YOLO
file, data = sys.argv[1:]
found = YOLO(file).val(data=data, imgsz=64, plots=False, verbose=False, project=sys.argv[1] + ".val")
yolo = YOLO(file)
boxes = len(yolo.predict(data.replace("data.yaml", "images/val"), imgsz=64, verbose=False))
assert yolo.fuse().model.is_fused()
assert not any(name.startswith("prunus") for name in sys.modules)
print("FOUND", json.dumps([found.box.map50, boxes, str(YOLO(file).export(format="torchscript", imgsz=64))]))
"""


def test_best_is_a_stock_file(resumed: tuple[Result, Recorder], job: Job, data: str, tmp_path: Path) -> None:
    """In a process that imports ultralytics only, best.pt validates to the same figure, predicts, fuses and exports."""
    copy = tmp_path / "elsewhere.pt"
    copy.write_bytes((job.out / "best.pt").read_bytes())
    done = subprocess.run(
        [sys.executable, "-P", "-c", FRESH, str(copy), data], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))
    map50, boxes, exported = json.loads(line.removeprefix("FOUND"))
    assert map50 == pytest.approx(resumed[0].finetuned.map50, abs=0.01)
    assert boxes == 8
    assert Path(exported).is_file()


def test_a_folder_in_use_is_refused(resumed: tuple[Result, Recorder], job: Job, tmp_path: Path) -> None:
    """Without resume, with other arguments, or over files of somebody else, a job writes nothing."""
    before = {file: file.stat().st_mtime_ns for file in job.out.rglob("*")}
    with pytest.raises(InputError, match="already holds a job; go on with it by --resume"):
        run(job)
    with pytest.raises(InputError, match=r"macs was 0\.5 and is now 0\.4"):
        run(replace(job, macs=0.4), resume=True)
    assert {file: file.stat().st_mtime_ns for file in job.out.rglob("*")} == before
    (tmp_path / "best.pt").write_text("mine")
    with pytest.raises(InputError, match=r"already holds best\.pt"):
        run(replace(job, out=tmp_path))
    assert (tmp_path / "best.pt").read_text() == "mine"
    with pytest.raises(InputError, match=r"below' cannot be written to, because of '.*best\.pt'"):
        run(replace(job, out=tmp_path / "best.pt" / "below"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"macs": 0.0}, "macs=0.0 is not between 0 and 1"),
        ({"macs": 1.0}, "macs=1.0 is not between 0 and 1"),
        ({"epochs": 0}, "epochs=0 is too small"),
        ({"batch": 0}, "batch=0 is too small"),
        ({"dense_epochs": 0}, "dense-epochs=0 is too small"),
        ({"imgsz": 100}, "imgsz=100 is not a multiple"),
        ({"device": "77"}, "device='77' is not here"),
        ({"data": "missing.yaml"}, "data file 'missing.yaml' does not exist"),
        ({"data": "pictures"}, "data 'pictures' is not a .yaml file"),
        ({"model": "missing.pt"}, "model file 'missing.pt' does not exist"),
        ({"model": "missing.yaml"}, "model 'missing.yaml' cannot be loaded"),
        ({"model": "model.onnx"}, "neither a .pt file nor a .yaml"),
        ({"model": "yolov8n-seg.yaml"}, "task 'segment', and this job handles detection"),
    ],
)
def test_bad_input_is_one_clear_error(change: dict[str, object], message: str, job: Job, tmp_path: Path) -> None:
    """The message names the argument and the value, and the folder is not even made."""
    out = tmp_path / "never"
    with pytest.raises(InputError) as caught:
        run(replace(job, out=out, **change))  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert not out.exists()


def test_bad_files_are_one_clear_error(tiny: YOLO, job: Job, data: str, tmp_path: Path) -> None:
    """A fused checkpoint, a torn one, data whose pictures are gone, and a model of other classes are found at once."""
    out = tmp_path / "never"
    dense = save(tiny, tmp_path / "dense.pt")
    torn = tmp_path / "torn.pt"
    torn.write_bytes(dense.read_bytes()[:1000])
    gone = tmp_path / "gone.yaml"
    gone.write_text("train: nowhere\nval: nowhere\nnames: [a, b, c]\n")
    two = tmp_path / "two.yaml"
    two.write_text(f"path: {Path(data).parent}\ntrain: images/train\nval: images/val\nnames: [a, b]\n")
    tiny.fuse(verbose=False)
    fused = save(tiny, tmp_path / "fused.pt")
    for change, message in (
        ({"model": str(fused)}, "fused"),
        ({"model": str(torn)}, "cannot be loaded"),
        ({"data": str(gone)}, "images not found"),
        ({"model": str(dense), "data": str(two), "dense_epochs": None}, "predicts 3 classes and the data has 2"),
    ):
        with pytest.raises(InputError, match=message):
            run(replace(job, out=out, **change))  # type: ignore[arg-type]
    assert not out.exists()
