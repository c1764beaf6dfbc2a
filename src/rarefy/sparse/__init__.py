"""Which weights live while a network trains."""

from rarefy.sparse.autosparse import AutoSparse
from rarefy.sparse.base import LayerState, Sparsifier
from rarefy.sparse.registry import create, names, options
from rarefy.sparse.soft_threshold import STR

__all__ = ["STR", "AutoSparse", "LayerState", "Sparsifier", "create", "names", "options"]
