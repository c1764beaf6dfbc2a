"""Checks of arguments, each with the message that says what was given and what is expected."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from rarefy.rtl.design import Design


def design(function: str, value: Any, name: str = "") -> None:
    """Raise TypeError unless ``value`` is a design; ``name`` is that of an argument after the first."""
    if not isinstance(value, Design):
        takes = f"{name} must be" if name else f"{function} takes"
        raise TypeError(f"{takes} a Design, got {type(value).__name__}: rarefy.rtl.emit makes one of a table")


def whole(name: str, value: Any, least: int, most: float = math.inf, words: str = "") -> int:
    """Give ``value`` as an int; raises ValueError unless it is a whole number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name} must be {words or f'a whole number {limits}'}, got {value!r}")
    return int(value)


def seed(value: Any) -> int:
    """Give ``value`` as an int; raises ValueError unless it is a seed."""
    return whole("seed", value, 0, (1 << 32) - 1, "a whole number from 0 to 2^32 - 1")


def flag(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of the names that are known."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
