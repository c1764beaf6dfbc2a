"""What synthesis runs besides Yosys: ABC alone, OpenSTA, nextpnr, and the standard cells that it maps to."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from rarefy.rtl.eda import tools
from rarefy.rtl.eda.tools import MissingToolError

LOAD_FF = 10.0  # at every output
_OSU018 = "usr/share/qflow/tech/osu018/osu018_stdcells.lib"
_TIMEOUT = 900


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
        """Write what drives the inputs and what loads the outputs, as ABC reads it."""
        return f"set_driving_cell {self.driver}\nset_load {LOAD_FF} [all_outputs]\n"


def osu018() -> Path:
    """Find the liberty file of OSU 0.18 um, of Debian's package qflow-tech-osu018.

    It is looked for below the folder ``osu018`` of a virtual environment, into which the package may be unpacked
    without its many dependencies, and below ``/``. Raises MissingToolError when it is in neither.
    """
    for root in (Path(sys.prefix) / "osu018", Path("/")):
        if (root / _OSU018).is_file():
            return root / _OSU018
    raise MissingToolError(f"synthesis needs standard cells, OSU 0.18 um: install {tools.PACKAGES['osu018']}")


@lru_cache(maxsize=16)
def library(path: Path | None = None) -> Library:
    """Read the cells of a liberty file (default: OSU 0.18 um).

    The two-input NAND of least area is the unit of area; the second smallest inverter (of drive strength 2 in every
    library of ours) is what drives the inputs. Raises MissingToolError or FileNotFoundError when there is no file,
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


def has(name: str) -> bool:
    """Whether a program is there."""
    return shutil.which(name, path=tools.search_path()) is not None


def run(command: Sequence[str], folder: Path) -> str:
    """Run a command in ``folder``; give what it prints, or raise RuntimeError with the end of that when it fails."""
    done = tools.run(command, folder, _TIMEOUT)
    printed = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed (status {done.returncode}): {printed.strip()[-1500:]}")
    return printed


def version(name: str) -> str:
    """Ask OpenSTA ("sta") or nextpnr ("nextpnr-ice40") for its version; raises MissingToolError without it."""
    option, pattern = ("-version", r"(\d\S*)") if name == "sta" else ("--version", r"Version ([^)\s]+)")
    return _version(tools.program(name, "timing" if name == "sta" else "placement"), option, pattern)


@lru_cache(maxsize=16)
def _version(path: str, option: str, pattern: str) -> str:
    done = subprocess.run([path, option], capture_output=True, text=True, timeout=60, check=False)
    match = re.search(pattern, done.stdout + done.stderr)
    return match[1] if match else "unknown"


class Estimate(NamedTuple):
    """Area in um2 and delay in ns."""

    area: float
    delay_ns: float


def abc(blif: str, cells: Library, script: str, folder: Path) -> Estimate:
    """Estimate logic in BLIF fast, by ABC alone and a script as Yosys takes it."""
    (folder / "unit.blif").write_text(blif, encoding="utf-8")
    (folder / "constraints").write_text(cells.constraints(), encoding="utf-8")
    commands = f"read_lib -w {cells.path}; read_constr constraints; read_blif unit.blif; {script.replace(',', ' ')}"
    printed = run([_abc_program(), "-q", commands], folder)
    found = re.findall(r"Area\s*=\s*([\d.]+).*?Delay\s*=\s*([\d.]+)\s*ps", printed)
    if not found:
        raise RuntimeError(f"ABC printed no area and delay: {printed.strip()[-1500:]}")
    return Estimate(float(found[-1][0]), float(found[-1][1]) / 1000.0)


def _abc_program() -> str:
    """Find ABC of pyosys, else that of an installed Yosys."""
    spec = importlib.util.find_spec("pyosys")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "yosys-abc")
    return tools.program("yosys-abc", "the search")
