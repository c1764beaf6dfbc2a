"""Fit tables: from the true function to the interval of answers allowed for every input, and from there to rows.

Everything here is deterministic and exhaustive over the inputs of the format. ``fit_shift`` searches every (E, r, b)
of every row, so that its optimum is a proof; ``fit_linear`` and ``fit_segments`` decide by exact integer arithmetic
whether a straight line passes through all intervals of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TypeAlias

import numpy as np

from rarefy.act import formats, oracle
from rarefy.act.formats import Bits, Format, Values
from rarefy.act.table import BitIndex, CutIndex, MultiplyIndex, Table

Function: TypeAlias = str | Callable[[Values], Values]

OBJECTIVES = ("max_abs", "max_ulp", "rmse")
_SLACK = 1e-12  # float64 noise when two error bounds are compared


def _true(function: Function, x: Values) -> Values:
    return oracle.evaluate(function, x) if isinstance(function, str) else np.asarray(function(x), dtype=np.float64)


def _name_of(function: Function) -> str:
    return function if isinstance(function, str) else getattr(function, "__name__", "function")


@dataclass(frozen=True)
class _Candidates:
    """The (r, base) of one row within a bound, with the bits of their first and last value and their errors."""

    shift: Bits
    base: Bits
    first: Bits
    last: Bits
    max_abs: Values
    max_ulp: Values
    square: Values

    def keep(self, mask: np.ndarray) -> _Candidates:
        return _Candidates(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))

    def error(self, objective: str) -> Values:
        return {"max_abs": self.max_abs, "max_ulp": self.max_ulp, "rmse": self.square}[objective]


@dataclass(frozen=True)
class _Row:
    """The inputs of one row, what they should give, and the weight of each for the mean square."""

    number: int
    mantissa: Bits
    value: Values
    bits: Bits
    weight: Values


def _rows(
    function: Function, fmt: Format, index: BitIndex, identity_below: int, saturate_above: int
) -> tuple[list[_Row], Values]:
    low = fmt.mantissa_bits - index.mantissa_bits
    chunks = range(identity_below >> low, (saturate_above >> low) + 1)
    if not 0 < len(chunks) <= index.rows:
        raise ValueError(f"T1 to T2 spans {len(chunks)} rows, but {index} addresses {index.rows}")
    everything = fmt.decode(np.arange(fmt.last + 1, dtype=np.int64))
    rows = []
    for chunk in chunks:
        u = np.arange(max(chunk << low, identity_below), min((chunk + 1) << low, saturate_above + 1), dtype=np.int64)
        value = _true(function, everything[u])
        # spacing of the inputs, so that the mean is over a uniform distribution of x
        weight = np.exp2((u >> fmt.mantissa_bits) - float(fmt.bias))
        rows.append(_Row(chunk & (index.rows - 1), u & fmt.mantissa_mask, value, fmt.encode(value), weight))
    return rows, everything


def _candidates(
    row: _Row, fmt: Format, values: Values, form: str, shifts: Sequence[int], objective: str, bound: float
) -> _Candidates:
    """Every (r, base) of a row whose error is within the bound; over all bases, none left out."""
    found = []
    top = fmt.one if row.value.max() <= 1.0 else fmt.last - 1
    for r in shifts:
        k = row.mantissa >> r
        base = np.arange(-int(k[0]), top - int(k[-1]) + 1, dtype=np.int64)
        if form == "shift":  # no carry: all values of the row share one exponent
            base = base[(base + k[0]) >> fmt.mantissa_bits == (base + k[-1]) >> fmt.mantissa_bits]
        max_abs, max_ulp, square = (np.zeros(base.size) for _ in range(3))
        # the ends first: they reject most bases at once
        for j in [0, len(k) - 1, *range(1, len(k) - 1)][: len(k)]:
            y = base + k[j]
            error = np.abs(values[y] - row.value[j])
            max_abs = np.maximum(max_abs, error)
            max_ulp = np.maximum(max_ulp, np.abs(y - row.bits[j]))
            square = square + row.weight[j] * error**2
            good = {"max_abs": max_abs, "max_ulp": max_ulp, "rmse": square}[objective] <= bound + _SLACK
            base, max_abs, max_ulp, square = base[good], max_abs[good], max_ulp[good], square[good]
        shift = np.full(base.size, r, dtype=np.int64)
        found.append(_Candidates(shift, base, base + k[0], base + k[-1], max_abs, max_ulp, square))
    names = _Candidates.__dataclass_fields__
    return _Candidates(*(np.concatenate([getattr(c, name) for c in found]) for name in names))


def _least(row: _Row, fmt: Format, values: Values, form: str, shifts: Sequence[int], objective: str) -> float:
    """The least error that any (E, r, b) reaches on a row."""
    best = np.inf
    for r in shifts:
        error = _candidates(row, fmt, values, form, [r], objective, best).error(objective)
        best = min(best, float(error.min())) if error.size else best
    return best


@dataclass(frozen=True)
class Certificate:
    """What an exhaustive search over all (E, r, b) proves about one form of table.

    ``least`` is the smallest error (by ``objective``) that any table of the form has between T1 and T2; ``rows`` holds
    the smallest error of each row, in the order of the inputs.
    """

    objective: str
    least: float
    rows: tuple[float, ...]


def certify(
    function: Function = "tanh",
    fmt: str | Format = "bf16",
    index: BitIndex = BitIndex(2, 3),  # noqa: B008 (frozen)
    *,
    identity_below: float = 0.25,
    saturate_above: float = 3.75,
    form: str = "shift",
    objective: str = "max_abs",
) -> Certificate:
    """Search every (E, r, b) of every row: no table of the form can have a smaller error than the certificate's.

    The largest error of a table is that of its worst row, and rows are independent: the proof goes row by row.
    """
    f = formats.get(fmt)
    t1, t2 = (int(f.encode(value)) for value in (identity_below, saturate_above))
    rows, values = _rows(function, f, index, t1, t2)
    least = tuple(_least(row, f, values, form, range(f.mantissa_bits + 1), objective) for row in rows)
    return Certificate(objective, max(least), least)


def fit_shift(
    function: Function = "tanh",
    fmt: str | Format = "bf16",
    index: BitIndex = BitIndex(2, 3),  # noqa: B008 (frozen)
    *,
    identity_below: float = 0.25,
    saturate_above: float = 3.984375,
    form: str = "shift",
    objective: str = "max_abs",
    monotone: bool = False,
    few_shifts: bool = False,
    name: str | None = None,
) -> Table:
    """The best ``shift`` or ``carry`` table of an odd function that is x near 0 and 1 far out.

    Among the tables of least ``objective`` ("max_abs", "max_ulp" or "rmse", between T1 and T2) it takes that of
    least mean square error; with ``few_shifts`` first the fewest distinct r (a smaller multiplexer in hardware).
    ``monotone`` allows only tables that never fall, the steps at T1 and T2 included. ``identity_below`` and
    ``saturate_above`` are T1 and T2 as values. The "rmse" objective with ``monotone`` or ``few_shifts`` looks among
    rows of at most four times the least mean square.
    Raises ValueError for thresholds that the index cannot span, or when no monotone table exists.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if form not in ("shift", "carry"):
        raise ValueError(f'form must be "shift" or "carry", got {form!r}')
    f = formats.get(fmt)
    t1, t2 = (int(f.encode(value)) for value in (identity_below, saturate_above))
    rows, values = _rows(function, f, index, t1, t2)
    every = tuple(range(f.mantissa_bits + 1))
    least = [_least(row, f, values, form, every, objective) for row in rows]
    bounds = [4.0 * e for e in least] if objective == "rmse" else [max(least)] * len(rows)
    path: list[tuple[int, int]] | None = None
    for _ in range(40 if monotone else 1):
        lists = [_candidates(row, f, values, form, every, objective, b) for row, b in zip(rows, bounds, strict=True)]
        path = _choose(lists, every, t1, f.one, monotone, few_shifts)
        if path is not None:
            break
        bounds = [b * 1.05 if objective != "max_ulp" else b + 1 for b in bounds]
    if path is None:
        raise ValueError("no monotone table exists near the least error; use an index with more rows")
    table: list[tuple[int, int, int]] = [(f.bias, f.mantissa_bits, 0)] * index.rows
    for row, (r, base) in zip(rows, path, strict=True):
        e = (base + int(row.mantissa[0] >> r)) >> f.mantissa_bits
        table[row.number] = (e, r, base - (e << f.mantissa_bits))
    return Table(
        name=name or f"{_name_of(function)}_{f.name}_{form}{index.rows}",
        function=_name_of(function),
        format=f.name,
        form=form,
        index=index,
        rows=tuple(table),
        identity_below=t1,
        saturate_above=t2,
    )


def _choose(
    lists: list[_Candidates], every: Sequence[int], t1: int, one: int, monotone: bool, few_shifts: bool
) -> list[tuple[int, int]] | None:
    subsets = [every]
    if few_shifts:
        subsets = [s for size in range(1, len(every) + 1) for s in combinations(every, size)]
    for subset in subsets:
        kept = [c.keep(np.isin(c.shift, subset)) for c in lists]
        if any(c.base.size == 0 for c in kept):
            continue
        path = _monotone_path(kept, t1, one) if monotone else [_best(c) for c in kept]
        if path is not None:
            return path
    return None


def _best(c: _Candidates) -> tuple[int, int]:
    i = int(np.lexsort((c.base, c.shift, c.max_abs, c.square))[0])
    return int(c.shift[i]), int(c.base[i])


def _monotone_path(lists: list[_Candidates], t1: int, one: int) -> list[tuple[int, int]] | None:
    """Dynamic program over the last value of a row: least mean square with no fall between rows."""
    best: dict[int, tuple[float, list[tuple[int, int]]]] = {t1 - 1: (0.0, [])}
    for c in lists:
        following: dict[int, tuple[float, list[tuple[int, int]]]] = {}
        ends = sorted(best)
        running: list[tuple[float, int]] = []
        for end in ends:  # the cheapest way to arrive at or below each end
            here = (best[end][0], end)
            running.append(min(running[-1], here) if running else here)
        for i in range(c.base.size):
            if c.last[i] > one:
                continue
            at = int(np.searchsorted(ends, int(c.first[i]), side="right")) - 1
            if at < 0:
                continue
            cost, end = running[at]
            total, last = cost + float(c.square[i]), int(c.last[i])
            if last not in following or total < following[last][0]:
                following[last] = (total, [*best[end][1], (int(c.shift[i]), int(c.base[i]))])
        if not following:
            return None
        best = following
    return min(best.items(), key=lambda item: (item[1][0], item[0]))[1][1]


def line(low: Bits, high: Bits, fraction_bits: int) -> tuple[int, int, int] | None:
    """Integers (S, B) with ``low[d] <= (B + S * d) >> f <= high[d]`` for every d, and the room left over; None if none.

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


def _allowed(function: Function, fmt: Format, bits: Bits, max_abs: float | None) -> tuple[Bits, Bits]:
    """The interval of bits allowed for each input: the rounded value, or all magnitudes within ``max_abs`` of it."""
    if max_abs is None:
        if isinstance(function, str):
            target = oracle.rounded(function, fmt, bits)[0]
        else:
            target = fmt.encode(_true(function, fmt.decode(bits)))
        return target, target
    value = np.abs(_true(function, fmt.decode(bits)))
    grid = fmt.decode(np.arange(fmt.last + 1, dtype=np.int64))
    return np.searchsorted(grid, value - max_abs), np.searchsorted(grid, value + max_abs, side="right") - 1


def fit_linear(
    function: Function = "tanh",
    fmt: str | Format = "bf16",
    rows: int = 64,
    *,
    fraction_bits: int = 6,
    max_abs: float | None = None,
    starts: int = 24,
    name: str | None = None,
) -> Table:
    """A ``linear`` table, correctly rounded or within ``max_abs``, of an odd function: x near 0 and 1 far out.

    Searches ``starts`` beginnings below the first input that is not its own value, and factors that fill the rows.
    Raises ValueError when no table with that many rows does it; ask for more rows or a larger ``max_abs``.
    """
    f = formats.get(fmt)
    u = np.arange(f.last + 1, dtype=np.int64)
    low, high = _allowed(function, f, u, max_abs)
    inside = (low <= u) & (u <= high)
    first = int(np.argmin(inside))
    end = int(np.argmax((low <= f.one) & (f.one <= high) & (u > f.one)))
    offset = (int(low[first - starts]) >> (16 - fraction_bits)) << (16 - fraction_bits)
    fits: dict[tuple[int, int], tuple[int, int] | None] = {}
    for start in range(first - 1, first - 1 - starts, -1):
        length = end - start
        most = (rows << 16) // length + 1
        d = np.arange(length + 1, dtype=np.int64)
        for factor in range(most, most - most // 5, -1):
            t = d * factor >> 16
            if t[-1] >= rows:
                continue
            cuts = np.searchsorted(t, np.arange(t[-1] + 2)) + start
            lines = []
            for a, b in pairwise(cuts):
                key = (int(a), int(b))
                if key not in fits:
                    found = line(low[a:b] - offset, high[a:b] - offset, fraction_bits)
                    fits[key] = found and found[:2]
                fitted = fits[key]
                if fitted is None:
                    break
                slope, base = fitted
                lines.append((slope & 0xFFFF, (base - slope * (key[0] - start)) & 0xFFFF))
            else:
                return Table(
                    name=name or f"{_name_of(function)}_{f.name}_linear{rows}",
                    function=_name_of(function),
                    format=f.name,
                    form="linear",
                    index=MultiplyIndex(start, length, factor),
                    rows=tuple(lines),
                    identity_below=start,
                    fraction_bits=fraction_bits,
                    offset=offset,
                )
    raise ValueError(f"no linear table of {rows} rows does it; ask for more rows or a larger max_abs")


def fit_segments(
    function: Function,
    fmt: str | Format,
    *,
    fraction_bits: int = 10,
    max_abs: float | None = None,
    symmetry: str | None = None,
    name: str | None = None,
) -> Table:
    """The ``segments`` table with the fewest rows that is correctly rounded, or within ``max_abs``, on every input.

    Each row reaches as far as a line can (which is optimal for cutting a line into intervals). Symmetry is "odd" for
    tanh and "none" else unless given. Formats of at most 16 bits.
    """
    f = formats.get(fmt)
    symmetry = symmetry or ("odd" if function == "tanh" else "none")
    rows: list[tuple[int, int, int]] = []
    for sign in (0,) if symmetry == "odd" else (0, f.sign):
        bits = np.arange(f.last + 1, dtype=np.int64) + sign
        low, high = _allowed(function, f, bits, max_abs)
        if max_abs is not None:  # magnitudes: give back the sign of the value
            negative = np.signbit(_true(function, f.decode(bits))) * f.sign
            low, high = low + negative, high + negative
        at, reach = 0, 64
        while at < len(bits):
            reach, fit = _furthest(low[at:], high[at:], fraction_bits, reach)
            rows.append((int(bits[at]), *fit))
            at += reach
    return Table(
        name=name or f"{_name_of(function)}_{f.name}",
        function=_name_of(function),
        format=f.name,
        form="segments",
        index=CutIndex(),
        rows=tuple(rows),
        symmetry=symmetry,
        fraction_bits=fraction_bits,
    )


def _furthest(low: Bits, high: Bits, fraction_bits: int, guess: int) -> tuple[int, tuple[int, int]]:
    """The longest prefix that one line fits, and the line: gallop from the guess, then bisect."""

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
    found = attempt(good)
    assert found is not None
    return good, found[:2]
