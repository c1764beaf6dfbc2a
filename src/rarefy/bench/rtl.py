"""Other ways to build a tanh unit in bfloat16, for a comparison in one flow: same ports, same NaN policy, same scripts.

Every function gives a :class:`Design` whose ``compute`` equals its SystemVerilog on all 2^16 inputs. Except for the
fixed-point one they share a frame: below a threshold the output is the input, from another one on it is 1, between them
the body decides, and the sign is the input's. A NaN passes with its quiet bit set. A constant is the bfloat16 number
nearest to the middle of the true values of its row, which is the best that a constant can do.

Sources: HardTanh and PLAN (Amin, Curtis and Hayes-Gill, "Piecewise linear approximation applied to nonlinear function
of a neural network", 1997) as used by everyone; range-addressable tables (RALUT) after Leboeuf et al., "High speed VLSI
implementation of the hyperbolic tangent sigmoid function", 2008; the table of 1,024 rows after the default of hls4ml's
tanh (``nnet_activation.h``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from rarefy.act.spec import oracle
from rarefy.act.spec.formats import BF16, Bits, Format, Values, patterns
from rarefy.rtl.design import About, Compute, Design, Port

_ONE, _QUARTER, _HALF, _FOUR, _SATURATED = 0x3F80, 0x3E80, 0x3F00, 0x4080, 0x4071
_INFINITY = 0x7F80
_PORTS = (Port("x", "input", 16), Port("y", "output", 16))
#: 2^-2 to 4: the exponents that a table of constants or lines is indexed by, in the order of their two low bits.
_BINADES = (128, 125, 126, 127)

#: The values and the true tanh of every magnitude up to infinity.
_MAGNITUDES = np.arange(_INFINITY + 1, dtype=np.int64)
_VALUES = BF16.decode(_MAGNITUDES)
_TANH = oracle.tanh(_VALUES)


def _nearest(values: npt.ArrayLike) -> list[int]:
    return [int(bits) for bits in np.atleast_1d(BF16.encode(values))]


def _rom(name: str, width: int, index: int, rows: Sequence[int]) -> str:
    """Write a constant table as a function of ``index`` bits."""
    cases = "".join(f"      {index}'d{i}: {name} = {width}'d{row};\n" for i, row in enumerate(rows))
    return (
        f"  function automatic [{width - 1}:0] {name}(input [{index - 1}:0] t);\n    case (t)\n{cases}"
        f"      default: {name} = {width}'d0;\n    endcase\n  endfunction\n"
    )


def _framed(
    top: str, about: str, body: str, middle: str, first: int, end: int, model: Callable[[Bits], Bits]
) -> Design:
    """Put ``model``, and ``body`` with the expression ``middle``, from ``first`` up to ``end`` into the frame."""
    text = (
        f"// {about}\nmodule {top} (\n    input  wire [15:0] x,\n    output wire [15:0] y\n);\n"
        f"  wire [14:0] mag = x[14:0];\n{body}"
        f"  wire lin = mag < 15'd{first};\n  wire sat = mag >= 15'd{end};\n  wire nan = mag > 15'd{_INFINITY};\n"
        f"  assign y[15] = x[15];\n"
        f"  assign y[14:0] = nan ? (mag | 15'h40) : lin ? mag : sat ? 15'd{_ONE} : {middle};\nendmodule\n"
    )

    def compute(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        x = patterns(BF16, bits)
        u = x & 0x7FFF
        y = np.where(u < first, u, np.where(u >= end, _ONE, model(np.clip(u, first, end - 1))))
        y = np.where(u > _INFINITY, u | 0x40, y)
        return ((x & 0x8000) | y).astype(np.uint16)

    return _design(top, text, BF16, compute, about)


def _design(top: str, text: str, fmt: Format, compute: Compute, about: str) -> Design:
    bits = fmt.all_bits()
    x = fmt.decode(bits[~fmt.is_nan(bits)])
    y = fmt.decode(compute(bits[~fmt.is_nan(bits)]))
    described = About(about, "tanh", max_abs=float(np.abs(y - oracle.tanh(x)).max()))
    return Design(top=top, text=text, format=fmt, latency=0, ports=_PORTS, compute=compute, about=described)


def hard_tanh() -> Design:
    """Make HardTanh: min(max(x, -1), 1)."""
    return _framed("hardtanh", "HardTanh: min(max(x, -1), 1)", "", "mag", _ONE, _ONE, lambda u: u)


def plan() -> Design:
    """Make PLAN, the piecewise linear sigmoid, as tanh(x) = 2 sigmoid(2x) - 1 folded into bfloat16.

    Its segments x, 1/2 + x/4 ..., are four rows of K-TanH's form at exponent 126.
    """
    body = (
        "  wire [6:0] m = x[6:0];\n"
        "  wire [6:0] p = x[14:7] == 8'd126 ? m >> 1 : x[14:7] == 8'd127 ? (m < 7'd24 ? 7'd64 + m : 7'd80 + (m >> 2))"
        " : 7'd112 + (m >> 1);\n"
    )

    def model(u: Bits) -> Bits:
        e, m = u >> 7, u & 127
        p = np.where(e == 126, m >> 1, np.where(e == 127, np.where(m < 24, 64 + m, 80 + (m >> 2)), 112 + (m >> 1)))
        return (126 << 7) | (p & 127)

    return _framed("plan", "PLAN, folded into bfloat16", body, "{8'd126, p}", _HALF, 0x4020, model)


def constants(rows: int) -> Design:
    """Make ``rows`` constants (8 to 512, a power of two) from 1/4 to 3.75, by two exponent and top mantissa bits."""
    k = _mantissa_bits(rows)
    table = [(_TANH[u[0]] + _TANH[u[-1]]) / 2 for u in _bins(k)]
    about = f"{rows} constants by the bits of the number"
    values: Bits = np.array(_nearest(table))
    return _framed(
        f"constants{rows}",
        about,
        _rom("rom", 15, 2 + k, values.tolist()),
        f"rom(x[8:{7 - k}])",
        _QUARTER,
        _SATURATED - 1,
        lambda u: values[(u >> (7 - k)) & (rows - 1)],
    )


def _mantissa_bits(rows: int) -> int:
    if rows not in (8, 16, 32, 64, 128, 256, 512):
        raise ValueError(f"rows must be 8, 16, 32, ... 512, got {rows}")
    return int(math.log2(rows)) - 2


def _bins(k: int) -> list[Bits]:
    """List the magnitudes of each row of an index of two exponent and k mantissa bits, by row."""
    return [(e << 7) + (i << (7 - k)) + np.arange(1 << (7 - k)) for e in _BINADES for i in range(1 << k)]


def exact() -> Design:
    """Make the correctly rounded tanh as one table, between where it is the identity and where it is 1."""
    right, _ = oracle.rounded("tanh", BF16, _MAGNITUDES)
    first, end = int(np.argmax(right != _MAGNITUDES)), int(np.argmax(right == _ONE))
    cases = "".join(f"    15'd{u}: r = 15'd{right[u]};\n" for u in range(first, end))
    body = f"  reg [14:0] r;\n  always @* case (mag)\n{cases}    default: r = 15'bx;\n  endcase\n"
    return _framed("exact", f"correctly rounded, {end - first} rows", body, "r", first, end, lambda u: right[u])


def ralut(error: float = 0.00892) -> Design:
    """Make a range-addressable table: the longest ranges, one by one, whose best constant is within ``error``."""
    if not 0.002 <= error <= 0.25:
        raise ValueError(f"error must be from 0.002 to 0.25 (a half unit of bfloat16 is 0.00195), got {error}")
    starts, values, u = [], [], _QUARTER
    while _TANH[u] < 1 - error:
        starts.append(u)
        while (_TANH[u + 1] - _TANH[starts[-1]]) / 2 <= error:
            u += 1
        values += _nearest((_TANH[starts[-1]] + _TANH[u]) / 2)
        u += 1
    steps = "".join(
        f"    if (mag >= 15'd{start}) r = 15'd{value};\n" for start, value in zip(starts[1:], values[1:], strict=True)
    )
    body = f"  reg [14:0] r;\n  always @* begin\n    r = 15'd{values[0]};\n{steps}  end\n"
    first, constant = np.array(starts), np.array(values)
    return _framed(
        f"ralut{len(starts)}",
        f"range-addressable table, {len(starts)} ranges, error {error:g}",
        body,
        "r",
        _QUARTER,
        u,
        lambda x: constant[np.searchsorted(first, x, side="right") - 1],
    )


def uniform(rows: int) -> Design:
    """Make ``rows`` (16 to 512, a power of two) equal steps of |x| < 4: to fixed point by a shifter, then a table."""
    b = _mantissa_bits(rows) + 2
    values: Bits = np.array([0, *_nearest(np.tanh((np.arange(1, rows) + 0.5) * 4 / rows))])  # no input reads row 0
    body = _rom("rom", 15, b, values.tolist()) + (
        f"  wire [{b + 8}:0] sig = {{{b + 2}'d1, x[6:0]}} << {b};\n"
        "  wire [7:0] sh = 8'd128 - x[14:7];\n"
        f"  wire [{b + 8}:0] fixed = sh > 8'd{b} ? {b + 9}'d0 : (sig >> 8) >> sh[3:0];\n"
    )

    def model(u: Bits) -> Bits:
        fixed = (((128 + (u & 127)) << b) >> 8) >> np.clip(128 - (u >> 7), 0, b)
        row: Bits = values[np.minimum(fixed, rows - 1)]
        return row

    return _framed(
        f"uniform{rows}", f"{rows} equal steps of |x| < 4", body, f"rom(fixed[{b - 1}:0])", (129 - b) << 7, _FOUR, model
    )


def lines(segments: int, slope_bits: int = 6) -> Design:
    """Make ``segments`` (16, 32 ...) straight lines with a multiplier, by two exponent bits and the rest mantissa bits.

    The best slope of ``slope_bits`` bits and base of each segment, over all slopes; ten fraction bits, then normalised.
    """
    k, extra = _mantissa_bits(segments), slope_bits - 4
    low = 7 - k
    steps = np.arange(1 << low)
    slopes, bases = (np.array(column) for column in zip(*(_line(u, steps, slope_bits) for u in _bins(k)), strict=True))
    rows = [(int(a) << 10) | int(b) for a, b in zip(slopes, bases, strict=True)]
    body = _rom("rom", slope_bits + 10, 2 + k, rows) + (
        f"  wire [{slope_bits + 9}:0] th = rom(x[8:{low}]);\n"
        f"  wire [{slope_bits + low - 1}:0] p = th[{slope_bits + 9}:10] * x[{low - 1}:0];\n"
        f"  wire [10:0] s = (p >> {extra}) + th[9:0];\n"
        "  wire [9:0] v = s[10] ? 10'd1023 : s[9:0];\n"
        "  wire [14:0] r = v[9] ? {8'd126, v[8:2]} : v[8] ? {8'd125, v[7:1]} : {8'd124, v[6:0]};\n"
    )

    def model(u: Bits) -> Bits:
        t = (u >> low) & (segments - 1)
        v = np.minimum(((slopes[t] * (u & ((1 << low) - 1))) >> extra) + bases[t], 1023)
        r: Bits = np.where(v >= 256, (125 << 7) | ((v >> 1) & 127), (124 << 7) | (v & 127))
        r = np.where(v >= 512, (126 << 7) | ((v >> 2) & 127), r)
        return r

    about = f"{segments} lines, {slope_bits}-bit multiplier"
    return _framed(f"lines{segments}", about, body, "r", _QUARTER, _SATURATED - 1, model)


def _line(u: Bits, steps: Bits, slope_bits: int) -> tuple[int, int]:
    """Find the (slope, base) of least maximum error over the magnitudes u, the first of equals."""
    wanted: Values = _TANH[u] * 1024
    best = (math.inf, 0, 0)
    for slope in range(1 << slope_bits):
        line = (slope * steps) >> (slope_bits - 4)
        rest = wanted - line
        base = round(float(rest.max() + rest.min()) / 2)
        best = min(best, (float(np.abs(rest - base).max()), slope, base))
    return best[1], best[2]


class _Fixed(Format):
    """Two's complement with 10 fraction bits in 16 (ap_fixed<16,6>), where a format of bit patterns is asked for."""

    def is_nan(self, bits: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        return np.zeros(np.shape(bits), dtype=bool)

    def decode(self, bits: npt.ArrayLike) -> Values:
        b = np.asarray(bits, dtype=np.int64)
        return np.where(b >= self.sign, b - (self.sign << 1), b) / 1024.0

    def encode(self, values: npt.ArrayLike, residual: npt.ArrayLike = 0.0) -> Bits:
        scaled = np.rint(np.asarray(values, dtype=np.float64) * 1024.0)
        return np.clip(scaled, -self.sign, self.sign - 1).astype(np.int64) & (2 * self.sign - 1)


#: ap_fixed<16,6> of hls4ml's default.
FIXED = _Fixed("fixed16_6", 5, 10, 0)


def fixed_point(rows: int = 1024) -> Design:
    """Make hls4ml's default scheme: ``rows`` numbers of 16 bits over [-4, 4), input and output in fixed point.

    This is RTL of that scheme, not the output of its high-level synthesis, and there is no conversion from bfloat16.
    """
    b = int(math.log2(rows))
    if 1 << b != rows or not 16 <= rows <= 4096:
        raise ValueError(f"rows must be a power of two from 16 to 4096, got {rows}")
    values: Bits = np.floor(np.tanh(-4 + 8 * np.arange(rows) / rows) * 1024).astype(np.int64)
    shift = 13 - b  # of 10 fraction bits, over 8
    text = (
        f"// {rows} rows over [-4, 4), fixed point, as hls4ml does\nmodule fixed{rows} (\n"
        "    input  wire [15:0] x,\n    output wire [15:0] y\n);\n"
        + _rom("rom", 16, b, (values & 0xFFFF).tolist())
        + f"  wire signed [15:0] xs = x;\n  wire signed [16:0] i = (xs >>> {shift}) + 17'sd{rows // 2};\n"
        f"  wire [{b - 1}:0] t = i < 0 ? {b}'d0 : i > 17'sd{rows - 1} ? {b}'d{rows - 1} : i[{b - 1}:0];\n"
        "  assign y = rom(t);\nendmodule\n"
    )

    def compute(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        x = patterns(FIXED, bits)
        signed = np.where(x >= 32768, x - 65536, x)
        row: Bits = values[np.clip((signed >> shift) + rows // 2, 0, rows - 1)]
        return (row & 0xFFFF).astype(np.uint16)

    about = f"{rows} rows over [-4, 4), fixed point, as hls4ml does"
    return _design(f"fixed{rows}", text, FIXED, compute, about)


#: Every peer by its name.
PEERS: dict[str, Callable[[], Design]] = {
    "HardTanh": hard_tanh,
    "PLAN": plan,
    **{f"constants, {rows}": partial(constants, rows) for rows in (32, 64, 128, 256)},
    "RALUT": ralut,
    **{f"uniform, {rows}": partial(uniform, rows) for rows in (128, 512)},
    **{f"lines, {segments}": partial(lines, segments) for segments in (16, 32)},
    "fixed point, 1024": fixed_point,
    "exact": exact,
}
