"""Methods that choose exactly as many weights as a budget allows: how many, over which layers, in which pattern."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy._names import unknown
from rarefy.sparse import distribution as spread
from rarefy.sparse.base import LayerState, Selection, Sparsifier
from rarefy.sparse.masks import block_expand, block_sum, check_divisible, top_k, within_budget


class BudgetedOptions(Selection, total=False):
    """The keyword arguments of :class:`Budgeted`, for the methods built on it."""

    distribution: str | Mapping[str, float] | None
    block: int


class Budgeted(Sparsifier):
    """Counts a layer for every density, and the choice of the best weights for them.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor: see :class:`Sparsifier`. One
            of the targets must be given.
        distribution: "uniform", "erk", "global" (the best weights wherever they are) or a mapping of shell patterns of
            layers to sparsities, where the layers that it does not name share the rest of the target uniformly. None
            takes the method's own.
        block: 4 chooses blocks of 4 consecutive inputs of one output together, which integer dot products of CPUs
            want; 1 chooses single weights.

    Raises:
        ValueError: as :class:`Sparsifier`; no target; a distribution that the target or the method does not allow; an
            input width that blocks do not divide.
    """

    #: What the method takes when nothing is asked for.
    default_distribution: ClassVar[str] = "erk"

    #: Whether the best weights may be chosen over all layers together.
    takes_global: ClassVar[bool] = False

    least_steps = 10

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        distribution: str | Mapping[str, float] | None = None,
        block: int = 1,
        **selection: Unpack[Selection],
    ) -> None:
        if selection.get("target") is None and selection.get("target_flops") is None:
            raise ValueError(f"{type(self).__name__} needs a target (a sparsity, such as 0.9) or target_flops")
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"block must be a positive whole number of weights, got {block!r}")
        super().__init__(model, total_steps=total_steps, **selection)
        assert self.budget is not None
        self.distribution = self._checked(self.default_distribution if distribution is None else distribution)
        self.block = block
        shapes = {name: tuple(layer.weight.shape) for name, layer in self._layers.items()}
        check_divisible(shapes, block, f"blocks of {block}")
        # From here on in blocks, which are single weights where block is 1.
        self._sizes = [math.prod(shape) // block for shape in shapes.values()]
        self._costs = [cost * block for cost in self.budget.costs]
        self._least_blocks = [math.ceil(self._least[name] / block) for name in shapes]
        self._relative = spread.relative_densities(self.distribution, shapes)
        self._fixed = spread.fixed_densities(self.distribution, list(shapes))
        self._live_counts(self.budget.goal)

    def _checked(self, distribution: str | Mapping[str, float]) -> str | Mapping[str, float]:
        if isinstance(distribution, Mapping):
            for pattern, sparsity in distribution.items():
                if not any(fnmatch.fnmatchcase(name, pattern) for name in self._layers):
                    raise ValueError(unknown("layer in distribution:", pattern, self._layers))
                if not 0.0 <= sparsity < 1.0:
                    raise ValueError(f"distribution: the sparsity of {pattern!r} must be in [0, 1), got {sparsity}")
            return dict(distribution)
        known = (*spread.NAMES, *(("global",) if self.takes_global else ()))
        if distribution not in known:
            raise ValueError(
                f"distribution must be one of {', '.join(map(repr, known))} or a mapping of layers to sparsities, "
                f"got {distribution!r}"
            )
        return distribution

    def _live_counts(self, density: float) -> list[int]:
        """How many blocks of every layer live when the whole network has this density."""
        assert self.budget is not None
        if density >= 1.0:
            return list(self._sizes)
        available = self.budget.available_at(density)
        whole = [cost * size for cost, size in zip(self._costs, self._sizes, strict=True)]
        lows = [low / size for low, size in zip(self._least_blocks, self._sizes, strict=True)]
        found = spread.densities(self._relative, self._fixed, whole, lows, available)
        return spread.counts(found, self._sizes, self._costs, self._least_blocks, available)

    def _choose(self, scores: Sequence[Tensor], density: float) -> list[Tensor]:
        """The masks of the best weights when the whole network has this density; one tensor of scores a layer."""
        assert self.budget is not None
        if density >= 1.0:
            return [torch.ones_like(layer, dtype=torch.bool) for layer in scores]
        sums = [block_sum(layer, self.block) for layer in scores]
        if self.distribution == "global":
            masks = within_budget(sums, self._costs, self.budget.available_at(density), self._least_blocks)
        else:
            masks = [top_k(layer, k) for layer, k in zip(sums, self._live_counts(density), strict=True)]
        return [block_expand(mask, self.block) for mask in masks]

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "distribution": self.distribution, "block": self.block}

    def _layer_states(self, masks: Sequence[Tensor], weight_grads: Sequence[float], **about: Any) -> list[LayerState]:
        rows = zip(self._layers.items(), torch.stack([m.sum() for m in masks]).tolist(), weight_grads, strict=True)
        return [
            LayerState(name, tuple(layer.weight.shape), int(live), weight_grad, **about)
            for (name, layer), live, weight_grad in rows
        ]
