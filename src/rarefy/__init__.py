"""Make neural networks cheap to run, and prove it: four rooms, each of use alone.

- :mod:`rarefy.sparse`: train a network sparse, to the sparsity, the share of the FLOPs or the time that you name;
- :mod:`rarefy.act`: compute tanh, sigmoid, SiLU and GELU cheaply and exactly;
- :mod:`rarefy.engine`: run a sparse network on the CPU in less time;
- :mod:`rarefy.rtl`: make hardware of the activation functions, verified on all inputs.

:mod:`rarefy.cost` counts what a network costs, :func:`save_sparse` stores it small, and :mod:`rarefy.train` and
:mod:`rarefy.report` (extra ``train``) run recipes and write reports.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rarefy import act, cost, engine, kernels, models, rtl, sparse
    from rarefy.sparse import STR, AutoSparse, LayerState, Sparsifier
    from rarefy.sparse_files import load_sparse, save_sparse

#: Everything is imported with its first use: a command can tell what it does, and be interrupted, without PyTorch.
_ROOMS = ("act", "cost", "engine", "kernels", "models", "rtl", "sparse")
_OTHERS = {
    **dict.fromkeys(("STR", "AutoSparse", "LayerState", "Sparsifier"), "rarefy.sparse"),
    **dict.fromkeys(("load_sparse", "save_sparse"), "rarefy.sparse_files"),
}

__version__ = version("rarefy")

__all__ = [
    "STR",
    "AutoSparse",
    "LayerState",
    "Sparsifier",
    "__version__",
    "act",
    "cost",
    "engine",
    "kernels",
    "load_sparse",
    "models",
    "rtl",
    "save_sparse",
    "sparse",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"rarefy.{name}")
    if name not in _OTHERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_OTHERS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
