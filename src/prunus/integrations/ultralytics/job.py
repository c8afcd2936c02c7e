"""The whole job on one model: train, prune, fine-tune, validate, time, export; it can go on where it was cut."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from prunus.integrations.ultralytics.preflight import Job, settle
from prunus.integrations.ultralytics.result import Figures, Result
from prunus.integrations.ultralytics.stages import OWNED, STAGES, Reporter, Run
from prunus.integrations.ultralytics.state import State, open_state


def run(job: Job, *, resume: bool = False, reporter: Reporter | None = None) -> Result:
    """Do a job, and leave ``pruned.pt``, ``best.pt``, ``best.onnx``, ``plan.json`` and ``result.json`` in its folder.

    Args:
        job: What to do.
        resume: Go on with a job that was cut; where none was begun in the folder, begin one. Default False.
        reporter: Who hears of the progress; default nobody.

    Raises:
        InputError: An argument cannot be used, or the folder holds something else; nothing has been written then.
        PrunusError: A stage failed; the stages before it are kept.

    Example:
        >>> result = run(Job(model="yolov8n.yaml", data="shapes", out=Path("runs/demo"), imgsz=160))  # doctest: +SKIP
        >>> result.finetuned.map50 / result.dense.map50                                               # doctest: +SKIP
        0.998
    """
    reporter = reporter or Reporter()
    out = Path(job.out).absolute()
    with _quiet_ultralytics():
        arguments = settle(job)
        state = open_state(out, asdict(arguments), resume=resume, owned=OWNED)
        state.write()
        under_way = Run(arguments, out, state, reporter)
        for name, title, work in STAGES:
            if state.done(name):
                reporter.skipped(title)
                continue
            reporter.started(title)
            state.run(name, functools.partial(work, under_way))
            reporter.finished(title, state.seconds[name])
    result = _result(state)
    result.save(out / "result.json")
    return result


def _result(state: State) -> Result:
    """Put together what the stages found."""
    latency = state.found("latency")
    figures = {
        name: Figures(**state.found(name), latency_ms=round(latency["latency_ms"][name], 3))
        for name in ("dense", "pruned", "finetuned")
    }
    return Result(
        **figures,
        onnx=state.found("onnx"),
        arguments=state.arguments,
        machine=latency["machine"],
        seconds=state.seconds,
    )


@contextlib.contextmanager
def _quiet_ultralytics() -> Iterator[None]:
    """Keep ultralytics' log, its bars (which follow the log's level) and warnings off the screen.

    It also sets the number of threads of PyTorch whenever it selects the CPU; afterwards that is as it was.
    """
    log = logging.getLogger("ultralytics")
    level, threads = log.level, torch.get_num_threads()
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        torch.set_num_threads(threads)
