"""Methods by name."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import inspect
import re
from typing import Any, Literal, overload

from torch import nn

from rarefy._names import unknown
from rarefy.sparse.base import Sparsifier
from rarefy.sparse.methods.acdc import ACDC
from rarefy.sparse.methods.autosparse import AutoSparse
from rarefy.sparse.methods.band import Band
from rarefy.sparse.methods.cs import ContinuousSparsification
from rarefy.sparse.methods.dst import DST
from rarefy.sparse.methods.feather import Feather
from rarefy.sparse.methods.gmp import GMP
from rarefy.sparse.methods.granet import GraNet
from rarefy.sparse.methods.ltp import LTP
from rarefy.sparse.methods.mest import MEST
from rarefy.sparse.methods.nm import NM
from rarefy.sparse.methods.optg import OptG
from rarefy.sparse.methods.powerprop import PowerPropagation
from rarefy.sparse.methods.rigl import RigL
from rarefy.sparse.methods.set import SET
from rarefy.sparse.methods.snfs import SNFS
from rarefy.sparse.methods.st3 import ST3
from rarefy.sparse.methods.static import Static
from rarefy.sparse.methods.str import STR
from rarefy.sparse.methods.topk import TopK
from rarefy.sparse.methods.topkast import TopKAST
from rarefy.sparse.reports import Info

METHODS: dict[str, type[Sparsifier]] = {
    "acdc": ACDC,
    "autosparse": AutoSparse,
    "band": Band,
    "cs": ContinuousSparsification,
    "dst": DST,
    "feather": Feather,
    "gmp": GMP,
    "granet": GraNet,
    "ltp": LTP,
    "mest": MEST,
    "nm": NM,
    "optg": OptG,
    "powerprop": PowerPropagation,
    "rigl": RigL,
    "set": SET,
    "snfs": SNFS,
    "st3": ST3,
    "static": Static,
    "str": STR,
    "topk": TopK,
    "topkast": TopKAST,
}


@functools.cache
def _sections(kind: type) -> list[str]:
    """What a class's own docstring says: about it, then Args and Raises where they are."""
    return re.split(r"\n\n(?=Args:|Raises:)", inspect.cleandoc(vars(kind).get("__doc__") or kind.__name__))


def _document(method: type[Sparsifier]) -> None:
    """Let ``help()`` of a method tell all its options, those of its bases too, and their defaults."""
    known = {field.name: field.default for field in dataclasses.fields(method) if field.init}
    told: dict[str, str] = {}
    for args in (section for kind in method.__mro__ for section in _sections(kind) if section.startswith("Args:")):
        for entry in re.split(r"\n    (?=\S)", args.rstrip())[1:]:
            about = entry.partition(": ")[0].split(", ")
            values = [
                repr(known[name]) for name in about if known.get(name, dataclasses.MISSING) is not dataclasses.MISSING
            ]
            default = f" Default: {', '.join(values)}." if values else ""
            told = {**dict.fromkeys(about, f"    {entry}{default}"), **told}
    lines = dict.fromkeys(told[name] for name in known if name in told)  # in order, and once
    head, *others = _sections(method)
    raises = [section for section in others if section.startswith("Raises:")]
    method.__doc__ = "\n\n".join([head, "\n".join(["Args:", *lines]), *raises])


for _method in METHODS.values():
    _sections(_method)
for _method in METHODS.values():
    _document(_method)


def names() -> list[str]:
    """List the names that :func:`create` knows: ``list_methods()``."""
    return sorted(METHODS)


@overload
def list_methods(pattern: str = "*", details: Literal[False] = False) -> list[str]: ...


@overload
def list_methods(pattern: str = "*", *, details: Literal[True]) -> dict[str, Info]: ...


def list_methods(pattern: str = "*", details: bool = False) -> list[str] | dict[str, Info]:
    """List the names that match a shell pattern, in order; with ``details``, what each method is, by name.

    ``list_methods("s*")`` gives ``["set", "snfs", ...]``.
    """
    found = fnmatch.filter(sorted(METHODS), pattern)
    return {name: METHODS[name].info for name in found} if details else found


def register(name: str, method: type[Sparsifier]) -> None:
    """Let :func:`create`, recipes and comparisons in this process know a method of your own by this name.

    Raises ValueError for a name that is taken, and for what is no subclass of :class:`Sparsifier`.
    """
    if not isinstance(name, str):
        raise ValueError(f"the name of a method is a text, got {name!r}")
    if name in METHODS:
        raise ValueError(f"there is a method {name!r} already")
    if not (isinstance(method, type) and issubclass(method, Sparsifier)):
        raise ValueError(f"a method is a subclass of Sparsifier, got {method!r}")
    _document(method)
    METHODS[name] = method


def options(name: str) -> dict[str, Any]:
    """Return the keyword arguments of the method of this name and their defaults, ``dataclasses.MISSING`` for none.

    Raises ValueError for a name that is not there.
    """
    if name not in METHODS:
        raise ValueError(unknown("method", name, sorted(METHODS)))
    fields = dataclasses.fields(METHODS[name])
    return {field.name: field.default for field in fields if field.init and field.kw_only}


def create(name: str, model: nn.Module, **arguments: Any) -> Sparsifier:
    """Make the method of this name for ``model``: ``create("autosparse", model, total_steps=1000, target=0.9)``.

    Raises ValueError for a name or an option that is not there, naming the nearest one that is.
    """
    if name not in METHODS:
        raise ValueError(unknown("method", name, sorted(METHODS)))
    return METHODS[name](model, **arguments)
