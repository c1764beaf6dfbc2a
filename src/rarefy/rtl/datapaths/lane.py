"""The datapath of one lane: what is looked up for ``x`` and how the result follows from it.

A :class:`Unit` has two steps, so that a register may stand between them: the look-up of constants and comparisons, and
the shift, the addition and the choice. :mod:`rarefy.rtl.emit` puts ports, registers and lanes around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rarefy.act.formats import Format
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
class Unit:
    """One lane as text.

    Attributes:
        functions: functions and registers of SystemVerilog that the expressions read; shared by all lanes.
        lookup: given what ``x`` is called, the wires of the first step.
        carried: the names of those, and ``x``, that the second step reads, with their widths.
        finish: given what a carried name is called, the wires of the second step; the last one is the result.
        write: the widths of the address and of the word of the write port, None for a table that is fixed.
        setup: the words (address, data) of the table.

    """

    functions: str
    lookup: Callable[[str], list[Wire]]
    carried: dict[str, int]
    finish: Callable[[Callable[[str], str]], list[Wire]]
    write: tuple[int, int] | None = None
    setup: tuple[tuple[int, int], ...] = ()


def width_for(count: int) -> int:
    """Bits of an index into ``count`` things, at least one."""
    return max(1, (count - 1).bit_length())


def choose(selector: str, width: int, options: Sequence[str]) -> str:
    """A multiplexer: ``options[selector]``."""
    *first, last = options
    return "".join(f"{selector} == {literal(width, i)} ? {text} : " for i, text in enumerate(first)) + last


def below(u: str, width: int, value: int) -> str:
    """Whether ``u`` is below a constant: nothing is below 0, which a linter would say of the comparison."""
    return f"{u} < {literal(width, value)}" if value else literal(1, 0)


def nan_wire(fmt: Format, nan: str, x: str) -> list[Wire]:
    """Whether the input is NaN, where the unit wants to know."""
    return [] if nan == "none" else [Wire("nan", 1, f"{x}[{fmt.bits - 2}:0] > {literal(fmt.bits - 1, fmt.last)}")]


def rom(name: str, width: int, address_width: int, words: dict[int, tuple[int, str]]) -> str:
    """A function that gives the word of an address; addresses that are never read are left open."""
    lines = [
        f"  function automatic logic [{width - 1}:0] {name}(input logic [{address_width - 1}:0] t);",
        "    case (t)",
    ]
    for address, (word, comment) in sorted(words.items()):
        lines.append(f"      {address_width}'d{address}: {name} = {literal(width, word)};  // {comment}")
    if len(words) < 1 << address_width:
        lines.append(f"      default: {name} = 'x;  // no input reads it")
    return "\n".join([*lines, "    endcase", "  endfunction"]) + "\n"


def nan_result(fmt: Format, nan: str, x: str) -> str:
    """The magnitude that a NaN gives."""
    magnitude = f"{x}[{fmt.bits - 2}:0]"
    if nan == "keep" or not fmt.infinities:
        return magnitude
    return f"{magnitude} | {literal(fmt.bits - 1, 1 << (fmt.mantissa_bits - 1))}"
