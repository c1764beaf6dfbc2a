"""Watching a run: a live bar on a terminal, a plain line an epoch elsewhere; Ctrl-C and SIGTERM stop it cleanly."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from rarefy.train.classification import Observer, Progress


def _status(seen: Progress) -> str:
    parts = [f"epoch {seen.epoch:5.2f}"]
    if seen.loss is not None:
        parts.append(f"loss {seen.loss:.3f}")
    if seen.sparsity is not None:
        parts.append(f"sparsity {100 * seen.sparsity:4.1f} %")
    if seen.accuracy is not None:
        parts.append(f"accuracy {100 * seen.accuracy:5.2f} %")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _plain(stream: TextIO) -> Observer:
    announced = 0

    def observe(seen: Progress) -> None:
        nonlocal announced
        if int(seen.epoch) > announced:
            announced = int(seen.epoch)
            pace = seen.seconds / seen.step
            left = _clock(pace * (seen.total_steps - seen.step))
            print(f"{_status(seen)}  {_clock(seen.seconds)} gone, {left} left", file=stream, flush=True)

    return observe


@contextmanager
def watched(quiet: bool = False) -> Iterator[Observer]:
    """An observer that shows progress on standard error, and stops the run when the user or the system asks.

    A second signal acts as usual: it ends the process at once.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        print("stopping after this step: writing a checkpoint", file=sys.stderr, flush=True)
        for name, handler in before.items():
            signal.signal(name, handler)

    before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    console = Console(stderr=True)
    try:
        if quiet:
            yield lambda seen: bool(asked)
        elif console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            with Bar(*columns, console=console, transient=True) as bar:
                task = bar.add_task("starting")

                def show(seen: Progress) -> bool:
                    bar.update(task, total=seen.total_steps, completed=seen.step, description=_status(seen))
                    return bool(asked)

                yield show
        else:
            tell = _plain(sys.stderr)

            def report(seen: Progress) -> bool:
                tell(seen)
                return bool(asked)

            yield report
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
