"""Methods that choose exactly as many weights as a budget allows: how many, over which layers, in which pattern."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rarefy import _checks
from rarefy._names import matches, unknown
from rarefy.sparse import _options
from rarefy.sparse import distribution as spread
from rarefy.sparse.budget import Budget
from rarefy.sparse.families.targeted import Targeted
from rarefy.sparse.masks import block_expand, block_sum, top_k_each, within_budget
from rarefy.sparse.schedules import cubic_ramp


@dataclass(eq=False, repr=False)
class Budgeted(Targeted):
    """Counts a layer for every density, and the choice of the best weights for them.

    One of the targets must be given.

    Args:
        distribution: "uniform", "erk", "global" (the best weights wherever they are) or a mapping of shell patterns of
            layers to sparsities, where the layers that it does not name share the rest of the target uniformly. None
            takes the method's own.
        block: 4 chooses blocks of 4 consecutive inputs of one output together, which integer dot products of CPUs
            want, and (8, 4) those of 8 consecutive outputs; 1 chooses single weights. Of a convolution they are at one
            position of the kernel.

    Raises:
        ValueError: as :class:`Targeted`; no target; a distribution that the target or the method does not allow; a
            layer that blocks do not divide, or whose part on a process they do not.
    """

    budget: Budget = field(init=False)

    _: KW_ONLY
    distribution: str | Mapping[str, float] | None = None
    block: int | Sequence[int] = 1

    #: What the method takes when nothing is asked for.
    default_distribution: ClassVar[str] = "erk"

    #: Whether the best weights may be chosen over all layers together.
    takes_global: ClassVar[bool] = False

    least_steps = 10

    def __post_init__(self) -> None:
        self._check_target()
        self.block = self._block = _options.block("block", self.block)
        super().__post_init__()
        self.distribution = self._checked(self.default_distribution if self.distribution is None else self.distribution)
        self._relayer()
        self.live_counts(self.budget.goal)

    def _check_target(self) -> None:
        if not self.targeted:
            raise ValueError(
                f"{type(self).__name__} needs a target (a sparsity, such as 0.9), target_flops or target_ms"
            )

    def _relayer(self) -> None:
        # From here on in blocks, which are single weights where block is 1.
        shapes, each = {layer.name: layer.shape for layer in self._layers}, math.prod(self._block)
        self._sizes = [layer.size // each for layer in self._layers]
        self._prices = [prices.of_blocks(each) for prices in self.budget.prices]
        self._least = self._least_blocks()
        self._relative = spread.relative_densities(self.distribution or "uniform", shapes)
        self._fixed = spread.fixed_densities(self.distribution or "uniform", list(shapes))

    def _checked(self, distribution: str | Mapping[str, float]) -> str | Mapping[str, float]:
        if isinstance(distribution, Mapping):
            names = [layer.name for layer in self._layers]
            for pattern, sparsity in distribution.items():
                if not any(matches(name, pattern) for name in names):
                    raise ValueError(unknown("layer in distribution:", pattern, names))
                _checks.fraction(f"distribution: the sparsity of {pattern!r}", sparsity, one=False)
            return dict(distribution)
        known = (*spread.NAMES, *(("global",) if self.takes_global else ()))
        if distribution not in known:
            raise ValueError(
                f"distribution must be one of {', '.join(map(repr, known))} or a mapping of layers to sparsities, "
                f"got {distribution!r}"
            )
        return distribution

    def ramped(self, first: float, start: float, end: float) -> float:
        """The density now on the cubic curve that leaves ``first`` at ``start`` and is the target's from ``end`` on."""
        return first - (first - self.budget.goal) * cubic_ramp(self.progress, start, end)

    def live_counts(self, density: float) -> list[int]:
        """How many blocks of every layer live when the whole network has this density."""
        if density >= 1.0:
            return list(self._sizes)
        available = self.budget.available_at(density)
        # While the network is denser than its target, so are the layers whose sparsities are named.
        share = min(1.0, (1.0 - density) / (1.0 - self.budget.goal))
        fixed = [None if least is None else 1.0 - share * (1.0 - least) for least in self._fixed]
        lows = [low / size for low, size in zip(self._least, self._sizes, strict=True)]
        found = spread.densities(self._relative, fixed, self._prices, lows, available)
        return spread.counts(found, self._prices, self._least, available)

    def choose(self, scores: Sequence[Tensor], density: float) -> list[Tensor]:
        """The masks of the best weights when the whole network has this density; one tensor of scores a layer."""
        if density >= 1.0:
            return [torch.ones_like(layer, dtype=torch.bool) for layer in scores]
        sums = [block_sum(layer, self._block) for layer in scores]
        shards = self._shards()
        if self.distribution == "global":
            masks = within_budget(sums, self._prices, self.budget.available_at(density), self._least, shards)
        else:
            masks = top_k_each(sums, self.live_counts(density), shards)
        return [block_expand(mask, self._block) for mask in masks]
