"""Band: AutoSparse with its thresholds on the budget, and full gradients in a band of weights below them.

    forward     W^ = sign(W) * (|W|^p - T^p)^(1/p) for |W| > T, else 0,   p = 3, but
                W^ = sign(W) * max(|W| - T, 0) * c,   c as in ST-3, where no normalisation gives the scale back
    backward    dL/dW = dL/dW^    for the `band` times as many largest weights of a layer as live, and at least 5 %
                                  of them; 0 for the others

AutoSparse (arXiv 2304.06941) lets every masked weight have alpha of its gradient; Feather (arXiv 2310.02448), whose
curve and threshold these are, all of it, which costs a dense product a step. Those far below their threshold hardly
come back: left out, they cost nothing. The share of gradients that are computed falls with the density, as alpha would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from rarefy import _checks
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.freedom import is_restored
from rarefy.sparse.families.latent import Exploring
from rarefy.sparse.families.soft_on_budget import SoftOnBudget
from rarefy.sparse.layers import Layer
from rarefy.sparse.methods.feather import thresholded, unthresholded
from rarefy.sparse.reports import Info
from rarefy.sparse.shards import total

#: The share of a layer's weights that get a gradient at least: a layer that starts at 0 would hardly ever come to life.
LEAST = 0.05


@dataclass(eq=False, repr=False)
class Band(SoftOnBudget, Exploring):
    """Thresholds on the budget, with gradients for the largest weights alone.

    Args:
        start, end: shares of the run between which the sparsity rises; None takes 0 and 0.5.
        band: how many times as many weights of a layer get a gradient as live, at least 1; 5 % of them always do.
        power: Feather's p, at least 1; 1 is the soft threshold. Where no normalisation stands layers are soft anyway,
            but for those that start at 0.

    Raises:
        ValueError: as :class:`Budgeted`; blocks; an option out of its range.
    """

    _: KW_ONLY
    band: float = 3.0
    power: float = 3.0

    info = Info(
        title="AutoSparse, band",
        paper="of this library, after Kundu et al., 2023, arXiv 2304.06941, and Feather",
        start="dense",
        targeted="always",
        training_flops="at band times the density of the weights",
    )
    ramp = (0.0, 0.5)

    def __post_init__(self) -> None:
        _checks.number("band", self.band, least=1.0)
        _checks.number("power", self.power, least=1.0)
        super().__post_init__()

    def prepare(self, bucket: Bucket) -> None:
        """See :class:`Sparsifier`."""
        SoftOnBudget.prepare(self, bucket)
        Exploring.prepare(self, bucket)

    def rescales(self, layer: Layer, weight: Tensor) -> bool:
        """Tell whether nothing else gives back what the threshold takes.

        A layer that starts at 0 is left alone: as soon as it lives it would be scaled up by a hundred.
        """
        alive = total(weight.count_nonzero()[None].double(), [layer.shard]) > 0
        return not is_restored(self.model, layer.key) and bool(alive)

    def value(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """See :class:`SoftOnBudget`; where nothing is rescaled the threshold of a power."""
        return self._by_kind(
            bucket,
            soft=lambda: super(Band, self).value(weight, bucket),
            hard=lambda: thresholded(weight, self.threshold(bucket), self.power),
        )

    def unmasked(self, used: Tensor, bucket: Bucket) -> Tensor:
        """See :class:`Latent`."""
        return self._by_kind(
            bucket,
            soft=lambda: super(Band, self).unmasked(used, bucket),
            hard=lambda: unthresholded(used, self.threshold(bucket), self.power),
        )

    @staticmethod
    def _by_kind(bucket: Bucket, *, soft: Callable[[], Tensor], hard: Callable[[], Tensor]) -> Tensor:
        """Take one of two values for each weight; both are computed only where layers of both kinds are there."""
        share = bucket.mean("rescaled")
        if share in (0.0, 1.0):
            return soft() if share else hard()
        return torch.where(bucket.spread(bucket.kept["rescaled"]) > 0.0, soft(), hard())

    def gradient(self, grad: Tensor, weight: Tensor, bucket: Bucket) -> Tensor:
        """dL/dW = dL/dW^ where W lives and in the band, else 0."""
        return torch.where(self.live(bucket) | bucket.kept["explore"], grad, 0.0)

    def reach(self, layer: Layer, live: int) -> int:
        """Count the weights of the layer that get a gradient."""
        return min(layer.size, max(int(self.band * live), int(LEAST * layer.size)))

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        return min(1.0, max(self.band * density, LEAST))
