"""OptG: optimizing gradient-driven criteria (Zhang et al. 2022, arXiv 2201.12826).

    forward     W^ = W * M,   M = 1 for the largest scores S over all layers, as many as a cubic schedule says
    backward    dL/dW = dL/dW^ * M;   dL/dS = dL/dW^ * W     (straight through M, for removed weights too)

So S accumulates -lr * W * dL/dW^, the first-order gain of having each weight, while the weights train on: criterion and
weights are optimized together. Written from the paper's abstract and README; its own mask optimizer is replaced by the
optimizer of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rarefy.sparse.buckets import Bucket
from rarefy.sparse.budget import RAMP
from rarefy.sparse.families.latent import Projected
from rarefy.sparse.layers import Layer
from rarefy.sparse.reports import Info


@dataclass(eq=False, repr=False)
class OptG(Projected):
    """Scores learned by the gradient of the mask.

    Args:
        start, end: shares of the run between which the sparsity rises; None takes 0.05 and 0.6.
    """

    info = Info(
        title="OptG",
        paper="Zhang et al. 2022, arXiv 2201.12826",
        start="dense",
        targeted="always",
        training_flops="dense, for the scores",
    )
    ramp = RAMP

    def gradient(self, grad: Tensor, weight: Tensor, bucket: Bucket) -> Tensor:
        """dL/dW = dL/dW^ M;  dL/dS = dL/dW^ W."""
        bucket.own["score"].grad = grad * weight
        return grad * bucket.kept["mask"]

    def scores(self, layer: Layer, weight: Tensor) -> Tensor:
        """S."""
        bucket, place = self.where(layer)
        return bucket.views(bucket.own["score"].detach())[place]

    def prepare(self, bucket: Bucket) -> None:
        """See :class:`Sparsifier`."""
        bucket.own["score"] = nn.Parameter(bucket.flat())
