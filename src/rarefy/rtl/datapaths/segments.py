"""The datapath of ``segments`` tables: comparisons find the row, a shift (or a product) and a sum compute its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rarefy.act.spec.formats import Format
from rarefy.act.spec.table import SegmentsTable
from rarefy.rtl.datapaths.lane import Lane, Wire, Word, choose, nan_result, nan_wire, width_for
from rarefy.rtl.design import literal

#: Rows up to which they are found by a ladder of comparisons.
_LADDER = 64


@dataclass(frozen=True)
class _Row:
    """A row: inputs ``first`` to ``last``, slope S, sum B at ``first``, and the results of the two ends."""

    first: int
    last: int
    slope: int
    base: int
    results: tuple[int, int]

    def describe(self, fmt: Format) -> str:
        """Write the row as a comment."""
        return f"from x = {fmt.decode(self.first):g}: S={self.slope} B={self.base}"

    def passes(self, fraction_bits: int) -> bool:
        """Whether the result is the input."""
        return self.results == (self.first, self.last) and self.slope == 1 << fraction_bits


@dataclass(frozen=True)
class _Line:
    """How ``B + S * (u - first)`` is computed.

    Attributes:
        fields: what a row's word holds for it, in words.
        width: how many bits that is.
        fraction: low bits of the sum, below those of the result.
        words: those bits of each row.
        wires: the wires up to ``sum``.

    """

    fields: str
    width: int
    fraction: int
    words: Mapping[_Row, int]
    wires: Sequence[Wire]


class _Place(NamedTuple):
    """Where a row's word holds what is chosen at the end; without ``sign`` the result has that of the input."""

    sign: int | None
    zero: int
    passing: int


def segments(table: SegmentsTable, nan: str) -> Lane:
    """Make the lane of ``y = (B + S * (u - first)) >> f`` by rows; ``S * u`` is a shift where all S are powers of two.

    Rows that give the input itself, or zero, are a choice at the end. The others have the same high bits in all their
    results, so that the sum is only as wide as the bits that differ; where a row changes the sign of its result the sum
    is as wide as the result. With powers of two ``B - S * first`` is one
    constant of the row; a negative slope adds the complement of the input.
    """
    fmt = table.fmt
    n, f = fmt.bits, table.fraction_bits
    odd = table.symmetry == "odd"
    w = n - 1 if odd else n
    rows = _rows(table, w, nan)
    crossing = any((r.results[0] ^ r.results[1]) >> (n - 1) for r in rows)
    k = n if crossing and not odd else n - 1  # bits that are chosen; a sign besides, if it is not among them
    chosen = (1 << k) - 1
    zero = {r for r in rows if not any(y & chosen for y in r.results) and r.slope == 0}
    passing = {r for r in rows if r.passes(f)} - zero
    summed = [r for r in rows if r not in zero and r not in passing]
    ends = [y & chosen for r in summed for y in r.results]
    # all bits above the lowest `bw` are the same in every sum
    bw = k if crossing else max(1, max((a ^ ends[0] for a in ends), default=0).bit_length())
    line = _line(summed, f, bw, w)
    follows = odd or crossing or all(_keeps_sign(r, fmt) for r in rows)
    at = line.width
    place = _Place(None, at, at + 1) if follows else _Place(at, at + 1, at + 2)
    words = []
    for r in rows:
        word = line.words.get(r, 0) | (r in zero) << place.zero | (r in passing) << place.passing
        words.append(word if place.sign is None else word | (r.results[0] & fmt.sign != 0) << place.sign)
    width = place.passing + 1
    grid = min(((r.first & -r.first).bit_length() - 1 for r in rows if r.first), default=0)
    if len(rows) > 1:
        steps = [_Step(r.first >> grid, Word(word, r.describe(fmt))) for r, word in zip(rows, words, strict=True)]
        functions, row = _ladder(width, w - grid, steps), f"rows(x[{w - 1}:{grid}])"
    else:
        functions, row = "", literal(width, words[0])
    fields = f"pass, zero, {'' if follows else 'sign, '}{line.fields}"
    lookup = [Wire("row", width, row, fields), *nan_wire(fmt, nan)]
    inside = literal(k, 0)
    if summed:
        fixed = [literal(k - bw, ends[0] >> bw)] * (bw < k)
        total = ", ".join([*fixed, f"sum[{bw + line.fraction - 1}:{line.fraction}]"])
        inside = f"row[{place.zero}] ? {literal(k, 0)} : {{{total}}}"
    finish = [*line.wires, *_chosen(fmt, nan, k, place, inside)]
    return Lane(functions, lookup, finish, ("x", "row", "nan"))


def _keeps_sign(row: _Row, fmt: Format) -> bool:
    """Whether the results of a row have the sign of their inputs."""
    return all((y & fmt.sign) == (u & fmt.sign) for y, u in zip(row.results, (row.first, row.last), strict=True))


def _chosen(fmt: Format, nan: str, k: int, place: _Place, inside: str) -> list[Wire]:
    """Choose the input where the row passes it, else ``inside``, of ``k`` bits; and a sign where it is not in them."""
    n = fmt.bits
    choice = f"row[{place.passing}] ? x[{k - 1}:0] : {inside}"
    if k == n:  # the sign is one of the bits
        if nan != "none":
            choice = f"nan ? {{x[{n - 1}], {nan_result(fmt, nan)}}} : {choice}"
        return [Wire("result", n, choice)]
    sign = f"x[{n - 1}]"
    if place.sign is not None:
        sign = f"row[{place.passing}] ? {sign} : row[{place.sign}]"
    if nan != "none":
        choice = f"nan ? {nan_result(fmt, nan)} : {choice}"
        sign = sign if place.sign is None else f"nan ? x[{n - 1}] : {sign}"
    return [Wire("magnitude", n - 1, choice), Wire("sign", 1, sign), Wire("result", n, "{sign, magnitude}")]


def _rows(table: SegmentsTable, width: int, nan: str) -> list[_Row]:
    """Cut the rows at the sign bit, with the first and the last result of each; NaN counts where it passes through."""
    fmt, f = table.fmt, table.fraction_bits
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


def _line(rows: Sequence[_Row], fraction_bits: int, result_bits: int, input_bits: int) -> _Line:
    """Choose how the lines of the rows are computed."""
    slopes = sorted({r.slope for r in rows}, key=lambda s: (abs(s), s))
    if not rows:
        return _Line("none", 0, 0, {}, ())
    if all(s == 0 or abs(s) & (abs(s) - 1) == 0 for s in slopes):
        return _shifted(rows, slopes, fraction_bits, result_bits, input_bits)
    return _product(rows, slopes, fraction_bits, result_bits)


def _shifted(rows: Sequence[_Row], slopes: list[int], fraction_bits: int, result_bits: int, input_bits: int) -> _Line:
    """Compute the lines by a shift: a row's word is the index of S and the constant ``B - S * first``."""
    powers = [abs(s).bit_length() - 1 for s in slopes if s]
    spare = min([*powers, fraction_bits])  # low bits that no slope reaches
    fraction = fraction_bits - spare
    width = result_bits + fraction
    sw = width_for(len(slopes)) if len(slopes) > 1 else 0
    words = {}
    for row in rows:
        constant = (row.base - row.slope * row.first >> spare) + (row.slope < 0)
        words[row] = slopes.index(row.slope) << width | constant & ((1 << width) - 1)
    options = [_term(slope, abs(slope).bit_length() - 1 - spare, width, input_bits) for slope in slopes]
    shifted = choose(f"row[{width + sw - 1}:{width}]", sw, options)
    wires = (
        Wire("shifted", width, shifted, "S * u; ~ for the negative"),
        Wire("sum", width, f"row[{width - 1}:0] + shifted"),
    )
    return _Line("index of S, B - S * first", width + sw, fraction, words, wires)


def _term(slope: int, zeros: int, width: int, input_bits: int) -> str:
    """Write the input, shifted up by ``zeros``, in ``width`` bits; of a negative slope its complement."""
    if slope == 0 or zeros >= width:
        return literal(width, 0 if slope >= 0 else -1)
    used = min(input_bits, width - zeros)
    parts = [literal(width - zeros - used, 0)] * (width > zeros + used)
    parts += [f"x[{used - 1}:0]"] + [literal(zeros, 0)] * (zeros > 0)
    text = parts[0] if len(parts) == 1 else f"{{{', '.join(parts)}}}"
    return f"~{text}" if slope < 0 else text


def _product(rows: Sequence[_Row], slopes: list[int], fraction_bits: int, result_bits: int) -> _Line:
    """Compute the lines by a product: a row's word is S, the low bits of ``first``, and B."""
    width = result_bits + fraction_bits
    dw = max(1, *((r.last - r.first).bit_length() for r in rows))
    signed = min(slopes) < 0
    sw = max(s.bit_length() for s in slopes) + signed
    words = {}
    for row in rows:
        base, first = row.base & ((1 << width) - 1), row.first & ((1 << dw) - 1)
        words[row] = ((row.slope & ((1 << sw) - 1)) << dw | first) << width | base
    slope = f"row[{width + dw + sw - 1}:{width + dw}]"
    product = f"$signed({slope}) * $signed({{1'b0, d}})" if signed else f"{slope} * d"
    wires = (
        Wire("d", dw, f"x[{dw - 1}:0] - row[{width + dw - 1}:{width}]", "u - first"),
        Wire("product", sw + dw + signed, product, "S * d", signed),
        Wire("sum", width, f"row[{width - 1}:0] + {_fitted('product', sw + dw + signed, width, signed)}"),
    )
    return _Line("S, first, B", width + dw + sw, fraction_bits, words, wires)


def _fitted(name: str, width: int, wanted: int, signed: bool) -> str:
    """Write a value of ``width`` bits as one of ``wanted`` bits."""
    if width >= wanted:
        return f"{name}[{wanted - 1}:0]"
    fill = f"{{{wanted - width}{{{name}[{width - 1}]}}}}" if signed else literal(wanted - width, 0)
    return f"{{{fill}, {name}}}"


class _Step(NamedTuple):
    """The least input, by its high bits, that a word is for."""

    first: int
    word: Word


def _ladder(width: int, address_width: int, steps: list[_Step]) -> str:
    """Write a function from the high bits of an input to the word of the last step that does not begin above them.

    Comparisons from the last step down, which read well; of many a tree, which tools read fast.
    """
    lines = [f"  function automatic logic [{width - 1}:0] rows(input logic [{address_width - 1}:0] t);"]
    if len(steps) > _LADDER:
        lines += _tree(width, address_width, steps, "    ")
    else:
        for number, (first, word) in enumerate(reversed(steps)):
            test = f"if (t >= {literal(address_width, first)}) " if number < len(steps) - 1 else ""
            row = f"rows = {literal(width, word.value)};  // {word.comment}"
            lines.append(f"    {'else ' if number else ''}{test}{row}")
    return "\n".join([*lines, "  endfunction"]) + "\n"


def _tree(width: int, address_width: int, steps: list[_Step], indent: str) -> list[str]:
    """Halve the steps by a comparison, and each half again."""
    if len(steps) == 1:
        word = steps[0].word
        return [f"{indent}rows = {literal(width, word.value)};  // {word.comment}"]
    middle = len(steps) // 2
    return [
        f"{indent}if (t >= {literal(address_width, steps[middle].first)}) begin",
        *_tree(width, address_width, steps[middle:], indent + "  "),
        f"{indent}end else begin",
        *_tree(width, address_width, steps[:middle], indent + "  "),
        f"{indent}end",
    ]
