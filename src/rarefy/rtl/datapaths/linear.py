"""The datapath of ``linear`` tables: a row by a product with a constant, and a line by a product with its slope."""

from __future__ import annotations

from rarefy.act.spec.table import LinearTable
from rarefy.rtl.datapaths.lane import Lane, Wire, Word, below, nan_result, nan_wire, rom, width_for
from rarefy.rtl.design import literal


def linear(table: LinearTable, nan: str) -> Lane:
    """Make the lane of a ``linear`` table.

    ``d = clamp(u - start, 0, length)``, row ``d * factor >> 16``, ``y = offset + ((B + S * d mod 2^16) >> f)``.
    """
    fmt, index = table.fmt, table.index
    n, f = fmt.bits, table.fraction_bits
    odd = table.symmetry == "odd"
    dw = index.length.bit_length()
    fw = index.factor.bit_length()
    tw = width_for(index.rows) if index.rows > 1 else 0  # one row needs no address
    # a table without symmetry has as many rows again for negative inputs
    negative = 0 if odd else 1 << tw
    words = {
        t if t < index.rows else negative + t - index.rows: Word(s << 16 | b, f"S={s} B={b}")
        for t, (s, b) in enumerate(table.rows)
    }
    only = literal(32, words[0].value) if odd and not tw else None
    rows = "" if only else rom("rows", 32, tw + (not odd), words)

    u = f"x[{n - 2}:0]"
    start, end = literal(n - 1, index.start), literal(n - 1, index.start + index.length)
    clamp = f"{u} > {end} ? {literal(n - 1, index.length)} : {u} - {start}"
    if index.start:
        clamp = f"{below(u, n - 1, index.start)} ? {literal(n - 1, 0)} : {clamp}"
    place = [Wire("place", dw + fw, f"d * {literal(fw, index.factor)}")] * (tw > 0)
    address = ", ".join([f"x[{n - 1}]"] * (not odd) + [f"place[{16 + tw - 1}:16]"] * (tw > 0))
    lookup = [
        Wire("offset", n - 1, clamp, "u - start, clamped"),
        Wire("d", dw, f"offset[{dw - 1}:0]"),
        *place,
        Wire("row", 32, only or f"rows({{{address}}})", "S, B"),
        Wire("below", 1, below(u, n - 1, table.identity_below)),
        *nan_wire(fmt, nan),
    ]

    low = f"{{{literal(n - 1 - (16 - f), 0)}, sum[15:{f}]}}" if n - 1 > 16 - f else f"sum[{f + n - 2}:{f}]"
    choice = f"below ? {u} : {literal(n - 1, table.offset)} + {low}"
    sign = f"x[{n - 1}]" if odd else literal(1, 0)
    if nan != "none":
        choice = f"nan ? {nan_result(fmt, nan)} : {choice}"
        sign = sign if odd else f"nan ? x[{n - 1}] : {sign}"
    finish = [
        Wire("product", 16, "row[31:16] * d", "S * d"),
        Wire("sum", 16, "row[15:0] + product"),
        Wire("magnitude", n - 1, choice),
        Wire("sign", 1, sign),
        Wire("result", n, "{sign, magnitude}"),
    ]
    return Lane(rows, lookup, finish, ("x", "d", "row", "below", "nan"))
