"""Hard masks on a model that is otherwise left alone: zeros are held, and gradients masked, around each optimizer step.

Around the optimizer's step (see :meth:`Sparsifier.attach`) the gradient of masked weights is set to 0 before and the
weights themselves after. Where a weight is masked or comes back, everything that the optimizer remembers of it, such as
momentum, is set to 0 too, so that a revived weight starts fresh. Gradients that are clipped are clipped before that,
with those of the masked weights in their norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.base import LayerState
from rarefy.sparse.budgeted import Budgeted, BudgetedOptions
from rarefy.sparse.masks import block_expand, block_sum, random_scores, top_k
from rarefy.sparse.selection import Prunable


def write_sparse(weight: Tensor, values: Tensor, mask: Tensor) -> None:
    """Put ``values`` where ``mask`` is and exact zeros elsewhere; a live value that is 0 is made the least nonzero."""
    tiny = torch.finfo(weight.dtype).tiny
    weight.copy_(torch.where(mask, torch.where(values == 0.0, tiny, values), 0.0))


class MaskedOptions(BudgetedOptions, total=False):
    """The keyword arguments of :class:`Masked`, for the methods built on it."""

    update_every: int | None
    seed: int


class Masked(Budgeted):
    """Masks, and what they do to gradients, weights and the optimizer's state; when they change is the method's.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block: see
            :class:`Budgeted`.
        update_every: steps from one change of the masks to the next; None takes a 125th of the run.
        seed: of what the method draws at random; every process of a run must have the same.
    """

    needs_optimizer = True

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        update_every: int | None = None,
        seed: int = 0,
        **options: Unpack[BudgetedOptions],
    ) -> None:
        if update_every is not None and not 1 <= update_every <= total_steps:
            raise ValueError(f"update_every must be between 1 and total_steps={total_steps}, got {update_every}")
        super().__init__(model, total_steps=total_steps, **options)
        self.update_every = update_every or self.interval
        self.seed = seed
        with torch.no_grad():
            self._masks: list[Tensor] = [torch.ones_like(weight, dtype=torch.bool) for weight in self._weights()]
            self._set_masks(self._first_masks())

    # What a method provides

    def _first_masks(self) -> list[Tensor]:
        """The masks at the start; all ones unless the method is sparse to sparse."""
        return self._masks

    def _change(self) -> list[Tensor] | None:
        """The masks from this step on, after the step's update of the weights; None leaves them."""
        return None

    def _see_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Gradients of the whole weights, one a layer, before those of masked weights are set to 0."""

    def _weight_grad_density(self, density: float) -> float:
        return density

    # What all have

    def _weights(self) -> list[Tensor]:
        return [layer.weight for layer in self._layers.values()]

    def _random_masks(self, counts: Sequence[int]) -> list[Tensor]:
        """Masks of so many blocks a layer, drawn at random."""
        draws = zip(self._random(), counts, strict=True)
        return [block_expand(top_k(block_sum(draw, self.block), count), self.block) for draw, count in draws]

    def _random(self) -> list[Tensor]:
        """Random scores, a function of the seed and the step alone; one number a block."""
        draws = []
        for index, weight in enumerate(self._weights()):
            shape = (weight.shape[0], weight.shape[1] // self.block, *weight.shape[2:])
            draw = random_scores(shape, self.seed, self.steps, index).to(weight.device)
            draws.append(block_expand(draw, self.block))
        return draws

    def _live_magnitudes(self) -> list[Tensor]:
        """|W| where the masks are, -1 elsewhere: whatever lives comes before whatever does not."""
        return [
            weight.detach().abs().masked_fill(~mask, -1.0)
            for weight, mask in zip(self._weights(), self._masks, strict=True)
        ]

    def layers(self) -> list[LayerState]:
        """See :meth:`Sparsifier.layers`."""
        weight_grads = [self._weight_grad_density(float(mask.float().mean())) for mask in self._masks]
        return self._layer_states(self._masks, weight_grads)

    @torch.no_grad()
    def _before_optimizer(self) -> None:
        weights = self._weights()
        self._see_gradients([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])
        for weight, mask in zip(weights, self._masks, strict=True):
            if weight.grad is not None:
                weight.grad.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def _after_optimizer(self) -> None:
        for weight, mask in zip(self._weights(), self._masks, strict=True):
            weight.masked_fill_(~mask, 0.0)

    def _update(self) -> None:
        if self.steps > self.total_steps:
            return
        masks = self._change()
        if masks is not None:
            self._set_masks(masks)

    def _set_masks(self, masks: Sequence[Tensor]) -> None:
        for weight, old, new in zip(self._weights(), self._masks, masks, strict=True):
            changed = old ^ new
            weight.masked_fill_(~new, 0.0)
            state = {} if self._optimizer is None else self._optimizer.state.get(weight, {})
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.masked_fill_(changed, 0.0)
        self._masks = list(masks)

    def _due(self, until: float = 1.0) -> bool:
        """Whether the masks change after this step: every so often, last at ``until`` or just after."""
        last = self.steps - self.update_every
        return self.steps % self.update_every == 0 and last < until * self.total_steps

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "update_every": self.update_every, "seed": self.seed}

    def _state(self) -> dict[str, Any]:
        return {"masks": [mask.clone() for mask in self._masks]}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._masks = [saved.to(mask.device) for saved, mask in zip(state["masks"], self._masks, strict=True)]

    def _finalize(self, layers: Mapping[str, Prunable]) -> None:
        assert self.budget is not None
        live = [int(mask.sum()) for mask in self._masks]
        masks: Sequence[Tensor] = self._masks
        if self.budget.density(live) > self.budget.goal * (1.0 + 1e-9):
            magnitudes = zip(layers.values(), self._masks, strict=True)
            masks = self._choose([m.weight.abs().masked_fill(~mask, -1.0) for m, mask in magnitudes], self.budget.goal)
        for layer, mask in zip(layers.values(), masks, strict=True):
            write_sparse(layer.weight, layer.weight, mask)


def cosine_decay(initial: float, progress: float, end: float) -> float:
    """``f(t) = initial / 2 * (1 + cos(pi t / end))``, and 0 from the end on (RigL, section 3)."""
    return initial / 2.0 * (1.0 + math.cos(math.pi * min(progress / end, 1.0))) if end > 0.0 else 0.0
