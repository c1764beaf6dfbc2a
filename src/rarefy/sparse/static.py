"""Static sparse training: masks drawn at random before the first step and kept.

The baseline of sparse-to-sparse training (Mocanu et al. 2018; RigL, Evci et al. 2020, calls it "Static").
"""

from __future__ import annotations

from torch import Tensor

from rarefy.sparse.base import Info
from rarefy.sparse.masked import Masked


class Static(Masked):
    """Fixed random masks.

    Args: see :class:`Masked`; ``update_every`` has no effect.
    """

    info = Info("Static", "baseline of RigL, Evci et al., ICML 2020", "sparse", "always", "at the target's density")

    def _first_masks(self) -> list[Tensor]:
        assert self.budget is not None
        return self._random_masks(self._live_counts(self.budget.goal))
