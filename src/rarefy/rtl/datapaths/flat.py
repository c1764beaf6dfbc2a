"""A function of a narrow format as one truth table: what synthesis makes of it knows nothing of how it was computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rarefy.act.spec.formats import Format
from rarefy.rtl.datapaths.lane import Lane, Wire
from rarefy.rtl.design import literal


@dataclass(frozen=True)
class _Run:
    """Inputs ``first`` to ``last`` that all give ``value``, or, where that is None, themselves plus ``plus``."""

    first: int
    last: int
    value: int | None
    plus: int


def flat(fmt: Format, results: npt.NDArray[Any]) -> Lane:
    """Make the lane of ``results``, one for every bit pattern of the format.

    Long runs of inputs that give one result, or themselves plus a constant, are comparisons; the rest is a case. An odd
    function is tabulated by magnitude.
    """
    y = np.asarray(results, dtype=np.int64)
    n = fmt.bits
    half = fmt.sign
    odd = bool((y[half:] == y[:half] | half).all()) and not (y[:half] & half).any()
    w = n - 1 if odd else n
    y = y[: 1 << w]
    # in 8 bits a case of everything is as clear
    runs = _runs(y, 1 << (fmt.mantissa_bits - 1)) if n > 8 else []
    inside = np.ones(len(y), dtype=bool)
    for run in runs:
        inside[run.first : run.last + 1] = False
    cases = np.flatnonzero(inside)
    lines = [
        f"  function automatic logic [{w - 1}:0] value(input logic [{w - 1}:0] u);",
        "    case (u)",
        *(f"      {literal(w, u)}: value = {literal(w, y[u])};" for u in cases),
        *(["      default: value = 'x;  // no input reads it"] if len(cases) < len(y) else []),
        "    endcase",
        "  endfunction\n",
    ]
    u = f"x[{w - 1}:0]"
    lookup = [Wire("listed", w, f"value({u})")]
    chosen = ""
    for number, run in enumerate(runs):
        ends = [f"{u} >= {literal(w, run.first)}"] * (run.first > 0)
        ends += [f"{u} <= {literal(w, run.last)}"] * (run.last < len(y) - 1)
        lookup.append(Wire(f"run{number}", 1, " && ".join(ends) or literal(1, 1)))
        moved = f"{u} + {literal(w, run.plus)}" if run.plus else u
        chosen += f"run{number} ? {moved if run.value is None else literal(w, run.value)} : "
    finish = [
        Wire("looked_up", w, chosen + "listed"),
        Wire("result", n, f"{{x[{n - 1}], looked_up}}" if odd else "looked_up"),
    ]
    return Lane("\n".join(lines), lookup, finish, ("x", *(wire.name for wire in lookup)))


def _runs(y: npt.NDArray[np.int64], shortest: int) -> list[_Run]:
    """Find the maximal runs of a constant, or of the input plus a constant; of both kinds the longer."""
    u = np.arange(len(y))
    reaches = []
    for values in (y, y - u):
        changes = np.flatnonzero(np.diff(values)) + 1
        reaches.append(np.append(changes, len(y))[np.searchsorted(changes, u, side="right")])
    runs, at = [], 0
    while at < len(y):
        ends = [int(reach[at]) for reach in reaches]
        end = max(ends)
        if end - at >= shortest:
            constant = ends[0] == end
            runs.append(_Run(at, end - 1, int(y[at]) if constant else None, 0 if constant else int(y[at] - at)))
            at = end
        else:
            at += 1
    return runs
