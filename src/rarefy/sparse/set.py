"""SET: sparse evolutionary training (Mocanu et al., Nature Communications 2018, arXiv 1707.04780).

Masks start at random. At every update each layer drops the share f(t) of its live weights, those of least magnitude,
and grows as many, at random; grown weights start at 0.

    f(t) = p / 2 * (1 + cos(pi t / end))          (RigL's decay, which it gives SET too; SET itself keeps f = p)

What to grow is one method, :meth:`SET._growth`: RigL and SNFS are this file with another one. As in RigL's code a
weight that was just dropped may be grown again, and then keeps its value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.base import Info
from rarefy.sparse.masked import Masked, MaskedOptions, cosine_decay
from rarefy.sparse.masks import block_expand, block_sum, top_k


class SETOptions(MaskedOptions, total=False):
    """The keyword arguments of :class:`SET`, for the methods built on it."""

    drop_fraction: float
    stop: float


class SET(Masked):
    """Drop the smallest, grow at random.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block: see
            :class:`Budgeted`.
        update_every, seed: see :class:`Masked`.
        drop_fraction: p, the share of the live weights replaced at the first update, in (0, 1).
        stop: the share of the run after which the masks stay, in (0, 1].

    Raises:
        ValueError: as :class:`Budgeted`; an option out of its range; a run without a single update before ``stop``.
    """

    info = Info("SET", "Mocanu et al. 2018, arXiv 1707.04780", "sparse", "always", "at the target's density")

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        drop_fraction: float = 0.3,
        stop: float = 0.75,
        **options: Unpack[MaskedOptions],
    ) -> None:
        if not 0.0 < drop_fraction < 1.0:
            raise ValueError(f"drop_fraction must be in (0, 1), got {drop_fraction}")
        if not 0.0 < stop <= 1.0:
            raise ValueError(f"stop must be a share of the run in (0, 1], got {stop}")
        self.drop_fraction, self.stop = drop_fraction, stop
        every = options.get("update_every") or 1
        if every > stop * total_steps:
            raise ValueError(f"update_every={every} leaves no update within {stop:.0%} of total_steps={total_steps}")
        super().__init__(model, total_steps=total_steps, **options)

    def _first_masks(self) -> list[Tensor]:
        assert self.budget is not None
        return self._random_masks(self._live_counts(self.budget.goal))

    def _growth(self) -> Sequence[Tensor] | None:
        """Scores of what to grow, one tensor a layer, larger first; None leaves the masks."""
        return self._random()

    def _change(self) -> list[Tensor] | None:
        if not self._due(self.stop):
            return None
        growth = self._growth()
        if growth is None:
            return None
        fraction = cosine_decay(self.drop_fraction, self.progress, self.stop)
        return [
            drop_and_grow(magnitude, mask, grow, fraction, self.block)
            for magnitude, mask, grow in zip(self._live_magnitudes(), self._masks, growth, strict=True)
        ]


def drop_and_grow(magnitude: Tensor, mask: Tensor, growth: Tensor, fraction: float, block: int = 1) -> Tensor:
    """The mask after dropping this share of the live and growing as many of what is not live then.

    Args:
        magnitude: what to keep most, (out, in, ...); -1 where the mask is not.
        mask: boolean, of the same shape.
        growth: what to grow most.
        fraction: of the live weights, rounded down, and at most as many as are not live.
        block: consecutive inputs that are dropped and grown together.
    """
    live = block_sum(mask, block) > 0
    keep_score = block_sum(magnitude, block)
    alive = int(live.sum())
    moved = min(int(fraction * alive), live.numel() - alive)
    kept = top_k(keep_score, alive - moved)
    grow_score = block_sum(growth, block).double().masked_fill(kept, -torch.inf)
    return block_expand(kept | top_k(grow_score, moved), block)
