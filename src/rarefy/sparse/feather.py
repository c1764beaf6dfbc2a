"""Feather (Georgiou et al., BMVC 2023): a threshold between soft and hard, and a scaled straight-through gradient.

    forward     W^ = sign(W) * (|W|^p - T^p)^(1/p) for |W| > T, else 0,   p = 3
    backward    dL/dW = dL/dW^ for |W| > T, theta * dL/dW^ for the others

theta is 1 up to a sparsity of 95 % and 0.5 above. One T for all layers; the sparsity rises on a cubic curve over the
first half of the run. arXiv 2310.02448.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.base import Info
from rarefy.sparse.projected import Estimator, Projected, RampOptions, straight_through
from rarefy.sparse.thresholded import separate


class _Feather(Estimator):
    """The power threshold and its scaled straight-through gradient."""

    threshold: Tensor

    def __init__(self, weight: Tensor, power: float, theta: float) -> None:
        super().__init__(weight)
        self.register_buffer("threshold", torch.zeros((1,) * weight.dim(), device=weight.device))
        self.power, self.theta = power, theta

    def project(self, weight: Tensor, mask: Tensor) -> None:
        super().project(weight, mask)
        self.threshold.copy_(separate(weight.detach().double().abs(), self.threshold.double(), mask))

    def live(self, weight: Tensor) -> Tensor:
        return weight.abs() > self.threshold

    def value(self, weight: Tensor) -> Tensor:
        p, magnitude = self.power, weight.detach().float().abs()
        shrunk = (magnitude**p - self.threshold**p).clamp(min=0.0) ** (1.0 / p)
        return shrunk.copysign(weight.detach()) * (magnitude > self.threshold)

    def forward(self, weight: Tensor) -> Tensor:
        factor = torch.where(self.live(weight), 1.0, self.theta)
        return straight_through(self.value(weight).to(weight.dtype), weight, factor)


class Feather(Projected):
    """The power threshold on the budget.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block: see
            :class:`Budgeted`; single weights only, since a threshold is on single weights.
        update_every, start, end: see :class:`Projected`; 0 to 50 % of the run.
        power: p, at least 1; 1 is the soft threshold, and the larger the harder.
        theta: in [0, 1]; None takes the paper's for the target.

    Raises:
        ValueError: as :class:`Budgeted`; blocks; an option out of its range.
    """

    info = Info("Feather", "Georgiou et al., BMVC 2023, arXiv 2310.02448", "dense", "always", "dense")
    ramp = (0.0, 0.5)

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        power: float = 3.0,
        theta: float | None = None,
        **options: Unpack[RampOptions],
    ) -> None:
        if options.get("block", 1) != 1:
            raise ValueError(f"{type(self).__name__} thresholds single weights: leave block out")
        if power < 1.0:
            raise ValueError(f"power must be at least 1, got {power}")
        if theta is not None and not 0.0 <= theta <= 1.0:
            raise ValueError(f"theta must be in [0, 1], got {theta}")
        target = options.get("target")
        self.power = power
        self.theta = theta if theta is not None else 0.5 if target is not None and target > 0.95 else 1.0
        super().__init__(model, total_steps=total_steps, **options)

    def _estimator(self, weight: Tensor) -> Estimator:
        return _Feather(weight, self.power, self.theta)

    def _weight_grad_density(self, density: float) -> float:
        return 1.0 if self.theta > 0.0 else density

    def _alpha(self) -> float | None:
        return self.theta
