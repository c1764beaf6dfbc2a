"""The datapath of one lane: what is looked up for ``x`` and how the result follows from it.

A :class:`Lane` has two steps, so that a register may stand between them: the look-up of constants and comparisons, and
the shift, the addition and the choice. :mod:`rarefy.rtl.emit` puts ports, registers and lanes around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rarefy.act.spec.formats import Format
from rarefy.rtl.design import literal

NAN = ("keep", "quiet", "none")


@dataclass(frozen=True)
class Wire:
    """A named value of a lane, and the expression that it has."""

    name: str
    width: int
    expression: str
    comment: str = ""
    signed: bool = False


@dataclass(frozen=True)
class Lane:
    """One lane as text, in which the input is called ``x``.

    Attributes:
        functions: functions and registers of SystemVerilog that the expressions read; shared by all lanes.
        lookup: the wires of the first step.
        finish: the wires of the second step; the last one is ``result``. No name stands in both.
        carried: what the second step may read of the first, and ``x``, in the order of their registers.
        write: the widths of the address and of the word of the write port, None for a table that is fixed.
        setup: the words (address, data) of the table.

    """

    functions: str
    lookup: Sequence[Wire]
    finish: Sequence[Wire]
    carried: Sequence[str]
    write: tuple[int, int] | None = None
    setup: tuple[tuple[int, int], ...] = ()


def width_for(count: int) -> int:
    """Return the bits of an index into ``count`` things, at least one."""
    return max(1, (count - 1).bit_length())


def choose(selector: str, width: int, options: Sequence[str]) -> str:
    """Write a multiplexer: ``options[selector]``."""
    *first, last = options
    return "".join(f"{selector} == {literal(width, i)} ? {text} : " for i, text in enumerate(first)) + last


def below(u: str, width: int, value: int) -> str:
    """Write ``u < value`` for a constant: nothing is below 0, which a linter would say of the comparison."""
    return f"{u} < {literal(width, value)}" if value else literal(1, 0)


def nan_wire(fmt: Format, nan: str) -> list[Wire]:
    """Give the wire that says whether the input is NaN, where the lane wants to know."""
    return [] if nan == "none" else [Wire("nan", 1, f"x[{fmt.bits - 2}:0] > {literal(fmt.bits - 1, fmt.last)}")]


def nan_result(fmt: Format, nan: str) -> str:
    """Write the magnitude that a NaN gives."""
    magnitude = f"x[{fmt.bits - 2}:0]"
    if nan == "keep" or not fmt.infinities:
        return magnitude
    return f"{magnitude} | {literal(fmt.bits - 1, 1 << (fmt.mantissa_bits - 1))}"


class Word(NamedTuple):
    """A word of a constant table, and the comment behind it."""

    value: int
    comment: str


def rom(name: str, width: int, address_width: int, words: Mapping[int, Word]) -> str:
    """Write a function that gives the word of an address; addresses that are never read are left open."""
    lines = [
        f"  function automatic logic [{width - 1}:0] {name}(input logic [{address_width - 1}:0] t);",
        "    case (t)",
    ]
    for address, word in sorted(words.items()):
        lines.append(f"      {address_width}'d{address}: {name} = {literal(width, word.value)};  // {word.comment}")
    if len(words) < 1 << address_width:
        lines.append(f"      default: {name} = 'x;  // no input reads it")
    return "\n".join([*lines, "    endcase", "  endfunction"]) + "\n"
