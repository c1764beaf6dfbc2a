"""Watching a run: a live bar on a terminal, plain lines elsewhere; Ctrl-C and SIGTERM stop it cleanly."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from rarefy.train.run import Observer, Progress

#: A plain line is written after every epoch, and after so many seconds without one.
SILENCE_SECONDS = 60.0

#: The metrics that a line shows, and how.
_METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "test_accuracy": ("accuracy", lambda share: f"{100 * share:5.2f} %"),
    "valid_perplexity": ("perplexity", lambda value: f"{value:.2f}"),
}


def _status(seen: Progress) -> str:
    parts = [f"epoch {seen.epoch:5.2f}"]
    if seen.loss is not None:
        parts.append(f"loss {seen.loss:.3f}")
    if seen.sparsity is not None:
        parts.append(f"sparsity {100 * seen.sparsity:4.1f} %")
    for name, (label, text) in _METRICS.items():
        if name in seen.metrics:
            parts.append(f"{label} {text(seen.metrics[name])}")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _plain(console: Console) -> Observer:
    first: Progress | None = None
    told: Progress | None = None

    def tell(seen: Progress) -> None:
        nonlocal first, told
        first, told = first or seen, told or seen
        if int(seen.epoch) == int(told.epoch) and seen.seconds - told.seconds < SILENCE_SECONDS:
            return
        told = seen
        done = f"{100 * seen.step / seen.total_steps:3.0f} %"
        left = _clock(seen.seconds / seen.step * (seen.total_steps - seen.step))
        line = f"{done}  {_status(seen)}  {_clock(seen.seconds)} gone, {left} left"
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    return tell


class Watch:
    """An observer that shows the run, and stops it when a signal has come: ``signal`` is its number, or None."""

    def __init__(self, console: Console, show: Observer) -> None:
        self.signal: int | None = None
        self._console, self._show = console, show

    def __call__(self, seen: Progress) -> bool:
        """Show where the run is; True if it is to stop."""
        with suppress(OSError):  # who looked on may be gone: that is no reason to stop
            self._show(seen)
            if self.signal is not None:
                self._console.print("stopping: writing a checkpoint", highlight=False)
        return self.signal is not None


class _Console(Console):
    """One that falls silent where nobody listens any more: by custom Rich ends the process then."""

    def on_broken_pipe(self) -> None:
        """Say nothing more."""
        self.quiet = True


@contextmanager
def watched(quiet: bool = False) -> Iterator[Watch]:
    """An observer that shows progress on standard error, and stops the run when the user or the system asks.

    A second Ctrl-C acts as usual: it ends the process at once. A second SIGTERM does not, since the system and a
    launcher may both send one: the checkpoint is written.
    """
    console = _Console(stderr=True, quiet=quiet)

    def ask(number: int, frame: FrameType | None) -> None:
        watch.signal = number
        if number == signal.SIGINT:
            restore()

    def restore() -> None:
        for name, handler in before.items():
            signal.signal(name, handler)

    if console.is_terminal and not quiet:
        # On a narrow terminal it is the bar that gives way.
        left = TimeRemainingColumn(table_column=Column(no_wrap=True))
        columns = (BarColumn(20), TaskProgressColumn(), left, TextColumn("left {task.description}"))
        bar = Bar(*columns, console=console, transient=True)
        task = bar.add_task("starting")

        def show(seen: Progress) -> None:
            bar.update(task, total=seen.total_steps, completed=seen.step, description=_status(seen))

        watch = Watch(console, show)
    else:
        bar, watch = Bar(console=console, disable=True), Watch(console, _plain(console))
    before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        with bar:
            yield watch
    finally:
        restore()
