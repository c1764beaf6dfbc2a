"""The datapath of ``linear`` tables: a row by a product with a constant, and a line by a product with its slope."""

from __future__ import annotations

from collections.abc import Callable

from rarefy.act import formats
from rarefy.act.table import MultiplyIndex, Table
from rarefy.rtl.datapaths.lane import Unit, Wire, below, nan_result, nan_wire, rom, width_for
from rarefy.rtl.design import literal


def linear(table: Table, nan: str) -> Unit:
    """``d = clamp(u - start, 0, length)``, row ``d * factor >> 16``, ``y = offset + ((B + S * d mod 2^16) >> f)``."""
    fmt, index = formats.get(table.format), table.index
    assert isinstance(index, MultiplyIndex)
    n, f = fmt.bits, table.fraction_bits
    odd = table.symmetry == "odd"
    dw = index.length.bit_length()
    fw = index.factor.bit_length()
    tw = width_for(index.rows) if index.rows > 1 else 0  # one row needs no address
    comments = [f"S={s} B={b}" for s, b in table.rows]
    # a table without symmetry has as many rows again for negative inputs
    negative = 0 if odd else 1 << tw
    words = {
        t if t < index.rows else negative + t - index.rows: (s << 16 | b, comment)
        for t, ((s, b), comment) in enumerate(zip(table.rows, comments, strict=True))
    }
    only = literal(32, words[0][0]) if odd and not tw else None
    rows = "" if only else rom("rows", 32, tw + (not odd), words)
    start, end = literal(n - 1, index.start), literal(n - 1, index.start + index.length)

    def lookup(x: str) -> list[Wire]:
        u = f"{x}[{n - 2}:0]"
        inside = f"{u} - {start}"
        clamp = f"{u} > {end} ? {literal(n - 1, index.length)} : {inside}"
        if index.start:
            clamp = f"{below(u, n - 1, index.start)} ? {literal(n - 1, 0)} : {clamp}"
        place = [Wire("place", dw + fw, f"d * {literal(fw, index.factor)}")] * (tw > 0)
        address = ", ".join([f"{x}[{n - 1}]"] * (not odd) + [f"place[{16 + tw - 1}:16]"] * (tw > 0))
        return [
            Wire("offset", n - 1, clamp, "u - start, clamped"),
            Wire("d", dw, f"offset[{dw - 1}:0]"),
            *place,
            Wire("row", 32, only or f"rows({{{address}}})", "S, B"),
            Wire("below", 1, below(u, n - 1, table.identity_below)),
            *nan_wire(fmt, nan, x),
        ]

    def finish(q: Callable[[str], str]) -> list[Wire]:
        x, row = q("x"), q("row")
        low = f"{{{literal(n - 1 - (16 - f), 0)}, sum[15:{f}]}}" if n - 1 > 16 - f else f"sum[{f + n - 2}:{f}]"
        choice = f"{q('below')} ? {x}[{n - 2}:0] : {literal(n - 1, table.offset)} + {low}"
        sign = f"{x}[{n - 1}]" if odd else literal(1, 0)
        if nan != "none":
            choice = f"{q('nan')} ? {nan_result(fmt, nan, x)} : {choice}"
            sign = sign if odd else f"{q('nan')} ? {x}[{n - 1}] : {sign}"
        return [
            Wire("product", 16, f"{row}[31:16] * {q('d')}", "S * d"),
            Wire("sum", 16, f"{row}[15:0] + product"),
            Wire("magnitude", n - 1, choice),
            Wire("sign", 1, sign),
            Wire("result", n, "{sign, magnitude}"),
        ]

    carried = {"x": n, "d": dw, "row": 32, "below": 1} | ({} if nan == "none" else {"nan": 1})
    return Unit(rows, lookup, carried, finish)
