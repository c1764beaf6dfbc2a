"""Docstrings as Python shows them, for the reference: options that classes inherit, and roles as plain code."""

import importlib
import inspect
import itertools
import re
from pathlib import Path
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


def _above(obj: griffe.Object) -> str:
    """The comment of #: that stands right above an assignment, or nothing."""
    lines = Path(obj.filepath).read_text().splitlines()[: obj.lineno - 1]
    comment = itertools.takewhile(lambda line: line.strip().startswith("#:"), reversed(lines))
    return " ".join(line.strip()[2:].strip() for line in reversed(list(comment)))


class Docstrings(griffe.Extension):
    """A sparsifier's docstring names all its options only once the class is made: that one is shown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Replace the text that griffe read from the source, and give it that of a constant: the lines of #: above."""
        if obj.docstring is None:
            if not (obj.is_attribute and obj.lineno and (comment := _above(obj))):
                return
            obj.docstring = griffe.Docstring(comment, parent=obj)
        text = obj.docstring.value
        if obj.is_class and obj.path.startswith("rarefy.sparse."):
            made = _at_run_time(obj.path)
            text = (made and inspect.getdoc(made)) or text
        obj.docstring.value = _ROLE.sub(r"`\1`", text)
