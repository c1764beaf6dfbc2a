"""Which weights live while a network trains: one method a file, all under the contract of :class:`Sparsifier`."""

from rarefy.sparse.acdc import ACDC
from rarefy.sparse.autosparse import AutoSparse
from rarefy.sparse.base import Info, LayerState, Sparsifier
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
from rarefy.sparse.registry import create, list_methods, names, options, register
from rarefy.sparse.rigl import RigL
from rarefy.sparse.set import SET
from rarefy.sparse.snfs import SNFS
from rarefy.sparse.soft_threshold import STR
from rarefy.sparse.st3 import ST3
from rarefy.sparse.static import Static
from rarefy.sparse.topk import TopK
from rarefy.sparse.topkast import TopKAST

__all__ = [
    "ACDC",
    "DST",
    "GMP",
    "LTP",
    "MEST",
    "NM",
    "SET",
    "SNFS",
    "ST3",
    "STR",
    "AutoSparse",
    "ContinuousSparsification",
    "Feather",
    "GraNet",
    "Info",
    "LayerState",
    "OptG",
    "PowerPropagation",
    "RigL",
    "Sparsifier",
    "Static",
    "TopK",
    "TopKAST",
    "create",
    "list_methods",
    "names",
    "options",
    "register",
]

#: ``rarefy.sparse.list``; not in ``__all__``, since a star import would hide Python's own.
list = list_methods
