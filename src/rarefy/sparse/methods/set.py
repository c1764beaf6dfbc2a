"""SET: sparse evolutionary training (Mocanu et al., Nature Communications 2018, arXiv 1707.04780).

Masks start at random. At every update each layer drops the share f(t) of its live weights, those of least magnitude,
and grows as many, at random; grown weights start at 0.

    f(t) = p / 2 * (1 + cos(pi t / end))          (RigL's decay, which it gives SET too; SET itself keeps f = p)

What to grow is one method, :meth:`SET.growth_scores`: RigL and SNFS are this file with another one. As in RigL's code
a weight that was just dropped may be grown again, and then keeps its value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from rarefy import _checks
from rarefy.sparse import _options
from rarefy.sparse.families.masked import Masked
from rarefy.sparse.masks import drop_and_grow
from rarefy.sparse.reports import Info
from rarefy.sparse.schedules import cosine_decay


@dataclass(eq=False, repr=False)
class SET(Masked):
    """Drop the smallest, grow at random.

    Args:
        update_every: steps from one change of the masks to the next; None takes a 125th of the run.
        seed: of what is drawn at random; every process of a run must have the same.
        drop_fraction: p, the share of the live weights replaced at the first update, in (0, 1).
        stop: the share of the run after which the masks stay, in (0, 1].

    Raises:
        ValueError: as :class:`Budgeted`; an option out of its range; a run without a single update before ``stop``.
    """

    _: KW_ONLY
    update_every: int | None = None
    seed: int = 0
    drop_fraction: float = 0.3
    stop: float = 0.75

    info = Info(
        title="SET",
        paper="Mocanu et al. 2018, arXiv 1707.04780",
        start="sparse",
        targeted="always",
        training_flops="at the target's density",
    )

    def __post_init__(self) -> None:
        _checks.fraction("drop_fraction", self.drop_fraction, zero=False, one=False)
        _checks.fraction("stop", self.stop, zero=False)
        _checks.whole("seed", self.seed, least=0)
        super().__post_init__()
        _options.update_every(self.update_every, self.total_steps)
        every = self.update_every or 1
        if every > self.stop * self.total_steps:
            raise ValueError(
                f"update_every={every} leaves no update within {self.stop:.0%} of total_steps={self.total_steps}"
            )
        self._every = self.update_every or self.interval

    def initial_masks(self) -> list[Tensor]:
        """See :class:`Masked`: at random."""
        return self.random_masks(self.budget.goal, self.seed)

    def growth_scores(self) -> Sequence[Tensor] | None:
        """Score what to grow, one tensor a layer, larger first; None leaves the masks."""
        return self.random(self.seed)

    def update_masks(self) -> list[Tensor] | None:
        """See :class:`Masked`: drop and grow."""
        if not self.due(self._every, self.stop):
            return None
        growth = self.growth_scores()
        return None if growth is None else self.drop_and_grow(self._live(), self.magnitudes(), growth)

    def drop_and_grow(
        self, masks: Sequence[Tensor], magnitudes: Sequence[Tensor], growth: Sequence[Tensor]
    ) -> list[Tensor]:
        """Make the masks after dropping the share f(t) of what lives and growing as much."""
        fraction = cosine_decay(self.drop_fraction, self.progress, self.stop)
        rows = zip(magnitudes, masks, growth, self._shards(), strict=True)
        return [drop_and_grow(size, mask, grow, fraction, self._block, shard) for size, mask, grow, shard in rows]
