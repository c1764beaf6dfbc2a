"""Hard masks: what is masked is 0 and gets no gradient, around each optimizer step.

    before a step   dL/dW <- dL/dW * M
    after it        W <- W * M

Where a weight is masked or comes back, everything that the optimizer remembers of it, such as momentum, is set to 0
too, so that a revived weight starts fresh. Gradients that are clipped are clipped before that, with those of the masked
weights in their norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.kernels.thresholds import Masks
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.budgeted import Budgeted
from rarefy.sparse.masks import block_expand, block_sum, count_all, random_scores, top_k_each


@dataclass(eq=False, repr=False)
class Masked(Budgeted):
    """Masks, and what they do to gradients, weights and the optimizer's state; when they change is the method's."""

    # What a method provides

    def initial_masks(self) -> list[Tensor]:
        """Make the masks at the start, one a layer; all ones unless the method is sparse to sparse."""
        return [torch.ones_like(weight, dtype=torch.bool) for weight in self.weights()]

    def update_masks(self) -> list[Tensor] | None:
        """Make the masks from this step on, after the step's update of the weights; None leaves them."""
        return None

    def see_gradients(self, bucket: Bucket) -> None:
        """Look at the gradients of all weights before a step, before those of masked ones become 0."""

    # What all have

    def weights(self) -> list[Tensor]:
        """Return the weights, one tensor a layer: this process's part of it."""
        return [layer.local for layer in self._layers]

    def magnitudes(self) -> list[Tensor]:
        """|W| where the masks are, -1 elsewhere: whatever lives comes before whatever does not."""
        rows = zip(self.weights(), self.kept("mask"), strict=True)
        return [weight.abs().masked_fill(~mask, -1.0) for weight, mask in rows]

    def random(self, seed: int) -> list[Tensor]:
        """Random scores, a function of the seed and the step alone; one number a block."""
        draws, (rows, columns) = [], self._block
        for index, (layer, weight) in enumerate(zip(self._layers, self.weights(), strict=True)):
            shape = (layer.shape[0] // rows, layer.shape[1] // columns, *layer.shape[2:])
            draw = random_scores(shape, seed, self.steps, index)
            if layer.shard is not None:
                first = layer.shard.first_row // rows
                draw = draw[first : first + len(weight) // rows]
            draws.append(block_expand(draw.to(weight.device), self._block))
        return draws

    def random_masks(self, density: float, seed: int) -> list[Tensor]:
        """Masks drawn at random, when the whole network has this density."""
        return self.masks_of(self.live_counts(density), seed)

    def masks_of(self, counts: Sequence[int], seed: int) -> list[Tensor]:
        """Masks of so many blocks a layer, drawn at random."""
        sums = [block_sum(draw, self._block) for draw in self.random(seed)]
        return [block_expand(mask, self._block) for mask in top_k_each(sums, counts, self._shards())]

    def zeros_of_the_model(self) -> list[Tensor] | None:
        """Masks of the weights that are not 0, where the model is sparse already; None where it is dense.

        It is sparse if at least a tenth of all weights are 0, and some in at least half of the layers.
        """
        live = count_all([weight != 0 for weight in self.weights()], self._shards())
        sizes = [layer.size for layer in self._layers]
        zeros = [size - n if n else 0 for n, size in zip(live, sizes, strict=True)]
        if sum(zeros) < 0.1 * sum(sizes) or sum(n > 0 for n in zeros) < 0.5 * len(zeros):
            return None
        return self.nonzero()

    def nonzero(self) -> list[Tensor]:
        """Masks of the weights that are not 0; of a layer that is all 0, which starts so, all."""
        masks = [weight != 0 for weight in self.weights()]
        live = count_all(masks, self._shards())
        return [mask if n else torch.ones_like(mask) for mask, n in zip(masks, live, strict=True)]

    def due(self, every: int, until: float = 1.0) -> bool:
        """Say whether masks that change every so often change after this step, last at ``until`` or just after."""
        return self.steps % every == 0 and self.steps - every < until * self.total_steps

    def _dense(self) -> list[Tensor]:
        return self.weights()

    def _live(self) -> list[Tensor]:
        return self.kept("mask")

    def _begin(self) -> None:
        for bucket in self._buckets:
            bucket.keep("mask", bucket.flat(1, torch.bool))
            bucket.passes = Masks(self._views(bucket))
            self.prepare(bucket)
        self._write(self.initial_masks())

    def _write(self, masks: Sequence[Tensor]) -> None:
        for mine, new in zip(self.kept("mask"), masks, strict=True):
            mine.copy_(new)

    def _lift(self, bucket: Bucket) -> None:
        """Nothing, as :meth:`_take`."""

    def _before(self, bucket: Bucket) -> None:
        self.see_gradients(bucket)
        bucket.passes.cut_(bucket.grads())

    def _views(self, bucket: Bucket) -> list[Tensor]:
        return bucket.views(bucket.kept["mask"])

    def _take(self, bucket: Bucket) -> None:
        """Nothing: the parameters are the dense weights, where they live."""

    def _show(self, bucket: Bucket) -> None:
        bucket.passes.cut_(bucket.weights())

    def _changed(self, bucket: Bucket) -> bool:
        pairs = zip(bucket.weights(), self._views(bucket), strict=True)
        return bool(torch.stack([((weight != 0) & ~mask).any() for weight, mask in pairs]).any())

    def _update(self) -> None:
        masks = self.update_masks()
        if masks is not None:
            self._forget(masks)
            self._write(masks)

    def _forget(self, masks: Sequence[Tensor]) -> None:
        """The optimizer forgets what it knows of the weights that are masked, or come back, from here on."""
        for layer, old, new in zip(self._layers, self.kept("mask"), masks, strict=True):
            self.where(layer)[0].forget(layer, old ^ new)

    def _settle(self) -> list[Tensor]:
        masks = self.kept("mask")
        if self.budget.density(count_all(masks, self._shards())) > self.budget.goal * (1.0 + 1e-9):
            self._write(self.choose(self.magnitudes(), self.budget.goal))
        return self.kept("mask")
