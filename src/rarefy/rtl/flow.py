"""The programs that the synthesis flow runs, where they and the standard cells are found, and how they are called.

Nothing here is imported by what only emits or simulates. A program that is missing is a :class:`ToolMissingError` that
names the package to install, raised before any work is done.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_TIMEOUT = 900
LOAD_FF = 10.0  # at every output

#: What each program is, and the Debian package it comes in.
_PROGRAMS = {
    "sta": ("OpenSTA", "opensta"),
    "nextpnr-ice40": ("nextpnr for iCE40", "nextpnr-ice40"),
    "yosys": ("Yosys", "yosys"),
}
_OSU018 = "usr/share/qflow/tech/osu018/osu018_stdcells.lib"


class ToolMissingError(RuntimeError):
    """A program or a library of cells is not installed; the message says which package has it."""


@dataclass(frozen=True)
class Library:
    """Standard cells: the liberty file, its two-input NAND's area in um2, and the inverter that drives the inputs."""

    path: Path
    nand2: float
    driver: str
    flip_flops: frozenset[str]

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    def constraints(self) -> str:
        """What drives the inputs and what loads the outputs, as ABC reads it."""
        return f"set_driving_cell {self.driver}\nset_load {LOAD_FF} [all_outputs]\n"


def program(name: str) -> str:
    """The path of a program; raises ToolMissingError with the package to install when it is not on PATH."""
    found = shutil.which(name)
    if found is None:
        what, package = _PROGRAMS[name]
        raise ToolMissingError(f"{what} ({name}) is not on PATH: apt-get install {package}")
    return found


def has(name: str) -> bool:
    """Whether a program is on PATH."""
    return shutil.which(name) is not None


def run(command: Sequence[str], folder: Path) -> str:
    """What a command prints, run in ``folder``; raises RuntimeError with the end of its output when it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    printed = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed (status {done.returncode}): {printed.strip()[-1500:]}")
    return printed


def yosys(script: str, folder: Path) -> str:
    """Run a Yosys script in ``folder``, by the Python package pyosys if it is installed, else by the program yosys."""
    path = folder / "script.ys"
    path.write_text(script, encoding="utf-8")
    if importlib.util.find_spec("pyosys") is not None:
        # in a process of its own: an error in a script ends the process that runs it
        code = "from pyosys import libyosys as ys; ys.run_pass('script script.ys', ys.Design())"
        return run([sys.executable, "-c", code], folder)
    return run([_yosys_program(), "-s", path.name], folder)


def abc(blif: str, cells: Library, script: str, folder: Path) -> tuple[float, float]:
    """Area in um2 and delay in ns of logic in BLIF, by ABC alone and a script as Yosys takes it: a fast estimate."""
    (folder / "unit.blif").write_text(blif, encoding="utf-8")
    (folder / "constraints").write_text(cells.constraints(), encoding="utf-8")
    commands = f"read_lib -w {cells.path}; read_constr constraints; read_blif unit.blif; {script.replace(',', ' ')}"
    printed = run([_abc_program(), "-q", commands], folder)
    found = re.findall(r"Area\s*=\s*([\d.]+).*?Delay\s*=\s*([\d.]+)\s*ps", printed)
    if not found:
        raise RuntimeError(f"ABC printed no area and delay: {printed.strip()[-1500:]}")
    return float(found[-1][0]), float(found[-1][1]) / 1000.0


@lru_cache(maxsize=1)
def _abc_program() -> str:
    spec = importlib.util.find_spec("pyosys")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "yosys-abc")
    found = shutil.which("yosys-abc") or shutil.which("berkeley-abc")
    if found is None:
        raise ToolMissingError("no ABC: pip install 'rarefy[rtl]' (pyosys brings it), or apt-get install yosys")
    return found


def yosys_version() -> str:
    """Which Yosys :func:`yosys` runs; raises ToolMissingError when there is none."""
    if importlib.util.find_spec("pyosys") is not None:
        return f"pyosys {importlib.metadata.version('pyosys')}"
    return _version((_yosys_program(), "-V"), r"Yosys \S+")


def _yosys_program() -> str:
    if not has("yosys"):
        raise ToolMissingError("no Yosys: pip install 'rarefy[rtl]' (it brings pyosys), or apt-get install yosys")
    return program("yosys")


def version(name: str) -> str:
    """The version that a program prints of itself."""
    if name == "sta":
        return "OpenSTA " + _version((program(name), "-version"), r"\d\S+")
    return _version((program(name), "--version"), r"Version (\S+?)\)").replace("Version ", "nextpnr-ice40 ").rstrip(")")


@lru_cache(maxsize=16)
def _version(command: tuple[str, ...], pattern: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    match = re.search(pattern, done.stdout + done.stderr)
    return match.group(0) if match else "unknown version"


def osu018() -> Path:
    """The liberty file of OSU 0.18 um, of Debian's package qflow-tech-osu018.

    It is looked for below ``$RAREFY_TOOLS`` (a folder into which the package was unpacked) and below ``/``. Raises
    ToolMissingError when it is in neither.
    """
    roots = [Path(root) for root in (os.environ.get("RAREFY_TOOLS"), "/") if root]
    for root in roots:
        if (root / _OSU018).is_file():
            return root / _OSU018
    raise ToolMissingError(
        "the standard cells of OSU 0.18 um are not installed: apt-get install qflow-tech-osu018, or name a liberty file"
    )


@lru_cache(maxsize=16)
def library(path: Path | None = None) -> Library:
    """The cells of a liberty file (default: OSU 0.18 um).

    The two-input NAND of least area is the unit of area; the second smallest inverter (of drive strength 2 in every
    library of ours) is what drives the inputs. Raises ToolMissingError or FileNotFoundError when there is no file,
    ValueError when it holds no such cells.
    """
    chosen = (osu018() if path is None else Path(path)).resolve()
    if not chosen.is_file():
        raise FileNotFoundError(f"no liberty file {chosen}")
    text = re.sub(r"/\*.*?\*/", " ", chosen.read_text(encoding="utf-8", errors="replace"), flags=re.DOTALL)
    bodies = re.split(r"\bcell\s*\(\s*\"?([\w$]+)\"?\s*\)", text)[1:]
    areas, flip_flops = {}, set()
    for name, body in zip(bodies[::2], bodies[1::2], strict=True):
        area = re.search(r"\barea\s*:\s*([\d.eE+-]+)", body)
        if area:
            areas[name] = float(area.group(1))
        if re.search(r"\bff\s*\(", body):
            flip_flops.add(name)
    nands = [area for name, area in areas.items() if re.search(r"nand2(?![a-z]*b)", name, re.IGNORECASE)]
    inverters = sorted(
        (area, name) for name, area in areas.items() if re.search(r"(^|_)inv_?x?\d", name, re.IGNORECASE)
    )
    if not nands or not inverters:
        raise ValueError(f"{chosen} holds no cell named like a two-input NAND and an inverter: is it a cell library?")
    return Library(chosen, min(nands), inverters[min(1, len(inverters) - 1)][1], frozenset(flip_flops))
