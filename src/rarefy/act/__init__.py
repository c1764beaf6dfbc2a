"""Cheap activation functions: K-TanH from one integer table, and correctly rounded ones at its speed."""

from rarefy.act import functional
from rarefy.act.functional import gelu, sigmoid, silu, tanh
from rarefy.act.modules import GELU, LSTMCell, Sigmoid, SiLU, Tanh
from rarefy.act.spec.formats import FORMATS, Format
from rarefy.act.spec.table import BitIndex, CutIndex, MultiplyIndex, Table, load, names
from rarefy.act.swapping import Swap, swap

__all__ = [
    "FORMATS",
    "GELU",
    "BitIndex",
    "CutIndex",
    "Format",
    "LSTMCell",
    "MultiplyIndex",
    "SiLU",
    "Sigmoid",
    "Swap",
    "Table",
    "Tanh",
    "functional",
    "gelu",
    "load",
    "names",
    "sigmoid",
    "silu",
    "swap",
    "tanh",
]
