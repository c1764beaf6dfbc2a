"""GMP: gradual magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878; Gale et al. 2019, arXiv 1902.09574).

    s(t) = s_f + (s_i - s_f) * (1 - u)^3,   u = (t - start) / (end - start) in [0, 1]          equation 1

After each update the weights of largest magnitude live, as many as s(t) says; a pruned weight stays 0. Layers are
compared together ("global"), or pruned each on its own: to the same sparsity ("uniform", also called local), to ERK's,
or to sparsities given by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from rarefy.sparse import _options
from rarefy.sparse.budget import RAMP
from rarefy.sparse.families.masked import Masked
from rarefy.sparse.masks import count_all
from rarefy.sparse.reports import Info


@dataclass(eq=False, repr=False)
class GMP(Masked):
    """Gradual magnitude pruning.

    A model that is sparse already (a tenth of its weights, in half of the layers) keeps its zeros, and goes on from its
    sparsity, s_i; any other starts dense.

    Args:
        update_every: steps from one change of the masks to the next; None takes a 125th of the run.
        start, end: the shares of the run between which the sparsity rises.

    Raises:
        ValueError: as :class:`Budgeted`; start and end not in order.
    """

    _: KW_ONLY
    update_every: int | None = None
    start: float = RAMP[0]
    end: float = RAMP[1]

    info = Info(
        title="GMP",
        paper="Zhu and Gupta 2017, arXiv 1710.01878",
        start="dense",
        targeted="always",
        training_flops="at the density of the weights",
    )
    default_distribution = "global"
    takes_global = True

    def __post_init__(self) -> None:
        _options.ramp(self.start, self.end)
        super().__post_init__()
        _options.update_every(self.update_every, self.total_steps)
        self._every = self.update_every or self.interval
        self._initial_density = 1.0

    def aim(self) -> float:
        """See :meth:`Sparsifier.aim`: d = d_0 - (d_0 - d_T) ramp."""
        return self.ramped(self._initial_density, self.start, self.end)

    def initial_masks(self) -> list[Tensor]:
        """See :class:`Masked`: what the model has."""
        masks = self.zeros_of_the_model()
        if masks is not None:
            self._initial_density = self.budget.density(count_all(masks, self._shards()))
        return super().initial_masks() if masks is None else masks

    def update_masks(self) -> list[Tensor] | None:
        """See :class:`Masked`: the largest weights."""
        if not self.due(self._every, self.end) and self.steps != self.total_steps:
            return None
        if self._initial_density <= self.budget.goal:  # as sparse as the target, or sparser
            return None
        return self.choose(self.magnitudes(), self.aim())

    def _state(self) -> dict[str, Any]:
        return {"initial_density": self._initial_density}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._initial_density = state["initial_density"]
