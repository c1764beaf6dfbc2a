"""The datapath of ``segments`` tables: comparisons find the row, a shift (or a product) and a sum compute its line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rarefy.act import formats
from rarefy.act.formats import Format
from rarefy.act.table import Table
from rarefy.rtl.datapaths.lane import Unit, Wire, choose, nan_result, nan_wire, width_for
from rarefy.rtl.design import literal

#: Rows up to which they are found by a ladder of comparisons.
_LADDER = 64


@dataclass(frozen=True)
class _Row:
    """A row: inputs ``first`` to ``last``, slope S, sum B at ``first``, and what becomes of it."""

    first: int
    last: int
    slope: int
    base: int
    results: tuple[int, int]

    def describe(self, fmt: Format) -> str:
        """The row as a comment."""
        return f"from x = {fmt.decode(self.first):g}: S={self.slope} B={self.base}"

    def passes(self, fraction_bits: int) -> bool:
        """Whether the result is the input."""
        return self.results == (self.first, self.last) and self.slope == 1 << fraction_bits


def segments(table: Table, nan: str) -> Unit:
    """``y = (B + S * (u - first)) >> f`` by rows; ``S * u`` is a shift where every slope is a power of two.

    Rows that give the input itself, or zero, are a choice at the end. The others have the same high bits in all their
    results, so that the sum is only as wide as the bits that differ; where a row changes the sign of its result the sum
    is as wide as the result. With powers of two ``B - S * first`` is one
    constant of the row; a negative slope adds the complement of the input.
    """
    fmt = formats.get(table.format)
    n, f = fmt.bits, table.fraction_bits
    odd = table.symmetry == "odd"
    w = n - 1 if odd else n
    rows = _rows(table, w, nan)
    crossing = any((r.results[0] ^ r.results[1]) >> (n - 1) for r in rows)
    k = n if crossing and not odd else n - 1  # bits that are chosen; a sign besides, if it is not among them
    chosen = (1 << k) - 1
    zero = [not any(y & chosen for y in r.results) and r.slope == 0 for r in rows]
    passing = [r.passes(f) and not z for r, z in zip(rows, zero, strict=True)]
    summed = [r for r, z, p in zip(rows, zero, passing, strict=True) if not z and not p]
    ends = [y & chosen for r in summed for y in r.results]
    # all bits above the lowest `bw` are the same in every sum
    bw = k if crossing else max(1, max((a ^ ends[0] for a in ends), default=0).bit_length())
    prefix = ends[0] >> bw if ends else 0
    slopes = sorted({r.slope for r in summed}, key=lambda s: (abs(s), s))
    if not summed:
        line = _Line("none", 0, 0, lambda row: 0, lambda x, row: [])
    elif all(s == 0 or abs(s) & (abs(s) - 1) == 0 for s in slopes):
        line = _shifted(slopes, f, bw, w)
    else:
        line = _product(summed, slopes, f, bw)
    follows = (
        odd
        or crossing
        or all(
            (y & fmt.sign) == (u & fmt.sign) for r in rows for y, u in zip(r.results, (r.first, r.last), strict=True)
        )
    )
    words = []
    for r, z, p in zip(rows, zero, passing, strict=True):
        word = line.word(r) if not z and not p else 0
        at = line.width
        if not follows:
            word, at = word | (r.results[0] & fmt.sign != 0) << at, at + 1
        words.append(word | z << at | p << at + 1)
    sign_bit, zero_bit = line.width, line.width + (0 if follows else 1)
    width = zero_bit + 2
    grid = min(((r.first & -r.first).bit_length() - 1 for r in rows if r.first), default=0)
    functions, found = "", literal(width, words[0])
    if len(rows) > 1:
        functions = _ladder(
            width, w - grid, [(r.first >> grid, word, r.describe(fmt)) for r, word in zip(rows, words, strict=True)]
        )

    def lookup(x: str) -> list[Wire]:
        row = f"rows({x}[{w - 1}:{grid}])" if functions else found
        wires = [Wire("row", width, row, f"pass, zero, {'' if follows else 'sign, '}{line.fields}")]
        return [*wires, *nan_wire(fmt, nan, x)]

    def finish(q: Callable[[str], str]) -> list[Wire]:
        x, row = q("x"), q("row")
        wires = line.wires(x, row)
        fixed = [literal(k - bw, prefix)] * (bw < k)
        inside = "{" + ", ".join([*fixed, f"sum[{bw + line.fraction - 1}:{line.fraction}]"]) + "}"
        inside = f"{row}[{zero_bit}] ? {literal(k, 0)} : {inside}" if summed else literal(k, 0)
        choice = f"{row}[{zero_bit + 1}] ? {x}[{k - 1}:0] : {inside}"
        if k == n:  # the sign is one of the bits
            if nan != "none":
                choice = f"{q('nan')} ? {{{x}[{n - 1}], {nan_result(fmt, nan, x)}}} : {choice}"
            return [*wires, Wire("result", n, choice)]
        sign = f"{x}[{n - 1}]" if follows else f"{row}[{zero_bit + 1}] ? {x}[{n - 1}] : {row}[{sign_bit}]"
        if nan != "none":
            choice = f"{q('nan')} ? {nan_result(fmt, nan, x)} : {choice}"
            sign = sign if follows else f"{q('nan')} ? {x}[{n - 1}] : {sign}"
        wires.append(Wire("magnitude", n - 1, choice))
        wires.append(Wire("sign", 1, sign))
        return [*wires, Wire("result", n, "{sign, magnitude}")]

    carried = {"x": n, "row": width} | ({} if nan == "none" else {"nan": 1})
    return Unit(functions, lookup, carried, finish)


def _rows(table: Table, width: int, nan: str) -> list[_Row]:
    """The rows, cut at the sign bit, with the first and the last result of each; NaN counts where it passes through."""
    fmt, f = formats.get(table.format), table.fraction_bits
    firsts = [row[0] for row in table.rows]
    highest = fmt.sign - 1 if nan == "none" else fmt.last
    found = []
    for (first, slope, base), end in zip(table.rows, [*firsts[1:], 1 << width], strict=True):
        for low, high in ((0, highest), (fmt.sign, fmt.sign + highest)):
            a, b = max(first, low), min(end - 1, high)
            if a <= b:
                at = base + slope * (a - first)
                found.append(_Row(a, b, slope, at, (at >> f, at + slope * (b - a) >> f)))
    return found


@dataclass(frozen=True)
class _Line:
    """How ``B + S * (u - first)`` is computed: the fields of a row's word, and the wires up to ``sum``."""

    fields: str
    width: int
    fraction: int
    word: Callable[[_Row], int]
    wires: Callable[[str, str], list[Wire]]


def _shifted(slopes: list[int], fraction_bits: int, result_bits: int, input_bits: int) -> _Line:
    powers = [abs(s).bit_length() - 1 for s in slopes if s]
    spare = min([*powers, fraction_bits])  # low bits that no slope reaches
    fraction = fraction_bits - spare
    width = result_bits + fraction
    sw = width_for(len(slopes)) if len(slopes) > 1 else 0

    def word(row: _Row) -> int:
        constant = (row.base - row.slope * row.first >> spare) + (row.slope < 0)
        return slopes.index(row.slope) << width | constant & ((1 << width) - 1)

    def term(slope: int, x: str) -> str:
        zeros = abs(slope).bit_length() - 1 - spare
        if slope == 0 or zeros >= width:
            return literal(width, 0 if slope >= 0 else -1)
        used = min(input_bits, width - zeros)
        parts = [literal(width - zeros - used, 0)] * (width > zeros + used)
        parts += [f"{x}[{used - 1}:0]"] + [literal(zeros, 0)] * (zeros > 0)
        text = parts[0] if len(parts) == 1 else f"{{{', '.join(parts)}}}"
        return f"~{text}" if slope < 0 else text

    def wires(x: str, row: str) -> list[Wire]:
        options = [term(s, x) for s in slopes]
        selector = f"{row}[{width + sw - 1}:{width}]"
        shifted = choose(selector, sw, options)
        return [
            Wire("shifted", width, shifted, "S * u; ~ for the negative"),
            Wire("sum", width, f"{row}[{width - 1}:0] + shifted"),
        ]

    return _Line("index of S, B - S * first", width + sw, fraction, word, wires)


def _product(rows: list[_Row], slopes: list[int], fraction_bits: int, result_bits: int) -> _Line:
    width = result_bits + fraction_bits
    dw = max(1, *((r.last - r.first).bit_length() for r in rows))
    signed = min(slopes) < 0
    sw = max(s.bit_length() for s in slopes) + signed

    def word(row: _Row) -> int:
        base, first = row.base & ((1 << width) - 1), row.first & ((1 << dw) - 1)
        return ((row.slope & ((1 << sw) - 1)) << dw | first) << width | base

    def wires(x: str, row: str) -> list[Wire]:
        slope = f"{row}[{width + dw + sw - 1}:{width + dw}]"
        product = f"$signed({slope}) * $signed({{1'b0, d}})" if signed else f"{slope} * d"
        return [
            Wire("d", dw, f"{x}[{dw - 1}:0] - {row}[{width + dw - 1}:{width}]", "u - first"),
            Wire("product", sw + dw + signed, product, "S * d", signed),
            Wire("sum", width, f"{row}[{width - 1}:0] + {_fitted('product', sw + dw + signed, width, signed)}"),
        ]

    return _Line("S, first, B", width + dw + sw, fraction_bits, word, wires)


def _fitted(name: str, width: int, wanted: int, signed: bool) -> str:
    """A value of ``width`` bits as one of ``wanted`` bits."""
    if width >= wanted:
        return f"{name}[{wanted - 1}:0]"
    fill = f"{{{wanted - width}{{{name}[{width - 1}]}}}}" if signed else literal(wanted - width, 0)
    return f"{{{fill}, {name}}}"


def _ladder(width: int, address_width: int, rows: list[tuple[int, int, str]]) -> str:
    """A function from the high bits of an input to the word of the last row that does not begin above them.

    Comparisons from the last row down, which read well; of many rows a tree, which tools read fast.
    """
    lines = [f"  function automatic logic [{width - 1}:0] rows(input logic [{address_width - 1}:0] t);"]

    def place(some: list[tuple[int, int, str]], indent: str) -> None:
        if len(some) == 1:
            lines.append(f"{indent}rows = {literal(width, some[0][1])};  // {some[0][2]}")
            return
        middle = len(some) // 2
        lines.append(f"{indent}if (t >= {literal(address_width, some[middle][0])}) begin")
        place(some[middle:], indent + "  ")
        lines.append(f"{indent}end else begin")
        place(some[:middle], indent + "  ")
        lines.append(f"{indent}end")

    if len(rows) > _LADDER:
        place(rows, "    ")
    else:
        for number, (first, word, comment) in enumerate(reversed(rows)):
            test = f"if (t >= {literal(address_width, first)}) " if number < len(rows) - 1 else ""
            lines.append(f"    {'else ' if number else ''}{test}rows = {literal(width, word)};  // {comment}")
    return "\n".join([*lines, "  endfunction"]) + "\n"
