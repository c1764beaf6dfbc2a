"""Names: what a layer is called, and errors that say what was given and which right name is nearest."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable


def unknown(what: str, given: object, known: Iterable[str]) -> str:
    """The message for a name that does not exist: ``unknown WHAT 'GIVEN'; did you mean 'NEAREST'? (there is ...)``."""
    names = [str(name) for name in known]
    tried = (difflib.get_close_matches(text, names, n=1) for text in (str(given), str(given).lower()))
    nearest = next(filter(None, tried), [])
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"unknown {what} {given!r}{hint} (there is {listed or 'none'})"


def matches(name: str, pattern: str) -> bool:
    """Whether a shell pattern is about this name; a name is about itself, whatever brackets it has."""
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def layer_name(parameter_name: str) -> str:
    """The name of the layer that a parameter is: ``conv1`` for ``conv1.weight``, ``""`` for a model's own ``weight``.

    Every other parameter keeps its name: ``attn.in_proj_weight``, ``rnn.weight_ih_l0``.
    """
    return "" if parameter_name == "weight" else parameter_name.removesuffix(".weight")
