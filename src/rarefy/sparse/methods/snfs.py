"""SNFS: SET that grows where the momentum of the gradient is largest (Dettmers and Zettlemoyer, arXiv 1907.04840).

    m <- 0.9 m + 0.1 dL/dW  in every step,  grow the largest |m| among the weights that do not live

This is SNFS as RigL compares with it: the distribution over the layers is fixed. The momentum, of all weights, is the
method's own; it needs the dense gradient in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from rarefy.sparse import _checks
from rarefy.sparse.base import Info
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.methods.set import SET


@dataclass(eq=False, repr=False)
class SNFS(SET):
    """Drop the smallest, grow where the gradient's momentum is largest.

    Args:
        growth_momentum: of the gradients that decide what grows, in [0, 1); 0.9.
    """

    _: KW_ONLY
    growth_momentum: float = 0.9

    info = Info(
        title="SNFS",
        paper="Dettmers and Zettlemoyer 2019, arXiv 1907.04840",
        start="sparse",
        targeted="always",
        training_flops="dense in every step until the masks stay",
    )

    def __post_init__(self) -> None:
        _checks.fraction("growth_momentum", self.growth_momentum, one=False)
        super().__post_init__()

    def see_gradients(self, bucket: Bucket) -> None:
        """See :class:`Masked`: m <- 0.9 m + 0.1 dL/dW."""
        if self.progress < self.stop:
            pairs = zip(bucket.views(bucket.kept["momentum"]), bucket.grads(), strict=True)
            seen = [(momentum, grad) for momentum, grad in pairs if grad is not None]
            torch._foreach_lerp_([m for m, _ in seen], [g for _, g in seen], 1.0 - self.growth_momentum)

    def growth_scores(self) -> Sequence[Tensor]:
        """See :class:`SET`: |m|."""
        return [momentum.abs() for momentum in self._kept("momentum")]

    def _begin(self) -> None:
        for bucket in self._buckets:
            bucket.keep("momentum", bucket.flat())
        super()._begin()

    def _weight_grad_density(self, density: float) -> float:
        return 1.0 if self.progress < self.stop else density
