"""Masks learned by gradients under a penalty on what lives, and their landing on a budget.

The papers set the sparsity by the penalty's coefficient, found by search. With a target the coefficient is controlled
so that the density follows a cubic curve, the thresholds are trimmed from the end of the curve on, and the last step
cuts exactly. Without one the coefficient stays, and the sparsity is what comes of it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.base import LayerState, Selection, Sparsifier
from rarefy.sparse.budget import log_error
from rarefy.sparse.masked import write_sparse
from rarefy.sparse.masks import top_k, within_budget
from rarefy.sparse.selection import Prunable
from rarefy.sparse.swapped import check_swapped, guard_fast_paths, swap, swap_back

#: Share of the run after which thresholds are trimmed to the target.
TRIM_FROM = 0.6

#: The share of the way that a trim goes at the start of the run; it rises to all of it at the end.
TRIM_GAIN = 0.3

#: Gains of the controller of log(coefficient), and how far it may take it from where it began.
PROPORTIONAL, INTEGRAL, RANGE = 1.0, 0.15, 12.0


class LearnedMask(nn.Module):
    """What a layer computes with, as a function of its weight and of what the mask learns; a method's own."""

    learned: nn.Parameter

    @abstractmethod
    def margin(self, weight: Tensor) -> Tensor:
        """How far each weight is from being masked, in units of ``learned``; masked at 0 and below. Double."""

    @abstractmethod
    def shift(self, by: float) -> None:
        """Move ``learned`` so that all margins fall by this much."""

    @abstractmethod
    def settle(self, weight: Tensor, mask: Tensor) -> None:
        """Move ``learned`` as little as makes the mask this one."""

    @abstractmethod
    def penalise(self, weight: Tensor, coefficient: float) -> None:
        """Add the gradient of the coefficient times the penalty to that of ``learned``."""

    @abstractmethod
    def value(self, weight: Tensor) -> Tensor:
        """What the layer computes with where it is not masked."""

    def threshold(self) -> float | None:
        """The threshold on the magnitude, if the method has one."""
        return None

    def bound(self) -> None:
        """Keep ``learned`` in its range after an optimizer step."""

    def live(self, weight: Tensor) -> Tensor:
        """Boolean, which weights are used."""
        return self.margin(weight) > 0.0


class LearnedOptions(Selection, total=False):
    """The keyword arguments of :class:`Learned`, for the methods built on it."""

    penalty: float | None
    mask_lr: float | None


class Learned(Sparsifier):
    """The penalty, the floors and the landing; what a mask is and how it learns is the method's.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor: see :class:`Sparsifier`.
        penalty: coefficient of the penalty, not negative; where its control begins if there is a target. None takes the
            method's own.
        mask_lr: learning rate of what the masks learn as a multiple of the weights'.

    Raises:
        ValueError: as :class:`Sparsifier`; a negative penalty; a mask_lr that is not above 0.
    """

    #: The coefficient if nothing is asked for.
    default_penalty: ClassVar[float]

    #: The multiple of the learning rate if nothing is asked for.
    default_mask_lr: ClassVar[float] = 1.0

    #: Whether a target is followed by shifting the masks all along, with the penalty as it is; else by the penalty.
    tracks: ClassVar[bool] = False

    needs_optimizer = True

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        penalty: float | None = None,
        mask_lr: float | None = None,
        **selection: Unpack[Selection],
    ) -> None:
        if mask_lr is not None and not mask_lr > 0.0:
            raise ValueError(f"mask_lr must be above 0, got {mask_lr}")
        if penalty is not None and not 0.0 <= penalty < math.inf:
            raise ValueError(f"penalty must be a finite number that is not negative, got {penalty}")
        super().__init__(model, total_steps=total_steps, **selection)
        self.penalty = self.default_penalty if penalty is None else penalty
        self.mask_lr = self.default_mask_lr if mask_lr is None else mask_lr
        self._integral = 0.0  # of the controller: the log of the factor on the penalty
        self._factor = 1.0
        self._masks: list[LearnedMask] = []
        with torch.no_grad():
            for layer in self._layers.values():
                self._masks.append(self._mask(layer.weight))
                swap(layer, self._masks[-1])
        guard_fast_paths(model)

    @abstractmethod
    def _mask(self, weight: Tensor) -> LearnedMask:
        """The mask of a layer to begin with."""

    def _steer(self) -> None:
        """What else the method does after a step."""

    def _weight_grad_density(self, density: float) -> float:
        return 1.0

    def _own_parameters(self) -> list[Tensor]:
        return [mask.learned for mask in self._masks]

    def _own_options(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = {"weight_decay": 0.0}
        if self.mask_lr != 1.0:
            if "lr" not in defaults:
                raise ValueError(f"mask_lr={self.mask_lr:g} is a multiple of lr: call param_groups(lr=...)")
            options["lr"] = defaults["lr"] * self.mask_lr
        return options

    def _pairs(self) -> list[tuple[LearnedMask, Tensor]]:
        return [(mask, layer.weight) for mask, layer in zip(self._masks, self._layers.values(), strict=True)]

    def _count(self) -> list[int]:
        counts = torch.stack([mask.live(weight).sum() for mask, weight in self._pairs()])
        return [int(count) for count in counts.tolist()]

    @torch.no_grad()
    def layers(self) -> list[LayerState]:
        """See :meth:`Sparsifier.layers`."""
        states = []
        for (name, layer), mask, live in zip(self._layers.items(), self._masks, self._count(), strict=True):
            gradient = self._weight_grad_density(live / layer.weight.numel())
            states.append(LayerState(name, tuple(layer.weight.shape), live, gradient, threshold=mask.threshold()))
        return states

    @torch.no_grad()
    def _before_optimizer(self) -> None:
        for mask, weight in self._pairs():
            if mask.learned.grad is not None:
                mask.penalise(weight, self.penalty * self._factor)

    @torch.no_grad()
    def _after_optimizer(self) -> None:
        for mask in self._masks:
            mask.bound()

    def _update(self) -> None:
        if self.steps > self.total_steps:
            return
        self._steer()
        if self.steps % self.interval and self.steps != self.total_steps:
            return
        for (mask, weight), least in zip(self._pairs(), self._least.values(), strict=True):
            if int(mask.live(weight).sum()) < least:
                mask.settle(weight, top_k(mask.margin(weight), least))
        if self.budget is None:
            return
        if self.steps == self.total_steps:
            final = self._select(self._pairs(), self.budget.goal)
            for (mask, weight), chosen in zip(self._pairs(), final, strict=True):
                mask.settle(weight, chosen)
            return
        density = self.budget.density(self._count())
        if not self.tracks:
            self._control(-log_error(density, self.budget.aim(self.progress)))
        if self.tracks or self.progress >= TRIM_FROM or density < self.budget.goal:
            self._trim(self.budget.aim(self.progress) if self.tracks else self.budget.goal)

    def aim(self) -> float | None:
        """The density of the curve that a target is followed on, in (0, 1]."""
        return None if self.budget is None else self.budget.aim(self.progress)

    def _control(self, error: float) -> None:
        """Answer an error of the density's logarithm, above 0 when too dense, by the factor on the penalty."""
        self._integral = min(max(self._integral + INTEGRAL * error, -RANGE), RANGE)
        self._factor = math.exp(min(max(self._integral + PROPORTIONAL * error, -RANGE), RANGE))

    def _trim(self, density: float) -> None:
        """Shift all masks a part of the way to this density."""
        if density >= 1.0:
            return
        chosen = self._select(self._pairs(), density)
        margins = [mask.margin(weight) for mask, weight in self._pairs()]
        least_kept = min(float(m[c].min()) for m, c in zip(margins, chosen, strict=True) if c.any())
        for mask in self._masks:
            mask.shift((TRIM_GAIN + (1.0 - TRIM_GAIN) * self.progress) * least_kept)

    def _select(self, pairs: Sequence[tuple[LearnedMask, Tensor]], density: float) -> list[Tensor]:
        """The masks that a common shift gives, cut exactly where the network has this density."""
        assert self.budget is not None
        margins = [mask.margin(weight) for mask, weight in pairs]
        available = self.budget.available_at(density)
        return within_budget(margins, self.budget.costs, available, list(self._least.values()))

    def _state(self) -> dict[str, Any]:
        return {"integral": self._integral, "factor": self._factor}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._integral, self._factor = state["integral"], state["factor"]

    def _finalize(self, layers: Mapping[str, Prunable]) -> None:
        swapped = list(check_swapped(layers).values())
        pairs = [(cast(LearnedMask, layer.reparam), layer.weight) for layer in swapped]
        masks = [m.live(w) for m, w in pairs] if self.budget is None else self._select(pairs, self.budget.goal)
        for layer, (learned, weight), mask in zip(swapped, pairs, masks, strict=True):
            write_sparse(weight, learned.value(weight), mask)
            swap_back(layer)
