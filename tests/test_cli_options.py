"""Every option of every command, given nonsense: one line on standard error, and nothing is written."""

import argparse
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rarefy.cli.main import build_parser, main
from rarefy.cli.outputs import check_file, check_folder

#: A call of every command that would do its work if the nonsense were not beside it.
CALLS = {
    "train": ["small.yaml"],
    "plan": ["small.yaml"],
    "report": ["run"],
    "compare": ["small.yaml"],
    "info": [],
    "export": ["run", "--to", "engine"],
    "bench act": ["--sizes", "L1"],
    "bench engine": ["fashion_cnn"],
    "table show": ["tanh_e5m2"],
    "table fit": ["tanh", "--form", "segments"],
    "rtl emit": ["tanh_e5m2"],
    "rtl verify": ["tanh_e5m2"],
    "rtl synth": ["tanh_e5m2"],
    "rtl search": ["--error", "0.1"],
    "translate": ["run"],
    "data check": ["pictures"],
    "data glyphs": ["--output", "glyphs", "--no-fetch", "--packages", "packages"],
    "data translation": ["--output", "pairs.tsv", "--no-fetch", "--packages", "packages"],
}
NUMBERS = ["nan", "inf", "-inf", "1e400", "-1", "text", "", "1" * 400]
#: The options that name what is written.
WRITTEN = {"--run", "--csv", "--html", "--output", "--save", "--shipped", "--unit"}


Options = tuple[str, list[argparse.Action]]


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[Options]:
    """Every command, and its options."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from commands(inner, (*words, name))
            return
    yield " ".join(words), [action for action in parser._actions if action.nargs != 0]


OPTIONS = [(name, action) for name, actions in commands(build_parser()) for action in actions]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    Path("folder.sv").mkdir()
    Path("file").write_text("a file")
    Path("latin.json").write_bytes(b'{"name": "\xe9"}')
    return tmp_path


def refused_untouched(capsys: pytest.CaptureFixture[str], here: Path, *words: str) -> None:
    """Run a call that argparse or the command refuses in one line; no file is made or removed."""
    before = sorted(path for path in here.rglob("*"))
    try:
        status = main(words)
    except SystemExit as ended:
        status = int(ended.code or 0)
    out, err = capsys.readouterr()
    assert status in (1, 2), (words, out)
    assert out in ("", "nothing was measured: the results would have no place\n")
    assert err.startswith("rarefy: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert "unexpected" not in err
    assert sorted(path for path in here.rglob("*")) == before


def test_every_command_has_a_call() -> None:
    assert {name for name, _ in commands(build_parser())} == set(CALLS)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    ("name", "option"),
    [(n, a.option_strings[0]) for n, a in OPTIONS if a.type in (int, float)],
)
def test_numbers(name: str, option: str, number: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused_untouched(capsys, here, *name.split(), *CALLS[name], f"{option}={number}")


@pytest.mark.parametrize(
    "path", ["file/below.json", "folder.json", "/proc/none/a.json", "/dev/null", "a" * 300 + ".json"]
)
@pytest.mark.parametrize(
    ("name", "option"),
    [(n, a.option_strings[0]) for n, a in OPTIONS if WRITTEN & set(a.option_strings)],
)
def test_paths_to_write(name: str, option: str, path: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if (option in ("--run", "--shipped") or name == "data glyphs") and path == "folder.json":
        path = "file"
    if name in ("rtl emit", "rtl search") and option == "--output":
        path = path.replace(".json", ".sv")
    extra = ["--kinds", "logic"] if option == "--unit" else []
    call = [] if option == "--shipped" else CALLS[name]
    refused_untouched(capsys, here, *name.split(), *call, *extra, option, path)


@pytest.mark.parametrize("path", ["nothing", "nothing.json", "folder.json", "file", "latin.json", "/proc/self/mem", ""])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("train", None),
        ("train", "--baseline"),
        ("report", None),
        ("report", "--baseline"),
        ("compare", None),
        ("export", None),
        ("bench engine", None),
        ("table show", None),
        ("table fit", None),
        ("rtl emit", None),
        ("rtl verify", None),
        ("rtl synth", None),
        ("rtl synth", "--liberty"),
        ("rtl search", "--liberty"),
        ("data check", None),
    ],
)
def test_paths_to_read(name: str, place: str | None, path: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = [] if name == "rtl search" else [path if place is None else CALLS[name][0]]
    rest = {"export": ["--to", "engine"], "rtl search": CALLS["rtl search"]}.get(name, [])
    refused_untouched(capsys, here, *name.split(), *first, *rest, *([] if place is None else [place, path]))


def test_what_can_be_written_is_let_pass(here: Path) -> None:
    before = sorted(here.rglob("*"))
    for path in (Path("new/folders/file.sv"), Path("file"), Path("模" * 85), None):
        check_file(path, "--output")
    for path in (Path("new/folders"), Path("folder.json"), None):
        check_folder(path, "--run")
    assert sorted(here.rglob("*")) == before


def test_a_name_that_no_file_can_have_is_refused(here: Path) -> None:
    for check in (check_file, check_folder):
        for path in (Path("模" * 86), Path("new", "模" * 86, "below")):
            with pytest.raises(ValueError, match="--output must have names of at most 255 bytes, got one of 258"):
                check(path, "--output")


# Closed pipes and signals


def test_a_reader_that_goes_away() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "rarefy.cli", "rtl", "emit", "tanh_e5m2"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == "rarefy: standard output was closed before everything was written\n"


def ended(*words: str, **streams: Any) -> tuple[int, str]:
    """Run the command in a process of its own; gives its status and what it says on standard error."""
    command = [sys.executable, "-m", "rarefy.cli", *words]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **streams)
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["rtl", "emit", "--help"]])
def test_help_for_a_full_disk(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        assert ended(*words, stdout=full) == (1, "rarefy: [Errno 28] No space left on device\n")


@pytest.mark.parametrize(
    ("stream", "words", "message"),
    [
        ("stdin", [], "standard input is closed: name a FILE of text"),
        ("stdout", ["file"], "standard output is closed: name an --output"),
        ("stdout", ["file", "--json"], "standard output is closed: name an --output"),
    ],
)
def test_translating_between_closed_streams(
    stream: str, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, stream, None)
    assert main(["translate", "run", *words]) == 1
    assert capsys.readouterr().err == f"rarefy: {message}\n"


def test_what_is_told_goes_nowhere_else_where_standard_error_is_closed() -> None:
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "rarefy.cli", "table", "show", "nosuch"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


def test_ctrl_c_while_pytorch_is_imported(here: Path) -> None:
    (here / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    assert ended("info") == (130, "rarefy: interrupted\n")


#: Run by the Python inside the simulator when that starts: it says so, and holds the pipe open until it ends.
TELL = """
import os
if open("/proc/self/comm").read() == "vvp\\n":
    os.write(os.open(os.environ["TOLD"], os.O_WRONLY), b".")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_nothing_is_left_of_a_simulation_that_is_ended(number: signal.Signals, status: int, here: Path) -> None:
    temporary, told = here / "temporary", here / "told"
    temporary.mkdir()
    os.mkfifo(told)
    Path("sitecustomize.py").write_text(TELL)
    reader = os.open(told, os.O_RDONLY | os.O_NONBLOCK)
    process = subprocess.Popen(
        [sys.executable, "-m", "rarefy.cli", "rtl", "verify", "tanh_fp16_shifts", "--stages", "2", "--handshake"],
        env={
            **os.environ,
            **{"TMPDIR": str(temporary), "TOLD": str(told), "PYTHONPATH": str(here)},
            "TORCHINDUCTOR_CACHE_DIR": str(here / "inductor"),  # or PyTorch puts it into TMPDIR
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert happens(reader), process.communicate()
        assert os.read(reader, 2) == b"."
        ends = [os.pidfd_open(each) for each in using(temporary)]
        assert len(ends) >= 3  # what guards the simulation, twice, and the simulator
        process.send_signal(number)
        out, err = process.communicate(timeout=600)
    assert process.returncode == status
    assert (out, err.count("\n")) == ("", 0 if status < 0 else 1)
    for end in (*ends, reader):
        assert happens(end)
        if end is reader:
            assert os.read(reader, 1) == b""
        os.close(end)
    assert using(temporary) == []
    assert list(temporary.iterdir()) == []


def using(folder: Path) -> list[int]:
    """The processes whose working folder is below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(process.joinpath("cwd").readlink()).startswith(str(folder)):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def happens(file: int) -> bool:
    """Wait until there is something to read, or the end of the process or pipe; False after ten minutes."""
    return bool(select.select([file], [], [], 600)[0])
