"""Dense weights of which the layers use the best: masks projected onto the budget, gradients let through past them.

Unlike :mod:`rarefy.sparse.masked` the weights outside the mask keep their values, and what reaches them of the gradient
is the method's; so they can come back. The masks are chosen anew every few steps and are exact then.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.anneal import cubic_ramp
from rarefy.sparse.base import LayerState
from rarefy.sparse.budgeted import Budgeted, BudgetedOptions
from rarefy.sparse.gmp import check_ramp
from rarefy.sparse.masked import write_sparse
from rarefy.sparse.selection import Prunable
from rarefy.sparse.swapped import check_swapped, guard_fast_paths, swap, swap_back


def straight_through(value: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """``value``, whose gradient goes to ``weight`` times ``factor``."""
    surrogate = weight * factor
    return value.detach() + (surrogate - surrogate.detach())


class Estimator(nn.Module):
    """What a layer computes with, as a function of its weight and of a mask that the method sets; a method's own.

    Attributes:
        mask: boolean, shaped as the weight: what is used.
    """

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool, requires_grad=False))

    def dense(self, weight: Tensor) -> Tensor:
        """The weight that the layer would use without a mask; its magnitude is what masks are chosen by."""
        return weight

    def value(self, weight: Tensor) -> Tensor:
        """W^: what the layer computes with."""
        return self.dense(weight) * self.mask

    def live(self, weight: Tensor) -> Tensor:
        """Boolean, which weights are used."""
        return self.mask

    def project(self, weight: Tensor, mask: Tensor) -> None:
        """Use this mask from now on."""
        self.mask.copy_(mask)

    def forward(self, weight: Tensor) -> Tensor:
        """W^ with the method's gradient; that of the mask itself unless a method says otherwise."""
        return self.value(weight)


class ProjectedOptions(BudgetedOptions, total=False):
    """The keyword arguments of :class:`Projected`, for the methods built on it."""

    update_every: int | None


class RampOptions(ProjectedOptions, total=False):
    """The keyword arguments of the projected methods whose sparsity rises."""

    start: float
    end: float


class Projected(Budgeted):
    """Masks of the largest weights, chosen anew every few steps, exactly at the density of the schedule.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block: see
            :class:`Budgeted`.
        update_every: steps from one choice of the masks to the next; None takes a 125th of the run.
        start, end: shares of the run between which the sparsity rises, on a cubic curve; both 0 for the target's from
            the first step on.
    """

    takes_global = True
    default_distribution = "global"

    #: start and end if nothing is asked for.
    ramp: ClassVar[tuple[float, float]] = (0.0, 0.0)

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        update_every: int | None = None,
        start: float | None = None,
        end: float | None = None,
        **options: Unpack[BudgetedOptions],
    ) -> None:
        if update_every is not None and not 1 <= update_every <= total_steps:
            raise ValueError(f"update_every must be between 1 and total_steps={total_steps}, got {update_every}")
        self.start = self.ramp[0] if start is None else start
        self.end = self.ramp[1] if end is None else end
        if (self.start, self.end) != (0.0, 0.0):
            check_ramp(self.start, self.end)
        super().__init__(model, total_steps=total_steps, **options)
        self.update_every = update_every or self.interval
        self._estimators: list[Estimator] = []
        with torch.no_grad():
            for layer in self._layers.values():
                self._estimators.append(self._estimator(layer.weight))
                swap(layer, self._estimators[-1])
            guard_fast_paths(model)
            self._project()

    # What a method provides

    @abstractmethod
    def _estimator(self, weight: Tensor) -> Estimator:
        """The estimator of a layer, which may change the weight to begin with."""

    def _score(self, estimator: Estimator, weight: Tensor) -> Tensor:
        """What masks are chosen by: the magnitude of the weight without a mask."""
        return estimator.dense(weight).abs()

    def _steer(self) -> None:
        """What else the method does after a step."""

    def _weight_grad_density(self, density: float) -> float:
        return 1.0

    def _alpha(self) -> float | None:
        return None

    # What all have

    def aim(self) -> float:
        """The density that the schedule asks for now, in (0, 1]."""
        assert self.budget is not None
        if self.end == 0.0:
            return self.budget.goal
        return 1.0 - (1.0 - self.budget.goal) * cubic_ramp(self.progress, self.start, self.end)

    def _weights(self) -> list[Tensor]:
        return [layer.weight for layer in self._layers.values()]

    def _project(self) -> None:
        pairs = list(zip(self._estimators, self._weights(), strict=True))
        masks = self._choose([self._score(estimator, weight) for estimator, weight in pairs], self.aim())
        for (estimator, weight), mask in zip(pairs, masks, strict=True):
            estimator.project(weight, mask)

    def _update(self) -> None:
        if self.steps > self.total_steps:
            return
        if self.steps % self.update_every == 0 or self.steps == self.total_steps:
            self._project()
        self._steer()

    @torch.no_grad()
    def layers(self) -> list[LayerState]:
        """See :meth:`Sparsifier.layers`."""
        pairs = zip(self._estimators, self._weights(), strict=True)
        masks = [estimator.live(weight) for estimator, weight in pairs]
        weight_grads = [self._weight_grad_density(float(mask.float().mean())) for mask in masks]
        return self._layer_states(masks, weight_grads, alpha=self._alpha())

    def _state(self) -> dict[str, Any]:
        return {}  # masks and thresholds are buffers of the model

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing: see :meth:`_state`."""

    def _finalize(self, layers: Mapping[str, Prunable]) -> None:
        assert self.budget is not None
        swapped = list(check_swapped(layers).values())
        pairs: Sequence[tuple[Estimator, Tensor]] = [(layer.reparam, layer.weight) for layer in swapped]  # type: ignore[misc]
        scores = [self._score(estimator, weight) for estimator, weight in pairs]
        masks = self._choose(scores, self.budget.goal)
        for layer, (estimator, weight), mask in zip(swapped, pairs, masks, strict=True):
            estimator.project(weight, mask)
            write_sparse(weight, estimator.value(weight), mask)
            swap_back(layer)
