"""rarefy makes neural networks cheap and proves it: sparse training to a budget, its cost counted honestly.

:class:`AutoSparse` and its siblings in :mod:`rarefy.sparse` sparsify a model while it trains; :mod:`rarefy.cost` counts
what is left and :func:`save_sparse` stores it small; :mod:`rarefy.train` and :mod:`rarefy.report` (extra ``train``) run
recipes and write reports.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rarefy import cost, kernels, models, sparse
from rarefy.sparse import STR, AutoSparse, LayerState, Sparsifier

if TYPE_CHECKING:
    from rarefy.sparse_files import load_sparse, save_sparse

#: What is imported with its first use, and where it is.
_LATER = {"load_sparse": "rarefy.sparse_files", "save_sparse": "rarefy.sparse_files"}

__version__ = version("rarefy")

__all__ = [
    "STR",
    "AutoSparse",
    "LayerState",
    "Sparsifier",
    "__version__",
    "cost",
    "kernels",
    "load_sparse",
    "models",
    "save_sparse",
    "sparse",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
