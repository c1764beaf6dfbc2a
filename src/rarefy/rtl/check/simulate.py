"""Simulation of a design on given inputs, by cocotb in Icarus Verilog or Verilator."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rarefy.rtl.design import Design
from rarefy.rtl.eda import tools

_BUILD = {"icarus": ["-g2012"], "verilator": ["-Wno-fatal"]}
_SECONDS = 3600


@dataclass(frozen=True)
class Answers:
    """What a simulation gave.

    Attributes:
        outputs: one bit pattern an input, int64 [words, lanes]; -1 where a bit is unknown, or where nothing came out.
        faults: breaches of the handshake, changes elsewhere than at a rising edge of the clock, and ports that are not
            the design's, with which nothing is driven.
        versions: the simulator's and cocotb's.

    """

    outputs: npt.NDArray[np.int64]
    faults: list[str]
    versions: dict[str, str]


def simulate(design: Design, inputs: npt.NDArray[np.int64], tool: str = "icarus", seed: int = 0) -> Answers:
    """Run a design on bit patterns [words, lanes], a word at a time.

    With a handshake both sides wait at random clocks, drawn from ``seed``. Raises MissingToolError when the simulator
    is not installed, and RuntimeError with the simulator's last lines when it does not accept the design.
    """
    environment = dict(os.environ, PATH=tools.search_path())
    versions = {"cocotb": tools.package("cocotb", "simulation")}
    if tool == "verilator":
        environment |= tools.verilator_environment()
        for name in ("make", "g++", "perl"):
            tools.program(name, "Verilator")
        if shutil.which("verilator", path=environment["PATH"]) is None:
            tools.program("verilator", "simulation")
        versions["verilator"] = tools.verilator_version()
    else:
        tools.program("iverilog", "simulation")
        tools.program("vvp", "simulation")
        versions["icarus"] = tools.icarus_version()
    with tempfile.TemporaryDirectory(prefix="rarefy-rtl-") as name:
        folder = Path(name)
        design.save(folder / "design.sv")
        shutil.copy(Path(__file__).with_name("testbench.py"), folder / "testbench.py")
        plan: dict[str, Any] = {
            "tool": tool,
            "top": design.top,
            "build_args": _BUILD[tool],
            "latency": design.latency,
            "ports": {port.name: port.width for port in design.ports},
            "clock": design.clock is not None,
            "handshake": design.handshake,
            "setup": design.setup,
            "seed": seed,
            "words": _packed(inputs, design),
        }
        (folder / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, str(folder / "testbench.py"), str(folder / "plan.json")]
        result = tools.run(command, folder, _SECONDS, environment)
        written = folder / "outputs.json"
        if not written.exists():
            logs = [path.read_text() for path in (folder / "test.log", folder / "build.log") if path.exists()]
            said = next((log for log in logs if log.strip()), result.stderr)  # which is cocotb's, of what it ran
            last = "\n".join(said.strip().splitlines()[-12:])
            raise RuntimeError(f"{tool} did not run {design.top}:\n{last}")
        found = json.loads(written.read_text())
    return Answers(_unpacked(found["outputs"], found["unknown"], design), found["faults"], versions)


def _packed(inputs: npt.NDArray[np.int64], design: Design) -> list[str]:
    """Write each word in hexadecimal, lane 0 in the lowest bits."""
    size = design.format.bits // 8
    data = inputs[:, ::-1].astype(f">u{size}").tobytes()
    width = size * design.lanes
    return [data[begin : begin + width].hex() for begin in range(0, len(data), width)]


def _unpacked(outputs: list[str | None], unknown: dict[str, str], design: Design) -> npt.NDArray[np.int64]:
    """Read words: in hexadecimal, None for those that did not come, and the bits of those that are not all known."""
    n, lanes = design.format.bits, design.lanes
    found = np.full((len(outputs), lanes), -1, dtype=np.int64)
    for number, word in enumerate(outputs):
        if word is not None:
            found[number] = np.frombuffer(bytes.fromhex(word.zfill(n * lanes // 4)), f">u{n // 8}")[::-1]
    for index, text in unknown.items():
        for lane in range(lanes):
            bits = text[len(text) - n * (lane + 1) : len(text) - n * lane]
            if set(bits) <= {"0", "1"}:
                found[int(index), lane] = int(bits, 2)
    return found
