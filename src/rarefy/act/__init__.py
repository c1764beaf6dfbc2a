"""Cheap activation functions: K-TanH from one integer table, and correctly rounded ones at its speed."""

from rarefy.act import functional
from rarefy.act.functional import gelu, sigmoid, silu, tanh
from rarefy.act.modules import GELU, Sigmoid, SiLU, Tanh
from rarefy.act.recurrent import GRU, LSTM, GRUCell, LSTMCell
from rarefy.act.spec.formats import FORMATS, Format
from rarefy.act.spec.table import (
    BitIndex,
    CarryTable,
    CutIndex,
    LinearTable,
    MultiplyIndex,
    SegmentsTable,
    ShiftTable,
    Table,
    list_tables,
    load,
)
from rarefy.act.swapping import Swap, swap

__all__ = [
    "FORMATS",
    "GELU",
    "GRU",
    "LSTM",
    "BitIndex",
    "CarryTable",
    "CutIndex",
    "Format",
    "GRUCell",
    "LSTMCell",
    "LinearTable",
    "MultiplyIndex",
    "SegmentsTable",
    "ShiftTable",
    "SiLU",
    "Sigmoid",
    "Swap",
    "Table",
    "Tanh",
    "functional",
    "gelu",
    "list_tables",
    "load",
    "sigmoid",
    "silu",
    "swap",
    "tanh",
]
