"""SNFS: SET that grows where the momentum of the gradient is largest (Dettmers and Zettlemoyer, arXiv 1907.04840).

    m <- 0.9 m + 0.1 dL/dW  in every step,  grow the largest |m| among the weights that do not live

This is SNFS as RigL compares with it: the distribution over the layers is fixed. The momentum, of all weights, is the
method's own; it needs the dense gradient in every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.base import Info
from rarefy.sparse.set import SET, SETOptions


class SNFS(SET):
    """Drop the smallest, grow where the gradient's momentum is largest.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block,
            update_every, seed, drop_fraction, stop: see :class:`SET`.
        growth_momentum: of the gradients that decide what grows, in [0, 1).
    """

    info = Info(
        "SNFS",
        "Dettmers and Zettlemoyer 2019, arXiv 1907.04840",
        "sparse",
        "always",
        "dense in every step until the masks stay",
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        growth_momentum: float = 0.9,
        **options: Unpack[SETOptions],
    ) -> None:
        if not 0.0 <= growth_momentum < 1.0:
            raise ValueError(f"growth_momentum must be in [0, 1), got {growth_momentum}")
        super().__init__(model, total_steps=total_steps, **options)
        self.growth_momentum = growth_momentum
        self._momenta = [torch.zeros_like(weight) for weight in self._weights()]

    def _see_gradients(self, gradients: Sequence[Tensor]) -> None:
        if self.progress < self.stop:
            torch._foreach_lerp_(self._momenta, list(gradients), 1.0 - self.growth_momentum)

    def _growth(self) -> Sequence[Tensor]:
        return [momentum.abs() for momentum in self._momenta]

    def _weight_grad_density(self, density: float) -> float:
        return 1.0 if self.progress < self.stop else density

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "momenta": [momentum.clone() for momentum in self._momenta]}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        super()._load_state(state)
        for mine, saved in zip(self._momenta, state["momenta"], strict=True):
            mine.copy_(saved)
