"""Top-K with Gradient Annealing: the variant of AutoSparse with a budget fixed beforehand (arXiv 2304.06941).

forward     W^ = W where W is among the K largest |W| of its layer, else 0
backward    1 for those, alpha for the next largest up to ``backward_density`` of the layer, 0 for the rest
annealing   alpha = alpha_0 * schedule(progress)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.anneal import SCHEDULES
from rarefy.sparse.base import Info
from rarefy.sparse.masks import top_k
from rarefy.sparse.projected import Estimator, Projected, RampOptions, straight_through


class _AnnealedTopK(Estimator):
    """A hard mask whose gradient reaches the next largest weights too, times alpha."""

    explore: Tensor
    alpha: Tensor

    def __init__(self, weight: Tensor, backward_density: float) -> None:
        super().__init__(weight)
        self.register_buffer("explore", torch.zeros_like(weight, dtype=torch.bool, requires_grad=False))
        self.register_buffer("alpha", torch.zeros((), device=weight.device))
        self.backward_density = backward_density

    def project(self, weight: Tensor, mask: Tensor) -> None:
        super().project(weight, mask)
        k = max(int(mask.sum()), int(self.backward_density * weight.numel()))
        # What the forward uses comes first, whatever its size: floors and blocks may have chosen smaller ones.
        self.explore.copy_(top_k(weight.detach().abs().masked_fill(mask, torch.inf), k) & ~mask)

    def forward(self, weight: Tensor) -> Tensor:
        return straight_through(weight * self.mask, weight, self.mask + self.alpha * self.explore)


class TopK(Projected):
    """Top-K with Gradient Annealing.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block: see
            :class:`Budgeted`; uniform, as in the paper.
        update_every, start, end: see :class:`Projected`; the target's sparsity from the first step on.
        alpha: alpha_0, in [0, 1].
        anneal: "sigmoid-cosine" (the default), "cosine", "sigmoid", "linear" or "constant".
        cutoff: share of the run after which alpha is 0, in [0, 1].
        backward_density: share of each layer's weights that gets a gradient while alpha is not 0, in [0, 1].

    Raises:
        ValueError: as :class:`Budgeted`; an option out of its range.
    """

    info = Info(
        "Top-K with Gradient Annealing",
        "Kundu et al., 2023, arXiv 2304.06941",
        "sparse",
        "always",
        "at backward_density while alpha > 0, then at the density of the weights",
    )
    default_distribution = "uniform"

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        alpha: float = 0.75,
        anneal: str = "sigmoid-cosine",
        cutoff: float | None = None,
        backward_density: float = 0.5,
        **options: Unpack[RampOptions],
    ) -> None:
        for name, value in (("alpha", alpha), ("cutoff", cutoff), ("backward_density", backward_density)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if anneal not in SCHEDULES:
            raise ValueError(f"anneal must be one of {', '.join(map(repr, SCHEDULES))}, got {anneal!r}")
        self.alpha, self.schedule, self.cutoff, self.backward_density = (
            alpha,
            SCHEDULES[anneal],
            cutoff,
            backward_density,
        )
        super().__init__(model, total_steps=total_steps, **options)
        self._steer()

    def _estimator(self, weight: Tensor) -> Estimator:
        return _AnnealedTopK(weight, self.backward_density)

    def _alpha(self) -> float:
        if self.cutoff is not None and self.progress >= self.cutoff:
            return 0.0
        return self.alpha * self.schedule(self.progress)

    def _steer(self) -> None:
        for estimator in self._estimators:
            assert isinstance(estimator, _AnnealedTopK)
            estimator.alpha.fill_(self._alpha())

    def _weight_grad_density(self, density: float) -> float:
        return max(density, self.backward_density) if self._alpha() > 0.0 else density
