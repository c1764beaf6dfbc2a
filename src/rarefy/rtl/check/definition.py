"""A table's definition as SystemVerilog, row by row: slow and large, made to be compared with and for nothing else."""

from __future__ import annotations

from rarefy.act.spec.table import SegmentsTable, ShiftTable, Table
from rarefy.rtl.design import literal


def definition(top: str, table: Table, nan: str) -> str:
    """Write the formulas of :mod:`rarefy.act.spec.table` down as a module, without any of ``emit``'s ways.

    Forms ``shift``, ``carry`` and ``segments``; raises ValueError for ``linear``.
    """
    fmt = table.fmt
    n, m = fmt.bits, fmt.mantissa_bits
    if not isinstance(table, ShiftTable | SegmentsTable):
        raise ValueError(f"{table.name}: form linear has 16 bits, where the truth table is the definition")
    odd = table.symmetry == "odd"
    u = f"{{1'b0, x[{n - 2}:0]}}" if odd else "x"
    lines = [f"  wire [{n - 1}:0] u = {u};", f"  logic [{n - 1}:0] v;"]
    if isinstance(table, ShiftTable):
        index = table.index
        lines += [
            f"  wire [{m - 1}:0] mantissa = x[{m - 1}:0];",
            "  always_comb begin",
            f"    case (x[{m + index.exponent_bits - 1}:{m - index.mantissa_bits}])",
        ]
        for t, (e, r, b) in enumerate(table.rows):
            # y = (E, (M >> r) + b)
            sign = "-" if b < 0 else "+"
            value = f"{literal(n, e << m)} + {{{literal(n - m, 0)}, mantissa >> {r}}} {sign} {literal(n, abs(b))}"
            lines.append(f"      {index.exponent_bits + index.mantissa_bits}'d{t}: v = {value};")
        lines += [
            "    endcase",
            f"    if (u < {literal(n, table.identity_below)}) v = u;",
            f"    if (u > {literal(n, table.saturate_above)}) v = {literal(n, fmt.one)};",
        ]
    else:
        f = table.fraction_bits
        # enough for B + S * d and its sign
        widest = max(max(abs(base), abs(slope) << n) for _, slope, base in table.rows)
        w = widest.bit_length() + 2
        lines += [f"  wire signed [{w - 1}:0] wide = {{{literal(w - n, 0)}, u}};", f"  logic signed [{w - 1}:0] sum;"]
        lines += ["  always_comb begin"]
        for number, (first, slope, base) in enumerate(reversed(table.rows)):
            test = f"if (u >= {literal(n, first)}) " if number < len(table.rows) - 1 else ""
            # y = (B + S * (u - first)) >> f
            value = f"{_signed(w, base)} + {_signed(w, slope)} * (wide - {_signed(w, first)})"
            lines.append(f"    {'else ' if number else ''}{test}sum = {value};")
        lines += [f"    v = sum[{f + n - 1}:{f}];"]
    if odd:
        lines.append(f"    v[{n - 1}] = x[{n - 1}];")
    if nan != "none":
        lines.append(f"    if (x[{n - 2}:0] > {literal(n - 1, fmt.last)}) v = x;")
    if nan == "quiet" and fmt.infinities:
        lines.append(f"    if (x[{n - 2}:0] > {literal(n - 1, fmt.last)}) v[{m - 1}] = 1'b1;")
    body = "\n".join([*lines, "  end", "  assign y = v;"])
    return f"module {top} (input logic [{n - 1}:0] x, output logic [{n - 1}:0] y);\n{body}\nendmodule\n"


def _signed(width: int, value: int) -> str:
    return f"{'-' if value < 0 else ''}{width}'sd{abs(value)}"
