"""LTP: learned threshold pruning (Azarian et al. 2020, arXiv 2003.00075).

    forward     W^ = W * sigmoid((W^2 - tau) / T),   one tau a layer, T = T_0 var(W)
    backward    to W: dL/dW^ * sigmoid(...) alone, the sigmoid's own slope in W left out; to tau: the whole gradient
    penalty     the soft L0 norm, the sum over all weights of sigmoid((W^2 - tau) / T)

Here tau is measured in units of the layer's variance at the start, v = tau / var(W), and the penalty is a share of the
network's weights, so that one coefficient serves any network. Evaluation uses the hard mask W^2 > tau, as in the end.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.base import Info
from rarefy.sparse.learned import Learned, LearnedMask, LearnedOptions
from rarefy.sparse.thresholded import separate

#: The most that v moves in a step: its gradient is a sum over a layer.
MAX_MOVE = 0.05


class _Sigmoid(LearnedMask):
    before: Tensor
    variance: Tensor

    def __init__(self, weight: Tensor, temperature: float, share: float) -> None:
        super().__init__()
        one = torch.zeros((1,) * weight.dim(), device=weight.device)
        self.learned = nn.Parameter(one.clone())
        self.register_buffer("before", one.clone())
        self.register_buffer("variance", one + weight.detach().float().var().clamp(min=1e-12))
        self.temperature, self.share = temperature, share  # share: of the network's weights, 1 / N each

    def _excess(self, weight: Tensor) -> Tensor:
        """(W^2 / var - v) / T_0, with no gradient to W."""
        return (weight.detach().square() / self.variance - self.learned) / self.temperature

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight * (self._excess(weight) > 0.0)
        return weight * torch.sigmoid(self._excess(weight))

    def margin(self, weight: Tensor) -> Tensor:
        return weight.detach().double().square() / self.variance.double() - self.learned.detach().double()

    def shift(self, by: float) -> None:
        self.learned.add_(by).clamp_(min=0.0)

    def settle(self, weight: Tensor, mask: Tensor) -> None:
        scaled = weight.detach().double().square() / self.variance.double()
        self.learned.copy_(separate(scaled, self.learned.double(), mask))
        self.before.copy_(self.learned)

    def penalise(self, weight: Tensor, coefficient: float) -> None:
        soft = torch.sigmoid(self._excess(weight))
        slope = (soft * (1.0 - soft)).sum() / self.temperature
        self.learned.grad.sub_(slope, alpha=coefficient * self.share)  # type: ignore[union-attr]

    def value(self, weight: Tensor) -> Tensor:
        return weight

    def bound(self) -> None:
        self.learned.copy_(torch.minimum(torch.maximum(self.learned, self.before - MAX_MOVE), self.before + MAX_MOVE))
        self.learned.clamp_(min=0.0)
        self.before.copy_(self.learned)

    def threshold(self) -> float:
        return float((self.learned * self.variance).sqrt())


class LTP(Learned):
    """Learned threshold pruning.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, penalty: see :class:`Learned`.
        temperature: T_0, above 0.

    Raises:
        ValueError: as :class:`Learned`; a temperature that is not above 0.
    """

    info = Info("LTP", "Azarian et al. 2020, arXiv 2003.00075", "dense", "optional", "dense")
    default_penalty = 1e-3
    tracks = True

    def __init__(
        self, model: nn.Module, *, total_steps: int, temperature: float = 1e-3, **options: Unpack[LearnedOptions]
    ) -> None:
        if not temperature > 0.0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.temperature = temperature
        super().__init__(model, total_steps=total_steps, **options)

    def _mask(self, weight: Tensor) -> LearnedMask:
        weights = sum(layer.weight.numel() for layer in self._layers.values())
        return _Sigmoid(weight, self.temperature, 1.0 / weights)
