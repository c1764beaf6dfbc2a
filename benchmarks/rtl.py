"""The figures of the hardware: ``python benchmarks/rtl.py`` writes results/rtl.csv.

Every design is mapped by the same two scripts (area; speed, with timing and energy), placed on an iCE40 HX8K and
verified on all inputs. ``--part NAME`` renews the rows of some parts only; ``--search FOLDER`` makes the shipped units
of logic again, which takes a minute or more each; ``--print`` prints docs/results/hardware.md's tables from the file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import results
from rarefy import act, rtl
from rarefy.act import BitIndex, fit
from rarefy.act.spec import error, formats
from rarefy.bench import rtl as peers
from rarefy.rtl import logic, search
from rarefy.rtl.design import Design
from rarefy.rtl.eda import flow, fpga, tools

PARTS = ("peers", "published", "carry", "logic", "functions")
#: The parts that are placed on the FPGA too.
PLACED = ("peers", "published")
FUNCTIONS = ("tanh", "sigmoid", "silu", "gelu")
FORMATS = ("bf16", "fp16", "e4m3fn", "e5m2")
#: Error bounds of the shipped units: those of the peers, K-TanH's, and that of 64 rows with carry.
BOUNDS = (0.238406, 0.038325, 0.023563, 0.011844, 0.00892, 0.006329, 0.00537, 0.004519, 0.001945)
STEPS = 150


def designs(part: str) -> Iterator[tuple[str, Design]]:
    """The designs of a part, by what the file calls them."""
    if part == "peers":
        for name, make in peers.PEERS.items():
            yield name, make()
    elif part == "published":
        table = act.load("tanh_bf16_ktanh")
        for style in rtl.STYLES:
            for stages in (0, 1, 2):
                yield f"K-TanH, {style}, {stages} stages", rtl.emit(table, style, stages=stages, nan="quiet")
    elif part == "carry":
        for rows, index in ((32, BitIndex(2, 3)), (64, BitIndex(2, 4))):
            table = fit.fit_shift(
                "tanh", "bf16", index, form="carry", few_shifts=True, name=f"tanh_bf16_carry{rows}_few"
            )
            yield f"{rows} rows with carry, few shifts", rtl.emit(table, nan="quiet")
        yield "64 rows with carry, shipped", rtl.emit(act.load("tanh_bf16_carry64"), nan="quiet")
        for bound in (0.00892, 0.00537, 0.004519, 0.001945):
            tables = search.tables(error=bound)[:8]
            table = min(tables, key=lambda table: rtl.synth(rtl.emit(table, nan="quiet"), timing=False).area)
            shifts = " ".join(map(str, sorted({row[1] for row in table.rows if row[1] < 7})))
            yield (
                f"{len(table.rows)} rows with carry, shifts {shifts}, within {bound:g}",
                rtl.emit(table, nan="quiet", top=f"within_{int(bound * 1e6)}"),
            )
    elif part == "logic":
        for name in logic.names():
            yield name, logic.load(name).design()
    else:
        for function in FUNCTIONS:
            for fmt in FORMATS:
                yield f"{function}, {fmt}, correctly rounded", rtl.emit(act.load(f"{function}_{fmt}"))
            for fmt in ("bf16", "fp16"):
                yield f"{function}, {fmt}, slopes by shifts", rtl.emit(act.load(f"{function}_{fmt}_shifts"))


def mismatches(designs: Sequence[Design]) -> list[int]:
    """On how many of all inputs the hardware of each design differs from its model.

    By ``rtl.verify``; combinational designs of one width by one simulation of all together, which is quicker.
    """
    if any(design.latency or design.clock for design in designs):
        return [rtl.verify(design).mismatches for design in designs]
    found: dict[str, int] = {}
    for n in {design.format.bits for design in designs}:
        chosen = [design for design in designs if design.format.bits == n]
        units = "".join(
            f"  wire [{n - 1}:0] y{i};\n  {design.top} u{i} (.x(x), .y(y{i}));\n" for i, design in enumerate(chosen)
        )
        values = ", ".join(f"y{i}" for i in range(len(chosen)))
        bench = (
            f"module bench;\n  reg [{n - 1}:0] x;\n  integer i, file;\n{units}  initial begin\n"
            f'    file = $fopen("answers", "w");\n    for (i = 0; i < {1 << n}; i = i + 1) begin\n      x = i;\n'
            f'      #1 $fdisplay(file, "{" ".join(["%h"] * len(chosen))}", {values});\n    end\n'
            "    $finish;\n  end\nendmodule\n"
        )
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "bench.sv").write_text("".join(design.text for design in chosen) + bench)
            flow.run([tools.program("iverilog", "simulation"), "-g2012", "-o", "bench", "bench.sv"], folder)
            flow.run([tools.program("vvp", "simulation"), "bench"], folder)
            lines = [line.split() for line in (folder / "answers").read_text().splitlines()]
        bits = np.arange(1 << n)
        for design, column in zip(chosen, zip(*lines, strict=True), strict=True):
            expected = [f"{value:0{(n + 3) // 4}x}" for value in design.compute(bits)]
            found[design.top] = sum(a != b for a, b in zip(column, expected, strict=True))
    return [found[design.top] for design in designs]


def row(part: str, name: str, design: Design, differing: int) -> dict[str, Any]:
    """One design: its error, its cost by both scripts, its place on the FPGA, and how many inputs differ."""
    area, speed = (rtl.synth(design, script=script) for script in ("area", "speed"))
    placed = fpga.place(design) if part in PLACED else None
    fixed = design.format.name not in formats.FORMATS  # two's complement, which the measure does not order
    errors = (
        None if fixed else error.measure(design.about.function, design.format, design.compute(design.format.all_bits()))
    )
    assert speed.delay_ns is not None
    assert area.energy_pj is not None
    largest = design.about.max_abs
    return {
        "part": part,
        "name": name,
        "function": design.about.function,
        "format": design.format.name,
        "latency": design.latency,
        "max_abs": "" if largest is None else f"{largest:.6f}",
        "rms": "" if errors is None else f"{errors.rmse:.6f}",
        "falls": "" if errors is None else errors.falls,
        "mismatches": differing,
        "inputs": 1 << design.format.bits,
        "ge": f"{area.gate_equivalents:.1f}",
        "um2": f"{area.area:.0f}",
        "depth": area.depth,
        "flip_flops": area.flip_flops,
        "energy_pj": f"{area.energy_pj:.1f}",
        "delay_ns": f"{speed.delay_ns:.3f}",
        "speed_ge": f"{speed.gate_equivalents:.1f}",
        "luts": "" if placed is None else placed.luts,
        "rams": "" if placed is None else placed.rams,
        "fmax_mhz": "" if placed is None else f"{placed.fmax_mhz:.1f}",
        "yosys": area.versions["yosys"],
        "sta": area.versions["sta"],
        "library": area.library,
        "nextpnr": flow.version("nextpnr-ice40"),
        **results.provenance(),
    }


def main() -> int:
    """Measure, or print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", choices=PARTS, help="only these parts; default all")
    parser.add_argument("--search", type=Path, metavar="FOLDER", help="search the units of logic again, into a folder")
    parser.add_argument("--print", action="store_true", help="print the tables from the file")
    arguments = parser.parse_args()
    if arguments.print:
        print("\n\n".join(make(results.read("rtl")) for make in TABLES))
        return 0
    if arguments.search is not None:
        for goal in search.GOALS:
            for bound in BOUNDS:
                found = search.smallest(error=bound, goal=goal, kinds=("logic",), steps=STEPS)
                assert found.unit is not None
                found.unit.save(arguments.search / f"{found.unit.name}.json")
        return 0
    parts = arguments.part or PARTS
    for part in parts:
        rows = [entry for entry in results.read("rtl") if entry["part"] != part]
        named = list(designs(part))
        differing = mismatches([design for _, design in named])
        for (name, design), count in zip(named, differing, strict=True):
            rows.append(row(part, name, design, count))
            print({key: rows[-1][key] for key in SHOWN}, flush=True)
            results.write("rtl", sorted(rows, key=lambda entry: PARTS.index(entry["part"])))
    return 0


SHOWN = (
    "name",
    "max_abs",
    "mismatches",
    "ge",
    "depth",
    "delay_ns",
    "speed_ge",
    "energy_pj",
    "luts",
    "rams",
    "fmax_mhz",
)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def against(unit: Mapping[str, str] | None, other: Mapping[str, str], cost: str, digits: int) -> str:
    """What a unit costs, and the difference from another one."""
    if unit is None:
        return "none"
    return f"{float(unit[cost]):.{digits}f} ({float(unit[cost]) / float(other[cost]) - 1:+.0%})"


def pareto(rows: Sequence[Mapping[str, str]]) -> str:
    """Peers and K-TanH, each with the searched units that have at most its error."""
    searched = [entry for entry in rows if entry["part"] == "logic" or ", within " in entry["name"]]
    lines = []
    for entry in rows:
        if entry["part"] == "peers" or entry["name"] == "K-TanH, shift_add, 0 stages":
            within = [unit for unit in searched if float(unit["max_abs"]) <= float(entry["max_abs"]) + 5e-7]
            small = min(within, key=lambda unit: float(unit["ge"]), default=None)
            fast = min(within, key=lambda unit: float(unit["delay_ns"]), default=None)
            unit = {**entry, "name": entry["name"].removesuffix(", shift_add, 0 stages")}
            ours = [against(small, entry, "ge", 0), against(fast, entry, "delay_ns", 2)]
            lines.append([*cells(unit), entry["energy_pj"], place(entry), *ours])
    lines.sort(key=lambda line: -float(line[1]))
    return _table([*HEAD, "pJ", "LUT / RAM / MHz", "ours: GE", "ours: ns"], lines)


HEAD = ("unit", "largest error", "rms error", "GE", "ns")


def cells(entry: Mapping[str, str]) -> list[str]:
    """The columns of HEAD."""
    rms = f"{float(entry['rms']):.4f}" if entry["rms"] else ""
    return [
        entry["name"],
        f"{float(entry['max_abs']):.5f}",
        rms,
        f"{float(entry['ge']):.0f}",
        f"{float(entry['delay_ns']):.2f}",
    ]


def place(entry: Mapping[str, str]) -> str:
    """What a design takes on the FPGA."""
    return f"{entry['luts']} / {entry['rams']} / {float(entry['fmax_mhz']):.0f}"


def listed(part: str) -> Callable[[Sequence[Mapping[str, str]]], str]:
    """The rows of one part as they are."""

    def make(rows: Sequence[Mapping[str, str]]) -> str:
        chosen = [entry for entry in rows if entry["part"] == part]
        lines = [[*cells(entry), f"{float(entry['speed_ge']):.0f}", entry["falls"]] for entry in chosen]
        if part not in PLACED:
            return _table([*HEAD, "GE at that", "falls"], lines)
        lines = [[*line, place(entry)] for line, entry in zip(lines, chosen, strict=True)]
        return _table([*HEAD, "GE at that", "falls", "LUT / RAM / MHz"], lines)

    return make


TABLES = (pareto, *(listed(part) for part in PARTS[1:]))

if __name__ == "__main__":
    sys.exit(main())
