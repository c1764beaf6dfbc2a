"""ST-3: straight-through, soft-thresholding, sparse training (Vanderschueren and De Vleeschouwer, WACV 2023).

    forward     W^ = sign(W) * max(|W| - T, 0) * c,   c = 1.01 / (r + 0.01),   r = sum |W^| / sum |W| of each channel
    backward    dL/dW = dL/dW^           (the identity, to masked weights too: AutoSparse with alpha = 1 for good)

T is such that the sparsity follows a cubic curve from 5 to 50 % of the run: one T for all layers, or, in the sigma
form, T in units of each layer's standard deviation, which leaves fewer FLOPs at the same sparsity. arXiv 2212.01076.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.kernels.soft_threshold import soft_threshold
from rarefy.sparse.anneal import SCHEDULES
from rarefy.sparse.base import Info
from rarefy.sparse.projected import Estimator, Projected, RampOptions
from rarefy.sparse.thresholded import separate


class _SoftThreshold(Estimator):
    """The soft threshold with an identity backward; alpha and T are the layer's buffers."""

    threshold: Tensor
    alpha: Tensor

    def __init__(self, weight: Tensor, rescale: bool) -> None:
        super().__init__(weight)
        shape = (1,) * weight.dim()
        self.register_buffer("threshold", torch.zeros(shape, device=weight.device))
        self.register_buffer("alpha", torch.ones((), device=weight.device))
        self.rescale = rescale

    def project(self, weight: Tensor, mask: Tensor) -> None:
        super().project(weight, mask)
        self.threshold.copy_(separate(weight.detach().double().abs(), self.threshold.double(), mask))

    def live(self, weight: Tensor) -> Tensor:
        return weight.abs() > self.threshold

    def value(self, weight: Tensor) -> Tensor:
        return self.forward(weight)

    def forward(self, weight: Tensor) -> Tensor:
        shrunk = soft_threshold(weight, self.threshold, self.alpha)
        if not self.rescale:
            return shrunk
        inner = list(range(1, weight.dim()))
        left = shrunk.detach().abs().sum(inner, keepdim=True)
        share = left / weight.detach().abs().sum(inner, keepdim=True).clamp(min=1e-12)
        # The scale is for the forward alone.
        return shrunk + shrunk.detach() * (1.01 / (share + 0.01) - 1.0)


class ST3(Projected):
    """Soft thresholds on the budget with a straight-through gradient.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block: see
            :class:`Budgeted`; single weights only, since a threshold is on single weights.
        update_every, start, end: see :class:`Projected`; 5 to 50 % of the run.
        sigma: compare weights in units of their layer's standard deviation.
        rescale: scale each output channel up by what the threshold took from it, as in the paper.
        alpha, anneal: the factor on the gradient of masked weights and its schedule, as of AutoSparse: with less than 1
            this is AutoSparse with its thresholds on the budget instead of learned. The paper has 1, "constant".

    Raises:
        ValueError: as :class:`Budgeted`; blocks; an option out of its range.
    """

    info = Info("ST-3", "Vanderschueren and De Vleeschouwer, WACV 2023, arXiv 2212.01076", "dense", "always", "dense")
    ramp = (0.05, 0.5)

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        sigma: bool = False,
        rescale: bool = True,
        alpha: float = 1.0,
        anneal: str = "constant",
        **options: Unpack[RampOptions],
    ) -> None:
        if options.get("block", 1) != 1:
            raise ValueError(f"{type(self).__name__} thresholds single weights: leave block out")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        if anneal not in SCHEDULES:
            raise ValueError(f"anneal must be one of {', '.join(map(repr, SCHEDULES))}, got {anneal!r}")
        self.sigma, self.rescale, self.alpha, self.schedule = sigma, rescale, alpha, SCHEDULES[anneal]
        super().__init__(model, total_steps=total_steps, **options)
        self._steer()

    def _estimator(self, weight: Tensor) -> Estimator:
        return _SoftThreshold(weight, self.rescale)

    def _score(self, estimator: Estimator, weight: Tensor) -> Tensor:
        return weight.abs() / weight.std().clamp(min=1e-12) if self.sigma else weight.abs()

    def _alpha(self) -> float:
        return self.alpha * self.schedule(self.progress)

    def _steer(self) -> None:
        for estimator in self._estimators:
            assert isinstance(estimator, _SoftThreshold)
            estimator.alpha.fill_(self._alpha())

    def _weight_grad_density(self, density: float) -> float:
        return 1.0 if self._alpha() > 0.0 else density
