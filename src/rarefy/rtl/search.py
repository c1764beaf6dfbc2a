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

import numpy as np

from rarefy.act import error as errors
from rarefy.act import formats, oracle
from rarefy.act.formats import Bits
from rarefy.act.oracle import Function
from rarefy.act.table import BitIndex, Table
from rarefy.rtl.design import Design
from rarefy.rtl.eda import flow, tools
from rarefy.rtl.eda.synth import SCRIPTS, Synthesis, synth
from rarefy.rtl.emit import emit
from rarefy.rtl.logic.covers import Choice, Relation
from rarefy.rtl.logic.unit import SLACK, Frame, Unit

KINDS = ("logic", "table")
GOALS = {"area": "area", "delay": "speed"}
_STARTS = 16
_FINALISTS = 12


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
    unit: Unit | None
    tried: tuple[tuple[Design, Synthesis], ...]


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
    """The smallest (or fastest) unit that the search finds with a largest absolute error of at most ``error``.

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
    f = formats.get(fmt)
    if goal not in GOALS:
        raise ValueError(f"goal must be one of {', '.join(GOALS)}, got {goal!r}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}")
    if not 0.0 < error < 0.5:
        raise ValueError(f"error must lie between 0 and 0.5, got {error}")
    if steps < 0:
        raise ValueError(f"steps must be 0 or more, got {steps}")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must be 0 to 2^32 - 1, got {seed}")
    if f.bits > 16:
        raise ValueError(f"every input is looked at, so {f.name} is too wide: at most 16 bits")
    if not oracle.is_odd(function):
        raise ValueError(f"the search is for odd functions like tanh, {oracle.name_of(function)} is none")
    cells = flow.library(None if liberty is None else Path(liberty))
    tools.yosys_version()
    name = oracle.name_of(function)
    units: list[Unit] = []
    if "logic" in kinds:
        every = frames(function, f.name, error, exact_limit)
        digits = f"{error:.6f}".rstrip("0")[2:]
        options = f"--format {f.name} --error {error:g} --goal {goal} --steps {steps} --seed {seed}"
        command = f"rarefy rtl search {name} {options}" + " --exact-limit" * exact_limit
        units = [
            Unit(f"{name}_{f.name}_{goal}_{digits}", state.frame, state.choice.covers, command)
            for state in _logic(every, goal, cells, steps, seed)
        ]
    designs = [unit.design() for unit in units]
    if "table" in kinds:
        designs += [emit(table, nan="quiet") for table in tables(function, f.name, error, seed=seed)[:_FINALISTS]]
    if not designs:
        raise ValueError(f"no {name} in {f.name} was found with an error of at most {error:g}: allow a larger one")
    timing = None if goal == "delay" else False
    tried = [(design, synth(design, liberty, GOALS[goal], timing=timing)) for design in designs]
    first = min(range(len(tried)), key=lambda i: measure(tried[i][1], goal))
    design, synthesis = tried[first]
    largest = errors.measure(function, f, design.compute(f.all_bits())).max_abs
    tried.sort(key=lambda entry: measure(entry[1], goal))
    return Found(design, synthesis, largest, units[first] if first < len(units) else None, tuple(tried))


def measure(synthesis: Synthesis, goal: str) -> float:
    """What the goal counts of a synthesis: gate equivalents, or nanoseconds (ABC's where there is no OpenSTA)."""
    if goal == "area":
        return synthesis.gate_equivalents
    return synthesis.abc_delay_ns if synthesis.delay_ns is None else synthesis.delay_ns


def frames(function: Function, fmt: str, error: float, exact_limit: bool = False) -> list[Frame]:
    """The frames of units of logic that keep the error, with the shortest middle there is.

    Those that stop just below the function's limit are left out with ``exact_limit``, and where the error is too small
    for them.
    """
    found = []
    for exact in (False, True)[exact_limit:]:
        for identity in range(0, -5, -1):
            for limit in range(max(identity, 0), 4):
                try:
                    found.append(Frame(function, fmt, error, identity, limit, exact))
                except ValueError:
                    continue
        if found:
            break
    shortest = min((frame.limit - frame.identity for frame in found), default=0)
    return [frame for frame in found if frame.limit - frame.identity == shortest]


@dataclass(frozen=True)
class _State:
    cost: float
    frame: Frame
    choice: Choice


def _logic(every: Sequence[Frame], goal: str, cells: flow.Library, steps: int, seed: int) -> list[_State]:
    rng = random.Random(seed)
    best: list[_State] = []
    with tempfile.TemporaryDirectory(prefix="rarefy-search-") as name:
        folder = Path(name)

        def cost(frame: Frame, choice: Choice) -> float:
            area, delay = flow.abc(frame.blif(choice.covers), cells, SCRIPTS[GOALS[goal]], folder)
            # among nearly equally fast ones the smaller: 100 gates are worth a fiftieth of a nanosecond
            return area / cells.nand2 if goal == "area" else delay + 0.0002 * area / cells.nand2

        for frame in every:
            starts = [frame.relation.choose(rng) for _ in range(_STARTS)]
            for start in sorted(starts, key=lambda choice: choice.cost)[: _STARTS // 4]:
                choice = frame.relation.revise(start, rng.sample(range(frame.width), frame.width), rng, 3, 0.0)
                best.append(_State(cost(frame, choice), frame, choice))
        if not best:
            return []
        best.sort(key=lambda state: state.cost)
        now = best[0]
        for step in range(steps):
            choice = _changed(now.frame.relation, now.choice, rng)
            state = _State(cost(now.frame, choice), now.frame, choice)
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
    """Another choice near a given one: some bits decided again, or all from one down."""
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
    """Tables of the form ``carry`` within an error, made for little hardware; the cheapest by a fast cost first.

    T1 is the largest and T2 the smallest power of two (T2 the number below it) that the error allows. For every number
    of rows: the sets of the fewest distinct shifts that can keep the error, and those with one more; of each, bases
    whose bits are cheap functions of the row's number. The cost is the literals of those bits and, for each shift, one
    multiplexer. Empty when no such table keeps the error.
    """
    f = formats.get(fmt)
    true = oracle.evaluate(function, f.decode(np.arange(f.last + 1, dtype=np.int64)))
    numbers = f.decode(np.arange(f.one + 1, dtype=np.int64))
    least = np.searchsorted(numbers, true - error - SLACK, side="left").astype(np.int64)
    most = np.searchsorted(numbers, true + error + SLACK, side="right").astype(np.int64) - 1
    u = np.arange(f.last + 1)
    wrong_identity, wrong_one = (u < least) | (u > most), (f.one < least) | (f.one > most)
    t1s = [t for k in range(1, -5, -1) if not wrong_identity[: (t := (f.bias + k) << f.mantissa_bits)].any()]
    t2s = [t - 1 for k in range(4) if not wrong_one[(t := (f.bias + k) << f.mantissa_bits) :].any()]
    if not t1s or not t2s or t1s[0] > t2s[0]:
        return []
    octaves = (t2s[0] >> f.mantissa_bits) - (t1s[0] >> f.mantissa_bits) + 1
    exponent_bits = max(1, (octaves - 1).bit_length())
    found: list[tuple[float, Table]] = []
    rng = random.Random(seed)
    for count in rows:
        index = BitIndex(exponent_bits, count.bit_length() - 1 - exponent_bits)
        if 0 <= index.mantissa_bits < f.mantissa_bits:
            found += _carry(function, fmt, index, t1s[0], t2s[0], least, most, rng)
    cheapest = {table.rows: table for _, table in sorted(found, key=lambda entry: entry[0], reverse=True)}
    return list(cheapest.values())[::-1]


def _carry(
    function: Function, fmt: str, index: BitIndex, t1: int, t2: int, least: Bits, most: Bits, rng: random.Random
) -> list[tuple[float, Table]]:
    f = formats.get(fmt)
    m, low = f.mantissa_bits, f.mantissa_bits - index.mantissa_bits
    possible: dict[int, dict[int, tuple[int, int]]] = {}  # by row and shift: the interval of its base
    for chunk in range(t1 >> low, (t2 >> low) + 1):
        u = np.arange(max(chunk << low, t1), min((chunk + 1) << low, t2 + 1))
        spans = {}
        for r in range(m + 1):
            k = (u & f.mantissa_mask) >> r
            first, last = int((least[u] - k).max()), int((most[u] - k).min())
            if first <= last:
                spans[r] = (first, last)
        possible[chunk & (index.rows - 1)] = spans
    if not all(possible.values()):
        return []
    every = range(m + 1)
    fit = [s for size in range(1, m + 2) for s in combinations(every, size) if _spanned(possible, s)]
    fewest = len(fit[0])
    bits = index.exponent_bits + index.mantissa_bits
    found = []
    for shifts in (s for s in fit if len(s) <= fewest + 1 and len(s) <= 4):
        for _ in range(2):
            taste = [rng.random() for _ in shifts]
            chosen = {
                t: min((r for r in shifts if r in spans), key=lambda r: taste[shifts.index(r)] + 0.3 * rng.random())
                for t, spans in possible.items()
            }
            lows = np.zeros(index.rows, dtype=np.int64)
            highs = np.full(index.rows, f.sign - 1)
            for t, r in chosen.items():
                lows[t], highs[t] = possible[t][r]
            if lows.min() < 0:
                continue
            used = sorted(set(chosen.values()))
            numbers, unread = np.array([used.index(chosen.get(t, used[0])) for t in range(index.rows)]), len(used) - 1
            open_rows = np.array([t not in chosen for t in range(index.rows)])
            selector = Relation(
                np.where(open_rows, 0, numbers),
                np.where(open_rows, (1 << max(1, unread.bit_length())) - 1, numbers),
                max(1, unread.bit_length()),
                [float(-i) for i in range(bits)],
            ).choose(rng)
            bases = Relation(lows, highs, f.bits - 1, [float(-i) for i in range(bits)]).choose(rng, tries=2)
            # a multiplexer of n ways is about 2.5 literals for each way and bit
            cost = bases.cost + selector.cost + 2.5 * m * (len(used) - 1)
            table = tuple(
                (int(b) >> m, chosen[t], int(b) & f.mantissa_mask) if t in chosen else (f.bias, m, 0)
                for t, b in enumerate(bases.values)
            )
            name = f"{oracle.name_of(function)}_{fmt}_carry{index.rows}_{''.join(map(str, used))}"
            found.append(
                (
                    cost,
                    Table(
                        name=name,
                        function=oracle.name_of(function),
                        format=fmt,
                        form="carry",
                        index=index,
                        rows=table,
                        identity_below=t1,
                        saturate_above=t2,
                    ),
                )
            )
    return found


def _spanned(possible: dict[int, dict[int, tuple[int, int]]], shifts: Sequence[int]) -> bool:
    return all(any(r in spans for r in shifts) for spans in possible.values())
