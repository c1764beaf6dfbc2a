"""Feather (Georgiou et al., BMVC 2023): a threshold between soft and hard, and a scaled straight-through gradient.

    forward     W^ = sign(W) * (|W|^p - T^p)^(1/p) for |W| > T, else 0,   p = 3
    backward    dL/dW = dL/dW^ for |W| > T, theta * dL/dW^ for the others

theta is 1 up to a sparsity of 95 % and 0.5 above. One T for all layers; the sparsity rises on a cubic curve over the
first half of the run. arXiv 2310.02448.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from rarefy import _checks
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.latent import Thresholding, wide
from rarefy.sparse.reports import Info


def thresholded(weight: Tensor, threshold: Tensor, p: float) -> Tensor:
    """W^ = sign(W) (|W|^p - T^p)^(1/p) for |W| > T, else 0: soft for p = 1, and the larger p the harder.

    Computed as |W| (1 - (T / |W|)^p)^(1/p), which no power of a small or large number takes part in, and which is 0 for
    no weight that lives.
    """
    size = wide(weight).abs()
    # in place: new memory costs more than the arithmetic
    used = (threshold / size).pow_(p).neg_().add_(1.0).clamp_(min=torch.finfo(size.dtype).eps).pow_(1.0 / p).mul_(size)
    return used.masked_fill_(size <= threshold, 0.0).copysign_(weight)


def unthresholded(used: Tensor, threshold: Tensor, p: float) -> Tensor:
    """W = sign(W^) (|W^|^p + T^p)^(1/p), of W^ that are not 0; computed as a (1 + (b / a)^p)^(1/p), a the larger."""
    size = wide(used).abs()
    larger, smaller = torch.maximum(size, threshold), torch.minimum(size, threshold)
    found = larger * (1.0 + (smaller / larger.clamp(min=torch.finfo(size.dtype).tiny)) ** p) ** (1.0 / p)
    return found.to(used.dtype).copysign(used)


@dataclass(eq=False, repr=False)
class Feather(Thresholding):
    """The power threshold on the budget.

    Args:
        start, end: shares of the run between which the sparsity rises; None takes 0 and 0.5.
        power: p, at least 1; 1 is the soft threshold, and the larger the harder.
        theta: in [0, 1]; None takes the paper's for the target.

    Raises:
        ValueError: as :class:`Budgeted`; blocks; an option out of its range.
    """

    _: KW_ONLY
    power: float = 3.0
    theta: float | None = None

    info = Info(
        title="Feather",
        paper="Georgiou et al., BMVC 2023, arXiv 2310.02448",
        start="dense",
        targeted="always",
        training_flops="dense",
    )
    ramp = (0.0, 0.5)

    def __post_init__(self) -> None:
        _checks.number("power", self.power, least=1.0)
        if self.theta is not None:
            _checks.fraction("theta", self.theta)
        super().__post_init__()
        high = self.target is not None and self.target > 0.95
        self._theta = self.theta if self.theta is not None else 0.5 if high else 1.0

    def value(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """W^ = sign(W) (|W|^p - T^p)^(1/p)."""
        return thresholded(weight, self.threshold(bucket), self.power)

    def unmasked(self, used: Tensor, bucket: Bucket) -> Tensor:
        """See :class:`Latent`: sign(W^) (|W^|^p + T^p)^(1/p)."""
        return unthresholded(used, self.threshold(bucket), self.power)

    def gradient(self, grad: Tensor, weight: Tensor, bucket: Bucket) -> Tensor:
        """dL/dW = dL/dW^ where |W| > T, else theta dL/dW^."""
        return grad if self._theta == 1.0 else torch.where(self.live(bucket), grad, self._theta * grad)

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        return 1.0 if self._theta else density

    def _alpha(self) -> float | None:
        return self._theta
