"""Proofs by Yosys: a design equals its definition, another design, or the high bits of its result a narrower one's."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rarefy.act.spec.table import LinearTable, ShiftTable, Table
from rarefy.rtl.check.definition import definition
from rarefy.rtl.datapaths.flat import flat
from rarefy.rtl.design import Design, literal
from rarefy.rtl.eda import tools
from rarefy.rtl.emit import module

#: The design alone, as it is written, before any pass chooses a value for what is undefined.
_READ = """read_verilog -sv design.sv
hierarchy -check -top {top}
proc -norom
flatten
opt_clean
check
write_json netlist.json
write_rtlil design.il
"""
#: Undefined values may be anything, and are it before passes that clean up choose for them.
_PROVE = """read_rtlil design.il
read_verilog -sv harness.sv
hierarchy -check -top {top}_harness
proc -norom
setundef -undriven -anyseq
flatten
opt_clean
async2sync
opt -full
memory_map
opt_clean
sat -timeout {seconds} -prove bad 0 {shown} {options}
"""
#: Lines of a truth table that a proof is quick with; how long Yosys may look for one.
_CASES = 4096
_SECONDS = 300
#: Clocks beyond the latency that an induction may need.
_STEPS = 3
#: What Yosys shows of a counterexample.
_RESULTS = ("given", "y", "want")
_HANDSHAKE = ("going", "ready", "valid", "sent")


class Counterexample(NamedTuple):
    """An input, what the design gives (None for unknown bits), and what was expected, as patterns."""

    x: int
    y: int | None
    expected: int


@dataclass(frozen=True)
class Proof:
    """What was proven, or that it is refuted, with the counterexample; and what the statement leaves out.

    ``faults``: other ports than the design's, or what is no registers at the rising edge of ``clk`` and logic between
    them, which alone a proof sees: then none was tried; or a handshake that is not as it should be.
    """

    statement: str
    refuted: bool
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
    proven = f"{statement} for all 2^{fmt.bits} inputs"
    if design.handshake:
        proven += ", with nothing waiting"
    faults, log = _run(design, reference.text + _harness(design, reference, low, exempt))
    refuted, found = "FAIL!" in log, None
    if refuted and design.handshake:
        faults = _handshake(design, log)
        refuted = not faults
    if refuted:
        found = _counterexample(log, design.lanes, low)
    return Proof(proven, refuted, found, faults, exceptions, {"yosys": tools.yosys_version()})


def _run(design: Design, harness: str) -> tuple[tuple[str, ...], str]:
    """Read a design, and run the proof of its harness: what is wrong with the design, else what Yosys says of it."""
    depth = design.latency
    options = f"-tempinduct -seq {depth} -maxsteps {depth + _STEPS} -set-def-inputs" if depth else ""
    shown = " ".join(f"-show {name}" for name in (*_RESULTS, *(_HANDSHAKE if design.handshake else ())))
    with tempfile.TemporaryDirectory(prefix="rarefy-rtl-") as name:
        folder = Path(name)
        (folder / "design.sv").write_text(design.text)
        (folder / "harness.sv").write_text(harness)
        log = tools.yosys(_READ.format(top=design.top), folder)
        netlist = json.loads((folder / "netlist.json").read_text())["modules"][design.top]
        faults = _faults(design, netlist, log)
        if faults:
            return faults, ""
        read = folder / "design.il"
        read.write_text(re.sub(r"(?<= )\d+'[01xz-]+(?=\s)", lambda bits: bits[0].replace("z", "x"), read.read_text()))
        log = tools.yosys(_PROVE.format(top=design.top, seconds=_SECONDS, shown=shown, options=options), folder)
    if "SUCCESS!" not in log and "FAIL!" not in log:
        if "TIMEOUT!" in log:
            raise RuntimeError(f"Yosys came to no end with {design.top} within {_SECONDS} s: simulate it")
        raise RuntimeError(f"induction over {depth + _STEPS} clocks does not decide {design.top}: simulate it")
    return (), log


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
    """Put the two side by side; ``given`` is the input that ``y`` belongs to.

    A handshake begins with a reset, and has others at any clock; what comes out is always taken, so that nothing waits.
    ``going`` is its ``rst_n``, ``sent`` whether a number is due.
    """
    n, lanes, depth = design.format.bits, design.lanes, design.latency
    width = n * lanes
    narrow = reference.format.bits
    inputs = f"input logic clk, input logic [{width - 1}:0] x"
    ports = [".x(x)", ".y(y)", *[".clk(clk)"] * (design.clock is not None)]
    compared = "y" if not low else f"y[{n - 1}:{low}]"
    bad = f"!({exempt}) && {compared} != want"
    delayed = _delayed("x", width, depth)
    if design.handshake:
        inputs += ", input logic rst_n, input logic in_valid"
        ports += [".rst_n(going)", ".in_valid(in_valid)", ".in_ready(ready)", ".out_valid(valid)", ".out_ready(1'b1)"]
        delayed += "  logic running = 1'b0;\n  always_ff @(posedge clk) running <= 1'b1;\n"
        delayed += "  (* keep *) wire ready, valid, going = running && rst_n;\n  wire [0:0] sent0 = in_valid;\n"
        delayed += _delayed("sent", 1, depth, "going && ") + f"  (* keep *) wire sent = sent{depth};\n"
        bad = f"ready != going || (going || !sent) && valid != sent || going && sent && {bad}"
    instances = "".join(
        f"  {reference.top} reference{i}(.x(given[{n * i + low} +: {narrow}]), .y(want[{narrow * i} +: {narrow}]));\n"
        for i in range(lanes)
    )
    return f"""
module {design.top}_harness({inputs}, output logic bad);
  wire [{width - 1}:0] x0 = x;
{delayed}  (* keep *) wire [{width - 1}:0] y, given = x{depth};
  (* keep *) wire [{narrow * lanes - 1}:0] want;
  {design.top} dut({", ".join(ports)});
{instances}  assign bad = {bad};
endmodule
"""


def _delayed(name: str, width: int, depth: int, only: str = "") -> str:
    """Declare the registers ``name1`` to ``nameDEPTH``, each a clock later than the one before, from ``name0`` on."""
    return "".join(
        f"  logic [{width - 1}:0] {name}{i + 1};\n  always_ff @(posedge clk) {name}{i + 1} <= {only}{name}{i};\n"
        for i in range(depth)
    )


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


def _faults(design: Design, netlist: dict[str, Any], log: str) -> tuple[str, ...]:
    """Say which ports are not the design's, and what is no register at the rising edge of ``clk`` and no logic."""
    ports = {name: (port["direction"], len(port["bits"])) for name, port in netlist["ports"].items()}
    wanted = {port.name: (port.direction, port.width) for port in design.ports}
    kinds = {
        f"port {name} is {_port(ports.get(name))}, the design's is {_port(wanted.get(name))}"
        for name in ports | wanted
        if ports.get(name) != wanted.get(name)
    }
    clock = netlist["ports"].get("clk", {}).get("bits")
    for cell in netlist["cells"].values():
        if "latch" in cell["type"] or cell["type"] == "$sr":
            kinds.add("a latch, where a register at the rising edge of clk was expected")
        elif "CLK" in cell["connections"]:
            if cell["connections"]["CLK"] != clock:
                kinds.add("a register with a clock that is not clk")
            elif not int(cell["parameters"]["CLK_POLARITY"], 2):
                kinds.add("a register at the falling edge of clk")
            if cell["connections"].keys() & {"ARST", "ALOAD", "SET", "CLR"}:
                kinds.add("a register that is set or reset without the clock")
    if "multiple conflicting drivers" in log:
        kinds.add("a signal with more than one driver")
    if "found logic loop" in log:
        kinds.add("a loop of logic without a register")
    return tuple(sorted(kinds))


def _port(port: tuple[str, int] | None) -> str:
    return "none" if port is None else f"an {port[0]} of {port[1]} bits"


def _shown(log: str, names: Sequence[str]) -> list[str] | None:
    """Read the bits of signals at the last time step that Yosys shows, None where it shows one not."""
    shown = [re.findall(rf"\\{name}\s+\S+\s+\S+\s+([01x]+)\s*$", log, re.MULTILINE) for name in names]
    return [values[-1] for values in shown] if all(shown) else None


def _counterexample(log: str, lanes: int, low: int) -> Counterexample | None:
    """Read the first lane that refutes a proof, without the ``low`` bits of its result; None where Yosys shows none."""
    shown = _shown(log, _RESULTS)
    if shown is None:
        return None
    for lane in reversed(range(lanes)):
        x, y, want = (text[lane * len(text) // lanes : (lane + 1) * len(text) // lanes] for text in shown)
        y = y[: len(y) - low]
        if y != want:
            break
    return Counterexample(int(x, 2), None if "x" in y else int(y, 2), int(want, 2))


def _handshake(design: Design, log: str) -> tuple[str, ...]:
    """Say what of a handshake a counterexample shows to be wrong, nothing where it is the result alone."""
    shown = _shown(log, _HANDSHAKE)
    if shown is None:
        return ()
    going, ready, valid, sent = shown
    faults = []
    if ready != going:
        faults.append(f"in_ready is {ready} where rst_n is {going} and nothing waits")
    if valid != sent and (going, sent) != ("0", "1"):
        taken = "a number" if sent == "1" else "nothing"
        faults.append(f"out_valid is {valid} where {taken} was taken {design.latency} clocks before")
    return tuple(faults)
