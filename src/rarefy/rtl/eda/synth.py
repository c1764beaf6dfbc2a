"""What a design costs: synthesis to standard cells by Yosys and ABC, timing and power by OpenSTA.

Two fixed scripts, one for the least area and one for the least delay, since what ABC finds for one structure is within
about a quarter of what it finds for another: a design is known by the pair. Area is counted in gate equivalents (GE),
the area of the library's smallest two-input NAND. There are no wires and no clock tree in these figures. The energy is
of a stimulus of normally distributed inputs whose toggle rates OpenSTA carries through the netlist as if all signals
were independent, without glitches: good for a comparison, not for a power budget.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rarefy import _checks
from rarefy.act.spec.formats import Bits
from rarefy.rtl import arguments
from rarefy.rtl.design import Design
from rarefy.rtl.eda import flow, tools
from rarefy.rtl.eda.flow import Library

_AREA = "strash;&get,-n;&fraig,-x;&put;scorr;dc2;dc2;dch,-f;amap,-m;buffer,-c;upsize,-D,99999;dnsize,-D,99999;stime,-p"
_SPEED = (
    "strash;&get,-n;&fraig,-x;&put;scorr;dc2;dch,-f;if,-g;strash;dch,-f;map,-B,0.9,-D,1;"
    "topo;buffer,-c;upsize,-D,1;dnsize,-D,1;stime,-p"
)
#: The two scripts of ABC by name, as Yosys takes them ("," for a blank).
SCRIPTS = {"area": _AREA, "speed": _SPEED}

_PERIOD_NS = 10.0  # of the clock that the power is counted at
_STIMULUS = 4096


@dataclass(frozen=True)
class Synthesis:
    """A design mapped to standard cells by one script.

    Attributes:
        design: name of the design's top module.
        script: "area" or "speed".
        library: name of the liberty file.
        area: in um2, flip-flops included.
        gate_equivalents: area over that of the library's smallest two-input NAND.
        cells: how many cells.
        flip_flops: how many of them are flip-flops.
        depth: cells on the longest path between registers or ports.
        abc_delay_ns: the delay that ABC computes of the combinational logic, with no flip-flops.
        delay_ns: OpenSTA's: the least clock period, or from input to output where there is no clock; None without it.
        energy_pj: OpenSTA's dynamic energy of one operation, relative only; None without it.
        versions: of every program that took part.

    """

    design: str
    script: str
    library: str
    area: float
    gate_equivalents: float
    cells: int
    flip_flops: int
    depth: int
    abc_delay_ns: float
    delay_ns: float | None
    energy_pj: float | None
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Write every attribute as JSON."""
        return json.dumps(asdict(self))


def synth(
    design: Design, liberty: str | Path | None = None, script: str = "area", *, timing: bool | None = None
) -> Synthesis:
    """Map a design to standard cells and measure it.

    Args:
        design: what :func:`rarefy.rtl.emit` or a peer gives.
        liberty: a liberty file of your own; default OSU 0.18 um.
        script: "area" or "speed".
        timing: run OpenSTA; default if it is installed. True raises when it is not.

    Raises TypeError for what is no design, ValueError for another script or a file without cells, MissingToolError
    (naming the package) without Yosys or cells, and RuntimeError with the program's own message when one fails.

    """
    arguments.design("synth", design)
    _checks.one_of("script", script, SCRIPTS)
    if timing is not None:
        _checks.flag("timing", timing)
    cells = flow.library(None if liberty is None else Path(liberty))
    versions = {"yosys": tools.yosys_version(), "library": cells.name}
    timing = flow.has("sta") if timing is None else timing
    if timing:
        versions["sta"] = flow.version("sta")
    with tempfile.TemporaryDirectory(prefix="rarefy-synth-") as name:
        folder = Path(name)
        log = _map(design, cells, script, folder)
        statistics = json.loads((folder / "stat.json").read_text())["design"]
        netlist = json.loads((folder / "netlist.json").read_text())["modules"][design.top]
        time = _time(design, cells, folder) if timing else _Timing(None, None)
    delays = [float(ps) for ps in re.findall(r"Delay\s*=\s*([\d.]+)\s*ps", log)]
    area = float(statistics.get("area", 0.0))  # wires alone have none
    kinds = [cell["type"] for cell in netlist["cells"].values()]
    return Synthesis(
        design=design.top,
        script=script,
        library=cells.name,
        area=area,
        gate_equivalents=area / cells.nand2,
        cells=len(kinds),
        flip_flops=sum(kind in cells.flip_flops for kind in kinds),
        depth=_depth(netlist, cells.flip_flops),
        abc_delay_ns=delays[-1] / 1000.0 if delays else 0.0,
        delay_ns=time.delay_ns,
        energy_pj=time.energy_pj,
        versions=versions,
    )


def _map(design: Design, cells: Library, script: str, folder: Path) -> str:
    """Run Yosys and ABC, which leave netlist.v, netlist.json and stat.json in the folder; give the log."""
    (folder / "design.sv").write_text(design.text, encoding="utf-8")
    (folder / "constraints").write_text(cells.constraints(), encoding="utf-8")
    (folder / "cells.lib").symlink_to(cells.path)
    registers = "dfflibmap -liberty cells.lib\n" if design.clock else ""
    return tools.yosys(
        f"read_verilog -sv design.sv\nsynth -flatten -top {design.top}\n{registers}"
        f'abc -liberty cells.lib -constr constraints -script "+{SCRIPTS[script]}"\nopt_clean -purge\n'
        "tee -q -o stat.json stat -json -liberty cells.lib\nread_liberty -lib -ignore_miss_func cells.lib\n"
        f"select {design.top}\nwrite_json -selected netlist.json\n"
        "write_verilog -selected -noattr -noexpr -nodec -simple-lhs netlist.v\n",
        folder,
    )


def _depth(netlist: dict[str, Any], flip_flops: frozenset[str]) -> int:
    """Count the most cells on any path that no flip-flop cuts."""
    drivers: dict[int | str, list[int | str]] = {}
    for cell in netlist["cells"].values():
        if cell["type"] in flip_flops:
            continue
        into = [
            bit
            for port, bits in cell["connections"].items()
            if cell["port_directions"][port] == "input"
            for bit in bits
        ]
        for port, bits in cell["connections"].items():
            if cell["port_directions"][port] == "output":
                drivers |= dict.fromkeys(bits, into)
    level: dict[int | str, int] = {}
    for output in drivers:
        waiting = [output]
        while waiting:  # depth first without recursion: a net's level is known once those of its cell's inputs are
            net = waiting[-1]
            missing = [bit for bit in drivers.get(net, []) if bit not in level]
            if missing:
                waiting += missing
                continue
            level[net] = 1 + max((level[bit] for bit in drivers[net]), default=0) if net in drivers else 0
            waiting.pop()
    return max(level.values(), default=0)


def stimulus(design: Design) -> Bits:
    """Give the bit patterns that the energy is counted with: the same standard normal numbers for every design."""
    numbers = np.random.default_rng(0).standard_normal(_STIMULUS)
    return design.format.encode(numbers)


class _Timing(NamedTuple):
    """The delay in ns, and the dynamic energy of an operation in pJ."""

    delay_ns: float | None
    energy_pj: float | None


def _time(design: Design, cells: Library, folder: Path) -> _Timing:
    """Run OpenSTA on netlist.v."""
    bits = stimulus(design)
    activity = []
    data = [port for port in design.ports if port.direction == "input" and port.width % design.format.bits == 0]
    for port in data:
        for i in range(port.width):
            wave = (bits >> (i % design.format.bits)) & 1
            toggles, duty = np.abs(np.diff(wave)).mean(), wave.mean()
            pin = f"{port.name}[{i}]" if port.width > 1 else port.name
            activity.append(
                f"set_power_activity -input_ports [get_ports {{{pin}}}] -activity {toggles:.4f} -duty {duty:.4f}"
            )
    clock = f"[get_ports {design.clock}]" if design.clock else ""
    commands = [
        f"read_liberty {{{cells.path}}}",
        "read_verilog netlist.v",
        f"link_design {design.top}",
        "set_cmd_units -time ns -capacitance fF",
        f"create_clock -name clock -period {_PERIOD_NS} {clock}",
        "set_input_delay 0 -clock clock [all_inputs]",
        "set_output_delay 0 -clock clock [all_outputs]",
        f"set_load {flow.LOAD_FF} [all_outputs]",
        "set_input_transition 0.05 [all_inputs]",
        "report_checks -path_delay max -digits 4",
        "set_power_activity -input -activity 0.5 -duty 0.5",
        *activity,
        "report_power -digits 6",
        "exit",
    ]
    (folder / "timing.tcl").write_text("\n".join(commands) + "\n")
    printed = flow.run([tools.program("sta", "timing"), "-exit", "timing.tcl"], folder)
    slack = re.search(r"(-?[\d.]+)\s+slack", printed)
    total = re.search(r"^Total\s+(\S+)\s+(\S+)\s+(\S+)\s+(\S+)", printed, re.MULTILINE)
    if slack is None or total is None:
        raise RuntimeError(f"OpenSTA reported no timing of {design.top}: {printed.strip()[-1500:]}")
    # internal and switching power are printed in W, and 1 W * 1 ns = 1000 pJ
    watts = float(total.group(1)) + float(total.group(2))
    return _Timing(_PERIOD_NS - float(slack.group(1)), watts * _PERIOD_NS * 1000.0)
