"""MEST: memory-economic sparse training (Yuan et al., NeurIPS 2021, arXiv 2110.14032), EM and EM&S.

At every update each layer drops the live weights of least |W| + lambda |dL/dW| and grows as many at random.

    EM        drops to below the target's density, then grows back to it: memory never exceeds the target's
    EM&S      drops to the target's density, then grows beyond it: the new weights have until the next update to prove
              themselves (a soft bound on memory)

What is moved is a share of the live weights that falls in three stages and ends at 0, so that the run lands on its
target: for a target of 90 % the code takes 2, 1 and 0 % of all weights for EM, 5, 2.5 and 0 % for EM&S, from epochs 0,
90 and 120 of 160 on, with an update every 5 epochs. Implemented from the paper and the code's settings.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from rarefy import _checks
from rarefy.sparse import _options
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.masked import Masked
from rarefy.sparse.masks import block_expand, block_sum, top_k
from rarefy.sparse.reports import Info

#: The shares of the run from which on the moved share is halved, and 0.
STAGES = (90 / 160, 120 / 160)


@dataclass(eq=False, repr=False)
class MEST(Masked):
    """Drop by magnitude and gradient, grow at random, under a hard (EM) or a soft (EM&S) bound on memory.

    Args:
        update_every: steps from one change of the masks to the next; None takes a 32nd of the run, as the code's 5 of
            160 epochs.
        seed: of what is drawn at random; every process of a run must have the same.
        soft: False for EM, True for EM&S.
        moved: share of the live weights that is replaced (EM) or added for a while (EM&S) at first, in (0, 1); None
            takes the code's, 0.2 and 0.5.
        gradient_weight: lambda, not negative; the code's by default.

    Raises:
        ValueError: as :class:`Budgeted`; an option out of its range.
    """

    _: KW_ONLY
    update_every: int | None = None
    seed: int = 0
    soft: bool = False
    moved: float | None = None
    gradient_weight: float = 0.0

    info = Info(
        title="MEST",
        paper="Yuan et al., NeurIPS 2021, arXiv 2110.14032",
        start="sparse",
        targeted="always",
        training_flops="at the density of the weights",
    )

    def __post_init__(self) -> None:
        if self.moved is not None:
            _checks.fraction("moved", self.moved, zero=False, one=False)
        _checks.flag("soft", self.soft)
        _checks.number("gradient_weight", self.gradient_weight)
        _checks.whole("seed", self.seed, least=0)
        if self.moved is None:
            self.moved = 0.5 if self.soft else 0.2
        super().__post_init__()
        _options.update_every(self.update_every, self.total_steps)
        self._every = self.update_every or max(1, self.total_steps // 32)
        self._gradients: dict[str, Tensor] = {}

    def initial_masks(self) -> list[Tensor]:
        """See :class:`Masked`: at random."""
        counts = zip(self.live_counts(self.budget.goal), self._sizes, strict=True)
        return self.masks_of([self.bounds(count, size)[1] for count, size in counts], self.seed)

    def bounds(self, count: int, size: int) -> tuple[int, int]:
        """Count the blocks that dropping leaves of a layer's, and growing makes of them; ``count`` is the target's."""
        assert self.moved is not None
        share = self.moved * (1.0 if self.progress < STAGES[0] else 0.5 if self.progress < STAGES[1] else 0.0)
        change = int(share * count)
        if self.soft:
            return count, min(count + change, size)
        return count - min(change, count - 1), count

    def see_gradients(self, bucket: Bucket) -> None:
        """See :class:`Masked`: keep |dL/dW| in the steps that change the masks."""
        if self.gradient_weight and (self.steps + 1) % self._every == 0:
            self._gradients.update({layer.name: g.abs() for layer in bucket.layers if (g := layer.grad) is not None})

    def update_masks(self) -> list[Tensor] | None:
        """See :class:`Masked`: drop, and grow at random."""
        # After the last stage has begun one more update takes away what EM&S has too many.
        if not self.due(self._every) and self.steps != self.total_steps:
            return None
        scores, shards = self.magnitudes(), self._shards()
        seen, self._gradients = self._gradients, {}
        if seen:
            rows = zip(self._layers, scores, self._live(), strict=True)
            scores = [
                (score + self.gradient_weight * seen.get(layer.name, torch.zeros_like(score))).masked_fill(~mask, -1.0)
                for layer, score, mask in rows
            ]
        masks = []
        counts = self.live_counts(self.budget.goal)
        for score, draw, count, size, shard in zip(
            scores, self.random(self.seed), counts, self._sizes, shards, strict=True
        ):
            lower, upper = self.bounds(count, size)
            kept = top_k(block_sum(score, self._block), lower, shard)
            growth = block_sum(draw, self._block).masked_fill(kept, -torch.inf)
            masks.append(block_expand(kept | top_k(growth, upper - lower, shard), self._block))
        return masks
