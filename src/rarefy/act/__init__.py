"""Cheap activation functions: K-TanH from one integer table, and correctly rounded ones at its speed."""

from rarefy.act.formats import FORMATS, Format
from rarefy.act.table import BitIndex, CutIndex, MultiplyIndex, Table, load, names

__all__ = ["FORMATS", "BitIndex", "CutIndex", "Format", "MultiplyIndex", "Table", "load", "names"]
