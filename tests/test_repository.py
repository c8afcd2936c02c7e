"""The shape of the repository: sizes, import arrows, a light front door, tests that assert, a README that runs."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "prunus"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))

LONGEST = 400
LONGER_FOR_A_REASON: dict[str, str] = {}
"""Files that may be longer, each with the reason."""

LEVELS = [
    {"errors", "labels", "ledger", "ties", "higher", "distributed", "_version"},
    {"rules"},
    {"sizes", "calls", "held", "siblings", "modes", "untouched", "meta", "opaque", "standins", "tracing", "hints"}
    | {"swapping", "solving", "entries", "recall"},
    {"coupling"},
    {"drops", "following", "plan"},
    {"surgery", "mirrors", "containers", "handlers", "cost", "calibration", "importance", "functions", "ops"},
    {
        "selection",
        "heads",
        "regularize",
        "recover",
        "recipe",
        "report",
        "repair",
        "distill",
        "allocation",
        "budget",
        "obstacles",
    },
    {"group", "graph", "history", "soft", "pruner", "pruning", "verification", "blocks", "utils"}
    | {
        "dependency",
        "familiar",
        "serialization",
        "spending",
        "sensitivity",
        "inspection",
        "speed",
        "samples",
        "cutting",
    },
    {"integrations"},
    {"cli", "__main__"},
]
"""Modules of the package by level: each imports only from its own level and the ones before it."""

UPWARD: dict[tuple[str, str], str] = {
    ("plan", "surgery"): "plan.apply(model) is where a user who holds a plan looks for it",
}
"""Imports inside a function that point up, each with the reason."""

HEAVY = ("ultralytics", "transformers", "torchvision", "matplotlib", "onnx", "onnxruntime", "cv2", "torch_pruning")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part_of(path: Path) -> str:
    """Give the module or package directly below `prunus` that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def level_of(part: str) -> int:
    return next((level for level, parts in enumerate(LEVELS) if part in parts), -1)


def imports(path: Path, deferred: bool = False) -> set[str]:
    """Give the modules or packages directly below `prunus` that a file imports when it is loaded.

    With `deferred`, those that it imports later, inside a function. Imports for type checkers do not count.
    """
    found: set[str] = set()
    waiting: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), False)]
    while waiting:
        node, inside = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        waiting.extend((child, inside) for child in ast.iter_child_nodes(node))
        if inside is not deferred:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "prunus":
            found.update(f"prunus.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return {name.split(".")[1] for name in found if name.startswith("prunus.")}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_stay_short(path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST or relative(path) in LONGER_FOR_A_REASON, f"{lines} lines: split it by what it is about"


def test_reasons_are_for_files_that_need_them() -> None:
    long = {relative(path) for path in SOURCES if len(path.read_text().splitlines()) > LONGEST}
    assert set(LONGER_FOR_A_REASON) == long
    assert all(len(reason) > 20 for reason in LONGER_FOR_A_REASON.values())


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.parent != PACKAGE or path.stem != "__init__"], ids=relative
)
def test_imports_point_down(path) -> None:
    part = part_of(path)
    level = level_of(part)
    assert level >= 0, f"{part} has no level yet; give it one in LEVELS"
    above = {other for other in imports(path) if level_of(other) > level}
    assert not above, f"{part} (level {level}) imports {above}, which stand above it"
    later = {(part, other) for other in imports(path, deferred=True) if level_of(other) > level}
    assert later <= UPWARD.keys(), f"{later - UPWARD.keys()} point up; list them in UPWARD with a reason, or turn them"


def test_imports_have_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        if path != PACKAGE / "__init__.py":
            graph.setdefault(part_of(path), set()).update(imports(path) - {part_of(path)})
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' <- '.join(error.args[1])}")
    assert order


def test_labels_and_errors_know_nothing_of_torch() -> None:
    for name in ("labels.py", "errors.py"):
        tree = ast.parse((PACKAGE / name).read_text())
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {module for module in modules if module.split(".")[0] == "torch"}, name


def test_the_front_door_is_light() -> None:
    code = f"import sys, prunus; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_drawers_and_no_asserts_for_users(path) -> None:
    assert path.stem not in {"helpers", "misc", "common", "base", "core"}
    tree = ast.parse(path.read_text())
    lines = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not lines, f"assert in lines {lines}: raise one of prunus.errors"


def functions_in(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def asserts(function: ast.FunctionDef, helpers: set[str]) -> bool:
    """Say whether a test asserts: by itself, by pytest.raises, by a testing function, or by a helper that does.

    A fixture that returns such a helper counts as one.
    """
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Name) and node.value.id in helpers:
            return True
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if re.search(r"pytest\.(raises|warns|fail)$|assert_\w+$", called) or called in helpers:
                return True
    return False


@pytest.mark.parametrize("path", TESTS, ids=relative)
def test_every_test_asserts(path) -> None:
    functions = functions_in(path)
    shared = [conftest for folder in path.parents if (conftest := folder / "conftest.py").exists()]
    helpers: set[str] = set()
    while True:  # a helper may assert through another helper
        known = [*functions, *(one for conftest in shared for one in functions_in(conftest))]
        more = {one.name for one in known if not one.name.startswith("test_") and asserts(one, helpers)}
        if more <= helpers:
            break
        helpers |= more
    tests = [one for one in functions if one.name.startswith("test_")]
    assert tests, "no test in this file"
    silent = [one.name for one in tests if not asserts(one, helpers)]
    assert not silent, f"these assert nothing: {silent}"


def test_nothing_points_to_one_machine() -> None:
    pattern = re.compile(
        r"https?://(?:localhost|127\.|10\.|192\.168\.)|/root/|/home/\w|/work/|index[-_]url", re.IGNORECASE
    )
    tops = [path for path in ROOT.iterdir() if path.is_file() and path.suffix in {".md", ".toml", ".cfg", ""}]
    files = [*tops, *SOURCES, *TESTS, *(ROOT / "benchmarks").rglob("*.py"), ROOT / ".ci" / "run"]
    found = [relative(path) for path in files if path != Path(__file__) and pattern.search(path.read_text())]
    assert not found


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    bench = importlib.util.module_from_spec(spec)
    with mock.patch.dict("os.environ"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setitem(sys.modules, spec.name, bench)  # dataclasses look their module up
        spec.loader.exec_module(bench)
    return bench


def test_the_benchmark_judges_what_is_promised() -> None:
    bench = benchmark("graph")
    fast = bench.Row("fast", forward=[2.0, 1.0], prunus=[1.5, 3.0], torch_pruning=[3.0])
    hung = bench.Row("hung", forward=[1.0], prunus=[2.5], torch_pruning_error="no end in 60 s")
    verdict = bench.judge([fast, hung])
    assert (verdict["median_forward_passes"], verdict["median_against_torch_pruning"]) == (2.0, 0.5)
    assert verdict["kept"]
    assert bench.sentence(verdict).startswith("KEPT: median 2.00 forward passes")
    slow = bench.Row("slow", forward=[1.0], prunus=[1.0], torch_pruning=[0.9])
    broken = bench.Row("broken", forward=[1.0], prunus_error="KeyError: 1")
    assert bench.judge([fast, slow])["slower_than_torch_pruning"] == ["slow"]
    assert not bench.judge([fast, slow])["kept"]
    assert not bench.judge([fast, broken])["kept"]
    assert "Prunus failed on broken" in bench.sentence(bench.judge([fast, broken]))


def test_the_benchmark_of_whole_cuts_judges_what_is_promised() -> None:
    bench = benchmark("zoo")

    def row(name: str, **found: object) -> dict[str, object]:
        return {"family": "f", "name": name, **found}

    fast = row("fast", forward=0.1, graph=0.1, prunus=0.2, torch_pruning=0.8)
    tiny = row("tiny", forward=0.01, graph=0.02, prunus=0.04, torch_pruning=0.04, torch_pruning_error="")
    alone = row("alone", forward=0.001, graph=0.01, prunus=0.02, torch_pruning_error="IndexError: 3")
    verdict = bench.judge([fast, tiny])
    assert verdict["kept"]
    assert verdict["geometric_mean"] == pytest.approx(0.5)
    assert bench.sentence(verdict).count("KEPT") == 3
    assert "NOT KEPT" not in bench.sentence(verdict)
    assert list(bench.judge([fast, alone])["above_ten_passes"]) == ["f/alone"]
    slow = row("slow", forward=1.0, graph=1.0, prunus=2.0, torch_pruning=1.0)
    assert bench.judge([fast, slow])["slower"] == ["f/slow"]
    broken = row("broken", prunus_error="KeyError: 1")
    for other in (alone, slow, broken):
        assert not bench.judge([fast, tiny, fast, other])["kept"]
        assert "NOT KEPT" in bench.sentence(bench.judge([fast, tiny, fast, other]))
    assert not bench.judge([])["kept"]


def test_a_sample_of_the_zoo_is_spread_evenly_and_the_same_each_time() -> None:
    names = [f"net{k}" for k in range(10)]
    bench = benchmark("zoo")
    assert bench.sampled(names, 1) == names
    assert bench.sampled(names, 3) == ["net1", "net4", "net7"]
    assert bench.sampled(names[:2], 9) == ["net0"]


def snippets() -> list[tuple[int, str]]:
    """Give the Python blocks of the README, with their lines, but for those marked `<!-- not run: why -->`."""
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    found = re.finditer(r"(<!-- not run: .+? -->\s*)?^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, block.start(2)) + 1, block[2]) for block in found if not block[1]]


@pytest.mark.parametrize(("line", "code"), snippets(), ids=[f"line {line}" for line, _ in snippets()])
def test_readme_snippets_run(line, code, tmp_path, monkeypatch) -> None:
    """Each block runs after those before it, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for earlier, text in snippets():
        if earlier <= line:
            exec(compile("\n" * (earlier - 1) + text, "README.md", "exec"), namespace)
    assert code in [text for _, text in snippets()]
