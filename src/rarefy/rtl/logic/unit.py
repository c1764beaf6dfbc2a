"""Units of pure logic for odd functions like tanh: no table, no adder, an error bound spent on the smallest sums.

Below ``2^identity`` the output is the input, from ``2^limit`` on it is within the error of the function's limit, and
between them the low exponent bits and the mantissa of the output are sums of products of the input's bits, with every
freedom that the error bound leaves (:mod:`rarefy.rtl.logic.covers`). The sign is the input's and a NaN gives a NaN,
whose payload is not kept.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rarefy._files import load_shipped, shipped_names, write_atomically
from rarefy.act.spec import error, formats, oracle
from rarefy.act.spec.formats import Bits, Format
from rarefy.act.spec.oracle import Function
from rarefy.rtl.design import About, Design, Port
from rarefy.rtl.identifiers import comment, module_name
from rarefy.rtl.logic.covers import Cover, Cube, Relation, between

FILE_VERSION = 1
SLACK = 1e-12  # float64 noise when two error bounds are compared


@dataclass(frozen=True)
class Node:
    """A named signal: a cover over other signals."""

    name: str
    inputs: tuple[str, ...]
    cover: Cover

    def blif(self) -> str:
        """Write it as a table of the Berkeley logic interchange format."""
        rows = ["".join(str(dict(cube).get(i, "-")) for i in range(len(self.inputs))) for cube in self.cover.cubes]
        if not all(self.cover.cubes):  # a product of nothing is 1, whatever else the sum holds
            return f".names {self.name}\n" + ("" if self.cover.inverted else "1\n")
        if not rows:
            return f".names {self.name}\n" + ("1\n" if self.cover.inverted else "")
        value = "0" if self.cover.inverted else "1"
        return f".names {' '.join(self.inputs)} {self.name}\n" + "".join(f"{row} {value}\n" for row in rows)

    def statement(self) -> str:
        """Write it as SystemVerilog in lines of about 100 characters: outputs are assigned, others declared."""
        kind = "assign" if self.name.startswith("y") else "wire"
        text = textwrap.fill(f"{kind} {self.name} = {self.expression()};", 100, break_long_words=False)
        return textwrap.indent(text.replace("\n", "\n    "), "  ") + "\n"

    def expression(self) -> str:
        """Write it as a factored expression of SystemVerilog."""
        text = _factored(self.cover.cubes, self.inputs)
        return f"~({text})" if self.cover.inverted else text


def _factored(cubes: Sequence[Cube], names: Sequence[str]) -> str:
    """Write a sum of products with what most products share taken out, and again inside: x & (a | b) | c."""
    if not cubes:
        return "1'b0"
    if not all(cubes):  # a product of nothing is 1, whatever else the sum holds
        return "1'b1"
    count = Counter(literal for cube in cubes for literal in cube)
    (variable, polarity), most = max(count.items(), key=lambda entry: (entry[1], -entry[0][0], entry[0][1]))
    if most == 1:
        products = [" & ".join(("" if p else "~") + names[v] for v, p in sorted(cube)) for cube in cubes]
        return " | ".join(f"({product})" if "&" in product and len(products) > 1 else product for product in products)
    shared = (variable, polarity)
    inside = [tuple(literal for literal in cube if literal != shared) for cube in cubes if shared in cube]
    rest = [cube for cube in cubes if shared not in cube]
    first = ("" if polarity else "~") + names[variable]
    if all(inside):
        part = _factored(inside, names)
        first += f" & {part}" if len(inside) == 1 else f" & ({part})"
    return f"({first}) | {_factored(rest, names)}" if rest else first


class Allowed(NamedTuple):
    """The least and the largest right bits of every magnitude, up to the largest that is not NaN."""

    least: Bits
    most: Bits


def allowed(function: Function, fmt: Format, error: float) -> Allowed:
    """Find, for every magnitude up to the largest that is not NaN, the bits up to 1 that are within the error."""
    numbers = fmt.decode(np.arange(fmt.one + 1, dtype=np.int64))
    true = oracle.evaluate(function, fmt.decode(np.arange(fmt.last + 1, dtype=np.int64)))
    least = np.searchsorted(numbers, true - error - SLACK, side="left")
    most = np.searchsorted(numbers, true + error + SLACK, side="right") - 1
    return Allowed(least.astype(np.int64), most.astype(np.int64))


@dataclass(frozen=True)
class LogicSpec:
    """A function, a format, an error bound, and where the middle of the function begins and ends.

    Args:
        function: an odd function that is near x at 0 and has a limit of at most 1.
        format: of input and output; at most 16 bits.
        error: the largest absolute error allowed.
        identity: below ``2^identity`` the output is the input.
        limit: from ``2^limit`` on the output is any number within the error of the function's limit.
        exact_limit: it is the limit itself; otherwise it and all of the middle stay below the limit, so that fewer
            bits change.

    Raises ValueError when no such unit keeps the error.

    """

    function: Function
    format: str
    error: float
    identity: int
    limit: int
    exact_limit: bool = False

    def __post_init__(self) -> None:
        if self.fmt.bits > 16:
            raise ValueError(f"every input is looked at, so {self.format} is too wide: at most 16 bits")
        if not oracle.is_odd(self.function):
            raise ValueError(f"units of pure logic are for odd functions, {oracle.name_of(self.function)} is none")
        if not -self.fmt.bias < self.identity <= self.limit <= min(3, self.fmt.bias):
            raise ValueError(f"needs identity <= limit <= 3, got {self.identity} and {self.limit}")
        _ = self.relation

    @property
    def fmt(self) -> Format:
        """The format."""
        return formats.get(self.format)

    @property
    def low(self) -> int:
        """How many of the exponent's low bits the sums decide; the ones above are the same in all of the middle."""
        # exponents from that of 2^identity to that of 1; one binade less may be needed below 2^identity
        return max(1, (-self.identity).bit_length())

    @property
    def width(self) -> int:
        """Bits that the sums decide: the exponent's low ones and the mantissa."""
        return self.low + self.fmt.mantissa_bits

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """What the sums are over: those same bits of the input, its highest exponent bit, ``lin`` and ``far``."""
        high = (f"x[{self.fmt.bits - 2}]",) if self.limit > 1 else ()
        return (*(f"x[{i}]" for i in range(self.width)), *high, "lin", "far")

    @cached_property
    def relation(self) -> Relation:
        """The relation between the variables and the bits decided."""
        fmt, names = self.fmt, self.variables
        least, most = allowed(self.function, fmt, self.error)
        u = np.arange(fmt.last + 1, dtype=np.int64)
        lin, far = self.regions(u)
        refused = f"no unit of {oracle.name_of(self.function)} in {self.format} has an error within {self.error:g}"
        if ((u < least) | (u > most))[lin].any():
            raise ValueError(f"{refused} and is the identity below 2^{self.identity}")
        limit = int(fmt.encode(oracle.evaluate(self.function, np.array(np.inf))))
        if self.exact_limit:
            least = np.where(far, np.maximum(least, limit), least)
        else:
            most = np.minimum(most, limit - 1)
        least, most = np.where(far, least[far].max(), least), np.where(far, most[far].min(), most)
        if (least > most).any():
            raise ValueError(f"{refused} and is at its limit from 2^{self.limit} on")
        # where the input is passed through, its own high bits are; elsewhere they are those of the base
        base = (fmt.bias + 1 - (1 << self.low)) << fmt.mantissa_bits
        mask = (1 << self.width) - 1
        least = np.where(lin, u & mask, np.maximum(least - base, 0))
        most = np.where(lin, u & mask, np.minimum(most - base, mask))
        if (least > most).any():
            raise ValueError(f"{refused} and exponents from {fmt.bias + 1 - (1 << self.low)} up")
        lows, highs = np.zeros(1 << len(names), dtype=np.int64), np.full(1 << len(names), mask, dtype=np.int64)
        at = self.assignment(u)
        np.maximum.at(lows, at, least)
        np.minimum.at(highs, at, most)
        # low mantissa bits first, which few outputs need; the exponent, lin and far last
        ranks = [float(-i) for i in range(self.width)] + [float(-self.width)] * (len(names) - self.width)
        return Relation(lows, highs, self.width, ranks)

    def regions(self, u: Bits) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Tell which magnitudes are below ``2^identity``, and which are at or above ``2^limit``."""
        m, bias = self.fmt.mantissa_bits, self.fmt.bias
        return u < (bias + self.identity) << m, u >= (bias + self.limit) << m

    def assignment(self, u: Bits) -> Bits:
        """Give the variables' assignment that a magnitude is."""
        lin, far = self.regions(u)
        at = u & ((1 << self.width) - 1)
        place = self.width
        if self.limit > 1:
            at = at | ((u >> (self.fmt.bits - 2)) & 1) << place
            place += 1
        result: Bits = at | lin.astype(np.int64) << place | far.astype(np.int64) << (place + 1)
        return result

    def nodes(self, covers: Sequence[Cover]) -> list[Node]:
        """Write the unit as signals: ``lin``, ``far``, ``nan``, the sums ``f[i]`` and the outputs ``y[i]``."""
        fmt, n, m = self.fmt, self.fmt.bits, self.fmt.mantissa_bits
        exponent = tuple(f"x[{i}]" for i in range(m, n - 1))
        field_ = np.arange(1 << fmt.exponent_bits)
        order = list(range(fmt.exponent_bits))
        found = []
        for name, region in zip(("lin", "far"), self.regions(field_ << m), strict=True):
            cover = min((between(region, region, order, i)[0] for i in (False, True)), key=lambda c: c.cost)
            found.append(Node(name, exponent, cover))
        if fmt.infinities:
            found.append(Node("some", tuple(f"x[{i}]" for i in range(m)), Cover(tuple(((i, 1),) for i in range(m)))))
            found.append(Node("nan", (*exponent, "some"), Cover((tuple((i, 1) for i in range(len(exponent) + 1)),))))
        else:
            found.append(
                Node("nan", tuple(f"x[{i}]" for i in range(n - 1)), Cover((tuple((i, 1) for i in range(n - 1)),)))
            )
        found += [Node(f"f{i}", self.variables, cover) for i, cover in enumerate(covers)]
        wire, either = Cover((((0, 1),),)), Cover((((0, 1),), ((1, 1),)))
        for i in range(n - 1):
            if i < self.width:
                quiet = i >= m or not fmt.infinities or (self.exact_limit and i == m - 1)
                inputs = (f"f{i}", "nan") if quiet else (f"f{i}",)
            elif i < n - 2:  # all ones in the middle; x[n-2] is 1 only there and far out
                inputs = (f"x[{i}]", f"x[{n - 2}]")
            else:
                inputs = ("nan",)
            found.append(Node(f"y[{i}]", inputs, wire if len(inputs) == 1 else either))
        return found

    def blif(self, covers: Sequence[Cover]) -> str:
        """Write the unit without its sign, for ABC."""
        n = self.fmt.bits
        inputs, outputs = (" ".join(f"{name}[{i}]" for i in range(n - 1)) for name in "xy")
        body = "".join(node.blif() for node in self.nodes(covers))
        return f".model unit\n.inputs {inputs}\n.outputs {outputs}\n{body}.end\n"


@dataclass(frozen=True)
class LogicUnit:
    """A unit of pure logic: what it is to be, and a cover for each bit that its sums decide, the lowest first.

    ``command`` is what made it. Raises ValueError when the covers are not the spec's or break its error bound.
    """

    name: str
    spec: LogicSpec
    covers: tuple[Cover, ...]
    command: str = ""

    def __post_init__(self) -> None:
        spec = self.spec
        module_name(self.name, "a unit's name")
        if not isinstance(self.command, str):
            raise ValueError(f"{self.name}: command must be a string, got {self.command!r}")
        if len(self.covers) != spec.width:
            raise ValueError(f"{self.name}: the frame decides {spec.width} bits, got {len(self.covers)} covers")
        variables = len(spec.variables)
        if any(v >= variables for cover in self.covers for cube in cover.cubes for v, _ in cube):
            raise ValueError(f"{self.name}: the frame has {variables} variables, a cover names others")
        outside = (self.numbers < spec.relation.least) | (self.numbers > spec.relation.most)
        if outside.any():
            raise ValueError(f"{self.name}: {int(outside.sum())} assignments leave the error bound {spec.error:g}")

    @cached_property
    def numbers(self) -> Bits:
        """What the covers give for every assignment of the spec's variables."""
        count = len(self.spec.variables)
        result = np.zeros(1 << count, dtype=np.int64)
        for i, cover in enumerate(self.covers):
            result |= cover.evaluate(count).astype(np.int64) << i
        return result

    def compute(self, bits: npt.ArrayLike) -> npt.NDArray[Any]:
        """Compute the results of an array of bit patterns, as unsigned integers of the format's width.

        Raises TypeError for an array that does not hold integers, ValueError for patterns wider than the format.
        """
        spec, fmt = self.spec, self.spec.fmt
        x = formats.patterns(fmt, bits)
        u = x & (fmt.sign - 1)
        lin, _ = spec.regions(u)
        base = (fmt.bias + 1 - (1 << spec.low)) << fmt.mantissa_bits
        high = (fmt.sign - 1) & ~((1 << spec.width) - 1)
        y = self.numbers[spec.assignment(u)] | np.where(lin, u & high, base)
        nan = fmt.last if fmt.infinities else fmt.sign - 1
        if spec.exact_limit:  # whose mantissa is 0, which would be infinity
            nan |= 1 << (fmt.mantissa_bits - 1)
        y = np.where(fmt.is_nan(x), y | nan, y)
        result: npt.NDArray[Any] = (y | (x & fmt.sign)).astype(fmt.dtype)
        return result

    def design(self) -> Design:
        """Make the unit a combinational design."""
        spec, fmt, n = self.spec, self.spec.fmt, self.spec.fmt.bits
        bits = fmt.all_bits()
        largest = error.measure(spec.function, fmt, self.compute(bits)).max_abs
        details = {"identity": spec.identity, "limit": spec.limit, "exact_limit": spec.exact_limit}
        about = About(self.name, oracle.name_of(spec.function), largest, self.command, details)
        far = "the limit" if spec.exact_limit else "just below the limit"
        text = (
            f"// {comment(about.function)} in {fmt.name} as sums of products,"
            f" largest error {largest:.6f} over all inputs\n"
            f"// |x| < 2^{spec.identity}: x; |x| >= 2^{spec.limit}: {far}; NaN gives a NaN\n"
            + (f"// made by: {comment(self.command)}\n" if self.command else "")
            + f"module {self.name} (\n    input  wire [{n - 1}:0] x,\n    output wire [{n - 1}:0] y\n);\n"
            + "".join(node.statement() for node in spec.nodes(self.covers))
            + f"  assign y[{n - 1}] = x[{n - 1}];\nendmodule\n"
        )
        ports = (Port("x", "input", n), Port("y", "output", n))
        return Design(self.name, text, fmt, 0, ports, self.compute, about)

    def save(self, path: str | Path) -> None:
        """Write the unit as JSON: beside the file first, then renamed. Raises ValueError for a function of your own."""
        if not isinstance(self.spec.function, str):
            raise ValueError(f"{self.name}: only units of {', '.join(oracle.FUNCTIONS)} are kept in files")
        variables = range(len(self.spec.variables))
        covers = [
            {
                "inverted": cover.inverted,
                "cubes": ["".join(str(dict(cube).get(v, "-")) for v in variables) for cube in cover.cubes],
            }
            for cover in self.covers
        ]
        data = {"rarefy_logic": FILE_VERSION, "name": self.name, "command": self.command, **asdict(self.spec)}
        text = json.dumps({**data, "covers": covers}, indent=1) + "\n"
        write_atomically(Path(path), lambda beside: beside.write_text(text, encoding="utf-8"))

    @classmethod
    def from_json(cls, text: str) -> LogicUnit:
        """Read the unit of a JSON text; raises ValueError when it is none."""
        try:
            data = json.loads(text)
            if data.pop("rarefy_logic") != FILE_VERSION:
                raise ValueError(f"not a unit of version {FILE_VERSION}")
            name, command = data.pop("name"), data.pop("command")
            covers = tuple(
                Cover(
                    tuple(tuple((v, int(c)) for v, c in enumerate(cube) if c != "-") for cube in cover["cubes"]),
                    bool(cover["inverted"]),
                )
                for cover in data.pop("covers")
            )
            return cls(name, LogicSpec(**data), covers, command)
        except (AttributeError, LookupError, TypeError, RecursionError, OverflowError, ValueError) as problem:
            what = "nested too deeply" if isinstance(problem, RecursionError) else str(problem)[:300]
            raise ValueError(f"not a unit of logic: {type(problem).__name__}: {what}") from None


_SHIPPED = resources.files("rarefy.rtl.logic") / "units"


def names() -> list[str]:
    """List the names of the shipped units."""
    return shipped_names(_SHIPPED)


def load(name: str | Path) -> LogicUnit:
    """Load a shipped unit by its name, or one from a ``.json`` file; raises ValueError when there is none."""
    return load_shipped(name, _SHIPPED, "unit", "a unit of logic", LogicUnit.from_json)
