"""Tables of straight lines: ``linear`` and ``segments``, fitted by exact integer arithmetic.

An input has an interval of results that are allowed: the correctly rounded one, or all within an error. :func:`line`
decides whether one line of integers passes through all intervals of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rarefy.act.spec import formats, oracle
from rarefy.act.spec.formats import Bits, Format
from rarefy.act.spec.oracle import Function
from rarefy.act.spec.table import CutIndex, LinearTable, MultiplyIndex, SegmentsTable


def line(low: Bits, high: Bits, fraction_bits: int) -> tuple[int, int, int] | None:
    """Find integers (S, B) with ``low[d] <= (B + S * d) >> f <= high[d]`` for every d, and the room left; None if none.

    The room ``max(L - S d) - min(H - S d)`` is convex in S, so bisection over the integers finds its least value.
    """
    d = np.arange(len(low), dtype=np.int64)
    floor, ceiling = low << fraction_bits, ((high + 1) << fraction_bits) - 1

    def gap(s: int) -> int:
        return int((floor - s * d).max() - (ceiling - s * d).min())

    span = max(len(low) - 1, 1)
    left = (int(low[-1]) - int(high[0]) - 1 << fraction_bits) // span - 1
    right = (int(high[-1]) - int(low[0]) + 1 << fraction_bits) // span + 1
    while left < right:
        middle = (left + right) // 2
        if gap(middle) <= gap(middle + 1):
            right = middle
        else:
            left = middle + 1
    room = -gap(left)
    if room < 0:
        return None
    lowest = int((floor - left * d).max())
    return left, lowest + room // 2, room


def _allowed(
    function: Function, fmt: Format, bits: Bits, max_abs: float | None, max_rel: float = 0.0
) -> tuple[Bits, Bits]:
    """Find the least and largest magnitude allowed for each input: the rounded one, all within one of the errors."""
    rounded = oracle.rounded(function, fmt, bits)[0] & (fmt.sign - 1)
    if max_abs is None:
        return rounded, rounded
    value = np.abs(oracle.evaluate(function, fmt.decode(bits)))
    grid = fmt.decode(np.arange(fmt.last + 1, dtype=np.int64))
    error = np.maximum(max_abs, max_rel * np.where(np.isinf(value), 0.0, value))
    low = np.searchsorted(grid, value - error)
    high = np.searchsorted(grid, value + error, side="right") - 1
    low, high = np.minimum(low, rounded), np.maximum(high, rounded)
    if max_rel:  # far out an error of x could be large: what is x stays x
        own = rounded == (bits & (fmt.sign - 1))
        low, high = np.where(own, rounded, low), np.where(own, rounded, high)
    return low, high


def fit_linear(
    function: Function = "tanh",
    fmt: str | Format = "bf16",
    rows: int = 64,
    *,
    fraction_bits: int = 6,
    max_abs: float | None = None,
    starts: int = 24,
    name: str | None = None,
) -> LinearTable:
    """Fit a ``linear`` table, correctly rounded or within ``max_abs``, of an odd function: x near 0, constant far out.

    Within ``max_abs`` everywhere that rounding alone is not farther off. Searches ``starts`` beginnings below the first
    input that is not its own value, and factors that fill the rows. Raises ValueError for a function that is not so,
    and when no table with that many rows and fraction bits does it. Formats of 16 bits.
    """
    f = formats.get(fmt)
    named = oracle.name_of(function)
    if f.bits != 16 or not oracle.is_odd(function):
        raise ValueError(f"linear tables are for odd functions and formats of 16 bits, not {named} in {f.name}")
    band = _band(function, f, fraction_bits, max_abs, starts)
    fits: dict[tuple[int, int], tuple[int, int] | None] = {}
    for start in range(band.first - 1, band.first - 1 - starts, -1):
        length = band.end - start
        fullest = (rows << 16) // length + 1
        d = np.arange(length + 1, dtype=np.int64)
        for factor in range(min(fullest, 0xFFFF), fullest - fullest // 5, -1):
            t = d * factor >> 16
            if t[-1] >= rows:
                continue
            lines = _rows(band, start, np.searchsorted(t, np.arange(t[-1] + 2)) + start, fits, fraction_bits)
            if lines is not None:
                return LinearTable(
                    name=name or f"{named}_{f.name}_linear{rows}",
                    function=named,
                    format=f.name,
                    index=MultiplyIndex(start, length, factor),
                    rows=tuple(lines),
                    identity_below=start,
                    fraction_bits=fraction_bits,
                    offset=band.offset,
                )
    raise ValueError(f"no linear table of {rows} rows does it; ask for more rows or a larger max_abs")


@dataclass(frozen=True)
class _Band:
    """What the lines of a ``linear`` table must keep to: from ``low`` to ``high`` for every input.

    ``first`` is the first input that must not stay as it is; from ``end`` on one result does for all; a sum of 16 bits
    holds all results above ``offset``.
    """

    low: Bits
    high: Bits
    first: int
    end: int
    offset: int


def _band(function: Function, f: Format, fraction_bits: int, max_abs: float | None, starts: int) -> _Band:
    named = oracle.name_of(function)
    u = np.arange(f.last + 1, dtype=np.int64)
    low, high = _allowed(function, f, u, max_abs)
    first = int(np.argmin((low <= u) & (u <= high)))
    # From `end` on one result does for all inputs, infinity included: the row that ends there holds it.
    least, most = np.maximum.accumulate(low[::-1])[::-1], np.minimum.accumulate(high[::-1])[::-1]
    end = int(np.argmax(least <= most))
    if not starts < first < end:
        raise ValueError(f"linear tables are for functions like tanh: x near 0, constant far out; {named} is not")
    # What a sum of 16 bits can hold above the offset.
    room = 1 << (16 - fraction_bits)
    offset = int(low[first - starts]) // room * room
    low, high = np.maximum(low, offset), np.minimum(high, offset + room - 1)
    low[end], high[end] = max(least[end], offset), min(most[end], offset + room - 1)
    if (low[first - starts : end + 1] > high[first - starts : end + 1]).any():
        raise ValueError(
            f"the results of {named} in {f.name} span more than {room} numbers: take fewer than {fraction_bits}"
            " fraction bits"
        )
    return _Band(low, high, first, end, offset)


def _rows(
    band: _Band, start: int, cuts: Bits, fits: dict[tuple[int, int], tuple[int, int] | None], fraction_bits: int
) -> list[tuple[int, int]] | None:
    """(S, B) of every row between the cuts, or None when one has no line; ``fits`` remembers lines by their row."""
    lines = []
    for a, b in pairwise(cuts):
        key = (int(a), int(b))
        if key not in fits:
            best = line(band.low[a:b] - band.offset, band.high[a:b] - band.offset, fraction_bits)
            fits[key] = best and best[:2]
        fitted = fits[key]
        if fitted is None:
            return None
        slope, base = fitted
        lines.append((slope & 0xFFFF, (base - slope * (key[0] - start)) & 0xFFFF))
    return lines


def fit_segments(
    function: Function,
    fmt: str | Format,
    *,
    fraction_bits: int = 10,
    max_abs: float | None = None,
    max_rel: float = 0.0,
    shifts: bool = False,
    grid: int = 0,
    symmetry: str | None = None,
    name: str | None = None,
) -> SegmentsTable:
    """Fit the ``segments`` table with the fewest rows that is correctly rounded, or within ``max_abs``, on every input.

    Each row reaches as far as a line can (which is optimal for cutting a line into intervals). Where rounding alone is
    farther off than ``max_abs``, it is correctly rounded. Symmetry is "odd" for odd functions and "none" for others
    unless given.

    For small hardware (:mod:`rarefy.rtl`): with ``shifts`` every slope S is 0 or a power of two, of either sign, up to
    ``2^(fraction_bits + 1)``, so that a shift does for the product; with ``grid`` rows begin at multiples of 2^grid
    patterns, so that fewer bits are compared; ``max_rel`` allows that relative error too where it is more than
    ``max_abs``, except for inputs that round to themselves.

    Raises ValueError for a format of more than 16 bits, and when no such table exists.
    """
    f = formats.get(fmt)
    if f.bits > 16:
        raise ValueError(f"fits go over every input, so {f.name} is too wide")
    if not 0 <= grid <= f.mantissa_bits or max_rel < 0 or (max_rel and max_abs is None):
        raise ValueError(
            f"grid must be 0 to {f.mantissa_bits} and max_rel go with max_abs, got {grid}, {max_rel} and {max_abs}"
        )
    symmetry = symmetry or ("odd" if oracle.is_odd(function) else "none")
    rows: list[tuple[int, int, int]] = []
    for sign in (0,) if symmetry == "odd" else (0, f.sign):
        bits = np.arange(f.last + 1, dtype=np.int64) + sign
        low, high = _allowed(function, f, bits, max_abs, max_rel)
        negative = oracle.rounded(function, f, bits)[0] & f.sign
        low, high = low + negative, high + negative
        rows += _cut(f, bits, low, high, fraction_bits, grid, shifts)
    return SegmentsTable(
        name=name or f"{oracle.name_of(function)}_{f.name}",
        function=oracle.name_of(function),
        format=f.name,
        index=CutIndex(),
        rows=tuple(rows),
        symmetry=symmetry,
        fraction_bits=fraction_bits,
    )


def _cut(
    f: Format, bits: Bits, low: Bits, high: Bits, fraction_bits: int, grid: int, shifts: bool
) -> list[tuple[int, int, int]]:
    """Rows (first, S, B) that follow each other through the patterns, each as long as one line allows."""
    rows: list[tuple[int, int, int]] = []
    at, reach = 0, 64
    while at < len(bits):
        if shifts:
            reach, fit = _furthest_shift(low[at:], high[at:], fraction_bits, grid)
        else:
            reach, fit = _furthest(low[at:], high[at:], fraction_bits, reach)
            reach = reach if at + reach == len(bits) else (at + reach >> grid << grid) - at
        if reach <= 0:
            raise ValueError(
                f"no line holds for the {1 << grid} inputs from {f.decode(bits[at]):g}: take a smaller grid, more"
                " fraction bits or a larger max_abs"
            )
        rows.append((int(bits[at]), *fit))
        at += reach
    return rows


def _furthest(low: Bits, high: Bits, fraction_bits: int, guess: int) -> tuple[int, tuple[int, int]]:
    """Find the longest prefix that one line fits, and the line: gallop from the guess, then bisect."""

    def attempt(n: int) -> tuple[int, int, int] | None:
        return line(low[:n], high[:n], fraction_bits)

    total = len(low)
    good, bad = 1, total + 1
    n = min(max(guess, 2), total)
    while good < n < bad:
        if attempt(n):
            good, n = n, min(n * 2, total)
        else:
            bad = n
    while bad - good > 1:
        middle = (good + bad) // 2
        if attempt(middle):
            good = middle
        else:
            bad = middle
    best = attempt(good)
    assert best is not None
    return good, best[:2]


def _furthest_shift(low: Bits, high: Bits, fraction_bits: int, grid: int) -> tuple[int, tuple[int, int]]:
    """As :func:`_furthest`, for slopes of 0 and of powers of two, and lengths of whole steps of the grid.

    Among equal reaches the gentlest slope wins, and of its bases the roundest number.
    """
    total, d = len(low), np.arange(len(low), dtype=np.int64)
    best: tuple[int, tuple[int, int]] = (0, (0, 0))
    for slope in [0, *(sign << k for k in range(fraction_bits + 2) for sign in (1, -1))]:
        least = np.maximum.accumulate((low << fraction_bits) - slope * d)
        most = np.minimum.accumulate(((high + 1 << fraction_bits) - 1) - slope * d)
        reach = total if least[-1] <= most[-1] else int(np.argmax(least > most))
        reach = reach if reach == total else reach >> grid << grid
        if reach > best[0]:
            best = (reach, (slope, _roundest(int(least[reach - 1]), int(most[reach - 1]))))
    return best


def _roundest(low: int, high: int) -> int:
    """Find the number between two with the most zeros at its low end."""
    zeros = 0
    while -(-low >> (zeros + 1)) << (zeros + 1) <= high and zeros < 40:
        zeros += 1
    return -(-low >> zeros) << zeros
