"""The shipped tables: how each is made, and writing them again (``rarefy table fit``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rarefy.act import fit
from rarefy.act.oracle import FUNCTIONS
from rarefy.act.table import BitIndex, Table

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


def published() -> Table:
    """The table of the paper."""
    return Table(
        name="tanh_bf16_ktanh",
        function="tanh",
        format="bf16",
        form="shift",
        index=BitIndex(2, 3),
        rows=_PUBLISHED_ROWS,
        identity_below=0x3E80,
        saturate_above=0x4070,
    )


def _segments(function: str, fmt: str) -> Callable[[], Table]:
    return lambda: fit.fit_segments(function, fmt, name=f"{function}_{fmt}")


#: How each shipped table is made: the published one, K-TanH tables of our own, and one correctly rounded table for
#: every function and format (``tanh_bf16`` in the form that the vector kernels run, the others as segments).
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
    for function in FUNCTIONS
    if (function, fmt) != ("tanh", "bf16")
}


def write(folder: str | Path) -> list[Table]:
    """Make every shipped table again, write them to ``folder`` and return them; the files are the same each time."""
    tables = [build() for build in BUILDERS.values()]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for table in tables:
        table.save(Path(folder) / f"{table.name}.json")
    return tables
