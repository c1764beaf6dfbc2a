"""DST: dynamic sparse training with trainable masked layers (Liu et al., ICLR 2020, arXiv 2005.06870).

    forward     W^ = W * step(|W| - t),   one t an output neuron or filter, 0 at first
    backward    step'(x) = 2 - 4|x| for |x| <= 0.4,  0.4 for 0.4 < |x| <= 1,  0 beyond     (long-tailed estimator)
    penalty     sum over all t of exp(-t)
    reset       a layer that keeps 1 % or less of its weights has its t set to 0           (the code)

With a target the reset stays out: the floors and the trimming hold a layer up.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.sparse.base import Info
from rarefy.sparse.learned import Learned, LearnedMask
from rarefy.sparse.thresholded import separate

#: The share of live weights at which a layer's thresholds are set to 0 in a run without a target.
RESET_AT = 0.01

#: The most that a threshold moves in a step: its gradient is a sum over a filter.
MAX_MOVE = 0.02


def long_tailed_step(x: Tensor) -> Tensor:
    """1 where x > 0, else 0, with the gradient of the long-tailed estimator."""
    size = x.detach().abs()
    slope = torch.where(size <= 0.4, 2.0 - 4.0 * size, torch.where(size <= 1.0, 0.4, 0.0))
    return (x.detach() > 0.0).to(x.dtype) + slope * (x - x.detach())


class _Step(LearnedMask):
    before: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        shape = (weight.shape[0],) + (1,) * (weight.dim() - 1)
        self.learned = nn.Parameter(torch.zeros(shape, device=weight.device))
        self.register_buffer("before", torch.zeros(shape, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * long_tailed_step(weight.abs() - self.learned)

    def margin(self, weight: Tensor) -> Tensor:
        return weight.detach().abs().double() - self.learned.detach().double()

    def shift(self, by: float) -> None:
        self.learned.add_(by).clamp_(min=0.0)

    def settle(self, weight: Tensor, mask: Tensor) -> None:
        self.learned.copy_(separate(weight.detach().double().abs(), self.learned.double(), mask))
        self.before.copy_(self.learned)

    def penalise(self, weight: Tensor, coefficient: float) -> None:
        # d exp(-t) / dt
        self.learned.grad.sub_(torch.exp(-self.learned), alpha=coefficient)  # type: ignore[union-attr]

    def value(self, weight: Tensor) -> Tensor:
        return weight

    def bound(self) -> None:
        self.learned.copy_(torch.minimum(torch.maximum(self.learned, self.before - MAX_MOVE), self.before + MAX_MOVE))
        self.learned.clamp_(min=0.0)
        self.before.copy_(self.learned)

    def threshold(self) -> float:
        return float(self.learned.mean())


class DST(Learned):
    """Dynamic sparse training.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, penalty: see
            :class:`Learned`; the paper's coefficient is 5e-4 for small networks on MNIST, 5e-6 on CIFAR.
    """

    info = Info("DST", "Liu et al., ICLR 2020, arXiv 2005.06870", "dense", "optional", "dense")
    default_penalty = 5e-4

    def _mask(self, weight: Tensor) -> LearnedMask:
        return _Step(weight)

    def _steer(self) -> None:
        if self.budget is not None or self.steps % self.interval:
            return
        for mask, weight in self._pairs():
            if float(mask.live(weight).float().mean()) <= RESET_AT:
                mask.learned.zero_()
