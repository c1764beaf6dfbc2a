"""Checks of the options that methods share, each with a message that says what was given and what is expected."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rarefy._checks import shown
from rarefy._names import unknown

#: What users of other libraries write, and what it is called here.
_OTHER_WORDS = {"sparsity": "target", "density": "target", "final_sparsity": "target", "steps": "total_steps"}


def known(what: str, given: Iterable[str], names: Sequence[str]) -> None:
    """Raise ValueError for a name that is not there, naming the nearest one that is."""
    for name in given:
        if name not in names:
            meant = _OTHER_WORDS.get(name)
            hint = f" (did you mean {meant!r}?)" if meant in names else ""
            raise ValueError(unknown(what, name, sorted(names)) + hint)


def block(name: str, value: Any) -> tuple[int, int]:
    """How many outputs and inputs a block has, given as both, or as the inputs alone. Raises ValueError otherwise."""
    pair = tuple(value) if isinstance(value, (list, tuple)) else (1, value)
    number = (int, np.integer)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, number) or n < 1 for n in pair):
        raise ValueError(
            f"{name} must be a positive whole number of inputs, such as 4, or of outputs and of inputs, such as "
            f"(8, 4), got {shown(value)}"
        )
    return operator.index(pair[0]), operator.index(pair[1])


def patterns(name: str, value: Any) -> list[str] | None:
    """The names or shell patterns as a list; None stays. Raises ValueError for anything else."""
    if isinstance(value, str):
        raise ValueError(f"{name} must be a list of patterns, got the string {value!r}; write [{value!r}]")
    listed = value if value is None or not isinstance(value, Iterable) else list(value)
    if listed is not None and not (isinstance(listed, list) and all(isinstance(each, str) for each in listed)):
        raise ValueError(f"{name} must be a list of names or shell patterns of layers, got {value!r:.80}")
    return listed


def ramp(start: float, end: float) -> None:
    """Raise ValueError unless the sparsity rises between two shares of the run, in this order."""
    given = all(not isinstance(x, (bool, str)) and hasattr(x, "__float__") for x in (start, end))
    if not given or not 0.0 <= start < end <= 1.0:
        raise ValueError(
            f"start and end must be shares of the run with 0 <= start < end <= 1, got {start!r} and {end!r}"
        )


def update_every(value: int | None, total_steps: int) -> None:
    """Raise ValueError unless it is None or fits into the run."""
    if value is not None and (isinstance(value, bool) or value not in range(1, total_steps + 1)):
        raise ValueError(
            f"update_every must be a whole number of steps between 1 and total_steps={total_steps}, got {value!r}"
        )
