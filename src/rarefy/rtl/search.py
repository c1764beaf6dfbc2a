"""The smallest unit of an error bound: what a table cannot know, hardware does.

Two families are searched. Units of pure logic (:mod:`rarefy.rtl.logic`) spend the whole error bound on fewer products.
Tables of the form ``carry`` (K-TanH with a sum that may cross into the next exponent) get few distinct shifts, and
bases whose bits are the cheapest functions of the row's number, unused rows left open. A fast cost (literals and
products, then ABC on the bare logic) leads the search; the few best are synthesised by the same scripts as every other
design, and the result is the best of those. The same seed gives the same answer under the same version of ABC.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from rarefy import _checks
from rarefy.act.spec import error as errors
from rarefy.act.spec import formats, oracle
from rarefy.act.spec.formats import Bits, Format
from rarefy.act.spec.oracle import Function
from rarefy.act.spec.table import BitIndex, CarryTable, Table
from rarefy.rtl import arguments
from rarefy.rtl.design import Design
from rarefy.rtl.eda import flow, tools
from rarefy.rtl.eda.synth import SCRIPTS, Synthesis, synth
from rarefy.rtl.emit import emit
from rarefy.rtl.logic.covers import Choice, Relation
from rarefy.rtl.logic.unit import LogicSpec, LogicUnit, allowed

KINDS = ("logic", "table")
GOALS = {"area": "area", "delay": "speed"}
_STARTS = 16
_FINALISTS = 12


class Tried(NamedTuple):
    """A design, and what it costs by the script of the goal."""

    design: Design
    synthesis: Synthesis


@dataclass(frozen=True)
class Found:
    """What a search gives.

    Attributes:
        design: the best design.
        synthesis: what it costs by the script of the goal.
        max_abs: its largest absolute error over all inputs.
        unit: the unit of logic that the design is, to be saved; None if it is a table.
        tried: every design that was synthesised, with its cost, the best first.

    """

    design: Design
    synthesis: Synthesis
    max_abs: float
    unit: LogicUnit | None
    tried: tuple[Tried, ...]


def smallest(
    function: Function = "tanh",
    fmt: str = "bf16",
    error: float = 0.00892,
    *,
    goal: str = "area",
    kinds: Sequence[str] = KINDS,
    exact_limit: bool = False,
    steps: int = 300,
    seed: int = 0,
    liberty: str | Path | None = None,
) -> Found:
    """Search for the smallest (or fastest) unit with a largest absolute error of at most ``error``.

    Args:
        function: an odd function that is near x at 0 and has a limit of at most 1: "tanh", or one of yours.
        fmt: a format of at most 16 bits.
        error: largest absolute error over all inputs.
        goal: "area" (gate equivalents by the area script) or "delay" (nanoseconds by the speed script).
        kinds: which families: "logic", "table" or both.
        exact_limit: units of logic give the function's limit itself far out; tables always do.
        steps: how many changes of the logic are tried, each with a run of ABC of some hundredths of a second.
        seed: of the search.
        liberty: a liberty file of your own; default OSU 0.18 um.

    Raises ValueError for arguments that make no sense or when no unit of these families keeps the error, and
    MissingToolError, naming the package, without Yosys or cells.

    """
    steps, seed = _checks.whole("steps", steps, 0), arguments.seed(seed)
    _checks.flag("exact_limit", exact_limit)
    _check(function, fmt, error, goal, kinds)
    f = formats.get(fmt)
    cells = flow.library(None if liberty is None else Path(liberty))
    tools.yosys_version()
    units = _units(function, f.name, error, goal, exact_limit, steps, seed, cells) if "logic" in kinds else []
    designs = [unit.design() for unit in units]
    if "table" in kinds:
        designs += [emit(table, nan="quiet") for table in tables(function, f.name, error, seed=seed)[:_FINALISTS]]
    if not designs:
        name = oracle.name_of(function)
        raise ValueError(f"no {name} in {f.name} was found with an error of at most {error:g}: allow a larger one")
    timing = None if goal == "delay" else False
    tried = [Tried(design, synth(design, liberty, GOALS[goal], timing=timing)) for design in designs]
    best = min(range(len(tried)), key=lambda i: measure(tried[i].synthesis, goal))
    design, synthesis = tried[best]
    largest = errors.measure(function, f, design.compute(f.all_bits())).max_abs
    tried.sort(key=lambda entry: measure(entry.synthesis, goal))
    return Found(design, synthesis, largest, units[best] if best < len(units) else None, tuple(tried))


def _check(function: Function, fmt: str, error: float, goal: str, kinds: Sequence[str]) -> None:
    """Raise ValueError for arguments of :func:`smallest` that make no sense."""
    f = formats.get(fmt)
    _checks.one_of("goal", goal, GOALS)
    if not isinstance(kinds, Sequence) or not kinds or any(kind not in KINDS for kind in kinds):
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {kinds!r}")
    if isinstance(error, (bool, str)) or not hasattr(error, "__float__") or not 0.0 < error < 0.5:
        raise ValueError(f"error must be a number between 0 and 0.5, got {error!r}")
    if f.bits > 16:
        raise ValueError(f"every input is looked at, so {f.name} is too wide: at most 16 bits")
    if not oracle.is_odd(function):
        raise ValueError(f"the search is for odd functions like tanh, {oracle.name_of(function)} is none")


def _units(
    function: Function,
    fmt: str,
    error: float,
    goal: str,
    exact_limit: bool,
    steps: int,
    seed: int,
    cells: flow.Library,
) -> list[LogicUnit]:
    """Search the units of logic; they are named after the goal and the digits of the error."""
    name = oracle.name_of(function)
    digits = f"{error:.6f}".rstrip("0")[2:]
    options = f"--format {fmt} --error {float(error)!r} --goal {goal} --steps {steps} --seed {seed}"
    command = f"rarefy rtl search {name} {options}" + " --exact-limit" * exact_limit
    return [
        LogicUnit(f"{name}_{fmt}_{goal}_{digits}", state.spec, state.choice.covers, command)
        for state in _logic(specs(function, fmt, error, exact_limit), goal, cells, steps, seed)
    ]


def measure(synthesis: Synthesis, goal: str) -> float:
    """Give what the goal counts of a synthesis: gate equivalents, or nanoseconds (ABC's where there is no OpenSTA)."""
    if goal == "area":
        return synthesis.gate_equivalents
    return synthesis.abc_delay_ns if synthesis.delay_ns is None else synthesis.delay_ns


def specs(function: Function, fmt: str, error: float, exact_limit: bool = False) -> list[LogicSpec]:
    """List the units of logic to be searched for: those that keep the error with the shortest middle there is.

    Those that stop just below the function's limit are left out with ``exact_limit``, and where the error is too small
    for them.
    """
    found = []
    for exact in (False, True)[exact_limit:]:
        for identity in range(0, -5, -1):
            for limit in range(max(identity, 0), 4):
                try:
                    found.append(LogicSpec(function, fmt, error, identity, limit, exact))
                except ValueError:
                    continue
        if found:
            break
    shortest = min((spec.limit - spec.identity for spec in found), default=0)
    return [spec for spec in found if spec.limit - spec.identity == shortest]


@dataclass(frozen=True)
class _State:
    """A unit of logic on the way, and its cost."""

    cost: float
    spec: LogicSpec
    choice: Choice


def _logic(every: Sequence[LogicSpec], goal: str, cells: flow.Library, steps: int, seed: int) -> list[_State]:
    """Anneal from the cheapest of several starts; give the best units, each netlist once."""
    rng = random.Random(seed)
    best: list[_State] = []
    with tempfile.TemporaryDirectory(prefix="rarefy-search-") as name:
        folder = Path(name)

        def cost(spec: LogicSpec, choice: Choice) -> float:
            area, delay = flow.abc(spec.blif(choice.covers), cells, SCRIPTS[GOALS[goal]], folder)
            # among nearly equally fast ones the smaller: 100 gates are worth a fiftieth of a nanosecond
            return area / cells.nand2 if goal == "area" else delay + 0.0002 * area / cells.nand2

        for spec in every:
            starts = [spec.relation.choose(rng) for _ in range(_STARTS)]
            for start in sorted(starts, key=lambda choice: choice.cost)[: _STARTS // 4]:
                choice = spec.relation.revise(start, rng.sample(range(spec.width), spec.width), rng, 3, 0.0)
                best.append(_State(cost(spec, choice), spec, choice))
        if not best:
            return []
        best.sort(key=lambda state: state.cost)
        now = best[0]
        for step in range(steps):
            choice = _changed(now.spec.relation, now.choice, rng)
            state = _State(cost(now.spec, choice), now.spec, choice)
            # relative, and falling to nothing: 1.5 % of the cost at the beginning
            temperature = 0.015 * now.cost * (1.0 - step / steps)
            if state.cost <= now.cost or rng.random() < math.exp((now.cost - state.cost) / temperature):
                now = state
                best.append(state)
    distinct = {
        state.cost: state for state in reversed(best)
    }  # of one cost to the last digit: nearly surely one netlist
    return sorted(distinct.values(), key=lambda state: state.cost)[:_FINALISTS]


def _changed(relation: Relation, choice: Choice, rng: random.Random) -> Choice:
    """Make another choice near a given one: some bits decided again, or all from one down."""
    if rng.random() < 0.3:
        return relation.choose(rng, choice, rng.randrange(relation.width), noise=0.15)
    return relation.revise(choice, rng.sample(range(relation.width), rng.choice((1, 1, 2, 3))), rng)


def tables(
    function: Function = "tanh",
    fmt: str = "bf16",
    error: float = 0.00892,
    *,
    rows: Sequence[int] = (4, 8, 16, 32, 64, 128, 256, 512),
    seed: int = 0,
) -> list[Table]:
    """Make tables of the form ``carry`` within an error, for little hardware; the cheapest by a fast cost first.

    T1 is the largest and T2 the smallest power of two (T2 the number below it) that the error allows. For every number
    of rows: the sets of the fewest distinct shifts that can keep the error, and those with one more; of each, bases
    whose bits are cheap functions of the row's number. The cost is the literals of those bits and, for each shift, one
    multiplexer. Empty when no such table keeps the error.
    """
    f = formats.get(fmt)
    least, most = allowed(function, f, error)
    u = np.arange(f.last + 1)
    wrong_identity, wrong_one = (u < least) | (u > most), (f.one < least) | (f.one > most)
    t1s = [t for k in range(1, -5, -1) if not wrong_identity[: (t := (f.bias + k) << f.mantissa_bits)].any()]
    t2s = [t - 1 for k in range(4) if not wrong_one[(t := (f.bias + k) << f.mantissa_bits) :].any()]
    if not t1s or not t2s or t1s[0] > t2s[0]:
        return []
    octaves = (t2s[0] >> f.mantissa_bits) - (t1s[0] >> f.mantissa_bits) + 1
    exponent_bits = max(1, (octaves - 1).bit_length())
    found: list[_Candidate] = []
    rng = random.Random(seed)
    for count in rows:
        index = BitIndex(exponent_bits, count.bit_length() - 1 - exponent_bits)
        if 0 <= index.mantissa_bits < f.mantissa_bits:
            found += _carry(_Wanted(function, f, index, t1s[0], t2s[0], least, most), rng)
    cheapest = {table.rows: table for _, table in sorted(found, key=lambda entry: entry.cost, reverse=True)}
    return list(cheapest.values())[::-1]


@dataclass(frozen=True)
class _Wanted:
    """What a table is to be: its index, T1, T2, and the least and largest right bits of every magnitude."""

    function: Function
    fmt: Format
    index: BitIndex
    t1: int
    t2: int
    least: Bits
    most: Bits


class _Interval(NamedTuple):
    """The bases that keep the error in all of a row."""

    least: int
    most: int


#: By row and shift, the bases that keep the error; a shift that has none is left out.
_Bases: TypeAlias = dict[int, dict[int, _Interval]]


class _Candidate(NamedTuple):
    """A table, and what it costs by the fast cost."""

    cost: float
    table: Table


def _carry(wanted: _Wanted, rng: random.Random) -> list[_Candidate]:
    """Make tables of one index, two for each set of shifts that is worth it."""
    bases = _bases(wanted)
    if not all(bases.values()):
        return []
    every = range(wanted.fmt.mantissa_bits + 1)
    fit = [s for size in range(1, len(every) + 1) for s in combinations(every, size) if _spanned(bases, s)]
    fewest = len(fit[0])
    found = []
    for shifts in (s for s in fit if len(s) <= fewest + 1 and len(s) <= 4):
        for _ in range(2):
            candidate = _candidate(wanted, bases, shifts, rng)
            if candidate is not None:
                found.append(candidate)
    return found


def _bases(wanted: _Wanted) -> _Bases:
    """Find the bases that keep the error: ``least <= base + (M >> r) <= most`` for all inputs of the row."""
    fmt, index = wanted.fmt, wanted.index
    low = fmt.mantissa_bits - index.mantissa_bits
    bases: _Bases = {}
    for chunk in range(wanted.t1 >> low, (wanted.t2 >> low) + 1):
        u = np.arange(max(chunk << low, wanted.t1), min((chunk + 1) << low, wanted.t2 + 1))
        intervals = {}
        for r in range(fmt.mantissa_bits + 1):
            k = (u & fmt.mantissa_mask) >> r
            first, last = int((wanted.least[u] - k).max()), int((wanted.most[u] - k).min())
            if first <= last:
                intervals[r] = _Interval(first, last)
        bases[chunk & (index.rows - 1)] = intervals
    return bases


def _spanned(bases: _Bases, shifts: Sequence[int]) -> bool:
    """Whether every row can have one of the shifts."""
    return all(any(r in intervals for r in shifts) for intervals in bases.values())


def _candidate(wanted: _Wanted, bases: _Bases, shifts: Sequence[int], rng: random.Random) -> _Candidate | None:
    """Give every row one of the shifts, by a random taste, and a cheap base; None where a base would be negative."""
    fmt, index = wanted.fmt, wanted.index
    m, count = fmt.mantissa_bits, index.rows
    taste = [rng.random() for _ in shifts]
    chosen = {
        t: min((r for r in shifts if r in intervals), key=lambda r: taste[shifts.index(r)] + 0.3 * rng.random())
        for t, intervals in bases.items()
    }
    lows = np.zeros(count, dtype=np.int64)
    highs = np.full(count, fmt.sign - 1)
    for t, r in chosen.items():
        lows[t], highs[t] = bases[t][r]
    if lows.min() < 0:
        return None
    used = sorted(set(chosen.values()))
    numbers = np.array([used.index(chosen.get(t, used[0])) for t in range(count)])
    unread = np.array([t not in chosen for t in range(count)])
    width = max(1, (len(used) - 1).bit_length())
    ranks = [float(-i) for i in range(index.exponent_bits + index.mantissa_bits)]
    any_number = (1 << width) - 1
    selector = Relation(np.where(unread, 0, numbers), np.where(unread, any_number, numbers), width, ranks).choose(rng)
    base = Relation(lows, highs, fmt.bits - 1, ranks).choose(rng, tries=2)
    # a multiplexer of n ways is about 2.5 literals for each way and bit
    cost = base.cost + selector.cost + 2.5 * m * (len(used) - 1)
    name = oracle.name_of(wanted.function)
    table = CarryTable(
        name=f"{name}_{fmt.name}_carry{count}_{''.join(map(str, used))}",
        function=name,
        format=fmt.name,
        index=index,
        rows=tuple(
            (int(b) >> m, chosen[t], int(b) & fmt.mantissa_mask) if t in chosen else (fmt.bias, m, 0)
            for t, b in enumerate(base.values)
        ),
        identity_below=wanted.t1,
        saturate_above=wanted.t2,
    )
    return _Candidate(cost, table)
