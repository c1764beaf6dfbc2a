"""The command line: ``rarefy train``, ``compare``, ``bench``, ``export``, ``rtl`` and the others."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rarefy import _act_commands, _engine_commands, _export_commands, _rtl_commands
from rarefy._outputs import NowhereToWriteError, check_file, check_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; gives the exit status.

    0; 1 for an error; 130 after Ctrl-C and 143 after SIGTERM (128 and the signal's number, as shells count). A call
    that cannot be understood exits with 2. Whatever goes wrong is told in one line on standard error.
    """
    arguments = _parser().parse_args(argv)
    try:
        with _ended_by_sigterm():
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
        return _told(str(error) or type(error).__name__, 1)
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


def _told(message: str, status: int) -> int:
    """Say what went wrong in one line; gives the status."""
    print(f"rarefy: {' '.join(message.split())}", file=sys.stderr, flush=True)
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
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"rarefy: {' '.join(message.split())} (usage: {self.prog} --help)\n")


def script() -> NoReturn:
    """The ``rarefy`` command of a shell: :func:`main`, then the end of the process with its status."""
    leave(main())


def leave(status: int) -> NoReturn:
    """End this process with ``status``; as one of several (``WORLD_SIZE``), without the end of the interpreter.

    There a thread of the process group that still lets go of a tensor would want the interpreter's lock, and abort
    (pytorch/pytorch#190489); DistributedDataParallel keeps those threads even when the group is destroyed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(prog="rarefy", description="Make PyTorch networks cheap, and prove it.")
    parser.add_argument("--version", action="version", version=f"rarefy {version('rarefy')}")
    commands: argparse._SubParsersAction[argparse.ArgumentParser]
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train by a recipe into a folder of its own, and write its report")
    train.add_argument("recipe", metavar="RECIPE", type=Path, help="a YAML file, for example recipes/demo.yaml")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key: method.target=0.95"
    )
    train.add_argument("--data", metavar="FOLDER", help="where the data set's files lie (data.folder)")
    train.add_argument("--run", type=Path, metavar="FOLDER", help="the run's folder; default a new one, runs/NAME")
    train.add_argument("--resume", action="store_true", help="go on with the run in that folder where it stopped")
    train.add_argument(
        "--baseline", type=Path, metavar="RUN", help="a dense run's folder, to compare with in the report"
    )
    train.set_defaults(command=_train)

    report = commands.add_parser("report", help="write a run's report as one HTML file")
    report.add_argument("folder", type=Path, metavar="RUN", help="the run's folder")
    report.add_argument("--baseline", type=Path, metavar="RUN", help="a dense run's folder, to compare with")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page; default RUN/report.html")
    report.set_defaults(command=_report)

    rooms = commands.add_parser("bench", help="measure time on this machine").add_subparsers(
        required=True, metavar="WHAT"
    )
    _act_commands.add(commands, rooms)
    _engine_commands.add(rooms)
    _export_commands.add(commands)
    _rtl_commands.add(commands)

    info = commands.add_parser("info", help="versions, processor, and which native kernels load")
    info.set_defaults(command=_info)

    compare = commands.add_parser("compare", help="methods x targets x seeds: a table and a page")
    compare.add_argument(
        "comparison", metavar="FILE", type=Path, help="a comparison (recipes/compare-fashion-mnist.yaml), or a recipe"
    )
    compare.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe: schedule.epochs=2"
    )
    compare.add_argument("--data", metavar="FOLDER", help="where the data set's files lie (data.folder)")
    compare.add_argument("--run", type=Path, metavar="FOLDER", help="where the runs go; default runs/compare-NAME")
    compare.add_argument("--jobs", type=int, metavar="N", help="runs at a time, a core each; default all cores")
    compare.add_argument("--ray", metavar="ADDRESS", help='run through Ray: "auto", "local" or a cluster\'s address')
    compare.add_argument("--csv", type=Path, metavar="FILE", help="the table; default compare.csv in the runs' folder")
    compare.add_argument("--html", type=Path, metavar="FILE", help="the page; default compare.html in the runs' folder")
    compare.add_argument("--write-only", action="store_true", help="run nothing: table and page of what is finished")
    compare.set_defaults(command=_compare)

    for command in (train, report, compare, info):
        command.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from rarefy import report, train
    from rarefy.train.progress import watched

    changes = list(arguments.set)
    if arguments.data is not None:
        changes.append(f"data.folder={json.dumps(arguments.data, ensure_ascii=False)}")
    recipe = train.load(arguments.recipe, changes)
    folder = arguments.run or _folder(recipe.name, arguments.resume)
    check_folder(folder, "--run")
    if not arguments.resume and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds a run already: add --resume to go on with it, or name another --run")
    if arguments.baseline is not None:
        report.load(arguments.baseline)
    # Every process has looked at the folder before the main one writes: they meet when the data is loaded.
    run = train.Classification(recipe, folder, resume=arguments.resume)
    if run.is_main:
        begun = f", from step {run.step} of {run.total_steps}" if run.step else ""
        about = f"training {recipe.model.name} with {recipe.method.name} into {folder}{begun}"
        print(about, file=sys.stderr, flush=True)
    with watched(quiet=not run.is_main) as watch:
        try:
            summary = run.train(watch)
        except train.TrainingInterruptedError as stopped:
            summary = None
            if run.is_main:
                print(f"rarefy: {stopped}; the same with --run {folder} --resume goes on", file=sys.stderr)
    run.accelerator.end_training()
    if summary is None:
        return 128 + (watch.signal or signal.SIGTERM)  # another process may have got the signal
    if not run.is_main:
        return 0
    page = report.write(folder, baseline=arguments.baseline)
    if arguments.json:
        print(json.dumps({**summary, "report": str(page)}))
    else:
        _print_summary(folder, page, arguments.baseline)
    return 0


def _folder(name: str, resume: bool) -> Path:
    """The first of runs/NAME, runs/NAME-2, ... that is free; to resume, the last that is not."""
    candidate, number = Path("runs") / name, 1
    last = candidate
    while candidate.exists():
        last, number = candidate, number + 1
        candidate = Path("runs") / f"{name}-{number}"
    return last if resume else candidate


def _print_summary(folder: Path, page: Path, baseline: Path | None) -> None:
    """What a finished run came to, read from its folder; an unfinished one has only its page."""
    summary, dense = _summary(folder), None if baseline is None else _summary(baseline)
    rows = [("report", str(page))]
    if summary is not None:
        rows[:0] = [
            ("test accuracy", f"{100 * summary['test_accuracy']:.2f} %"),
            *([("of the baseline", f"{100 * dense['test_accuracy']:.2f} %")] if dense is not None else []),
            ("sparsity", f"{100 * summary['sparsity']:.2f} %"),
            ("nonzero weights", f"{summary['nonzeros']:,} of {summary['parameters']:,}"),
            ("inference FLOPs", f"{100 * summary['inference_flops_ratio']:.1f} % of dense (counted, MACs)"),
            ("training FLOPs", f"{100 * summary['training_flops_ratio']:.1f} % of dense (counted)"),
            ("training time", f"{summary['seconds']:.0f} s"),
            ("model", str(folder / "model.safetensors")),
        ]
    for name, value in rows:
        print(f"{name:>16}  {value}")


def _summary(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def _report(arguments: argparse.Namespace) -> int:
    from rarefy import report

    if arguments.folder.is_dir():
        check_file(arguments.output or arguments.folder / "report.html", "--output")
    page = report.write(arguments.folder, baseline=arguments.baseline, output=arguments.output)
    if arguments.json:
        print(json.dumps({"report": str(page)}))
    else:
        _print_summary(arguments.folder, page, arguments.baseline)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from rarefy.compare.command import compare

    return compare(arguments)


def _info(arguments: argparse.Namespace) -> int:
    from rarefy import environment, kernels

    about = environment.describe()
    library = kernels.library_path()
    about["native_library"] = None if library is None else str(library)
    about["kernels"] = [{"name": k.name, "isa": k.isa, "supported": k.supported} for k in kernels.table()]
    if arguments.json:
        print(json.dumps(about))
        return 0
    about["cpu_features"] = " ".join(about["cpu_features"])
    for key in ("rarefy", "torch", "python", "platform", "cpu", "cpu_features", "threads", "gpu"):
        print(f"{key.replace('_', ' '):>12}  {about[key] or 'none'}")
    if not kernels.table():
        why = "built without a C++ compiler" if library is None else f"{library} does not load"
        print(f"{'kernels':>12}  none: {why}, everything runs in PyTorch")
        return 0
    print(f"{'kernels':>12}  {library}")
    in_use = environment.native_kernels() or {"none in use": "RAREFY_ISA asks for no kernel that runs here"}
    for name, isa in in_use.items():
        print(f"{'':>12}  {name}: {isa}")
    return 0


if __name__ == "__main__":
    script()
