"""A job on the screen: a line for each stage, and a bar for the epochs of a training."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from prunus.integrations.ultralytics.stages import Reporter


class ScreenReporter(Reporter):
    """Shows stages and epochs; on a terminal with a live bar, elsewhere a line at a time.

    Args:
        console: Where to write.

    Example:
        >>> with ScreenReporter(Console()) as reporter:   # doctest: +SKIP
        ...     run(job, reporter=reporter)
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", visible=False, total=None, note="")

    def __enter__(self) -> "ScreenReporter":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, title: str) -> None:
        """A stage begins."""
        if not self._console.is_terminal:
            self._console.print(f"  {title} ...")
        self._progress.reset(self._task, total=None, description=title, note="", visible=True)

    def epoch(self, number: int, total: int, map50: float | None) -> None:
        """An epoch of a training stage ended."""
        note = f"epoch {number}/{total}" + ("" if map50 is None else f"  mAP50 {map50:.3f}")
        if not self._console.is_terminal:
            self._console.print(f"    {note}")
        self._progress.update(self._task, completed=number, total=total, note=note)

    def finished(self, title: str, seconds: float) -> None:
        """A stage ended."""
        self._progress.update(self._task, visible=False)
        self._console.print(f"[green]done[/] {title} ({seconds:.1f} s)")

    def skipped(self, title: str) -> None:
        """A stage was done before the job was cut."""
        self._console.print(f"[dim]kept {title} (done before)[/]")
