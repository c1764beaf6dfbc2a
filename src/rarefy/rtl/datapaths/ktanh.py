"""The datapath of ``shift`` and ``carry`` tables: K-TanH, with its table fixed or in registers that can be written."""

from __future__ import annotations

from typing import NamedTuple

from rarefy.act.spec.formats import Format
from rarefy.act.spec.table import BitIndex, ShiftTable
from rarefy.rtl.datapaths.lane import Lane, Wire, Word, below, choose, nan_result, nan_wire, rom, width_for
from rarefy.rtl.design import literal


class Span(NamedTuple):
    """The least and the largest result of a row."""

    least: int
    most: int


def reachable(table: ShiftTable) -> dict[int, Span]:
    """Give, for every row of a ``shift`` or ``carry`` table that inputs from T1 to T2 reach, what it gives."""
    fmt = table.fmt
    low = fmt.mantissa_bits - table.index.mantissa_bits
    spans: dict[int, Span] = {}
    for chunk in range(table.identity_below >> low, (table.saturate_above >> low) + 1):
        t = chunk & (table.index.rows - 1)
        e, r, b = table.rows[t]
        base = (e << fmt.mantissa_bits) + b
        first = max(chunk << low, table.identity_below) & fmt.mantissa_mask
        last = min((chunk << low) + (1 << low) - 1, table.saturate_above) & fmt.mantissa_mask
        least, most = base + (first >> r), base + (last >> r)
        if t in spans:
            least, most = min(least, spans[t].least), max(most, spans[t].most)
        spans[t] = Span(least, most)
    return spans


def shift_add(table: ShiftTable, nan: str) -> Lane:
    """Make the lane of K-TanH (arXiv 1909.07729): T1 and T2, and between them a row (E, r, b) that shifts and adds.

    A row is a word of three fields: the index of its E among the distinct ones, the index of its r, and b. Of a
    ``carry`` table E and b are one number, of which the word holds the bits that differ between the results.
    """
    fmt, index = table.fmt, table.index
    m, n = fmt.mantissa_bits, fmt.bits
    spans = reachable(table)
    rows = {t: table.rows[t] for t in spans}
    shifts = sorted({r for _, r, _ in rows.values()})
    exponents = sorted({e for e, _, _ in rows.values()})
    rw = width_for(len(shifts)) if len(shifts) > 1 else 0
    carry = table.carries
    if carry:
        least, most = min(span.least for span in spans.values()), max(span.most for span in spans.values())
        bw = max(1, (least ^ most).bit_length())  # the bits above are the same in every result
        ew = 0
    else:
        bw, ew = m, width_for(len(exponents)) if len(exponents) > 1 else 0
    width = ew + rw + bw
    words: dict[int, Word] = {}
    for t, (e, r, b) in rows.items():
        low = ((e << m) + b if carry else b) & ((1 << bw) - 1)
        word = (exponents.index(e) << rw | shifts.index(r)) << bw if ew else shifts.index(r) << bw
        words[t] = Word(word | low, f"E={e} r={r} b={b}")

    t1, t2 = table.identity_below, table.saturate_above
    u, mantissa, address = f"x[{n - 2}:0]", f"x[{m - 1}:0]", _address(fmt, index)
    options = [mantissa if r == 0 else literal(m, 0) if r >= m else f"{mantissa} >> {r}" for r in shifts]
    fields = "index of E, index of r, b" if ew else "index of r, base" if carry else "index of r, b"
    lookup = [
        Wire("row", width, f"rows({address})", fields),
        Wire("below", 1, below(u, n - 1, t1), f"|x| < T1 = {fmt.decode(t1):g}"),
        Wire("above", 1, f"{u} > {literal(n - 1, t2)}", f"|x| > T2 = {fmt.decode(t2):g}"),
        # the shift is of the first step: the adder and the choice after it are the longer half
        Wire("shifted", m, choose(f"row[{bw + rw - 1}:{bw}]", rw, options), "M >> r"),
        *nan_wire(fmt, nan),
    ]

    pad = f"{{{bw - m}'d0, shifted}}" if bw > m else "shifted" if bw == m else f"shifted[{bw - 1}:0]"
    finish = [Wire("sum", bw, f"row[{bw - 1}:0] + {pad}", "base + (M >> r)" if carry else "(M >> r) + b")]
    if carry:
        fixed = n - 1 - bw
        inside = f"{{{literal(fixed, least >> bw)}, sum}}" if fixed else "sum"
    else:
        exponent = choose(f"row[{width - 1}:{bw + rw}]", ew, [literal(fmt.exponent_bits, e) for e in exponents])
        finish.append(Wire("exponent", fmt.exponent_bits, exponent))
        inside = "{exponent, sum}"
    functions = rom("rows", width, index.exponent_bits + index.mantissa_bits, words)
    carried = ("x", "row", "shifted", "below", "above", "nan")
    return Lane(functions, lookup, [*finish, *_chosen(fmt, nan, inside)], carried)


def programmable(table: ShiftTable, nan: str) -> Lane:
    """Make the same lane with rows, T1 and T2 in registers, for any table of the same form, index and format.

    Words 0 up are the rows, {r, E, b} (``shift``) or {r, E << m + b} (``carry``); then follow T1 and T2.
    """
    fmt, index = table.fmt, table.index
    m, n = fmt.mantissa_bits, fmt.bits
    carry = table.carries
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

    u = f"x[{n - 2}:0]"
    lookup = [
        Wire("row", width, f"words[{_address(fmt, index)}]", "r, (E << m) + b" if carry else "r, E, b"),
        Wire("below", 1, f"{u} < t1"),
        Wire("above", 1, f"{u} > t2"),
        *nan_wire(fmt, nan),
    ]
    shifted = Wire("shifted", m, f"x[{m - 1}:0] >> row[{width - 1}:{n - 1}]", "M >> r")
    if carry:
        total = Wire("sum", n - 1, f"row[{n - 2}:0] + {{{literal(fmt.exponent_bits, 0)}, shifted}}")
        inside = "sum"
    else:
        total = Wire("sum", m, f"row[{m - 1}:0] + shifted", "(M >> r) + b")
        inside = f"{{row[{n - 2}:{m}], sum}}"
    finish = [shifted, total, *_chosen(fmt, nan, inside)]
    return Lane(state, lookup, finish, ("x", "row", "below", "above", "nan"), write=(aw, width), setup=tuple(setup))


def _address(fmt: Format, index: BitIndex) -> str:
    """Write the row's number: low exponent bits and high mantissa bits of x."""
    m = fmt.mantissa_bits
    return f"x[{m + index.exponent_bits - 1}:{m - index.mantissa_bits}]"


def _chosen(fmt: Format, nan: str, inside: str) -> list[Wire]:
    """Choose the input below T1, 1 above T2, else ``inside``, with the sign of x."""
    n = fmt.bits
    choice = f"below ? x[{n - 2}:0] : above ? {literal(n - 1, fmt.one)} : {inside}"
    if nan != "none":
        choice = f"nan ? {nan_result(fmt, nan)} : {choice}"
    return [Wire("magnitude", n - 1, choice), Wire("result", n, f"{{x[{n - 1}], magnitude}}")]
