"""Continuous Sparsification (Savarese et al., NeurIPS 2020, arXiv 1912.04427), in one round.

    forward     W^ = W * sigmoid(beta s) / sigmoid(s_0),   one s a weight, s_0 at first
    annealing   beta = final^progress, from 1 to 200
    penalty     the sum over all weights of sigmoid(beta s)
    in the end  W^ = W where s > 0

The paper sets the sparsity by s_0 and rewinds through several rounds; here one round is driven to the target by the
penalty. Evaluation uses the mask s > 0, as in the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.base import Info
from rarefy.sparse.learned import Learned, LearnedMask, LearnedOptions


class _Continuous(LearnedMask):
    beta: Tensor

    def __init__(self, weight: Tensor, initial: float) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.full_like(weight, initial))
        self.register_buffer("beta", torch.ones((), device=weight.device))
        self.scale = 1.0 / float(torch.sigmoid(torch.tensor(initial)))

    def forward(self, weight: Tensor) -> Tensor:
        soft = self.value(weight)
        return soft if self.training else soft * (self.learned > 0.0)

    def margin(self, weight: Tensor) -> Tensor:
        return self.learned.detach().double()

    def shift(self, by: float) -> None:
        self.learned.sub_(by)

    def settle(self, weight: Tensor, mask: Tensor) -> None:
        edge = torch.finfo(self.learned.dtype).tiny
        self.learned.copy_(torch.where(mask, self.learned.clamp(min=edge), self.learned.clamp(max=0.0)))

    def penalise(self, weight: Tensor, coefficient: float) -> None:
        soft = torch.sigmoid(self.beta * self.learned)
        self.learned.grad.add_(soft * (1.0 - soft) * self.beta, alpha=coefficient)  # type: ignore[union-attr]

    def value(self, weight: Tensor) -> Tensor:
        return weight * torch.sigmoid(self.beta * self.learned) * self.scale


class ContinuousSparsification(Learned):
    """Continuous Sparsification.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, penalty: see :class:`Learned`.
        initial: s_0; above 0, so that everything lives at first.
        final_beta: beta at the end, above 1.

    Raises:
        ValueError: as :class:`Learned`; an option out of its range.
    """

    info = Info(
        "Continuous Sparsification", "Savarese et al., NeurIPS 2020, arXiv 1912.04427", "dense", "optional", "dense"
    )
    default_penalty = 1e-8
    default_mask_lr = 30.0
    tracks = True

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        initial: float = 0.1,
        final_beta: float = 200.0,
        **options: Unpack[LearnedOptions],
    ) -> None:
        if not initial > 0.0:
            raise ValueError(f"initial must be above 0, got {initial}")
        if not final_beta > 1.0:
            raise ValueError(f"final_beta must be above 1, got {final_beta}")
        self.initial, self.final_beta = initial, final_beta
        super().__init__(model, total_steps=total_steps, **options)

    def _mask(self, weight: Tensor) -> LearnedMask:
        return _Continuous(weight, self.initial)

    def _steer(self) -> None:
        for mask in self._masks:
            assert isinstance(mask, _Continuous)
            mask.beta.fill_(self.final_beta**self.progress)
