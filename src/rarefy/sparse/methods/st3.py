"""ST-3: straight-through, soft-thresholding, sparse training (Vanderschueren and De Vleeschouwer, WACV 2023).

    forward     W^ = sign(W) * max(|W| - T, 0) * c,   c = 1.01 / (r + 0.01),   r = sum |W^| / sum |W| of each channel
    backward    dL/dW = dL/dW^           (the identity, to masked weights too: AutoSparse with alpha = 1 for good)

T is such that the sparsity follows a cubic curve from 5 to 50 % of the run: one T for all layers, or, in the sigma
form, T in units of each layer's standard deviation, which leaves fewer FLOPs at the same sparsity. arXiv 2212.01076.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from rarefy import _checks
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.soft_on_budget import SoftOnBudget
from rarefy.sparse.layers import Layer
from rarefy.sparse.reports import Info
from rarefy.sparse.schedules import Annealed
from rarefy.sparse.shards import total


@dataclass(eq=False, repr=False)
class ST3(SoftOnBudget):
    """Soft thresholds on the budget with a straight-through gradient.

    Args:
        start, end: shares of the run between which the sparsity rises; None takes 0.05 and 0.5.
        sigma: compare weights in units of their layer's standard deviation.
        rescale: scale each output channel up by what the threshold took from it, as in the paper.
        alpha, anneal: the factor on the gradient of masked weights and its schedule, as of AutoSparse: with less than 1
            this is AutoSparse with its thresholds on the budget instead of learned. The paper has 1.0, "constant".

    Raises:
        ValueError: as :class:`Budgeted`; blocks; an option out of its range.
    """

    _: KW_ONLY
    sigma: bool = False
    rescale: bool = True
    alpha: float = 1.0
    anneal: str = "constant"

    info = Info(
        title="ST-3",
        paper="Vanderschueren and De Vleeschouwer, WACV 2023, arXiv 2212.01076",
        start="dense",
        targeted="always",
        training_flops="dense",
    )
    ramp = (0.05, 0.5)

    def __post_init__(self) -> None:
        _checks.flag("sigma", self.sigma)
        _checks.flag("rescale", self.rescale)
        self._annealed = Annealed(self.alpha, self.anneal)
        super().__post_init__()

    def rescales(self, layer: Layer, weight: Tensor) -> bool:
        """See :class:`SoftOnBudget`."""
        return self.rescale

    def gradient(self, grad: Tensor, weight: Tensor, bucket: Bucket) -> Tensor:
        """dL/dW = dL/dW^, times alpha where masked; the scale is for the forward alone."""
        alpha = self._annealed(self.progress)
        return grad if alpha == 1.0 else torch.where(self.live(bucket), grad, alpha * grad)

    def scores(self, layer: Layer, weight: Tensor) -> Tensor:
        """|W|, or |W| / std(W)."""
        if not self.sigma:
            return weight.abs()
        mean = total(weight.double().sum()[None], [layer.shard]) / layer.size
        squares = total((weight - mean).square().sum()[None], [layer.shard]) / (layer.size - 1)
        return weight.abs() / squares.sqrt().to(weight.dtype).clamp(min=1e-12)

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        return 1.0 if self._annealed(self.progress) > 0.0 else density

    def _alpha(self) -> float | None:
        return self._annealed(self.progress)
