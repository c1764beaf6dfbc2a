"""GMP: gradual magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878; Gale et al. 2019, arXiv 1902.09574).

    s(t) = s_f * (1 - (1 - u)^3),   u = (t - start) / (end - start) in [0, 1]          equation 1, from s_i = 0

After each update the weights of largest magnitude live, as many as s(t) says; a pruned weight stays 0. Layers are
compared together ("global"), or pruned each on its own: to the same sparsity ("uniform", also called local), to ERK's,
or to sparsities given by layer.
"""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.anneal import cubic_ramp
from rarefy.sparse.base import Info
from rarefy.sparse.budget import RAMP
from rarefy.sparse.masked import Masked, MaskedOptions


def check_ramp(start: float, end: float) -> None:
    """Raise ValueError unless the sparsity rises between two shares of the run, in this order."""
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(f"start and end must be shares of the run with 0 <= start < end <= 1, got {start} and {end}")


class GMP(Masked):
    """Gradual magnitude pruning.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block: see
            :class:`Budgeted`.
        update_every, seed: see :class:`Masked`.
        start, end: the shares of the run between which the sparsity rises.

    Raises:
        ValueError: as :class:`Budgeted`; start and end not in order.
    """

    info = Info("GMP", "Zhu and Gupta 2017, arXiv 1710.01878", "dense", "always", "at the density of the weights")
    default_distribution = "global"
    takes_global = True

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        start: float = RAMP[0],
        end: float = RAMP[1],
        **options: Unpack[MaskedOptions],
    ) -> None:
        check_ramp(start, end)
        self.start, self.end = start, end
        super().__init__(model, total_steps=total_steps, **options)

    def aim(self) -> float:
        """The density that the schedule asks for now, in (0, 1]."""
        assert self.budget is not None
        return 1.0 - (1.0 - self.budget.goal) * cubic_ramp(self.progress, self.start, self.end)

    def _change(self) -> list[Tensor] | None:
        if not self._due(self.end) and self.steps != self.total_steps:
            return None
        return self._choose(self._live_magnitudes(), self.aim())
