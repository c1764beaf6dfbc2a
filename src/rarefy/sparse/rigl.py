"""RigL: SET that grows where the gradient of the loss is largest (Evci et al., ICML 2020, arXiv 1911.11134).

    grow    the largest |dL/dW| among the weights that do not live          (algorithm 1)

The dense gradient is needed in the steps that change the masks only. RigL's code takes that step for the masks alone;
here the optimizer steps too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rarefy.sparse.base import Info
from rarefy.sparse.set import SET


class RigL(SET):
    """Drop the smallest, grow where the gradient is largest.

    Args: see :class:`SET`.
    """

    info = Info(
        "RigL",
        "Evci et al., ICML 2020, arXiv 1911.11134",
        "sparse",
        "always",
        "at the target's density, dense in each step that changes the masks",
    )
    _gradients: list[Tensor] | None = None

    def _see_gradients(self, gradients: Sequence[Tensor]) -> None:
        if (self.steps + 1) % self.update_every == 0:
            self._gradients = [gradient.abs() for gradient in gradients]

    def _growth(self) -> Sequence[Tensor] | None:
        # None if the optimizer skipped the step, as a gradient scaler has it do on overflow.
        gradients, self._gradients = self._gradients, None
        return gradients

    def _weight_grad_density(self, density: float) -> float:
        return density + (1.0 - density) / self.update_every if self.progress < self.stop else density
