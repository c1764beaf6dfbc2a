"""The ``rarefy`` command: its parser, and what becomes of errors and signals."""

from __future__ import annotations

import argparse
import io
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rarefy.cli import bench, compare, data, export, info, options, plan, report, rtl, table, train, translate
from rarefy.cli.outputs import NowhereToWriteError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit status.

    0; 1 for an error; 130 after Ctrl-C and 143 after SIGTERM (128 and the signal's number, as shells count). A call
    that cannot be understood exits with 2. Whatever goes wrong is told in one line on standard error.
    """
    arguments = argparse.Namespace()
    try:
        with _ended_by_sigterm():
            build_parser().parse_args(argv, arguments)
            _check_numbers(arguments)
            status = int(arguments.command(arguments))
            if sys.stdout is not None:
                sys.stdout.flush()
        return status
    except _TerminatedError:
        return _told("terminated", 128 + signal.SIGTERM)
    except KeyboardInterrupt:
        return _told("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        # nothing more can be written there, not by the interpreter's end either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _told("standard output was closed before everything was written", 1)
    except NowhereToWriteError as error:
        if getattr(arguments, "measures", False) and not getattr(arguments, "json", False):
            print("nothing was measured: the results would have no place", flush=True)
        return _told(str(error), 1)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        return _told(_words(error), 1)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(place.filename).name}, line {place.lineno}"
        return _told(f"unexpected {type(error).__name__} in {at}: {error}", 1)


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM has come: as with Ctrl-C everything that was begun is cleaned up on the way out."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the command as an exception, where it would end the process; elsewhere than in a main thread not."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise _TerminatedError

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _words(error: Exception) -> str:
    """What an error says: the system's, which is a number and the file at the end, begins with the file."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _told(message: str, status: int) -> int:
    """Say what went wrong in one line; gives the status."""
    options.say(f"rarefy: {' '.join(message.split())}")
    return status


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse numbers that no option has a use for."""
    for name, value in vars(arguments).items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{option} must be a finite number, got {value}")
        if type(value) is int and abs(value) >= 1 << 53:
            raise ValueError(f"{option} must be a number below 2^53, got one of {value.bit_length()} bits")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and that tells where its help cannot be written."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_told(f"{message} (usage: {self.prog} --help)", 2))

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file, flush=True)  # argparse itself says nothing of a full disk


def script() -> NoReturn:
    """The ``rarefy`` command of a shell: :func:`main`, then the end of the process with its status."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - print would take standard output for None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    leave(main())


def leave(status: int) -> NoReturn:
    """End this process with ``status``; as one of several (``WORLD_SIZE``), without the end of the interpreter.

    There a thread of the process group that still lets go of a tensor would want the interpreter's lock, and abort
    (pytorch/pytorch#190489). Nor may a command destroy the group: the lock is held by who waits for that thread.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        sys.exit(status)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError):
            stream.flush()
    os._exit(status)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser: argparse.ArgumentParser = _Parser(prog="rarefy", description="Make PyTorch networks cheap, and prove it.")
    parser.add_argument("--version", action="version", version=f"rarefy {version('rarefy')}")
    commands: argparse._SubParsersAction[argparse.ArgumentParser]
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, plan, report, bench, table, export, rtl, info, compare, data, translate):
        command.add(commands)
    return parser
