"""rarefy makes neural networks cheap and proves it: sparse training to a budget, its cost counted honestly.

:class:`AutoSparse` and its siblings in :mod:`rarefy.sparse` sparsify a model while it trains; :mod:`rarefy.cost` counts
what is left; :mod:`rarefy.train` and :mod:`rarefy.report` (extra ``train``) run recipes and write reports.
"""

from importlib.metadata import version

from rarefy import cost, kernels, models, sparse
from rarefy.sparse import STR, AutoSparse, LayerState, Sparsifier

__version__ = version("rarefy")

__all__ = ["STR", "AutoSparse", "LayerState", "Sparsifier", "__version__", "cost", "kernels", "models", "sparse"]
