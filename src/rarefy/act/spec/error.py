"""How far a table, or any array of answers for all inputs of a format, is from the true function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rarefy.act.spec import formats, oracle
from rarefy.act.spec.formats import Bits, Format, Values
from rarefy.act.spec.oracle import Function
from rarefy.act.spec.table import SegmentsTable, Table


@dataclass(frozen=True)
class Errors:
    """Exhaustive errors over every input of a format that is not NaN.

    Attributes:
        max_abs: largest absolute error against the true function.
        worst: the input of that error.
        max_ulp: largest distance to the correctly rounded result, counted in representable numbers.
        misrounded: how many inputs do not give the correctly rounded result.
        falls: how often the result falls from one input to the next larger one (SiLU and GELU do so by nature).
        rmse: root of the mean square error for x uniform on [-4, 4].

    """

    max_abs: float
    worst: float
    max_ulp: int
    misrounded: int
    falls: int
    rmse: float


def measure(function: Function, fmt: str | Format, answers: npt.ArrayLike) -> Errors:
    """Measure the errors of ``answers[bits]``, the results for all bit patterns of a format of at most 16 bits.

    Inputs where the function has no value (a callable may give NaN at infinity) do not count.
    """
    f = formats.get(fmt)
    bits = f.all_bits()
    y = np.asarray(answers, dtype=np.int64)
    if y.shape != bits.shape:
        raise ValueError(
            f"answers must hold one result for each of the {bits.size} patterns of {f.name}, got {y.shape}"
        )
    right, _ = oracle.rounded(function, f, bits)
    # by rising value: negative patterns in reverse, then the positive ones
    order = np.concatenate([np.arange(f.sign + f.last, f.sign - 1, -1), np.arange(0, f.last + 1)])
    order = order[~np.isnan(oracle.evaluate(function, f.decode(bits[order])))]
    bits, y, right = bits[order], y[order], right[order]
    x, value = f.decode(bits), f.decode(y)
    with np.errstate(invalid="ignore"):
        error = np.abs(value - oracle.evaluate(function, x))
    error = np.where(y == right, np.where(np.isfinite(error), error, 0.0), error)
    ordinal, target = (np.where(b & f.sign, -(b & (f.sign - 1)), b) for b in (y, right))
    inside = np.abs(x) <= 4.0
    gaps = np.gradient(x[inside])  # what each input stands for on the real line
    worst = int(np.nanargmax(error))
    return Errors(
        max_abs=float(error[worst]),
        worst=float(x[worst]),
        max_ulp=int(np.abs(ordinal - target).max()),
        misrounded=int((y != right).sum()),
        falls=int((np.diff(ordinal) < 0).sum()),
        rmse=float(np.sqrt(np.average(error[inside] ** 2, weights=gaps))),
    )


def of(table: Table, function: Function | None = None) -> Errors:
    """Measure the errors of a table over all inputs of its format, against ``function`` or the one that it names."""
    answers: npt.NDArray[Any] = table.compute(table.fmt.all_bits())
    return measure(function or table.function, table.fmt, answers)


#: No known function is steeper than this (hardswish is the steepest) but exp, and beyond 32 each is its limit to 13
#: digits.
_STEEPEST = 1.5
_LIMIT = 32.0


def largest(table: Table, function: str | None = None) -> float:
    """Find the largest absolute error of a table over all inputs of its format, float32 too; of a known function.

    Where there are too many inputs to try, by branch and bound: between two inputs of a row neither the result nor the
    function moves farther than its ends and its slope allow, and only where that could exceed the largest error known
    are the inputs between looked at. Raises ValueError for a function that is not one of
    :data:`~rarefy.act.spec.oracle.FUNCTIONS`, and for exp in float32, which has no steepest slope.
    """
    name = function or table.function
    if name not in oracle.FUNCTIONS:
        raise ValueError(f"function must be one of {', '.join(oracle.FUNCTIONS)}, got {name!r}")
    fmt = table.fmt
    if fmt.bits <= 16:
        return of(table, name).max_abs
    if name == "exp":
        raise ValueError("exp in fp32 has no largest slope to search by: measure a table of it in a format of 16 bits")

    def error(bits: Bits) -> tuple[Values, Values, Values]:
        x, y = fmt.decode(bits), fmt.decode(table.compute(bits))
        return x, y, np.abs(y - oracle.evaluate(name, x))

    worst = 0.0
    for sign in (0, fmt.sign):
        cuts = [sign, sign + table.identity_below, sign + table.saturate_above + 1]
        if isinstance(table, SegmentsTable):
            cuts += [first + (sign if table.symmetry == "odd" else 0) for first, _, _ in table.rows]
        step = fmt.bits - 16
        end = sign + fmt.last
        begins = np.unique([*cuts, *np.arange(sign, end, 1 << step)])
        begins = begins[(begins >= sign) & (begins < end)]
        lasts = np.append(begins[1:], end) - 1
        while begins.size:
            (x0, y0, e0), (x1, y1, e1) = error(begins), error(lasts)
            worst = max(worst, float(e0.max()), float(e1.max()))
            moved = np.where(np.abs(x0) < _LIMIT, np.abs(y1 - y0) + _STEEPEST * np.abs(x1 - x0), 0.0)
            open_ = (np.maximum(e0, e1) + moved > worst) & (lasts - begins > 1)
            begins, lasts = begins[open_], lasts[open_]
            # sixteen parts of each
            width = -(-(lasts - begins + 1) // 16)
            parts = begins[:, None] + width[:, None] * np.arange(16)
            ends = np.minimum(parts + width[:, None] - 1, lasts[:, None])
            inside = parts <= lasts[:, None]
            begins, lasts = parts[inside], ends[inside]
    return worst
