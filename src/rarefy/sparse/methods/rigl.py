"""RigL: SET that grows where the gradient of the loss is largest (Evci et al., ICML 2020, arXiv 1911.11134).

    grow    the largest |dL/dW| among the weights that do not live          (algorithm 1)

The dense gradient is needed in the steps that change the masks only. RigL's code takes that step for the masks alone;
here the optimizer steps too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.sparse.buckets import Bucket
from rarefy.sparse.methods.set import SET
from rarefy.sparse.reports import Info


@dataclass(eq=False, repr=False)
class RigL(SET):
    """Drop the smallest, grow where the gradient is largest."""

    info = Info(
        title="RigL",
        paper="Evci et al., ICML 2020, arXiv 1911.11134",
        start="sparse",
        targeted="always",
        training_flops="at the target's density, dense in each step that changes the masks",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._gradients: dict[str, Tensor] = {}

    def see_gradients(self, bucket: Bucket) -> None:
        """See :class:`Masked`: keep |dL/dW| in the steps that change the masks."""
        if self._looks():
            self._gradients.update({layer.name: g.abs() for layer in bucket.layers if (g := layer.grad) is not None})

    def reads_masked_gradients(self) -> bool:
        """See :class:`Sparsifier`: in the steps that change the masks."""
        return self._looks() and super().reads_masked_gradients()

    def _looks(self) -> bool:
        return (self.steps + 1) % self._every == 0

    def growth_scores(self) -> Sequence[Tensor] | None:
        """See :class:`SET`: |dL/dW|."""
        seen, self._gradients = self._gradients, {}
        if not seen:
            return None
        return [seen.get(layer.name, torch.zeros_like(layer.local)) for layer in self._layers]

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        return density + (1.0 - density) / self._every if self.progress < self.stop else density
