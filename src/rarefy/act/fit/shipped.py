"""The shipped tables: how each is made, and writing them again (``rarefy table fit``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rarefy._files import write_atomically
from rarefy.act import fit
from rarefy.act.fit.quartic import fit_quartic
from rarefy.act.spec import error, formats, oracle, quartic
from rarefy.act.spec.oracle import TABLED
from rarefy.act.spec.table import BitIndex, SegmentsTable, ShiftTable, Table, load

# The 32 rows (E, r, b) of arXiv 1909.07729, in the order of the 5-bit index, with its T1 = 0.25 and T2 = 3.75.
# fmt: off
_PUBLISHED_ROWS = (
    (126, 2, 119), (126, 4, 122), (126, 4, 123), (126, 4, 123),
    (126, 6, 126), (126, 6, 126), (126, 6, 126), (126, 6, 126),
    (125, 1, 1), (125, 0, -4), (125, 0, -6), (125, 0, -7), (125, 0, -10), (125, 0, -12), (125, 0, -15), (125, 0, -18),
    (125, 0, 112), (126, 1, -4), (126, 1, -1), (126, 1, 2), (126, 1, 3), (126, 1, 4), (126, 1, 4), (126, 1, 4),
    (126, 0, 65), (126, 1, 72), (126, 1, 73), (126, 1, 73), (126, 2, 88), (126, 2, 89), (126, 2, 89), (126, 4, 110),
)
# fmt: on


def published() -> ShiftTable:
    """Return the table of the paper."""
    return ShiftTable(
        name="tanh_bf16_ktanh",
        function="tanh",
        format="bf16",
        index=BitIndex(2, 3),
        rows=_PUBLISHED_ROWS,
        identity_below=0x3E80,
        saturate_above=0x4070,
    )


def _segments(function: str, fmt: str) -> Callable[[], Table]:
    return lambda: fit.fit_segments(function, fmt, name=f"{function}_{fmt}")


#: Largest absolute and relative error, and the grid in bf16, of the tables whose slopes are shifts: small hardware.
SHIFTS = {"tanh": (0.0089, 0.0, 4), "sigmoid": (2**-7, 0.0, 3), "silu": (2**-6, 2**-7, 1), "gelu": (2**-6, 2**-7, 2)}


def _shifts(function: str, fmt: str) -> Callable[[], Table]:
    max_abs, max_rel, grid = SHIFTS[function]
    grid += formats.get(fmt).mantissa_bits - formats.BF16.mantissa_bits
    return lambda: fit.fit_segments(
        function,
        fmt,
        fraction_bits=2,
        max_abs=max_abs,
        max_rel=max_rel,
        shifts=True,
        grid=grid,
        name=f"{function}_{fmt}_shifts",
    )


#: How each shipped table is made: the published one, K-TanH tables of our own, and one correctly rounded table for
#: every function of ``TABLED`` and format (``tanh_bf16`` in the form that the vector kernels run, the others as
#: segments); and segments whose slopes are shifts, for hardware.
BUILDERS: dict[str, Callable[[], Table]] = {
    "tanh_bf16_ktanh": published,
    "tanh_bf16_monotone": lambda: fit.fit_shift(monotone=True, name="tanh_bf16_monotone"),
    "tanh_bf16_few_shifts": lambda: fit.fit_shift(monotone=True, few_shifts=True, name="tanh_bf16_few_shifts"),
    "tanh_bf16_carry64": lambda: fit.fit_shift(
        index=BitIndex(2, 4), form="carry", monotone=True, name="tanh_bf16_carry64"
    ),
    "tanh_bf16": lambda: fit.fit_linear(name="tanh_bf16"),
} | {
    f"{function}_{fmt}": _segments(function, fmt)
    for fmt in ("bf16", "fp16", "e4m3fn", "e5m2")
    for function in TABLED
    if (function, fmt) != ("tanh", "bf16")
}
BUILDERS |= {f"{function}_{fmt}_shifts": _shifts(function, fmt) for fmt in ("bf16", "fp16") for function in SHIFTS}


def write(folder: str | Path) -> list[Table]:
    """Make every shipped table again, write them to ``folder`` and return them; the files are the same each time.

    The coefficients of exact tanh in float32 go to ``quartic/tanh_fp32.json`` there.
    """
    tables = [build() for build in BUILDERS.values()]
    for table in tables:
        table.save(Path(folder) / f"{table.name}.json")
    coefficients = Path(folder) / "quartic" / "tanh_fp32.json"
    write_atomically(coefficients, lambda beside: beside.write_text(fit_quartic().to_json(), encoding="utf-8"))
    return tables


@dataclass(frozen=True)
class Proof:
    """What was proven of a table, over all inputs of its format.

    Attributes:
        name: the table.
        statement: what it is, in words, with the figures that were found.
        holds: whether it is so, and whether the table is the shipped one.

    """

    name: str
    statement: str
    holds: bool


def prove(table: Table) -> Proof:
    """Prove what is claimed of a shipped table: correct rounding, or the least error of its form and no falls."""
    errors = error.of(table)
    same = load(table.name) == table
    if isinstance(table, ShiftTable):
        f = table.fmt
        t1, t2 = (float(f.decode(bits)) for bits in (table.identity_below, table.saturate_above))
        least = fit.certify(table.function, f, table.index, identity_below=t1, saturate_above=t2, form=table.form).least
        claim = f"largest error {errors.max_abs:.6f}, falls {errors.falls} times; no such table is below {least:.6f}"
        # the monotone carry table is not of least error: rows would meet in falls
        holds = errors.falls == 0 if table.carries else errors.max_abs == least
        holds &= errors.falls == 0 or table.name == "tanh_bf16_ktanh"
        return Proof(table.name, claim, bool(holds and same))
    if isinstance(table, SegmentsTable) and table.name.endswith("_shifts"):
        return _prove_shifts(table, errors.max_abs, same)
    _, margin = oracle.rounded(table.function, table.fmt, table.fmt.all_bits())
    claim = f"correctly rounded on all inputs; none is nearer to a tie than {margin:.1e} ulp"
    return Proof(table.name, claim, errors.misrounded == 0 and same)


def _prove_shifts(table: SegmentsTable, largest: float, same: bool) -> Proof:
    """Prove every result within one of the two errors or rounded right, and every slope 0 or a power of two."""
    fmt = table.fmt
    max_abs, max_rel, _ = SHIFTS[table.function]
    x = fmt.all_bits()
    x = x[~fmt.is_nan(x)]
    y, right = table.compute(x), oracle.rounded(table.function, fmt, x)[0]
    value, given = fmt.decode(right), fmt.decode(y)
    true = np.where(np.isinf(value), value, oracle.evaluate(table.function, fmt.decode(x)))
    with np.errstate(invalid="ignore"):
        near = np.abs(given - true) <= np.maximum(max_abs, max_rel * np.abs(true))
    shifts = all(abs(s) & (abs(s) - 1) == 0 for _, s, _ in table.rows)
    error = f"{max_abs:g}" + (f" or {100 * max_rel:.2g} %" if max_rel else "")
    claim = f"within {error} of every result, largest error {largest:.6f}, by shifts alone in {len(table.rows)} rows"
    return Proof(table.name, claim, bool((near | (y == right)).all()) and shifts and same)


def prove_quartic() -> Proof:
    """Prove the float32 coefficients of tanh: made again, and their bounds on 830,000 inputs of neither x nor 1.

    Every input of float32 is a matter of minutes, not of this: ``make test-float32``.
    """
    x = np.arange(0x39000000, 0x41200000, 163, dtype=np.uint32)
    y, true = formats.FP32.decode(quartic.tanh().compute(x)), np.tanh(formats.FP32.decode(x))
    last_place = np.exp2(np.floor(np.log2(true)) - 23.0)
    largest, ulp = float(np.abs(y - true).max()), float((np.abs(y - true) / last_place).max())
    holds = fit_quartic() == quartic.tanh() and largest <= quartic.MAX_ABS and ulp <= quartic.MAX_ULP
    return Proof("quartic/tanh_fp32", f"within {largest:.2e} and {ulp:.2f} ulp on {x.size} inputs", bool(holds))
