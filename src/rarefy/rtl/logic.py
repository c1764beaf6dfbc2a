"""Units of pure logic for odd functions like tanh: no table, no adder, an error bound spent on the smallest sums.

Below ``2^identity`` the output is the input, from ``2^limit`` on it is a constant next to the function's limit, and
between them the low exponent bits and the mantissa of the output are sums of products of the input's bits, with every
freedom that the error bound leaves (:mod:`rarefy.rtl.covers`). The sign is the input's and a NaN gives a NaN, whose
payload is not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rarefy.act import formats, oracle
from rarefy.act.formats import Bits, Format
from rarefy.act.oracle import Function
from rarefy.rtl.covers import Choice, Cover, Relation, between
from rarefy.rtl.design import About, Design, Port

SLACK = 1e-12  # float64 noise when two error bounds are compared


@dataclass(frozen=True)
class Node:
    """A named signal: a cover over other signals."""

    name: str
    inputs: tuple[str, ...]
    cover: Cover

    def blif(self) -> str:
        """As a table of the Berkeley logic interchange format."""
        rows = ["".join(str(dict(cube).get(i, "-")) for i in range(len(self.inputs))) for cube in self.cover.cubes]
        if not all(self.cover.cubes):  # a product of nothing is 1, whatever else the sum holds
            return f".names {self.name}\n" + ("" if self.cover.inverted else "1\n")
        if not rows:
            return f".names {self.name}\n" + ("1\n" if self.cover.inverted else "")
        value = "0" if self.cover.inverted else "1"
        return f".names {' '.join(self.inputs)} {self.name}\n" + "".join(f"{row} {value}\n" for row in rows)

    def expression(self) -> str:
        """As an expression of SystemVerilog, in lines of at most about 100 characters."""
        products = [
            " & ".join(("" if polarity else "~") + self.inputs[i] for i, polarity in sorted(cube)) or "1'b1"
            for cube in self.cover.cubes
        ] or ["1'b0"]
        lines = [""]
        for i, product in enumerate(products):
            term = (" | " if i else "") + (f"({product})" if "&" in product and len(products) > 1 else product)
            if len(lines[-1]) + len(term) > 100:
                lines.append("")
                term = term.strip()
            lines[-1] += term
        text = "\n      ".join(lines)
        return f"~({text})" if self.cover.inverted else text


@dataclass(frozen=True)
class Frame:
    """A function, a format, an error bound, and where the middle of the function begins and ends.

    Args:
        function: an odd function that is near x at 0 and has a limit of at most 1.
        format: of input and output; at most 16 bits.
        error: the largest absolute error allowed.
        identity: below ``2^identity`` the output is the input.
        limit: from ``2^limit`` on the output is one constant.
        exact_limit: that constant is the function's limit itself; otherwise all of the middle and it stay below the
            limit, so that fewer bits change.

    Raises ValueError when no unit of this frame keeps the error.

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

    def allowed(self) -> tuple[Bits, Bits]:
        """The least and the largest bits within the error, of every magnitude up to the largest that is not NaN."""
        fmt = self.fmt
        numbers = fmt.decode(np.arange(fmt.one + 1, dtype=np.int64))
        true = oracle.evaluate(self.function, fmt.decode(np.arange(fmt.last + 1, dtype=np.int64)))
        least = np.searchsorted(numbers, true - self.error - SLACK, side="left")
        most = np.searchsorted(numbers, true + self.error + SLACK, side="right") - 1
        return least.astype(np.int64), most.astype(np.int64)

    @cached_property
    def relation(self) -> Relation:
        """The relation between the variables and the bits decided."""
        fmt, names = self.fmt, self.variables
        least, most = self.allowed()
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
            raise ValueError(f"{refused} and is constant from 2^{self.limit} on")
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
        """Which magnitudes are below ``2^identity``, and which are at or above ``2^limit``."""
        m, bias = self.fmt.mantissa_bits, self.fmt.bias
        return u < (bias + self.identity) << m, u >= (bias + self.limit) << m

    def assignment(self, u: Bits) -> Bits:
        """The variables' assignment that a magnitude is."""
        lin, far = self.regions(u)
        at = u & ((1 << self.width) - 1)
        place = self.width
        if self.limit > 1:
            at = at | ((u >> (self.fmt.bits - 2)) & 1) << place
            place += 1
        result: Bits = at | lin.astype(np.int64) << place | far.astype(np.int64) << (place + 1)
        return result

    def nodes(self, covers: Sequence[Cover]) -> list[Node]:
        """The unit as signals: ``lin``, ``far``, ``nan``, the sums ``f[i]`` and the outputs ``y[i]``."""
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
        """The unit without its sign, for ABC."""
        n = self.fmt.bits
        inputs, outputs = (" ".join(f"{name}[{i}]" for i in range(n - 1)) for name in "xy")
        body = "".join(node.blif() for node in self.nodes(covers))
        return f".model unit\n.inputs {inputs}\n.outputs {outputs}\n{body}.end\n"

    def design(self, choice: Choice, top: str | None = None, command: str = "") -> Design:
        """The unit as a design."""
        fmt, n = self.fmt, self.fmt.bits
        name = top or f"{oracle.name_of(self.function)}_{self.format}_logic"
        nodes = self.nodes(choice.covers)
        numbers = np.zeros(1 << len(self.variables), dtype=np.int64)
        for i, cover in enumerate(choice.covers):
            numbers |= cover.evaluate(len(self.variables)).astype(np.int64) << i
        base = (fmt.bias + 1 - (1 << self.low)) << fmt.mantissa_bits
        high = (fmt.sign - 1) & ~((1 << self.width) - 1)

        def compute(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
            x = np.asarray(bits, dtype=np.int64)
            u = x & (fmt.sign - 1)
            lin, _ = self.regions(u)
            y = numbers[self.assignment(u)] | np.where(lin, u & high, base)
            nan = fmt.last if fmt.infinities else fmt.sign - 1
            if self.exact_limit:  # whose mantissa is 0, which would be infinity
                nan |= 1 << (fmt.mantissa_bits - 1)
            y = np.where(fmt.is_nan(x), y | nan, y)
            return (y | (x & fmt.sign)).astype(fmt.dtype)

        all_bits = fmt.all_bits()
        finite = all_bits[~fmt.is_nan(all_bits)]
        true = oracle.evaluate(self.function, fmt.decode(finite))
        largest = float(np.abs(fmt.decode(compute(finite)) - true).max())
        about = About(
            name, oracle.name_of(self.function), largest, command, {"identity": self.identity, "limit": self.limit}
        )
        text = (
            f"// {about.function} in {self.format} as sums of products, largest error {largest:.6f} over all inputs\n"
            f"// |x| < 2^{self.identity}: x; |x| >= 2^{self.limit}: a constant; NaN gives a NaN\n"
            + (f"// made by: {command}\n" if command else "")
            + f"module {name} (\n    input  wire [{n - 1}:0] x,\n    output wire [{n - 1}:0] y\n);\n"
            + "".join(
                f"  {'assign' if node.name.startswith('y') else 'wire'} {node.name} = {node.expression()};\n"
                for node in nodes
            )
            + f"  assign y[{n - 1}] = x[{n - 1}];\nendmodule\n"
        )
        ports = (Port("x", "input", n), Port("y", "output", n))
        return Design(top=name, text=text, format=fmt, latency=0, ports=ports, compute=compute, about=about)
