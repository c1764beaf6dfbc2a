"""Powerpropagation (Schwarz et al., NeurIPS 2021, arXiv 2110.00296): large weights grow, small ones stay small.

    W = phi * |phi|^(a - 1),   a > 1,   phi initialised so that W is as it was

The gradient of phi carries a factor a |phi|^(a - 1), so what is small hardly moves and pruning by magnitude costs less.
Here the weights of least |W| over all layers are masked on GMP's cubic schedule; what is masked keeps its phi and gets
no gradient. With Top-KAST, as in the paper: ``sparse.create("topkast", power=2.0)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from rarefy import _checks
from rarefy.sparse.budget import RAMP
from rarefy.sparse.families.latent import Projected
from rarefy.sparse.layers import Layer
from rarefy.sparse.reports import Info


def check_power(power: float, layers: Sequence[Layer] = ()) -> None:
    """Raise ValueError for an exponent that is not one of Powerpropagation's, or weights that it could never move."""
    _checks.number("power", power, least=1.0)
    still = [layer.name for layer in layers if not layer.parameter.is_meta and not bool(layer.local.any())]
    if still and power > 1.0 and not any(layer.shard is not None for layer in layers):
        raise ValueError(
            f"the weights of layer {still[0]!r} are all 0, where W = phi |phi|^(a - 1) has no gradient: they would "
            f"never learn; pass exclude={still}, or start them elsewhere"
        )


def to_phi(weight: Tensor, power: float) -> Tensor:
    """Phi of W = phi |phi|^(a - 1)."""
    return weight if power == 1.0 else weight.abs().pow(1.0 / power).copysign(weight)


def from_phi(phi: Tensor, power: float) -> Tensor:
    """W = phi |phi|^(a - 1)."""
    return phi if power == 1.0 else phi * phi.abs().pow(power - 1.0)


@dataclass(eq=False, repr=False)
class PowerPropagation(Projected):
    """Magnitude pruning of reparametrised weights.

    Args:
        start, end: shares of the run between which the sparsity rises; None takes 0.05 and 0.6.
        power: a, at least 1, where it is gradual magnitude pruning; the paper uses 1.4 to 4.

    Raises:
        ValueError: as :class:`Budgeted`; a power below 1; a layer whose weights are all 0.
    """

    _: KW_ONLY
    power: float = 2.0

    info = Info(
        title="Powerpropagation",
        paper="Schwarz et al., NeurIPS 2021, arXiv 2110.00296",
        start="dense",
        targeted="always",
        training_flops="at the density of the weights",
    )
    ramp = RAMP

    def __post_init__(self) -> None:
        check_power(self.power)
        super().__post_init__()
        check_power(self.power, self._layers)

    def latent(self, weight: Tensor) -> Tensor:
        """Phi."""
        return to_phi(weight, self.power)

    def dense(self, weight: Tensor) -> Tensor:
        """W = phi |phi|^(a - 1)."""
        return from_phi(weight, self.power)

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        return density
