"""Checks of arguments, each with a message that says what was given and what is expected."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any


def whole(
    name: str, value: Any, least: int = 1, most: float = math.inf, *, what: str = "number", or_else: str = ""
) -> int:
    """The value as an int. Raises ValueError unless it is a whole number of these, and says ``or_else`` what is one."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or not least <= found <= most:
        kind = "positive whole" if (least, most) == (1, math.inf) else "whole"
        bound = f" from {least} to {most}" if most < math.inf else "" if least == 1 else f" of at least {least}"
        other = f", or {or_else}" if or_else else ""
        raise ValueError(f"{name} must be a {kind} {what}{bound}{other}, got {shown(value)}")
    return found


def number(name: str, value: Any, *, least: float = 0.0, above: bool = False) -> None:
    """Raise ValueError unless the value is a finite number of at least ``least``, or above it."""
    given = not isinstance(value, (bool, str)) and hasattr(value, "__float__")
    if not given or not math.isfinite(value) or value < least or (above and value == least):
        bound = f" above {least:g}" if above else " that is not negative" if least == 0.0 else f" of at least {least:g}"
        raise ValueError(f"{name} must be a finite number{'' if least == -math.inf else bound}, got {shown(value)}")


def fraction(name: str, value: Any, *, zero: bool = True, one: bool = True, percent: bool = False) -> None:
    """Raise ValueError unless the value is a number in [0, 1], without the ends that are said to be out.

    ``percent`` is for what people give in percent: the message says how to write it.
    """
    span = f"{'[' if zero else '('}0, 1{']' if one else ')'}"
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise ValueError(f"{name} must be a number in {span}, got {shown(value)}")
    if not 0.0 <= value <= 1.0 or (value == 0.0 and not zero) or (value == 1.0 and not one):
        hint = f"; for {value:g} % write {value / 100:g}" if percent and 1.0 < value < 100.0 else ""
        raise ValueError(f"{name} must be in {span}, got {value}{hint}")


def flag(name: str, value: Any) -> None:
    """Raise ValueError unless the value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")


def one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise ValueError unless the value is one of the known ones."""
    names = list(known)
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def shown(value: Any) -> str:
    """A value in an error: text is said to be it, since ``1`` and ``'1'`` look alike."""
    return f"the text {value!r}" if isinstance(value, str) else repr(value)
