"""Proofs by Yosys: a design equals its definition, another design, or the high bits of its result a narrower one's."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rarefy.act.spec.table import LinearTable, ShiftTable, Table
from rarefy.rtl.check.definition import definition
from rarefy.rtl.datapaths.flat import flat
from rarefy.rtl.design import Design, literal
from rarefy.rtl.eda import tools
from rarefy.rtl.emit import module

#: Undefined values may be anything, and are it before passes that clean up choose for them.
_SCRIPT = """read_verilog -sv harness.sv
hierarchy -top {top}_harness
proc -norom
flatten
opt_clean
setundef -undriven -anyseq
check
write_json netlist.json
async2sync
opt -full
memory_map
opt_clean
sat -timeout {seconds} -prove bad 0 -show given -show y -show want {options}
"""
#: Lines of a truth table that a proof is quick with; how long Yosys may look for one.
_CASES = 4096
_SECONDS = 300


class Counterexample(NamedTuple):
    """An input, what the design gives, and what was expected, as patterns."""

    x: int
    y: int
    expected: int


@dataclass(frozen=True)
class Proof:
    """What was proven, or that it is not so, with the counterexample; and what the statement leaves out.

    ``faults``: what is no registers at the rising edge of ``clk`` and logic between them, which alone a proof sees.
    """

    statement: str
    holds: bool
    counterexample: Counterexample | None
    faults: tuple[str, ...]
    exceptions: tuple[str, ...]
    versions: dict[str, str]


def prove(design: Design, against: Design | None = None) -> Proof:
    """Prove a design against its definition, or ``against`` another; see :func:`rarefy.rtl.verify`."""
    if design.setup:
        raise ValueError(f"{design.top} has a programmable table, which a proof would have to fix: simulate it")
    fmt = design.format
    exempt, low = "1'b0", 0
    exceptions: tuple[str, ...] = ()
    if against is None:
        reference, statement = _reference(design)
    else:
        reference, low = against, fmt.bits - against.format.bits
        if against.latency or against.lanes > 1:
            raise ValueError(f"against must be combinational and of one lane, {against.top} is not")
        if low < 0 or against.format.exponent_bits != fmt.exponent_bits:
            raise ValueError(
                f"against must be of {fmt.name} or of a narrower format with {fmt.exponent_bits} exponent bits,"
                f" {against.top} is of {against.format.name}"
            )
        statement = f"equal to {against.top}"
        if low:
            exempt, exceptions = _narrowing(design, against)
            statement = f"high {against.format.bits} bits equal to {against.top} of the high bits of the input"
    if reference.top == design.top:
        raise ValueError(f"both designs are named {design.top}: emit one of them with another top")
    harness = _harness(design, reference, low, exempt)
    depth = design.latency
    options = f"-tempinduct -seq {depth} -maxsteps {depth + 3} -set-def-inputs" if depth else ""
    with tempfile.TemporaryDirectory(prefix="rarefy-rtl-") as name:
        (Path(name) / "harness.sv").write_text(design.text + reference.text + harness)
        log = tools.yosys(_SCRIPT.format(top=design.top, seconds=_SECONDS, options=options), Path(name))
        netlist = json.loads((Path(name) / "netlist.json").read_text())["modules"][f"{design.top}_harness"]
    faults = _faults(netlist, log)
    holds, refuted = "SUCCESS!" in log, "FAIL!" in log
    if not (holds or refuted or faults):
        raise RuntimeError(f"Yosys came to no end with {design.top} within {_SECONDS} s: simulate it")
    found = _counterexample(log) if refuted else None
    proven = f"{statement} for all 2^{fmt.bits} inputs"
    if design.handshake:
        proven += ", with nothing waiting"
    if found is not None and design.lanes > 1:
        found = _lane(design, found)
    if found is not None and low:
        found = found._replace(y=found.y >> low)
    return Proof(proven, not refuted, found, faults, exceptions, {"yosys": tools.yosys_version()})


def _reference(design: Design) -> tuple[Design, str]:
    """Make hardware that says what the design should be in another way; and say what equality with it states."""
    fmt = design.format
    top = f"{design.top}_definition"
    if fmt.bits <= 16:
        lane = flat(fmt, design.compute(fmt.all_bits()))
        if lane.functions.count("\n") <= _CASES:
            text = module(top, lane, fmt)
            return Design(top, text, fmt, 0, (), design.compute, design.about), "equal to the truth table of its model"
    if design.table is None or isinstance(design.table, LinearTable):
        raise ValueError(f"{design.top} is too irregular to prove against its truth table: simulate it")
    text = definition(top, design.table, design.nan)
    return Design(top, text, fmt, 0, (), design.compute, design.about), "equal to its table's definition"


def _harness(design: Design, reference: Design, low: int, exempt: str) -> str:
    """Put the two side by side; ``given`` is the input that ``y`` belongs to."""
    n, lanes, depth = design.format.bits, design.lanes, design.latency
    width = n * lanes
    narrow = reference.format.bits
    ports = [".x(x)", ".y(y)"]
    ports += [f".{p}(clk)" for p in ("clk",) if design.clock]
    if design.handshake:
        ports += [".rst_n(1'b1)", ".in_valid(1'b1)", ".in_ready()", ".out_valid()", ".out_ready(1'b1)"]
    moves = " ".join(f"x{i + 1} <= {f'x{i}' if i else 'x'};" for i in range(depth))
    delayed = f"  logic [{width - 1}:0] {', '.join(f'x{i + 1}' for i in range(depth))};\n" if depth else ""
    delayed += f"  always_ff @(posedge clk) begin {moves} end\n" if depth else ""
    instances = "".join(
        f"  {reference.top} reference{i}(.x(given[{n * i + low} +: {narrow}]), .y(want[{narrow * i} +: {narrow}]));\n"
        for i in range(lanes)
    )
    compared = "y" if not low else f"y[{n - 1}:{low}]"
    return f"""
module {design.top}_harness(input logic clk, input logic [{width - 1}:0] x, output logic bad);
  wire [{width - 1}:0] y;
  wire [{narrow * lanes - 1}:0] want;
  {design.top} dut({", ".join(ports)});
{delayed}  wire [{width - 1}:0] given = {f"x{depth}" if depth else "x"};
{instances}  assign bad = !({exempt}) && {compared} != want;
endmodule
"""


def _narrowing(design: Design, against: Design) -> tuple[str, tuple[str, ...]]:
    """Say where the high bits may differ: an expression of ``given``, and the same in words."""
    wide, narrow = design.table, against.table
    if wide is None or narrow is None or narrow.to_format(wide.format, wide.name) != wide:
        raise ValueError(f"{design.top} is not the table of {against.top} in {design.format.name} (Table.to_format)")
    if design.lanes > 1:
        raise ValueError("high bits are compared in designs of one lane")
    fmt, n = design.format, design.format.bits
    u = f"given[{n - 2}:0]"
    parts, words = [f"{u} > {literal(n - 1, fmt.last)}"], ["NaN"]
    for low, high, text in _differing(wide, narrow):
        bits, of = (n, "given") if wide.symmetry == "none" else (n - 1, u)
        parts.append(f"({of} >= {literal(bits, low)} && {of} <= {literal(bits, high)})")
        words.append(text)
    return " || ".join(parts), tuple(words)


class _Range(NamedTuple):
    """Patterns, and why they differ."""

    first: int
    last: int
    why: str


def _differing(wide: Table, narrow: Table) -> list[_Range]:
    """Find the patterns in which a table and its wide form truly differ."""
    f = wide.fmt
    if isinstance(wide, ShiftTable):
        extra = f.mantissa_bits - narrow.fmt.mantissa_bits
        first, last = wide.saturate_above + 1, ((narrow.saturate_above + 1) << extra) - 1
        between = f"{float(f.decode(first)):.9g} <= |x| < {float(f.decode(last + 1)):.9g}"
        return [_Range(first, last, f"{between}: above T2, which the narrow format cannot tell from T2")]
    ends = [row[0] for row in wide.rows[1:]] + [1 << f.bits if wide.symmetry == "none" else f.sign]
    steep = [
        (row[0], end - 1)
        for row, end in zip(wide.rows, ends, strict=True)
        if abs(row[1]) > 1 << wide.fraction_bits or abs(row[1]) & (abs(row[1]) - 1)
    ]
    return [_Range(a, b, f"x from {float(f.decode(a)):.9g} to {float(f.decode(b)):.9g}: a steep row") for a, b in steep]


def _faults(netlist: dict[str, Any], log: str) -> tuple[str, ...]:
    """Say what in a design is not made of registers at the rising edge of ``clk`` and logic between them."""
    clock = netlist["ports"]["clk"]["bits"]
    kinds: set[str] = set()
    for cell in netlist["cells"].values():
        if "latch" in cell["type"] or cell["type"] == "$sr":
            kinds.add("a latch, where a register at the rising edge of clk was expected")
        elif "CLK" in cell["connections"]:
            if cell["connections"]["CLK"] != clock:
                kinds.add("a register with a clock that is not clk")
            elif not int(cell["parameters"]["CLK_POLARITY"], 2):
                kinds.add("a register at the falling edge of clk")
    if "multiple conflicting drivers" in log:
        kinds.add("a signal with more than one driver")
    if "found logic loop" in log:
        kinds.add("a loop of logic without a register")
    return tuple(sorted(kinds))


def _counterexample(log: str) -> Counterexample | None:
    """Read the last time step that Yosys shows, None when it shows none; numbers in decimal end at 32 bits."""
    shown = [re.findall(rf"\\{name}\s+\S+\s+\S+\s+([01]+)\s*$", log, re.MULTILINE) for name in ("given", "y", "want")]
    if not all(shown):
        return None
    return Counterexample(*(int(values[-1], 2) for values in shown))


def _lane(design: Design, found: Counterexample) -> Counterexample:
    """Cut the first lane that differs out of a counterexample."""
    n = design.format.bits
    mask = (1 << n) - 1
    for lane in range(design.lanes):
        one = Counterexample(*(value >> (n * lane) & mask for value in found))
        if one.y != one.expected:
            return one
    return found
