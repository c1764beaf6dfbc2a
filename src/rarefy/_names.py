"""Errors about names: every one says what was given and which right name is nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, given: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: ``unknown WHAT 'GIVEN'; did you mean 'NEAREST'? (there is ...)``."""
    names = [str(name) for name in known]
    nearest = difflib.get_close_matches(given, names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"unknown {what} {given!r}{hint} (there is {listed or 'none'})"


def layer_name(parameter_name: str) -> str:
    """What a layer is called: its parameter's name without a trailing "weight", as "conv1" for "conv1.weight"."""
    return "" if parameter_name == "weight" else parameter_name.removesuffix(".weight")
