"""Continuous Sparsification (Savarese et al., NeurIPS 2020, arXiv 1912.04427), in one round.

    forward     W^ = W * sigmoid(beta s) / sigmoid(s_0),   one s a weight, s_0 at first
    annealing   beta = final^progress, from 1 to 200
    penalty     the sum over all weights of sigmoid(beta s)
    in the end  W^ = W where s > 0

The paper sets the sparsity by s_0 and rewinds through several rounds; here one round is driven to the target by the
penalty. After the last step the mask is hard, s > 0.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from rarefy import _checks
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.learned import Learned
from rarefy.sparse.layers import Layer
from rarefy.sparse.reports import Info


@dataclass(eq=False, repr=False)
class ContinuousSparsification(Learned):
    """Continuous Sparsification.

    Args:
        penalty: coefficient of the sum of all masks, not negative; None takes 1e-8.
        mask_lr: learning rate of s as a multiple of the weights', above 0; None takes 30.
        initial: s_0; above 0, so that everything lives at first.
        final_beta: beta at the end, above 1.

    Raises:
        ValueError: as :class:`Learned`; an option out of its range.
    """

    _: KW_ONLY
    initial: float = 0.1
    final_beta: float = 200.0

    info = Info(
        title="Continuous Sparsification",
        paper="Savarese et al., NeurIPS 2020, arXiv 1912.04427",
        start="dense",
        targeted="optional",
        training_flops="dense",
    )
    default_penalty = 1e-8
    default_mask_lr = 30.0
    tracks = True

    def __post_init__(self) -> None:
        _checks.number("initial", self.initial, above=True)
        _checks.number("final_beta", self.final_beta, least=1.0, above=True)
        super().__post_init__()

    @property
    def beta(self) -> float:
        """final^progress."""
        return math.pow(self.final_beta, self.progress)

    def value(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """W^ = W sigmoid(beta s) / sigmoid(s_0), hard in the end."""
        soft = weight * torch.sigmoid(self.beta * bucket.own["s"]) * (1.0 + math.exp(-self.initial))
        return soft if self.steps < self.total_steps else soft * self.live(bucket)

    def gradient(self, grad: Tensor, weight: Tensor, bucket: Bucket) -> Tensor:
        """dL/dW = dL/dW^ sigmoid(beta s) / sigmoid(s_0);  dL/ds that of the loss and of the penalty."""
        scale = 1.0 + math.exp(-self.initial)
        soft = torch.sigmoid(self.beta * bucket.own["s"].detach())
        pull = (grad * weight).mul_(scale).add_(self.penalty_now).mul_(self.beta)
        bucket.own["s"].grad = (1.0 - soft).mul_(soft).mul_(pull)
        return grad.mul_(soft).mul_(scale)

    def unmasked(self, used: Tensor, bucket: Bucket) -> Tensor:
        """See :class:`Latent`: W^ sigmoid(s_0) / sigmoid(beta s), but for weights that are all but masked."""
        factor = torch.sigmoid(self.beta * bucket.own["s"].detach()) * (1.0 + math.exp(-self.initial))
        return torch.where(factor > 0.1, used / factor, bucket.kept["latent"])

    def margin(self, bucket: Bucket) -> Tensor:
        """See :class:`Learned`: s."""
        return bucket.own["s"].detach().double()

    def shift(self, bucket: Bucket, by: float) -> None:
        """See :class:`Learned`."""
        bucket.own["s"].detach().sub_(by)

    def settle(self, layer: Layer, mask: Tensor) -> None:
        """See :class:`Learned`."""
        bucket, place = self.where(layer)
        s = bucket.views(bucket.own["s"].detach())[place]
        edge = torch.finfo(s.dtype).tiny
        s.copy_(torch.where(mask, s.clamp(min=edge), s.clamp(max=0.0)))

    def prepare(self, bucket: Bucket) -> None:
        """See :class:`Sparsifier`."""
        bucket.own["s"] = nn.Parameter(bucket.flat(self.initial, torch.float32))
