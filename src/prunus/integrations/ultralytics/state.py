"""Which stages of a job are done, in a small file beside its results, so that a job that was cut can go on."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prunus.errors import InputError

FILE = "state.json"
_FORMAT = 1


class State:
    """The stages that are finished: of each what it found, as plain data, and how long it took.

    Args:
        folder: The output folder of the job.
        arguments: The settled arguments, as JSON would give them back.
        stages: The finished stages by name.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, Any], stages: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self.arguments = dict(arguments)
        self.stages = stages

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each finished stage."""
        return {name: float(stage["seconds"]) for name, stage in self.stages.items()}

    def done(self, name: str) -> bool:
        """Tell whether a stage is finished."""
        return name in self.stages

    def found(self, name: str) -> dict[str, Any]:
        """Return what a finished stage found."""
        found: dict[str, Any] = self.stages[name]["found"]
        return found

    def run(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Do the work of a stage, and record it; where the work raises, nothing is recorded."""
        start = time.perf_counter()
        found = work()
        self.stages[name] = {"seconds": round(time.perf_counter() - start, 3), "found": found}
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".{FILE}"
        content = {"format": _FORMAT, "arguments": self.arguments, "stages": self.stages}
        draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(draft, self.folder / FILE)


def open_state(folder: Path, arguments: Mapping[str, Any], *, resume: bool, owned: tuple[str, ...]) -> State:
    """Read the state of a job that shall go on, or make the state of a new one; writes nothing.

    Args:
        folder: The output folder of the job.
        arguments: The settled arguments.
        resume: Whether a job that was begun in this folder shall go on; where none was, a new one begins.
        owned: Names in the folder that a new job would overwrite.

    Raises:
        InputError: The folder cannot be written to, or holds something and ``resume`` is off, or the job in it had
            other arguments.
    """
    ground = next(path for path in (folder, *folder.parents) if path.exists())
    if not (ground.is_dir() and os.access(ground, os.W_OK)):
        raise InputError(f"'{folder}' cannot be written to, because of '{ground}'; choose another folder with --out")
    file = folder / FILE
    if not file.exists():
        if taken := [name for name in owned if (folder / name).exists()]:
            raise InputError(
                f"'{folder}' already holds {', '.join(taken)}, which this job would overwrite; choose another folder "
                "with --out"
            )
        return State(folder, arguments, {})
    if not resume:
        raise InputError(
            f"'{folder}' already holds a job; go on with it by --resume, or choose another folder with --out"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        before, stages = content["arguments"], content["stages"]
    except (ValueError, KeyError) as error:
        raise InputError(f"'{file}' cannot be read ({error}); delete the folder and start again") from error
    if content.get("format") != _FORMAT:
        raise InputError(f"'{file}' was written by another version of prunus; delete the folder and start again")
    wanted = json.loads(json.dumps(dict(arguments)))
    changed = [key for key in sorted({*before, *wanted}) if before.get(key) != wanted.get(key)]
    if changed:
        differences = ", ".join(f"{key} was {before.get(key)!r} and is now {wanted.get(key)!r}" for key in changed)
        raise InputError(
            f"the job in '{folder}' had other arguments: {differences}; resume it with the same, or choose another "
            "folder with --out"
        )
    return State(folder, arguments, stages)
