"""OptG: optimizing gradient-driven criteria (Zhang et al. 2022, arXiv 2201.12826).

    forward     W^ = W * M,   M = 1 for the largest scores S over all layers, as many as a cubic schedule says
    backward    dL/dW = dL/dW^ * M;   dL/dS = dL/dW^ * W     (straight through M, for removed weights too)

So S accumulates -lr * W * dL/dW^, the first-order gain of having each weight, while the weights train on: criterion and
weights are optimized together. Written from the paper's abstract and README; its own mask optimizer is replaced by the
optimizer of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.sparse.base import Info
from rarefy.sparse.budget import RAMP
from rarefy.sparse.projected import Estimator, Projected, straight_through


class _Scored(Estimator):
    """A hard mask with scores that learn straight through it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.score = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        # Value W * M; gradients M to W, and W to S.
        return straight_through(weight * self.mask, weight, self.mask) + (
            weight.detach() * (self.score - self.score.detach())
        )


class OptG(Projected):
    """Scores learned by the gradient of the mask.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block: see
            :class:`Budgeted`.
        update_every, start, end: see :class:`Projected`; 5 to 60 % of the run.
    """

    info = Info("OptG", "Zhang et al. 2022, arXiv 2201.12826", "dense", "always", "dense, for the scores")
    ramp = RAMP

    def _estimator(self, weight: Tensor) -> Estimator:
        return _Scored(weight)

    def _score(self, estimator: Estimator, weight: Tensor) -> Tensor:
        assert isinstance(estimator, _Scored)
        return estimator.score.detach()

    def _own_parameters(self) -> list[Tensor]:
        return [estimator.score for estimator in self._estimators if isinstance(estimator, _Scored)]
