"""Powerpropagation (Schwarz et al., NeurIPS 2021, arXiv 2110.00296): large weights grow, small ones stay small.

    W = phi * |phi|^(a - 1),   a > 1,   phi initialised so that W is as it was

The gradient of phi carries a factor a |phi|^(a - 1), so what is small hardly moves and pruning by magnitude costs less.
Here the weights of least |W| over all layers are masked on GMP's cubic schedule; what is masked keeps its phi and gets
no gradient. With Top-KAST, as in the paper: ``sparse.create("topkast", power=2.0)``.
"""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.base import Info
from rarefy.sparse.budget import RAMP
from rarefy.sparse.projected import Estimator, Projected, RampOptions


def check_power(power: float) -> None:
    """Raise ValueError for an exponent that is not one of Powerpropagation's."""
    if not power >= 1.0:
        raise ValueError(f"power must be at least 1, got {power}")


def to_phi(weight: Tensor, power: float) -> None:
    """Put phi in the weight's place: W = phi |phi|^(a - 1) is what the weight was."""
    weight.copy_(weight.abs().pow(1.0 / power).copysign(weight))


def from_phi(phi: Tensor, power: float) -> Tensor:
    """W = phi |phi|^(a - 1)."""
    return phi if power == 1.0 else phi * phi.abs().pow(power - 1.0)


class _Powered(Estimator):
    """A masked power of the weight, with the plain gradient of that."""

    def __init__(self, weight: Tensor, power: float) -> None:
        super().__init__(weight)
        self.power = power

    def dense(self, weight: Tensor) -> Tensor:
        return from_phi(weight, self.power)


class PowerPropagation(Projected):
    """Magnitude pruning of reparametrised weights.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block: see
            :class:`Budgeted`.
        update_every, start, end: see :class:`Projected`; 5 to 60 % of the run.
        power: a, at least 1, where it is gradual magnitude pruning; the paper uses 1.4 to 4.

    Raises:
        ValueError: as :class:`Budgeted`; a power below 1.
    """

    info = Info(
        "Powerpropagation",
        "Schwarz et al., NeurIPS 2021, arXiv 2110.00296",
        "dense",
        "always",
        "at the density of the weights",
    )
    ramp = RAMP

    def __init__(
        self, model: nn.Module, *, total_steps: int, power: float = 2.0, **options: Unpack[RampOptions]
    ) -> None:
        check_power(power)
        self.power = power
        super().__init__(model, total_steps=total_steps, **options)

    def _estimator(self, weight: Tensor) -> Estimator:
        to_phi(weight, self.power)
        return _Powered(weight, self.power)

    def _weight_grad_density(self, density: float) -> float:
        return density
