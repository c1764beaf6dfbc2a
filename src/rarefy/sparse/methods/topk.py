"""Top-K with Gradient Annealing: the variant of AutoSparse with a budget fixed beforehand (arXiv 2304.06941).

forward     W^ = W where W is among the K largest |W| of its layer, else 0
backward    1 for those, alpha for the next largest up to ``backward_density`` of the layer, 0 for the rest
annealing   alpha = alpha_0 * schedule(progress)
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from rarefy import _checks
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.latent import Exploring
from rarefy.sparse.layers import Layer
from rarefy.sparse.reports import Info
from rarefy.sparse.schedules import Annealed


@dataclass(eq=False, repr=False)
class TopK(Exploring):
    """Top-K with Gradient Annealing, over uniform layers as in the paper.

    Args:
        alpha: alpha_0, in [0, 1].
        anneal: "sigmoid-cosine", "cosine", "sigmoid", "linear" or "constant".
        cutoff: share of the run after which alpha is 0, in [0, 1]; None never cuts it off.
        backward_density: share of each layer's weights that gets a gradient while alpha is not 0, in [0, 1].

    Raises:
        ValueError: as :class:`Budgeted`; an option out of its range.
    """

    _: KW_ONLY
    alpha: float = 0.75
    anneal: str = "sigmoid-cosine"
    cutoff: float | None = None
    backward_density: float = 0.5

    info = Info(
        title="Top-K with Gradient Annealing",
        paper="Kundu et al., 2023, arXiv 2304.06941",
        start="sparse",
        targeted="always",
        training_flops="at backward_density while alpha > 0, then at the density of the weights",
    )
    default_distribution = "uniform"

    def __post_init__(self) -> None:
        _checks.fraction("backward_density", self.backward_density)
        self._annealed = Annealed(self.alpha, self.anneal, self.cutoff)
        super().__post_init__()

    def gradient(self, grad: Tensor, weight: Tensor, bucket: Bucket) -> Tensor:
        """dL/dW = dL/dW^ for the K largest, alpha dL/dW^ for the next."""
        explored = torch.where(bucket.kept["explore"], self._annealed(self.progress) * grad, 0.0)
        return torch.where(bucket.kept["mask"], grad, explored)

    def reach(self, layer: Layer, live: int) -> int:
        """Count the weights of the layer that get a gradient."""
        return max(live, int(self.backward_density * layer.size))

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        return max(density, self.backward_density) if self._annealed(self.progress) > 0.0 else density

    def _alpha(self) -> float | None:
        return self._annealed(self.progress)
