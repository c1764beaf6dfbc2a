"""Soft thresholds on the budget, which may give a channel back what they took from it: as in ST-3, arXiv 2212.01076."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.latent import Thresholding, wide
from rarefy.sparse.layers import Layer


@dataclass(eq=False, repr=False)
class SoftOnBudget(Thresholding):
    """W^ = sign(W) max(|W| - T, 0) c, where c = 1.01 / (r + 0.01), r = sum |W^| / sum |W| of each channel, or is 1.

    Which layers are rescaled stands in ``bucket.kept["rescaled"]``, (L,): 1 or 0.
    """

    @abstractmethod
    def rescales(self, layer: Layer, weight: Tensor) -> bool:
        """Tell whether the layer's channels are scaled up; ``weight`` is its first."""

    def prepare(self, bucket: Bucket) -> None:
        """See :class:`Sparsifier`."""
        super().prepare(bucket)
        first = bucket.views(bucket.kept["latent"])
        rescaled = [float(self.rescales(layer, weight)) for layer, weight in zip(bucket.layers, first, strict=True)]
        bucket.per["rescaled"] = "layer"
        bucket.kept["rescaled"] = torch.tensor(rescaled, dtype=torch.float32, device=bucket.device)

    def value(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """W^ = sign(W) max(|W| - T, 0) c."""
        size = wide(weight).abs()
        shrunk = (size - self.threshold(bucket)).clamp_(min=0.0)
        if bucket.mean("rescaled"):
            # r of each channel, and c for each of its weights
            left = bucket.channel_sums(shrunk) / bucket.channel_sums(size).clamp(min=1e-12)
            shrunk = shrunk * self._where_rescaled(bucket.spread(1.01 / (left + 0.01), channels=True), bucket)
        return shrunk.copysign_(weight)

    def unmasked(self, used: Tensor, bucket: Bucket) -> Tensor:
        """See :class:`Latent`: W^ / c + sign(W^) T, with the c that comes of these."""
        threshold, latent = self.threshold(bucket), bucket.kept["latent"]
        if bucket.mean("rescaled"):
            # With S = sum |W^| and A = sum of T where W lives and |W| elsewhere c = 1.01 / (r + 0.01) has
            # r = (S / c) / (S / c + A), so that 0.01 A c^2 + 1.01 (S - A) c - 1.01 S = 0.
            live = self.live(bucket) & (used != 0.0)
            kept = bucket.channel_sums(used.float().abs() * live).double()
            taken = bucket.channel_sums(torch.where(live, threshold, latent.float().abs())).double()
            half = 0.5 * 1.01 * (taken - kept)
            scale = (half + (half.square() + 0.0101 * taken * kept).sqrt()) / (0.01 * taken).clamp(min=1e-30)
            scale = torch.where(taken > 0.0, scale, 1.0).clamp(min=1.0)
            used = used / self._where_rescaled(bucket.spread(scale.to(used.dtype), channels=True), bucket)
        return used + threshold.to(used.dtype).copysign(used)

    @staticmethod
    def _where_rescaled(scale: Tensor, bucket: Bucket) -> Tensor:
        return torch.where(bucket.spread(bucket.kept["rescaled"]) > 0.0, scale, 1.0)
