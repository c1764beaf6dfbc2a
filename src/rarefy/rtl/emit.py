"""``emit``: SystemVerilog of a table, in one of three styles, with the registers, lanes and handshake asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rarefy import _checks
from rarefy.act.spec import error, oracle
from rarefy.act.spec.formats import Format
from rarefy.act.spec.table import LinearTable, SegmentsTable, ShiftTable, Table
from rarefy.rtl.datapaths.flat import flat
from rarefy.rtl.datapaths.ktanh import programmable, shift_add
from rarefy.rtl.datapaths.lane import NAN, Lane, Wire
from rarefy.rtl.datapaths.linear import linear
from rarefy.rtl.datapaths.segments import segments
from rarefy.rtl.design import About, Compute, Design, Port, literal
from rarefy.rtl.identifiers import comment, module_name

_LINE = 100
_DEFAULTS = {"style": "shift_add", "stages": 0, "handshake": False, "lanes": 1, "nan": "keep", "top": None}
#: How a unit may be built: the table's own arithmetic, one truth table, rows that are written at run time.
STYLES = ("shift_add", "flat", "programmable")


def emit(
    table: Table,
    style: str = "shift_add",
    *,
    stages: int = 0,
    handshake: bool = False,
    lanes: int = 1,
    nan: str = "keep",
    top: str | None = None,
    command: str = "",
) -> Design:
    """Write the SystemVerilog of a table, with the software model that it equals on every input.

    Args:
        table: any table; its format is that of ``x`` and ``y``.
        style: "shift_add" (the table's own arithmetic), "flat" (the function as one truth table, for formats of at
            most 16 bits) or "programmable" (``shift`` and ``carry`` tables: rows and thresholds in registers that are
            written through a port, so that any table of the same index and format can be loaded).
        stages: 0 is combinational; 1 registers the result; 2 also registers between look-up and arithmetic.
        handshake: valid and ready on both sides, with back pressure; needs stages 1 or 2.
        lanes: numbers in ``x`` and ``y``; all lanes share one table.
        nan: what a NaN gives: "keep" (itself, as ``Table.compute`` has it), "quiet" (itself with the quiet bit set) or
            "none" (no logic for NaN: it passes through the arithmetic like any other pattern, which for ``shift`` and
            ``carry`` gives 1 with its sign).
        top: name of the module; default the table's name, and the style where it is not "shift_add".
        command: what the header says that made it; default the call of this function.

    Raises TypeError for what is no table, and ValueError for options that there are not or that do not go together,
    before anything is made.

    """
    if not isinstance(table, Table):
        raise TypeError(f"emit takes a table, got {type(table).__name__}: rarefy.act.load gives one by its name")
    stages = _checks.whole("stages", stages, 0, 2)
    lanes = _checks.whole("lanes", lanes, 1, 1024)
    name = _check(table, style, stages, handshake, nan, top, command)
    fmt = table.fmt
    compute = _model(table, nan)
    if style == "flat":
        lane = flat(fmt, compute(fmt.all_bits()))
    elif style == "programmable" and isinstance(table, ShiftTable):
        lane = programmable(table, nan)
    else:
        lane = _datapath(table, nan)
    ports = _ports(fmt, lane, stages, handshake, lanes)
    searchable = table.function in oracle.FUNCTIONS and (fmt.bits <= 16 or table.function != "exp")
    largest = error.largest(table) if searchable else None
    given = {"style": style, "stages": stages, "handshake": handshake, "lanes": lanes, "nan": nan, "top": top}
    options = "".join(f", {key}={value!r}" for key, value in given.items() if value != _DEFAULTS[key])
    command = command or f"rarefy.rtl.emit(table{options})"
    about = About(table.name, table.function, largest, command, {"style": style})
    body = _module(name, lane, fmt, ports, stages, handshake, lanes)
    if name in re.findall(r"[A-Za-z_]\w*", re.sub("//.*", "", body.partition("(")[2])):
        raise ValueError(f"top must not be the name of a port or signal of the module, got {name!r}: choose another")
    text = _header(table, about, fmt, stages) + body
    clock = "clk" if stages or lane.write else None
    return Design(name, text, fmt, stages, ports, compute, about, lanes, handshake, clock, table, nan, lane.setup)


def _check(table: Table, style: str, stages: int, handshake: bool, nan: str, top: str | None, command: str) -> str:
    """Raise ValueError where the arguments of :func:`emit` do not go together; give the module's name."""
    fmt = table.fmt
    _checks.one_of("style", style, STYLES)
    _checks.one_of("nan", nan, NAN)
    _checks.flag("handshake", handshake)
    if handshake and not stages:
        raise ValueError("a handshake needs registers to hold what waits: stages must be 1 or 2, got 0")
    if not isinstance(table.name, str):
        raise ValueError(f"the table's name must be a string, got {table.name!r}")
    if not isinstance(command, str):
        raise ValueError(f"command must be a string, got {command!r}")
    if top is None:
        ending = {"shift_add": "", "flat": "_flat", "programmable": "_prog"}[style]
        name = module_name(table.name + ending, "top, by default the table's name,")
    else:
        name = module_name(top, "top")
    if style == "flat" and fmt.bits > 16:
        raise ValueError(f"style flat lists every input, and {fmt.name} has 2^{fmt.bits}: use shift_add")
    if style == "programmable" and not isinstance(table, ShiftTable):
        raise ValueError(f"style programmable is for tables of the form shift or carry, {table.name} is {table.form}")
    return name


def _datapath(table: Table, nan: str) -> Lane:
    """Make the arithmetic of the form of a table."""
    if isinstance(table, ShiftTable):
        return shift_add(table, nan)
    if isinstance(table, LinearTable):
        return linear(table, nan)
    if isinstance(table, SegmentsTable):
        return segments(table, nan)
    raise TypeError(f"there is no datapath for a {type(table).__name__}")


def _model(table: Table, nan: str) -> Compute:
    """Make the function of bit patterns that the hardware equals."""
    fmt = table.fmt

    def compute(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if nan == "none":
            return table.arithmetic(bits)
        y = table.compute(bits)
        if nan == "quiet" and fmt.infinities:
            y = np.where(fmt.is_nan(bits), y | fmt.dtype(1 << (fmt.mantissa_bits - 1)), y).astype(fmt.dtype)
        return y

    return compute


def _ports(fmt: Format, lane: Lane, stages: int, handshake: bool, lanes: int) -> tuple[Port, ...]:
    """List the ports in the order of :class:`Design`."""
    ports = [Port("clk", "input", 1)] if stages or lane.write else []
    if handshake:
        ports.append(Port("rst_n", "input", 1))
    if lane.write:
        ports += [Port("we", "input", 1), Port("wa", "input", lane.write[0]), Port("wd", "input", lane.write[1])]
    if handshake:
        ports += [Port("in_valid", "input", 1), Port("in_ready", "output", 1)]
    ports.append(Port("x", "input", fmt.bits * lanes))
    if handshake:
        ports += [Port("out_valid", "output", 1), Port("out_ready", "input", 1)]
    return (*ports, Port("y", "output", fmt.bits * lanes))


def _header(table: Table, about: About, fmt: Format, stages: int) -> str:
    """Say in comments what the module is and what made it."""
    known = "not known" if about.max_abs is None else f"{about.max_abs:.6g} over all inputs"
    lines = [
        f"table {table.name}: {table.function} in {fmt.name}, {len(table.rows)} rows of the form {table.form}",
        f"maximum absolute error: {known}",
        f"latency: {f'{stages} clock cycles' if stages > 1 else '1 clock cycle' if stages else '0 (combinational)'}",
        f"made by: {about.command}",
    ]
    return "".join(f"// {comment(line)}\n" for line in lines)


def _module(
    top: str, lane: Lane, fmt: Format, ports: tuple[Port, ...], stages: int, handshake: bool, lanes: int
) -> str:
    """Write the module: ports, functions, handshake, and the lanes, each on its numbers of ``x`` and ``y``."""
    listed = ",\n".join(f"  {p.direction:6} logic {_range(p.width)}{p.name}" for p in ports)
    body = f"module {top} (\n{listed}\n);\n{lane.functions}\n"
    if handshake:
        body += _handshake(stages)
    n = fmt.bits
    output = "y_q" if stages else "result"
    if lanes == 1:
        lines = [*_lane(lane, fmt, stages, handshake, "x"), f"assign y = {output};"]
        body += "".join(f"  {line}\n" for line in lines)
    else:
        lines = [f"wire [{n - 1}:0] a = x[{n}*i +: {n}];", *_lane(lane, fmt, stages, handshake, "a")]
        lines.append(f"assign y[{n}*i +: {n}] = {output};")
        inside = "".join(f"    {line}\n" for line in lines)
        body += f"  for (genvar i = 0; i < {lanes}; i++) begin : lane\n{inside}  end\n"
    return body + "endmodule\n"


def module(top: str, lane: Lane, fmt: Format) -> str:
    """Write a combinational module of one lane."""
    return _module(top, lane, fmt, _ports(fmt, lane, 0, False, 1), 0, False, 1)


def _range(width: int) -> str:
    return f"[{width - 1}:0] " if width > 1 else ""


def _handshake(stages: int) -> str:
    """Write the pipeline: a stage holds its number until the next one takes it; a full one moves on in one clock."""
    declared = [f"logic valid_{stage};" for stage in range(1, stages + 1)]
    logic = []
    for stage in range(stages, 0, -1):  # the last first: a wire must be declared before it is read
        following = "out_ready" if stage == stages else f"go_{stage + 1}"
        before = "in_valid" if stage == 1 else f"valid_{stage - 1}"
        logic += [
            f"wire go_{stage} = !valid_{stage} || {following};",
            "always_ff @(posedge clk)",
            f"  if (!rst_n) valid_{stage} <= 1'b0;",
            f"  else if (go_{stage}) valid_{stage} <= {before};",
        ]
    outputs = ["assign in_ready = rst_n && go_1;", f"assign out_valid = valid_{stages};"]
    return "".join(f"  {line}\n" for line in [*declared, *logic, *outputs]) + "\n"


def _lane(lane: Lane, fmt: Format, stages: int, handshake: bool, x: str) -> list[str]:
    """Write what stands in one lane, whose input is called ``x``, up to ``result``, or its register ``y_q``."""
    scalars = [w.name for w in (*lane.lookup, *lane.finish) if w.width == 1]
    lookup = _renamed(_without_bits_of_scalars(lane.lookup, scalars), {"x": x})
    finish = _without_bits_of_scalars(lane.finish, scalars)
    widths = {"x": fmt.bits} | {w.name: w.width for w in lookup}
    signals = {x: fmt.bits} | {w.name: w.width for w in lookup}
    read = [w.expression for w in lookup]
    called = {"x": x}  # what the second step reads under another name
    lines = [_wire(w) for w in lookup]
    if stages == 2:
        wanted = [w.expression for w in finish]
        carried = [name for name in lane.carried if name in widths and _read(name, widths[name], wanted)]
        sources = [called.get(name, name) for name in carried]
        called = {name: f"{name}_1" for name in carried}
        signals |= {called[name]: widths[name] for name in carried}
        read += sources
        lines += [f"logic {_range(widths[name])}{called[name]};" for name in carried]
        moves = " ".join(f"{called[name]} <= {source};" for name, source in zip(carried, sources, strict=True))
        if moves:
            lines.append(f"always_ff @(posedge clk) {'if (go_1) ' if handshake else ''}begin {moves} end")
    finish = _renamed(finish, called)
    signals |= {w.name: w.width for w in finish}
    read += [w.expression for w in finish] + ["result"]
    lines += [_wire(w) for w in finish]
    unused = [part for name, width in signals.items() for part in _unread(name, width, read)]
    if unused:  # which linters know by its name
        lines.append(f"wire unused = &{{{', '.join([*unused, literal(1, 0)])}}};")
    if stages:
        go = f"if (go_{stages}) " if handshake else ""
        lines += [f"logic {_range(fmt.bits)}y_q;", f"always_ff @(posedge clk) {go}y_q <= result;"]
    return lines


def _renamed(wires: Sequence[Wire], names: Mapping[str, str]) -> list[Wire]:
    """Give the wires with what they read under other names."""
    renamed = []
    for wire in wires:
        expression = wire.expression
        for name, other in names.items():
            expression = re.sub(rf"\b{name}\b", other, expression)
        renamed.append(replace(wire, expression=expression))
    return renamed


def _without_bits_of_scalars(wires: Sequence[Wire], scalars: Sequence[str]) -> list[Wire]:
    """Write ``name`` for ``name[0:0]`` in the wires where that is one bit: SystemVerilog has no part of a scalar."""
    names = "|".join([*scalars, *(w.name for w in wires if w.width == 1)]) or "-"
    return [replace(w, expression=re.sub(rf"\b({names})\[0(?::0)?\]", r"\1", w.expression)) for w in wires]


def _read(name: str, width: int, expressions: Sequence[str]) -> int:
    """Give a mask of the bits of a signal that expressions read."""
    bits = 0
    for high, low in re.findall(rf"\b{name}\b(?:\[(\d+)(?::(\d+))?\])?", "\n".join(expressions)):
        first, last = (int(low or high), int(high)) if high else (0, width - 1)
        bits |= (2 << last) - (1 << first)
    return bits


def _unread(name: str, width: int, expressions: Sequence[str]) -> list[str]:
    """List the parts of a signal that no expression reads, highest first."""
    read, parts, last = _read(name, width, expressions), [], width - 1
    if not read:
        return [name]
    while last >= 0:
        first = last
        if not read >> last & 1:
            while first and not read >> (first - 1) & 1:
                first -= 1
            parts.append(f"{name}[{last}:{first}]" if last > first else f"{name}[{last}]")
        last = first - 1
    return parts


def _wire(w: Wire) -> str:
    """Declare a wire."""
    text = f"wire {'signed ' if w.signed else ''}{_range(w.width)}{w.name} = {w.expression};"
    if len(text) > _LINE:  # one option of a choice a line
        text = text.replace(" : ", "\n        : ")
    return text + (f"  // {w.comment}" if w.comment else "")
