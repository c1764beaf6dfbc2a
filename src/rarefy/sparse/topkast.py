r"""Top-KAST: always sparse, forward and backward (Jayakumar et al., NeurIPS 2020, arXiv 2106.03517).

    A           the D largest |W| of each layer: used in the forward pass
    B           the D + M largest: get a gradient, that of W^ as if they were used
    decay       lambda * (|W_A|^2 + |W_(B\A)|^2 / D) / 2, nothing for the rest     (exploration loss, section 2.2)

So a weight outside A has to grow against a stronger decay to be taken in. ``power`` trains W = phi |phi|^(a - 1)
instead, as Powerpropagation with Top-KAST does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.base import Info
from rarefy.sparse.masks import top_k
from rarefy.sparse.powerprop import check_power, from_phi, to_phi
from rarefy.sparse.projected import Estimator, Projected, RampOptions, straight_through


class _TopKAST(Estimator):
    """A hard mask A whose gradient reaches B."""

    explore: Tensor

    def __init__(self, weight: Tensor, superset: float, power: float) -> None:
        super().__init__(weight)
        self.register_buffer("explore", torch.zeros_like(weight, dtype=torch.bool, requires_grad=False))
        self.superset, self.power = superset, power

    def dense(self, weight: Tensor) -> Tensor:
        return from_phi(weight, self.power)

    def project(self, weight: Tensor, mask: Tensor) -> None:
        super().project(weight, mask)
        k = min(weight.numel(), int(self.superset * int(mask.sum())))
        self.explore.copy_(top_k(weight.detach().abs().masked_fill(mask, torch.inf), k) & ~mask)

    def forward(self, weight: Tensor) -> Tensor:
        dense = self.dense(weight)
        return straight_through(dense * self.mask, dense, (self.mask | self.explore).to(dense.dtype))


class TopKAST(Projected):
    """Top-KAST.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block: see
            :class:`Budgeted`; ERK.
        update_every, start, end: see :class:`Projected`; the target's sparsity from the first step on.
        superset: how many times as many weights B has as A, at least 1.
        exploration: whether the decay is that of the paper, with the optimizer's weight decay as lambda; else the
            optimizer's own. With a decoupled decay (AdamW) the weights outside B keep the optimizer's.
        power: Powerpropagation's a, at least 1.

    Raises:
        ValueError: as :class:`Budgeted`; an option out of its range.
    """

    info = Info(
        "Top-KAST", "Jayakumar et al., NeurIPS 2020, arXiv 2106.03517", "sparse", "always", "at the density of B"
    )
    default_distribution = "erk"
    needs_optimizer = True

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        superset: float = 2.0,
        exploration: bool = True,
        power: float = 1.0,
        **options: Unpack[RampOptions],
    ) -> None:
        check_power(power)
        if not superset >= 1.0:
            raise ValueError(f"superset must be at least 1, got {superset}")
        self.superset, self.exploration, self.power = superset, exploration, power
        super().__init__(model, total_steps=total_steps, **options)

    def _estimator(self, weight: Tensor) -> Estimator:
        to_phi(weight, self.power)
        return _TopKAST(weight, self.superset, self.power)

    @torch.no_grad()
    def _before_optimizer(self) -> None:
        if not self.exploration or self._optimizer is None:
            return
        coupled = not isinstance(self._optimizer, torch.optim.AdamW)
        decays = {id(p): g.get("weight_decay", 0.0) for g in self._optimizer.param_groups for p in g["params"]}
        for estimator, weight in zip(self._estimators, self._weights(), strict=True):
            assert isinstance(estimator, _TopKAST)
            decay = decays[id(weight)]
            if not decay or weight.grad is None:
                continue
            # The optimizer adds lambda W everywhere: here 1/D - 1 of it more where it explores, and none outside B.
            factor = estimator.explore * (1.0 / float(estimator.mask.float().mean()) - 1.0)
            if coupled:
                factor = factor - (~(estimator.mask | estimator.explore)).to(factor.dtype)
            weight.grad.add_(weight * factor, alpha=decay)

    def _weight_grad_density(self, density: float) -> float:
        return min(1.0, self.superset * density)
