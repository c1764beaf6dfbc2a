"""LTP: learned threshold pruning (Azarian et al. 2020, arXiv 2003.00075).

    forward     W^ = W * sigmoid((W^2 - tau) / T),   one tau a layer, T = T_0 var(W)
    backward    to W: dL/dW^ * sigmoid(...) alone, the sigmoid's own slope in W left out; to tau: the whole gradient
    penalty     the soft L0 norm, the sum over all weights of sigmoid((W^2 - tau) / T)

Here tau is measured in units of the layer's variance at the start, v = tau / var(W), and the penalty is a share of the
network's weights, so that one coefficient serves any network. After the last step the mask is hard, W^2 > tau.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from rarefy import _checks
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.learned import LearnedThreshold
from rarefy.sparse.reports import Info


@dataclass(eq=False, repr=False)
class LTP(LearnedThreshold):
    """Learned threshold pruning.

    Args:
        penalty: coefficient of the soft L0 norm, not negative; None takes 1e-3.
        mask_lr: learning rate of the thresholds as a multiple of the weights', above 0; None takes 1.
        temperature: T_0, above 0; the paper's by default.

    Raises:
        ValueError: as :class:`Learned`; a temperature that is not above 0.
    """

    _: KW_ONLY
    temperature: float = 1e-3

    info = Info(
        title="LTP",
        paper="Azarian et al. 2020, arXiv 2003.00075",
        start="dense",
        targeted="optional",
        training_flops="dense",
    )
    default_penalty = 1e-3
    max_move = 0.05
    channels = False
    tracks = True

    def __post_init__(self) -> None:
        _checks.number("temperature", self.temperature, above=True)
        super().__post_init__()

    def value(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """W^ = W sigmoid((W^2 - tau) / T), hard in the end."""
        return weight * (self._soft(weight, bucket) if self.steps < self.total_steps else self.live(bucket))

    def gradient(self, grad: Tensor, weight: Tensor, bucket: Bucket) -> Tensor:
        """dL/dW = dL/dW^ sigmoid(...);  dL/dv = -sum of (dL/dW^ W + the penalty's) sigmoid'(...) / T_0."""
        soft = self._soft(weight, bucket)
        steep = soft * (1.0 - soft)
        penalty = self.penalty_now / sum(layer.size for layer in self._layers)
        pull = (grad * weight).add_(penalty).mul_(steep)
        bucket.own["threshold"].grad = bucket.sums(pull.float()).div_(-self.temperature)
        return grad.mul_(soft)

    def _soft(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """sigmoid((W^2 / var - v) / T_0)."""
        scale = 1.0 / (bucket.kept["variance"] * self.temperature)
        shift = bucket.own["threshold"].detach() / self.temperature
        return weight.square().mul_(bucket.spread(scale)).sub_(bucket.spread(shift)).sigmoid_()

    def size(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """W^2 / var."""
        return weight.square() / bucket.spread(bucket.kept["variance"]).to(weight.dtype)

    def shown(self, threshold: Tensor, bucket: Bucket) -> Tensor:
        """sqrt(tau)."""
        return (threshold * bucket.kept["variance"]).sqrt()

    def prepare(self, bucket: Bucket) -> None:
        """See :class:`Sparsifier`."""
        super().prepare(bucket)
        bucket.per["variance"] = "layer"
        sizes = torch.tensor([layer.size for layer in bucket.layers], dtype=torch.float32, device=bucket.device)
        weight = bucket.kept["latent"].float()
        mean = bucket.sums(weight) / sizes
        squares = bucket.sums((weight - bucket.spread(mean)).square())
        bucket.kept["variance"] = (squares / (sizes - 1.0).clamp(min=1.0)).clamp(min=1e-12)
