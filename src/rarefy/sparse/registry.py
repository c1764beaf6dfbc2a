"""Methods by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from rarefy._names import unknown
from rarefy.sparse.autosparse import AutoSparse
from rarefy.sparse.base import Sparsifier
from rarefy.sparse.soft_threshold import STR

METHODS: dict[str, type[Sparsifier]] = {"autosparse": AutoSparse, "str": STR}


def names() -> list[str]:
    """The names that :func:`create` knows."""
    return sorted(METHODS)


def options(name: str) -> set[str]:
    """The keyword arguments of the method of this name. Raises ValueError for a name that is not there."""
    if name not in METHODS:
        raise ValueError(unknown("method", name, names()))
    constructors = [vars(cls)["__init__"] for cls in METHODS[name].__mro__[:-1] if "__init__" in vars(cls)]
    parameters = [p for init in constructors for p in inspect.signature(init).parameters.values()]
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def create(name: str, model: nn.Module, **arguments: Any) -> Sparsifier:
    """The method of this name for ``model``: ``create("autosparse", model, total_steps=1000, target=0.9)``.

    Raises ValueError for a name or an option that is not there, naming the nearest one that is.
    """
    known = options(name)
    for option in arguments:
        if option not in known:
            raise ValueError(unknown(f"option of method {name!r}:", option, sorted(known)))
    return METHODS[name](model, **arguments)
