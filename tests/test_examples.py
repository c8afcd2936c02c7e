"""Every example runs as it is shown, in a process of its own, and prints what it promises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "group_by_hand": ["(Pruning Root)", "Conv2d(3, 61,", "Conv2d(61, 128,", "output: (1, 1000)"],
    "all_groups": ["conv1              64 ->   48, 10 layers", "parameters: 11,689,512 -> ", "output: (1, 1000)"],
    "iterative_pruner": ["dense   1.82 G MACs  11,689,512 parameters", "step 5  0.", "3,055,880 parameters"],
    "sparse_training": ["masked  11,181,642 parameters", "pruned  2,801,450 parameters", "same outputs: True"],
    "prune_to_target": ["verified:", "whole model", "same outputs: True", "the dense one: True"],
}


def test_every_example_is_tested() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    for words in EXAMPLES[name]:
        assert words in done.stdout
