"""What a design costs on an iCE40 HX8K: Yosys to look-up tables, nextpnr for placement, routing and timing.

The frequency is nextpnr's for the clock, after routing. Paths to and from pads are not part of it, so every input gets
a register in front of the design, and so does the output of a combinational one behind it. One placement is chance: the
figure is the median over seeds.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rarefy import _checks
from rarefy.rtl import arguments
from rarefy.rtl.design import Design
from rarefy.rtl.eda import flow, tools

SEEDS = (1, 2, 3, 4, 5)
_TARGET = ("--hx8k", "--package", "ct256", "--freq", "400", "--pcf-allow-unconstrained", "--timing-allow-fail")


@dataclass(frozen=True)
class Placement:
    """A design on an iCE40 HX8K, with registers around it.

    Attributes:
        design: name of the design's top module.
        luts: four-input look-up tables.
        carries: carry cells.
        rams: block RAMs.
        flip_flops: flip-flops, those around the design included.
        fmax_mhz: median over the seeds, after routing.
        all_mhz: the frequency of each seed.
        versions: of every program that took part.

    """

    design: str
    luts: int
    carries: int
    rams: int
    flip_flops: int
    fmax_mhz: float
    all_mhz: tuple[float, ...]
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Write every attribute as JSON."""
        return json.dumps(asdict(self))


def place(design: Design, seeds: Sequence[int] = SEEDS) -> Placement:
    """Place and route a design on an iCE40 HX8K.

    Raises TypeError for what is no design, ValueError without seeds, MissingToolError (naming the package) without
    Yosys or nextpnr, RuntimeError with the program's own message when one fails, for example when the design is too
    large.
    """
    arguments.design("place", design)
    if not isinstance(seeds, Sequence) or not seeds:
        raise ValueError(f"seeds must hold at least one number, got {seeds!r}")
    seeds = tuple(_checks.whole("a seed", seed, 0, (1 << 31) - 1) for seed in seeds)
    versions = {"yosys": tools.yosys_version(), "nextpnr": flow.version("nextpnr-ice40")}
    nextpnr = tools.program("nextpnr-ice40", "placement")
    with tempfile.TemporaryDirectory(prefix="rarefy-fpga-") as name:
        folder = Path(name)
        (folder / "design.sv").write_text(design.text + registered(design), encoding="utf-8")
        tools.yosys(
            f"read_verilog -sv design.sv\nsynth_ice40 -abc9 -device hx -top {design.top}_registered\n"
            "delete t:$scopeinfo\nwrite_json design.json\n"  # marks of newer releases, which nextpnr cannot place
            "tee -q -o stat.json stat -json\n",
            folder,
        )
        counts = json.loads((folder / "stat.json").read_text())["design"]["num_cells_by_type"]
        reached = []
        for seed in seeds:
            flow.run(
                [nextpnr, "-q", *_TARGET, "--json", "design.json", "--report", "report.json", "--seed", str(seed)],
                folder,
            )
            clocks = json.loads((folder / "report.json").read_text())["fmax"]
            reached.append(min(float(clock["achieved"]) for clock in clocks.values()))

    def count(pattern: str) -> int:
        return sum(int(number) for kind, number in counts.items() if re.match(pattern, kind))

    return Placement(
        design=design.top,
        luts=count("SB_LUT4"),
        carries=count("SB_CARRY"),
        rams=count("SB_RAM40"),
        flip_flops=count("SB_DFF"),
        fmax_mhz=statistics.median(reached),
        all_mhz=tuple(reached),
        versions=versions,
    )


def registered(design: Design) -> str:
    """Write a module ``TOP_registered`` that is the design with registers in front, and behind if it has none."""
    declared, connected, clocked = [], [], []
    for port in design.ports:
        if port.name == design.clock:
            continue
        width = f"[{port.width - 1}:0] "
        if port.direction == "input":
            declared.append(f"input logic {width}{port.name}")
            clocked.append((f"{port.name}_in", width, f"{port.name}_in <= {port.name};"))
            connected.append(f".{port.name}({port.name}_in)")
        elif design.latency:
            declared.append(f"output logic {width}{port.name}")
            connected.append(f".{port.name}({port.name})")
        else:
            declared.append(f"output logic {width}{port.name}")
            clocked.append((f"{port.name}_out", width, f"{port.name} <= {port.name}_out;"))
            connected.append(f".{port.name}({port.name}_out)")
    clock = design.clock or "clk"
    if design.clock:
        connected.append(f".{design.clock}({design.clock})")
    return (
        f"module {design.top}_registered (input logic {clock}, {', '.join(declared)});\n"
        + "".join(f"  logic {width}{name};\n" for name, width, _ in clocked)
        + f"  {design.top} unit ({', '.join(connected)});\n"
        + f"  always_ff @(posedge {clock}) begin\n"
        + "".join(f"    {statement}\n" for *_, statement in clocked)
        + "  end\nendmodule\n"
    )
