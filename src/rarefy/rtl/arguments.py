"""Checks of arguments, each with the message that says what was given and what is expected."""

from __future__ import annotations

from typing import Any

from rarefy import _checks
from rarefy.rtl.design import Design


def design(function: str, value: Any, name: str = "") -> None:
    """Raise TypeError unless ``value`` is a design; ``name`` is that of an argument after the first."""
    if not isinstance(value, Design):
        takes = f"{name} must be" if name else f"{function} takes"
        raise TypeError(f"{takes} a Design, got {type(value).__name__}: rarefy.rtl.emit makes one of a table")


def seed(value: Any) -> int:
    """Give ``value`` as an int; raises ValueError unless it is a seed."""
    return _checks.whole("seed", value, 0, (1 << 32) - 1)
