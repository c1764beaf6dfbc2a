"""Methods by name."""

from __future__ import annotations

import fnmatch
import inspect
from typing import Any, Literal, overload

from torch import nn

from rarefy._names import unknown
from rarefy.sparse.acdc import ACDC
from rarefy.sparse.autosparse import AutoSparse
from rarefy.sparse.base import Info, Sparsifier
from rarefy.sparse.cs import ContinuousSparsification
from rarefy.sparse.dst import DST
from rarefy.sparse.feather import Feather
from rarefy.sparse.gmp import GMP
from rarefy.sparse.granet import GraNet
from rarefy.sparse.ltp import LTP
from rarefy.sparse.mest import MEST
from rarefy.sparse.nm import NM
from rarefy.sparse.optg import OptG
from rarefy.sparse.powerprop import PowerPropagation
from rarefy.sparse.rigl import RigL
from rarefy.sparse.set import SET
from rarefy.sparse.snfs import SNFS
from rarefy.sparse.soft_threshold import STR
from rarefy.sparse.st3 import ST3
from rarefy.sparse.static import Static
from rarefy.sparse.topk import TopK
from rarefy.sparse.topkast import TopKAST

METHODS: dict[str, type[Sparsifier]] = {
    "acdc": ACDC,
    "autosparse": AutoSparse,
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


def names() -> list[str]:
    """The names that :func:`create` knows."""
    return sorted(METHODS)


@overload
def list_methods(pattern: str = "*", details: Literal[False] = False) -> list[str]: ...


@overload
def list_methods(pattern: str = "*", *, details: Literal[True]) -> dict[str, Info]: ...


def list_methods(pattern: str = "*", details: bool = False) -> list[str] | dict[str, Info]:
    """The names that match a shell pattern, in order; with ``details``, what each method is, by name.

    As ``rarefy.sparse.list``: ``list("s*")`` gives ``["set", "snfs", ...]``.
    """
    found = fnmatch.filter(names(), pattern)
    return {name: METHODS[name].info for name in found} if details else found


def register(name: str, method: type[Sparsifier]) -> None:
    """Let :func:`create`, recipes and comparisons in this process know a method of your own by this name.

    Raises ValueError for a name that is taken, and for what is no subclass of :class:`Sparsifier`.
    """
    if name in METHODS:
        raise ValueError(f"there is a method {name!r} already")
    if not (isinstance(method, type) and issubclass(method, Sparsifier)):
        raise ValueError(f"a method is a subclass of Sparsifier, got {method!r}")
    METHODS[name] = method


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
