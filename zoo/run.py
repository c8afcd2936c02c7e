"""Run the zoo: build each network at random from a small configuration, prune it to half, and check everything.

    make zoo
    python zoo/run.py --family timm --only 'swin*' --jobs 2 --again

Each network runs in a process of its own, with a limit of time and memory. What was found goes to a JSON file for each
network, so that a run which was cut goes on where it was; `summary.json` and `summary.md` hold all of it. The verdicts:

    ok            at least a quarter of the parameters went; the graph is symmetric, removal is silence, outputs keep
                  their shapes, the cost is what the plan said, undo restores every bit, and a training step runs
    frozen        all of this holds, but less than a quarter could go (the reasons are listed)
    failed        something of it does not hold
    cannot build  the library cannot build or run the network

The exit status is 1 if a network failed, or if fewer than 98 % are ok.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console  # noqa: E402 - the environment comes first
from rich.table import Table  # noqa: E402

from zoo.networks import FAMILIES, PACKAGES, builders  # noqa: E402

LEAST_OK = 0.98
Found = dict[str, Any]


def file_of(out: Path, family: str, name: str) -> Path:
    """Where the findings on a network are kept."""
    return out / family / f"{re.sub(r'[^A-Za-z0-9_.+-]', '_', name)}.json"


def save(path: Path, row: Found) -> None:
    """Write a file at once, so that a reader never sees half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row, indent=1))
    part.replace(path)


def load(path: Path) -> Found | None:
    """Read what was found, if it was."""
    try:
        row = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return row if row.get("finished") else None


def one(family: str, name: str, path: Path, memory: int) -> None:
    """Check one network; runs in a process of its own."""
    import resource

    import torch

    from zoo.check import check

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory << 20, memory << 20))
    with open(os.devnull, "w") as quiet:  # libraries talk while they build
        os.dup2(quiet.fileno(), 1)
        os.dup2(quiet.fileno(), 2)
    row = check(name, family, builders(family)[name], lambda found: save(path, found))
    save(path, {**asdict(row), "finished": True})


class Pool:
    """A few processes at a time, each with a time limit."""

    def __init__(self, jobs: int, limit: float, memory: int) -> None:
        self.jobs, self.limit, self.memory = jobs, limit, memory
        self.context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.running: list[tuple[Any, float, str, str, Path]] = []

    def start(self, family: str, name: str, path: Path) -> None:
        """Start one network."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        process = self.context.Process(target=one, args=(family, name, path, self.memory), daemon=True)
        process.start()
        self.running.append((process, time.monotonic(), family, name, path))

    def finished(self) -> list[Found]:
        """What came to an end, by itself or because its time was up."""
        rows = []
        for entry in list(self.running):
            process, began, family, name, path = entry
            late = time.monotonic() - began > self.limit
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            self.running.remove(entry)
            rows.append(load(path) or self._broken(process.exitcode, late, family, name, path))
        return rows

    def _broken(self, code: int | None, late: bool, family: str, name: str, path: Path) -> Found:
        """A row for a process that did not finish: what it had found, and how it ended."""
        from zoo.check import Row

        try:
            row = json.loads(path.read_text())
        except (OSError, ValueError):
            row = asdict(Row(name, family))
        end = f"no end in {self.limit:.0f} s" if late else f"the process died ({_signal(code)})"
        row["problems"].append(f"{row['stage']}: {end}")
        row["status"] = "cannot build" if row["stage"] in {"start", "build", "run_dense"} else "failed"
        row["finished"] = True
        save(path, row)
        return row


def _signal(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit {code}"


def wanted(families: Sequence[str], only: str | None) -> list[tuple[str, str]]:
    """The networks to run, as (family, name)."""
    found = [(family, name) for family in families for name in builders(family)]
    if only is None:
        return found
    return [(f, n) for f, n in found if fnmatch.fnmatch(n, only) or fnmatch.fnmatch(f"{f}/{n}", only)]


def preload(family: str) -> None:
    """Import what a family needs once, before its networks are forked off."""
    for package in ("torch", "prunus", "zoo.check", *PACKAGES[family]):
        try:
            import_module(package)
        except ImportError as error:
            sys.exit(f"the family {family} needs {package} ({error}): pip install -e '.[zoo]'")


def run(todo: Sequence[tuple[str, str]], out: Path, pool: Pool, console: Console) -> None:
    """Check all of `todo`, and say how each went."""
    waiting = list(reversed(todo))
    done = 0
    while waiting or pool.running:
        while waiting and len(pool.running) < pool.jobs:
            family, name = waiting.pop()
            preload(family)
            pool.start(family, name, file_of(out, family, name))
        for row in pool.finished():
            done += 1
            console.print(f"[{done}/{len(todo)}] {_line(row)}", markup=False, highlight=False, soft_wrap=True)
        time.sleep(0.05)


def _line(row: Found) -> str:
    text = f"{row['family']}/{row['name']}: {row['status']}, {row['removed']:.0%} removed"
    if row["in_forward_passes"]:
        text += f", graph {row['in_forward_passes']:.1f} passes"
    return text + (f" - {row['problems'][0][:200]}" if row["problems"] else "")


def totals(rows: Sequence[Found]) -> dict[str, Any]:
    """The figures that matter over all rows."""
    status = Counter(row["status"] for row in rows)
    passes = [row["in_forward_passes"] for row in rows if row["in_forward_passes"]]
    return {
        "networks": len(rows),
        "engines": sorted({row["engine"] for row in rows if row.get("engine")}),
        "status": dict(status),
        "ok_share": status["ok"] / max(len(rows), 1),
        "median_forward_passes": round(statistics.median(passes), 2) if passes else None,
        "median_removed": round(statistics.median([row["removed"] for row in rows]), 4) if rows else None,
    }


def good(summary: dict[str, Any]) -> bool:
    """Whether the promise is kept."""
    return bool(summary["networks"]) and not summary["status"].get("failed") and summary["ok_share"] >= LEAST_OK


def as_table(rows: Sequence[Found]) -> Table:
    """A line for each network that is not ok."""
    shown = Table(title="Networks that are not ok")
    for head in ("network", "status", "parameters", "left", "removed", "symmetry", "passes", "why"):
        shown.add_column(
            head, justify="left" if head in {"network", "status", "why"} else "right", no_wrap=head != "why"
        )
    for row in sorted(rows, key=lambda r: r["status"]):
        if row["status"] == "ok":
            continue
        symmetry = "-" if row["symmetry"] is None else f"{row['symmetry']:.0e}"
        passes = "-" if row["in_forward_passes"] is None else f"{row['in_forward_passes']:.1f}"
        numbers = f"{row['params_before']:,}", f"{row['params_after']:,}", f"{row['removed']:.0%}", symmetry, passes
        shown.add_row(f"{row['family']}/{row['name']}", row["status"], *numbers, why(row)[:160])
    return shown


def why(row: Found) -> str:
    """Why a network is not ok, in a line."""
    if row["problems"]:
        return str(row["problems"][0]).splitlines()[0]
    return "; ".join(row["frozen"][:2]) if row["status"] == "frozen" else ""


def as_markdown(rows: Sequence[Found], summary: dict[str, Any]) -> str:
    """The summary for people who read files."""
    lines = [
        "# Zoo",
        "",
        f"{summary['networks']} networks: {', '.join(f'{n} {s}' for s, n in sorted(summary['status'].items()))}. "
        f"The graph took {summary['median_forward_passes']} forward passes (median).",
        "",
        "| family | networks | ok | frozen | failed | cannot build |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for family in FAMILIES:
        here = Counter(row["status"] for row in rows if row["family"] == family)
        if here:
            counts = " | ".join(str(here[s]) for s in ("ok", "frozen", "failed", "cannot build"))
            lines.append(f"| {family} | {here.total()} | {counts} |")
    lines += ["", "| network | status | parameters | left | removed | why |", "|---|---|--:|--:|--:|---|"]
    for row in rows:
        reason = why(row)[:300].replace("|", "\\|")
        numbers = f"{row['params_before']:,} | {row['params_after']:,} | {row['removed']:.0%}"
        lines.append(f"| {row['family']}/{row['name']} | {row['status']} | {numbers} | {reason} |")
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=FAMILIES, help="libraries (default: all)")
    parser.add_argument("--only", metavar="PATTERN", help="names to run, such as 'swin*' or 'timm/swin*'")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="networks at a time")
    parser.add_argument("--limit", type=float, default=180, help="seconds for each network (default 180)")
    parser.add_argument("--memory", type=int, default=6144, help="MiB for each network; 0: no limit (default 6144)")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="folder of the findings")
    parser.add_argument("--again", action="store_true", help="also run what has a finding already")
    parser.add_argument("--retry", action="store_true", help="also run what has a finding already and is not ok")
    parser.add_argument("--list", action="store_true", help="list the names and stop")
    return parser.parse_args()


def main() -> int:
    """Run, report, judge."""
    asked = arguments()
    console = Console(width=max(Console().width, 140))
    names = wanted(asked.family, asked.only)
    if asked.list:
        console.print("\n".join(f"{family}/{name}" for family, name in names), markup=False, highlight=False)
        return 0
    known = {} if asked.again else {key: load(file_of(asked.out, *key)) for key in names}
    if asked.retry:
        known = {key: row for key, row in known.items() if row is not None and row["status"] == "ok"}
    todo = [key for key in names if known.get(key) is None]
    run(todo, asked.out, Pool(asked.jobs, asked.limit, asked.memory), console)
    rows = [row for key in names if (row := load(file_of(asked.out, *key))) is not None]
    summary = totals(rows)
    asked.out.mkdir(parents=True, exist_ok=True)
    save(asked.out / "summary.json", {"totals": summary, "rows": rows})
    (asked.out / "summary.md").write_text(as_markdown(rows, summary))
    console.print(as_table(rows))
    console.print_json(data=summary)
    return 0 if good(summary) else 1


if __name__ == "__main__":
    sys.exit(main())
