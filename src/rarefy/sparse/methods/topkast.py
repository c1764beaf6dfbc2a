r"""Top-KAST: always sparse, forward and backward (Jayakumar et al., NeurIPS 2020, arXiv 2106.03517).

    A           the D largest |W| of each layer: used in the forward pass
    B           the D + M largest: get a gradient, that of W^ as if they were used
    decay       lambda * (|W_A|^2 + |W_(B\A)|^2 / D) / 2, nothing for the rest     (exploration loss, section 2.2)

So a weight outside A has to grow against a stronger decay to be taken in. ``power`` trains W = phi |phi|^(a - 1)
instead, as Powerpropagation with Top-KAST does.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from rarefy import _checks
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.latent import Exploring
from rarefy.sparse.layers import Layer
from rarefy.sparse.methods.powerprop import check_power, from_phi, to_phi
from rarefy.sparse.reports import Info

#: Optimizers that add lambda W to the gradient, unless their decay is decoupled.
_COUPLED = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.ASGD,
)


def _adds_decay(bucket: Bucket) -> bool:
    assert bucket.optimizer is not None
    assert bucket.group is not None
    decoupled = bucket.optimizer.param_groups[bucket.group].get("decoupled_weight_decay", False)
    return not decoupled and any(isinstance(each, _COUPLED) for each in bucket.trainers)


@dataclass(eq=False, repr=False)
class TopKAST(Exploring):
    """Top-KAST, over ERK's distribution.

    Args:
        superset: how many times as many weights B has as A, at least 1.
        exploration: whether the decay is that of the paper, with the optimizer's weight decay as lambda (True); else
            the optimizer's own. Where the decay is decoupled (AdamW, Muon), or nothing is known of the optimizer's,
            the weights outside B keep it.
        power: Powerpropagation's a, at least 1, which is none.

    Raises:
        ValueError: as :class:`Budgeted`; an option out of its range; a layer whose weights are all 0, with a power.
    """

    _: KW_ONLY
    superset: float = 2.0
    exploration: bool = True
    power: float = 1.0

    info = Info(
        title="Top-KAST",
        paper="Jayakumar et al., NeurIPS 2020, arXiv 2106.03517",
        start="sparse",
        targeted="always",
        training_flops="at the density of B",
    )
    default_distribution = "erk"

    def __post_init__(self) -> None:
        _checks.flag("exploration", self.exploration)
        _checks.number("superset", self.superset, least=1.0)
        check_power(self.power)
        super().__post_init__()
        check_power(self.power, self._layers)

    def latent(self, weight: Tensor) -> Tensor:
        """Phi."""
        return to_phi(weight, self.power)

    def dense(self, weight: Tensor) -> Tensor:
        """W = phi |phi|^(a - 1)."""
        return from_phi(weight, self.power)

    def gradient(self, grad: Tensor, weight: Tensor, bucket: Bucket) -> Tensor:
        """DL/dW = dL/dW^ in B, with the exploration's decay."""
        mask, explore = bucket.kept["mask"], bucket.kept["explore"]
        found = torch.where(mask | explore, grad, 0.0)
        if self.power != 1.0:
            found = found * (self.power * weight.abs().pow(self.power - 1.0))
        if self.exploration and bucket.optimizer is not None and bucket.group is not None:
            decay = float(bucket.optimizer.param_groups[bucket.group].get("weight_decay", 0.0))
            if decay:
                # The optimizer adds lambda W everywhere: here 1/D - 1 of it more where it explores, and none outside B.
                factor = explore * (1.0 / bucket.spread(bucket.kept["density"]) - 1.0)
                if _adds_decay(bucket):
                    factor = factor - (~(mask | explore)).to(factor.dtype)
                found = found.add(weight * factor, alpha=decay)
        return found

    def reach(self, layer: Layer, live: int) -> int:
        """Count the weights of the layer that are in B."""
        return min(layer.size, int(self.superset * live))

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        return min(1.0, self.superset * density)
