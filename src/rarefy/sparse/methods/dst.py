"""DST: dynamic sparse training with trainable masked layers (Liu et al., ICLR 2020, arXiv 2005.06870).

    forward     W^ = W * step(|W| - t),   one t an output neuron or filter, 0 at first;  step(0) = 1
    backward    step'(x) = 2 - 4|x| for |x| <= 0.4,  0.4 for 0.4 < |x| <= 1,  0 beyond     (long-tailed estimator)
    penalty     sum over all t of exp(-t)
    reset       a layer that keeps 1 % or less of its weights has its t set to 0           (the code)

With a target the reset stays out: the floors and the trimming hold a layer up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.learned import LearnedThreshold
from rarefy.sparse.masks import count_all
from rarefy.sparse.reports import Info

#: The share of live weights at which a layer's thresholds are set to 0 in a run without a target.
RESET_AT = 0.01


def long_tail(x: Tensor) -> Tensor:
    """step'(x), the long-tailed estimator."""
    size = x.abs()
    return (2.0 - 4.0 * size).clamp_(min=0.4) * (size <= 1.0)


@dataclass(eq=False, repr=False)
class DST(LearnedThreshold):
    """Dynamic sparse training.

    Args:
        penalty: the paper's coefficient is 5e-4 for small networks on MNIST, 5e-6 on CIFAR; None takes 5e-4.
        mask_lr: learning rate of the thresholds as a multiple of the weights', above 0; None takes 1.
    """

    info = Info(
        title="DST",
        paper="Liu et al., ICLR 2020, arXiv 2005.06870",
        start="dense",
        targeted="optional",
        training_flops="dense",
    )
    default_penalty = 5e-4
    max_move = 0.02
    channels = True

    def value(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """W^ = W step(|W| - t)."""
        return weight * (weight.abs() >= bucket.spread(bucket.own["threshold"].detach(), channels=True))

    def gradient(self, grad: Tensor, weight: Tensor, bucket: Bucket) -> Tensor:
        """dL/dW = dL/dW^ (step + |W| step');  dL/dt = -sum over the filter of dL/dW^ W step', and the penalty's."""
        size, t = weight.abs(), bucket.own["threshold"].detach()
        excess = size - bucket.spread(t, channels=True)
        slope = long_tail(excess)
        pull = bucket.channel_sums((grad * weight * slope).float())
        # d exp(-t) / dt = -exp(-t)
        bucket.own["threshold"].grad = -pull - self.penalty_now * torch.exp(-t)
        return grad.mul_(size.mul_(slope).add_(excess >= 0.0))

    def size(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """|W|."""
        return weight.abs()

    def live(self, bucket: Bucket) -> Tensor:
        """step(|W| - t) = 1."""
        return bucket.kept["latent"].abs() >= bucket.spread(bucket.own["threshold"].detach(), channels=True)

    def steer(self) -> None:
        """Reset layers that are all but gone, in a run without a target."""
        if self.budget is not None or self.steps % self.interval:
            return
        for layer, live in zip(self._layers, count_all(self._live(), self._shards()), strict=True):
            if live <= RESET_AT * layer.size:
                bucket, place = self.where(layer)
                bucket.parts(bucket.own["threshold"].detach())[place].zero_()
