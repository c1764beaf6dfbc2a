"""The datapath of one lane, from a table: what is looked up for ``x`` and how the result follows from it.

A :class:`Unit` has two steps, so that a register may stand between them: the look-up of constants and comparisons, and
the shift, the addition and the choice. :mod:`rarefy.rtl.emit` puts ports, registers and lanes around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rarefy.act import formats
from rarefy.act.formats import Format
from rarefy.act.table import BitIndex, Table
from rarefy.rtl.design import literal

NAN = ("keep", "quiet", "none")


@dataclass(frozen=True)
class Wire:
    """A named value of a lane, and the expression that it has."""

    name: str
    width: int
    expression: str
    comment: str = ""
    signed: bool = False


@dataclass(frozen=True)
class Unit:
    """One lane as text.

    Attributes:
        functions: functions of SystemVerilog that the expressions call; shared by all lanes.
        lookup: given what ``x`` is called, the wires of the first step.
        carried: the names of those, and ``x``, that the second step reads, with their widths.
        finish: given what a carried name is called, the wires of the second step; the last one is the result.

    """

    functions: str
    lookup: Callable[[str], list[Wire]]
    carried: dict[str, int]
    finish: Callable[[Callable[[str], str]], list[Wire]]


def width_for(count: int) -> int:
    """Bits of an index into ``count`` things, at least one."""
    return max(1, (count - 1).bit_length())


def choose(selector: str, width: int, options: Sequence[str]) -> str:
    """A multiplexer: ``options[selector]``."""
    *first, last = options
    return "".join(f"{selector} == {literal(width, i)} ? {text} : " for i, text in enumerate(first)) + last


def rom(name: str, width: int, address_width: int, words: dict[int, tuple[int, str]]) -> str:
    """A function that gives the word of an address; addresses that are never read are left open."""
    lines = [
        f"  function automatic logic [{width - 1}:0] {name}(input logic [{address_width - 1}:0] t);",
        "    case (t)",
    ]
    for address, (word, comment) in sorted(words.items()):
        lines.append(f"      {address_width}'d{address}: {name} = {literal(width, word)};  // {comment}")
    if len(words) < 1 << address_width:
        lines.append(f"      default: {name} = 'x;  // no input reads it")
    return "\n".join([*lines, "    endcase", "  endfunction"]) + "\n"


def nan_result(fmt: Format, nan: str, x: str) -> str:
    """The magnitude that a NaN gives."""
    magnitude = f"{x}[{fmt.bits - 2}:0]"
    if nan == "keep" or not fmt.infinities:
        return magnitude
    return f"{magnitude} | {literal(fmt.bits - 1, 1 << (fmt.mantissa_bits - 1))}"


def reachable(table: Table) -> dict[int, tuple[int, int]]:
    """For every row of a ``shift`` or ``carry`` table that inputs from T1 to T2 reach: its least and largest result."""
    assert isinstance(table.index, BitIndex)
    fmt = formats.get(table.format)
    low = fmt.mantissa_bits - table.index.mantissa_bits
    found: dict[int, tuple[int, int]] = {}
    for chunk in range(table.identity_below >> low, (table.saturate_above >> low) + 1):
        t = chunk & (table.index.rows - 1)
        e, r, b = table.rows[t]
        base = (e << fmt.mantissa_bits) + b
        first = max(chunk << low, table.identity_below) & fmt.mantissa_mask
        last = min((chunk << low) + (1 << low) - 1, table.saturate_above) & fmt.mantissa_mask
        least, most = base + (first >> r), base + (last >> r)
        if t in found:
            least, most = min(least, found[t][0]), max(most, found[t][1])
        found[t] = (least, most)
    return found


def shift_add(table: Table, nan: str) -> Unit:
    """K-TanH of arXiv 1909.07729: T1 and T2, and between them a row (E, r, b) that shifts and adds.

    A row is a word of three fields: the index of its E among the distinct ones, the index of its r, and b. Of a
    ``carry`` table E and b are one number, of which the word holds the bits that differ between the results.
    """
    fmt, index = formats.get(table.format), table.index
    assert isinstance(index, BitIndex)
    m, n = fmt.mantissa_bits, fmt.bits
    spans = reachable(table)
    rows = {t: table.rows[t] for t in spans}
    shifts = sorted({r for _, r, _ in rows.values()})
    exponents = sorted({e for e, _, _ in rows.values()})
    rw = width_for(len(shifts))
    carry = table.form == "carry"
    if carry:
        least, most = min(a for a, _ in spans.values()), max(b for _, b in spans.values())
        bw = (least ^ most).bit_length()  # the bits above are the same in every result
        ew = 0
    else:
        bw, ew = m, width_for(len(exponents)) if len(exponents) > 1 else 0
    if len(shifts) == 1:
        rw = 0
    width = ew + rw + bw
    words: dict[int, tuple[int, str]] = {}
    for t, (e, r, b) in rows.items():
        low = ((e << m) + b if carry else b) & ((1 << bw) - 1)
        word = (exponents.index(e) << rw | shifts.index(r)) << bw if ew else shifts.index(r) << bw
        words[t] = (word | low, f"E={e} r={r} b={b}")
    aw = index.exponent_bits + index.mantissa_bits

    def lookup(x: str) -> list[Wire]:
        u, address = f"{x}[{n - 2}:0]", f"{x}[{m + index.exponent_bits - 1}:{m - index.mantissa_bits}]"
        t1, t2 = literal(n - 1, table.identity_below), literal(n - 1, table.saturate_above)
        fields = "index of E, index of r, b" if ew else "index of r, base" if carry else "index of r, b"
        wires = [
            Wire("row", width, f"rows({address})", fields),
            Wire("below", 1, f"{u} < {t1}", f"|x| < T1 = {fmt.decode(table.identity_below):g}"),
            Wire("above", 1, f"{u} > {t2}", f"|x| > T2 = {fmt.decode(table.saturate_above):g}"),
        ]
        return wires if nan == "none" else [*wires, Wire("nan", 1, f"{u} > {literal(n - 1, fmt.last)}")]

    carried = {"x": n, "row": width, "below": 1, "above": 1} | ({} if nan == "none" else {"nan": 1})

    def finish(q: Callable[[str], str]) -> list[Wire]:
        x, row = q("x"), q("row")
        mantissa = f"{x}[{m - 1}:0]"
        options = [mantissa if r == 0 else literal(m, 0) if r >= m else f"{mantissa} >> {r}" for r in shifts]
        selector = f"{row}[{bw + rw - 1}:{bw}]"
        wires = [Wire("shifted", m, choose(selector, rw, options), "M >> r")]
        pad = f"{{{bw - m}'d0, shifted}}" if bw > m else "shifted" if bw == m else f"shifted[{bw - 1}:0]"
        wires.append(Wire("sum", bw, f"{row}[{bw - 1}:0] + {pad}", "base + (M >> r)" if carry else "(M >> r) + b"))
        if carry:
            fixed = n - 1 - bw
            inside = f"{{{literal(fixed, least >> bw)}, sum}}" if fixed else "sum"
        else:
            e = choose(f"{row}[{width - 1}:{bw + rw}]", ew, [literal(fmt.exponent_bits, e) for e in exponents])
            wires.append(Wire("exponent", fmt.exponent_bits, e))
            inside = "{exponent, sum}"
        choice = f"{q('below')} ? {x}[{n - 2}:0] : {q('above')} ? {literal(n - 1, fmt.one)} : {inside}"
        if nan != "none":
            choice = f"{q('nan')} ? {nan_result(fmt, nan, x)} : {choice}"
        wires.append(Wire("magnitude", n - 1, choice))
        return [*wires, Wire("result", n, f"{{{x}[{n - 1}], magnitude}}")]

    return Unit(rom("rows", width, aw, words), lookup, carried, finish)
