"""The datapath of ``shift`` and ``carry`` tables: K-TanH, with its table fixed or in registers that can be written."""

from __future__ import annotations

from collections.abc import Callable

from rarefy.act import formats
from rarefy.act.formats import Format
from rarefy.act.table import BitIndex, Table
from rarefy.rtl.datapaths.lane import Unit, Wire, below, choose, nan_result, nan_wire, rom, width_for
from rarefy.rtl.design import literal


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
        bw = max(1, (least ^ most).bit_length())  # the bits above are the same in every result
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
        t2 = literal(n - 1, table.saturate_above)
        fields = "index of E, index of r, b" if ew else "index of r, base" if carry else "index of r, b"
        wires = [
            Wire("row", width, f"rows({address})", fields),
            Wire("below", 1, below(u, n - 1, table.identity_below), f"|x| < T1 = {fmt.decode(table.identity_below):g}"),
            Wire("above", 1, f"{u} > {t2}", f"|x| > T2 = {fmt.decode(table.saturate_above):g}"),
        ]
        # the shift is of the first step: the adder and the choice after it are the longer half
        mantissa = f"{x}[{m - 1}:0]"
        options = [mantissa if r == 0 else literal(m, 0) if r >= m else f"{mantissa} >> {r}" for r in shifts]
        wires.append(Wire("shifted", m, choose(f"row[{bw + rw - 1}:{bw}]", rw, options), "M >> r"))
        return [*wires, *nan_wire(fmt, nan, x)]

    carried = {"x": n, "row": width, "shifted": m, "below": 1, "above": 1} | ({} if nan == "none" else {"nan": 1})

    def finish(q: Callable[[str], str]) -> list[Wire]:
        row, shifted = q("row"), q("shifted")
        pad = f"{{{bw - m}'d0, {shifted}}}" if bw > m else shifted if bw == m else f"{shifted}[{bw - 1}:0]"
        wires = [Wire("sum", bw, f"{row}[{bw - 1}:0] + {pad}", "base + (M >> r)" if carry else "(M >> r) + b")]
        if carry:
            fixed = n - 1 - bw
            inside = f"{{{literal(fixed, least >> bw)}, sum}}" if fixed else "sum"
        else:
            e = choose(f"{row}[{width - 1}:{bw + rw}]", ew, [literal(fmt.exponent_bits, e) for e in exponents])
            wires.append(Wire("exponent", fmt.exponent_bits, e))
            inside = "{exponent, sum}"
        return [*wires, *_chosen(fmt, nan, q, inside)]

    return Unit(rom("rows", width, aw, words), lookup, carried, finish)


def programmable(table: Table, nan: str) -> Unit:
    """The same with rows, T1 and T2 in registers: any table of the same form, index and format can be written.

    Words 0 up are the rows, {r, E, b} (``shift``) or {r, E << m + b} (``carry``); then follow T1 and T2.
    """
    fmt, index = formats.get(table.format), table.index
    assert isinstance(index, BitIndex)
    m, n = fmt.mantissa_bits, fmt.bits
    carry = table.form == "carry"
    rw = width_for(m + 1)
    width = rw + n - 1
    aw = width_for(index.rows + 2)
    setup = []
    for t, (e, r, b) in enumerate(table.rows):
        low = (e << m) + b if carry else e << m | b & fmt.mantissa_mask
        setup.append((t, r << (n - 1) | low & (fmt.sign - 1)))
    setup += [(index.rows, table.identity_below), (index.rows + 1, table.saturate_above)]
    state = f"""  logic [{width - 1}:0] words [0:{index.rows - 1}];
  logic [{n - 2}:0] t1;
  logic [{n - 2}:0] t2;
  always_ff @(posedge clk)
    if (we) begin
      if (wa < {literal(aw, index.rows)}) words[wa[{aw - 2}:0]] <= wd;
      else if (wa == {literal(aw, index.rows)}) t1 <= wd[{n - 2}:0];
      else if (wa == {literal(aw, index.rows + 1)}) t2 <= wd[{n - 2}:0];
    end
"""

    def lookup(x: str) -> list[Wire]:
        u, address = f"{x}[{n - 2}:0]", f"{x}[{m + index.exponent_bits - 1}:{m - index.mantissa_bits}]"
        fields = "r, (E << m) + b" if carry else "r, E, b"
        wires = [Wire("row", width, f"words[{address}]", fields), Wire("below", 1, f"{u} < t1")]
        return [*wires, Wire("above", 1, f"{u} > t2"), *nan_wire(fmt, nan, x)]

    def finish(q: Callable[[str], str]) -> list[Wire]:
        x, row = q("x"), q("row")
        shifted = Wire("shifted", m, f"{x}[{m - 1}:0] >> {row}[{width - 1}:{n - 1}]", "M >> r")
        if carry:
            wires = [Wire("sum", n - 1, f"{row}[{n - 2}:0] + {{{literal(fmt.exponent_bits, 0)}, shifted}}")]
            inside = "sum"
        else:
            wires = [Wire("sum", m, f"{row}[{m - 1}:0] + shifted", "(M >> r) + b")]
            inside = f"{{{row}[{n - 2}:{m}], sum}}"
        return [shifted, *wires, *_chosen(fmt, nan, q, inside)]

    carried = {"x": n, "row": width, "below": 1, "above": 1} | ({} if nan == "none" else {"nan": 1})
    return Unit(state, lookup, carried, finish, write=(aw, width), setup=tuple(setup))


def _chosen(fmt: Format, nan: str, q: Callable[[str], str], inside: str) -> list[Wire]:
    """The input below T1, 1 above T2, else ``inside``, with the sign of x."""
    x, n = q("x"), fmt.bits
    choice = f"{q('below')} ? {x}[{n - 2}:0] : {q('above')} ? {literal(n - 1, fmt.one)} : {inside}"
    if nan != "none":
        choice = f"{q('nan')} ? {nan_result(fmt, nan, x)} : {choice}"
    return [Wire("magnitude", n - 1, choice), Wire("result", n, f"{{{x}[{n - 1}], magnitude}}")]
