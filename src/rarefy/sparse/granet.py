"""GraNet: gradual pruning with neuroregeneration (Liu et al., NeurIPS 2021, arXiv 2106.10404).

At every update
    prune       to the density of the cubic schedule, by magnitude over all layers (as GMP)
    regenerate  each layer drops the share f(t) of its live weights, those of least magnitude, and grows as many where
                |dL/dW| is largest (as RigL)

Started dense it is dense to sparse; started at ``initial_density`` with ERK masks, sparse to sparse.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.anneal import cubic_ramp
from rarefy.sparse.base import Info
from rarefy.sparse.gmp import check_ramp
from rarefy.sparse.masked import cosine_decay
from rarefy.sparse.rigl import RigL
from rarefy.sparse.set import SETOptions, drop_and_grow


class GraNet(RigL):
    """Gradual pruning that lets weights grow back.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block,
            update_every, seed, drop_fraction, stop: see :class:`SET`; ``drop_fraction`` is 0.5 here, and
            ``distribution`` "global", as in the paper.
        initial_density: 0.5 for sparse to sparse, 1 for dense to sparse; more than the target's density, at most 1.
        end: the share of the run at which the sparsity is the target's, in (0, 1].

    Raises:
        ValueError: as :class:`SET`; an initial density not above the target's.
    """

    info = Info(
        "GraNet",
        "Liu et al., NeurIPS 2021, arXiv 2106.10404",
        "sparse",
        "always",
        "at the density of the weights, dense in each step that changes the masks",
    )
    default_distribution = "global"
    takes_global = True

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        initial_density: float = 0.5,
        end: float = 0.6,
        **options: Unpack[SETOptions],
    ) -> None:
        check_ramp(0.0, end)
        if not 0.0 < initial_density <= 1.0:
            raise ValueError(f"initial_density must be in (0, 1], got {initial_density}")
        self.initial_density, self.end = initial_density, end
        options.setdefault("drop_fraction", 0.5)
        super().__init__(model, total_steps=total_steps, **options)

    def _first_masks(self) -> list[Tensor]:
        assert self.budget is not None
        if self.initial_density <= self.budget.goal:
            raise ValueError(
                f"initial_density={self.initial_density:g} must be above the target's density, {self.budget.goal:.4g}"
            )
        if self.initial_density == 1.0:
            return self._masks
        return self._random_masks(self._live_counts(self.initial_density))

    def aim(self) -> float:
        """The density that the schedule asks for now, in (0, 1]."""
        assert self.budget is not None
        fall = self.initial_density - self.budget.goal
        return self.initial_density - fall * cubic_ramp(self.progress, 0.0, self.end)

    def _change(self) -> list[Tensor] | None:
        if not self._due(max(self.end, self.stop)) and self.steps != self.total_steps:
            return None
        masks = self._choose(self._live_magnitudes(), self.aim())
        growth: Sequence[Tensor] | None = self._growth()
        fraction = cosine_decay(self.drop_fraction, self.progress, self.stop)
        if growth is None or fraction == 0.0:
            return masks
        return [
            drop_and_grow(weight.detach().abs().masked_fill(~mask, -1.0), mask, grow, fraction, self.block)
            for weight, mask, grow in zip(self._weights(), masks, growth, strict=True)
        ]
