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

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.base import Info
from rarefy.sparse.masked import Masked, MaskedOptions
from rarefy.sparse.masks import block_expand, block_sum, top_k

#: The shares of the run from which on the moved share is halved, and 0.
STAGES = (90 / 160, 120 / 160)


class MEST(Masked):
    """Drop by magnitude and gradient, grow at random, under a hard (EM) or a soft (EM&S) bound on memory.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block: see
            :class:`Budgeted`.
        update_every: see :class:`Masked`; None takes a 32nd of the run, as the code's 5 of 160 epochs.
        seed: see :class:`Masked`.
        soft: False for EM, True for EM&S.
        moved: share of the live weights that is replaced (EM) or added for a while (EM&S) at first, in (0, 1); None
            takes the code's, 0.2 and 0.5.
        gradient_weight: lambda; 0 in the code.

    Raises:
        ValueError: as :class:`Budgeted`; an option out of its range.
    """

    info = Info(
        "MEST", "Yuan et al., NeurIPS 2021, arXiv 2110.14032", "sparse", "always", "at the density of the weights"
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        soft: bool = False,
        moved: float | None = None,
        gradient_weight: float = 0.0,
        **options: Unpack[MaskedOptions],
    ) -> None:
        if moved is not None and not 0.0 < moved < 1.0:
            raise ValueError(f"moved must be in (0, 1), got {moved}")
        if gradient_weight < 0.0:
            raise ValueError(f"gradient_weight must not be negative, got {gradient_weight}")
        self.soft, self.gradient_weight = soft, gradient_weight
        self.moved = (0.5 if soft else 0.2) if moved is None else moved
        self._gradients: list[Tensor] | None = None
        if options.get("update_every") is None:
            options["update_every"] = max(1, total_steps // 32)
        super().__init__(model, total_steps=total_steps, **options)

    def _first_masks(self) -> list[Tensor]:
        assert self.budget is not None
        counts = zip(self._live_counts(self.budget.goal), self._sizes, strict=True)
        return self._random_masks([self._bounds(count, size)[1] for count, size in counts])

    def _share(self) -> float:
        """The share of the live weights that moves now."""
        return self.moved * (1.0 if self.progress < STAGES[0] else 0.5 if self.progress < STAGES[1] else 0.0)

    def _bounds(self, count: int, size: int) -> tuple[int, int]:
        """How many blocks of a layer dropping leaves, and growing makes of them; ``count`` is the target's."""
        change = int(self._share() * count)
        if self.soft:
            return count, min(count + change, size)
        return count - min(change, count - 1), count

    def _see_gradients(self, gradients: Sequence[Tensor]) -> None:
        if self.gradient_weight and (self.steps + 1) % self.update_every == 0:
            self._gradients = [gradient.abs() for gradient in gradients]

    def _change(self) -> list[Tensor] | None:
        # After the last stage has begun one more update takes away what EM&S has too many.
        if not self._due() and self.steps != self.total_steps:
            return None
        assert self.budget is not None
        scores = self._live_magnitudes()
        if self._gradients is not None:
            scores = [s + self.gradient_weight * g for s, g in zip(scores, self._gradients, strict=True)]
            scores = [s.masked_fill(~mask, -1.0) for s, mask in zip(scores, self._masks, strict=True)]
            self._gradients = None
        masks = []
        rows = zip(scores, self._random(), self._live_counts(self.budget.goal), self._sizes, strict=True)
        for score, draw, count, size in rows:
            lower, upper = self._bounds(count, size)
            kept = top_k(block_sum(score, self.block), lower)
            growth = block_sum(draw, self.block).masked_fill(kept, -torch.inf)
            masks.append(block_expand(kept | top_k(growth, upper - lower), self.block))
        return masks
