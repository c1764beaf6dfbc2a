"""GraNet: gradual pruning with neuroregeneration (Liu et al., NeurIPS 2021, arXiv 2106.10404).

At every update
    prune       to the density of the cubic schedule, by magnitude over all layers (as GMP)
    regenerate  each layer drops the share f(t) of its live weights, those of least magnitude, and grows as many where
                |dL/dW| is largest (as RigL)

Started dense it is dense to sparse; started at ``initial_density`` with ERK masks, sparse to sparse.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from rarefy import _checks
from rarefy.sparse import _options
from rarefy.sparse.methods.rigl import RigL
from rarefy.sparse.reports import Info
from rarefy.sparse.schedules import cosine_decay


@dataclass(eq=False, repr=False)
class GraNet(RigL):
    """Gradual pruning that lets weights grow back.

    Args:
        initial_density: 0.5 for sparse to sparse, 1 for dense to sparse; more than the target's density, at most 1.
        end: the share of the run at which the sparsity is the target's, in (0, 1].

    Raises:
        ValueError: as :class:`SET`; an initial density not above the target's.
    """

    _: KW_ONLY
    drop_fraction: float = 0.5
    initial_density: float = 0.5
    end: float = 0.6

    info = Info(
        title="GraNet",
        paper="Liu et al., NeurIPS 2021, arXiv 2106.10404",
        start="sparse",
        targeted="always",
        training_flops="at the density of the weights, dense in each step that changes the masks",
    )
    default_distribution = "global"
    takes_global = True

    def __post_init__(self) -> None:
        _options.ramp(0.0, self.end)
        _checks.fraction("initial_density", self.initial_density, zero=False)
        super().__post_init__()
        if self.initial_density <= self.budget.goal:
            raise ValueError(
                f"initial_density={self.initial_density:g} must be above the target's density, {self.budget.goal:.4g}"
            )

    def initial_masks(self) -> list[Tensor]:
        """See :class:`Masked`: at random, or all."""
        return self.random_masks(self.initial_density, self.seed)

    def aim(self) -> float:
        """See :meth:`Sparsifier.aim`: d = d_0 - (d_0 - d_T) ramp."""
        return self.ramped(self.initial_density, 0.0, self.end)

    def update_masks(self) -> list[Tensor] | None:
        """See :class:`Masked`: prune as GMP, drop and grow as RigL."""
        if not self.due(self._every, max(self.end, self.stop)) and self.steps != self.total_steps:
            return None
        masks, growth = self.choose(self.magnitudes(), self.aim()), self.growth_scores()
        if growth is None or cosine_decay(self.drop_fraction, self.progress, self.stop) == 0.0:
            return masks
        magnitudes = [w.abs().masked_fill(~mask, -1.0) for w, mask in zip(self.weights(), masks, strict=True)]
        return self.drop_and_grow(masks, magnitudes, growth)
