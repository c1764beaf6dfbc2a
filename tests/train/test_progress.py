"""What is shown of a run: a bar on a terminal, lines elsewhere."""

import os
import pty
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rarefy.train.progress import watched
from rarefy.train.run import Progress


def seen(step: int, *, steps: int = 40, epoch: int = 10, pace: float = 1.0) -> Progress:
    metrics = {"test_accuracy": 0.5} if step >= epoch else {}
    return Progress(step, steps, step / epoch, 1.25, 0.875, step * pace, metrics)


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 100) -> Iterator[list[bytes]]:
    """Standard error is a terminal; what it got is in the list afterwards."""
    for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    ours, theirs = pty.openpty()
    got: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(ours, 65536):
                got.append(chunk)
        except OSError:  # how Linux tells that the other end is closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        yield got
    reader.join(10)
    os.close(ours)


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_a_bar_with_share_and_time_left(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    with terminal(monkeypatch, columns) as got, watched() as watch:
        for step in range(1, 31):
            now[0] += 1.0
            assert watch(seen(step)) is False
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(got).decode())
    assert "75%" in text
    assert "0:00:10 left" in text
    assert "epoch  3.00  loss 1.250  sparsity 87.5 %  accuracy 50.00 %" in text
    assert "━" in text
    assert max(len(line) for line in re.split(r"[\r\n]+", text)) <= columns


def test_elsewhere_a_line_an_epoch_with_share_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with watched() as watch:
        for step in range(1, 41):
            assert watch(seen(step)) is False
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"{share:3d} %  epoch {epoch:5.2f}  loss 1.250  sparsity 87.5 %  accuracy 50.00 %  {gone} gone, {left} left"
        for share, epoch, gone, left in [
            *((25, 1, "0:10", "0:30"), (50, 2, "0:20", "0:20"), (75, 3, "0:30", "0:10"), (100, 4, "0:40", "0:00"))
        ]
    ]


def test_a_long_epoch_is_not_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with watched() as watch:
        for step in range(1, 9):
            watch(seen(step, steps=1000, epoch=1000, pace=25.0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("%  ")[2] for line in lines] == [
        "epoch  0.00  loss 1.250  sparsity 87.5 %  1:40 gone, 6:55:00 left",
        "epoch  0.01  loss 1.250  sparsity 87.5 %  2:55 gone, 6:53:45 left",
    ]


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with watched(quiet=True) as watch:
        for step in range(1, 41):
            watch(seen(step))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_handlers_come_back(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with watched() as watch:
        assert watch(seen(1)) is False
        os.kill(os.getpid(), number)
        # The next Ctrl-C ends at once; SIGTERM may come from the system and a launcher both.
        restored = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
        assert restored == (number == signal.SIGINT)
        if number == signal.SIGTERM:
            os.kill(os.getpid(), number)
        assert watch(seen(2)) is True
        assert watch.signal == number
    assert "stopping: writing a checkpoint" in capsys.readouterr().err
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_signal_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as got, watched() as watch:
        watch(seen(1))
        os.kill(os.getpid(), signal.SIGINT)
        assert watch(seen(2)) is True
    assert b"stopping: writing a checkpoint" in b"".join(got)
