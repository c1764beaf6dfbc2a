"""Fit ``shift`` and ``carry`` tables by a search over every (E, r, b) of every row, so that the optimum is a proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rarefy.act.spec import formats, oracle
from rarefy.act.spec.formats import Bits, Format, Values
from rarefy.act.spec.oracle import Function
from rarefy.act.spec.table import BitIndex, CarryTable, ShiftTable

#: What a fit may make least: the largest error, the largest in units of the last place, the root mean square.
OBJECTIVES = ("max_abs", "max_ulp", "rmse")
_SLACK = 1e-12  # float64 noise when two error bounds are compared


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


def _thresholds(fmt: Format, index: BitIndex, low: float, high: float | None) -> tuple[int, int]:
    """T1 and T2 as bits; T2 is the last number below 4 unless given."""
    if not (0 < index.exponent_bits <= fmt.exponent_bits and 0 <= index.mantissa_bits <= fmt.mantissa_bits):
        raise ValueError(f"{index} does not fit {fmt.name}")
    t1 = int(fmt.encode(low))
    t2 = int(fmt.encode(4.0)) - 1 if high is None else int(fmt.encode(high))
    if not 0 < t1 <= t2 < fmt.last:
        raise ValueError(
            f"needs 0 < T1 <= T2, both finite in {fmt.name}; got {low} and {4.0 if high is None else high}"
        )
    return t1, t2


def _rows(
    function: Function, fmt: Format, index: BitIndex, identity_below: int, saturate_above: int
) -> tuple[list[_Row], Values]:
    if fmt.bits > 16:
        raise ValueError(f"fits go over every input, so {fmt.name} is too wide: fit in bf16 or fp16, then to_format")
    if not oracle.is_odd(function):
        raise ValueError(f"shift and carry tables are for odd functions, {oracle.name_of(function)} is none: segments")
    low = fmt.mantissa_bits - index.mantissa_bits
    chunks = range(identity_below >> low, (saturate_above >> low) + 1)
    if not 0 < len(chunks) <= index.rows:
        raise ValueError(f"T1 to T2 spans {len(chunks)} rows, but {index} addresses {index.rows}")
    everything = fmt.decode(np.arange(fmt.last + 1, dtype=np.int64))
    rows = []
    for chunk in chunks:
        u = np.arange(max(chunk << low, identity_below), min((chunk + 1) << low, saturate_above + 1), dtype=np.int64)
        value = oracle.evaluate(function, everything[u])
        # spacing of the inputs, so that the mean is over a uniform distribution of x
        weight = np.exp2((u >> fmt.mantissa_bits) - float(fmt.bias))
        rows.append(_Row(chunk & (index.rows - 1), u & fmt.mantissa_mask, value, fmt.encode(value), weight))
    return rows, everything


def _candidates(
    row: _Row, fmt: Format, values: Values, form: str, shifts: Sequence[int], objective: str, bound: float
) -> _Candidates:
    """Find every (r, base) of a row whose error is within the bound; over all bases, none left out."""
    parts = []
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
        parts.append(_Candidates(shift, base, base + k[0], base + k[-1], max_abs, max_ulp, square))
    names = _Candidates.__dataclass_fields__
    return _Candidates(*(np.concatenate([getattr(c, name) for c in parts]) for name in names))


def _least(row: _Row, fmt: Format, values: Values, form: str, shifts: Sequence[int], objective: str) -> float:
    """Find the least error that any (E, r, b) reaches on a row."""
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
    saturate_above: float | None = 3.75,
    form: str = "shift",
    objective: str = "max_abs",
) -> Certificate:
    """Search every (E, r, b) of every row: no table of the form can have a smaller error than the certificate's.

    The largest error of a table is that of its worst row, and rows are independent: the proof goes row by row.
    """
    f = formats.get(fmt)
    t1, t2 = _thresholds(f, index, identity_below, saturate_above)
    rows, values = _rows(function, f, index, t1, t2)
    least = tuple(_least(row, f, values, form, range(f.mantissa_bits + 1), objective) for row in rows)
    return Certificate(objective, max(least), least)


def fit_shift(
    function: Function = "tanh",
    fmt: str | Format = "bf16",
    index: BitIndex = BitIndex(2, 3),  # noqa: B008 (frozen)
    *,
    identity_below: float = 0.25,
    saturate_above: float | None = None,
    form: str = "shift",
    objective: str = "max_abs",
    monotone: bool = False,
    few_shifts: bool = False,
    name: str | None = None,
) -> ShiftTable:
    """Fit the best ``shift`` or ``carry`` table of an odd function that is x near 0 and 1 far out.

    Among the tables of least ``objective`` ("max_abs", "max_ulp" or "rmse", between T1 and T2) it takes that of
    least mean square error; with ``few_shifts`` first the fewest distinct r (a smaller multiplexer in hardware).
    ``monotone`` allows only tables that never fall, the steps at T1 and T2 included. ``identity_below`` and
    ``saturate_above`` are T1 and T2 as values; T2 is the last number below 4 unless given. The "rmse"
    objective with ``monotone`` or ``few_shifts`` looks among rows of at most four times the least mean square.
    Raises ValueError for thresholds that the index cannot span, for a function that is not odd or a format of more than
    16 bits, or when no monotone table exists.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if form not in ("shift", "carry"):
        raise ValueError(f'form must be "shift" or "carry", got {form!r}')
    f = formats.get(fmt)
    t1, t2 = _thresholds(f, index, identity_below, saturate_above)
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
    return (ShiftTable if form == "shift" else CarryTable)(
        name=name or f"{oracle.name_of(function)}_{f.name}_{form}{index.rows}",
        function=oracle.name_of(function),
        format=f.name,
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
