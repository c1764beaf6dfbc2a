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

from rarefy import _checks
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.methods.set import SET
from rarefy.sparse.reports import Info


@dataclass(eq=False, repr=False)
class SNFS(SET):
    """Drop the smallest, grow where the gradient's momentum is largest.

    Args:
        growth_momentum: of the gradients that decide what grows, in [0, 1).
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
        self._next: dict[int, Tensor] = {}

    def see_gradients(self, bucket: Bucket) -> None:
        """See :class:`Masked`: m <- 0.9 m + 0.1 dL/dW, once the step is made: a closure may be asked several times."""
        if self.progress < self.stop:
            following = bucket.kept["momentum"].clone()
            pairs = zip(bucket.views(following), bucket.grads(), strict=True)
            seen = [(momentum, grad) for momentum, grad in pairs if grad is not None]
            if seen:
                torch._foreach_lerp_([m for m, _ in seen], [g for _, g in seen], 1.0 - self.growth_momentum)
            # A batch of NaN is not remembered.
            self._next[id(bucket)] = torch.where(following.isfinite(), following, bucket.kept["momentum"])

    def _learn(self, bucket: Bucket) -> None:
        super()._learn(bucket)
        if (following := self._next.pop(id(bucket), None)) is not None:
            bucket.kept["momentum"].copy_(following)

    def growth_scores(self) -> Sequence[Tensor]:
        """See :class:`SET`: |m|."""
        return [momentum.abs() for momentum in self.kept("momentum")]

    def prepare(self, bucket: Bucket) -> None:
        """See :class:`Sparsifier`: m."""
        bucket.keep("momentum", bucket.flat())
        self._next = {}

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        return 1.0 if self.progress < self.stop else density
