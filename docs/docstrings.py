"""Docstrings as Python shows them, for the reference: options that classes inherit, and roles as plain code."""

import importlib
import inspect
import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?([^`]+)`")


def _at_run_time(path: str) -> Any:
    """The object of a dotted path, or None where there is none."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


class Docstrings(griffe.Extension):
    """A sparsifier's docstring names all its options only once the class is made: that one is shown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace the text that griffe read from the source."""
        if obj.docstring is None:
            return
        text = obj.docstring.value
        if obj.is_class and obj.path.startswith("rarefy.sparse."):
            made = _at_run_time(obj.path)
            text = (made and inspect.getdoc(made)) or text
        obj.docstring.value = _ROLE.sub(r"`\1`", text)
