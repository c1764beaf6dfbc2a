"""AC/DC: alternating compressed and decompressed training (Peste et al., NeurIPS 2021, arXiv 2106.12379).

    warm up dense, then in turn: compressed (the best weights by magnitude over all layers, the others held at 0) and
    decompressed (all weights train, those pruned from 0), and compressed for good at the end

The paper trains 100 epochs: 10 to warm up, then 5 and 5 in turn, the last compressed phase up to the end. Here the same
in shares of the run. In a compressed phase forward and both gradients are sparse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy import _checks
from rarefy.sparse.families.masked import Masked
from rarefy.sparse.reports import Info


@dataclass(eq=False, repr=False)
class ACDC(Masked):
    """Compressed and decompressed training in turn.

    Args:
        warmup: share of the run before the first compressed phase, in [0, 1).
        phase: share of the run that a phase takes, in (0, 1).
        final: share of the run after which it stays compressed.

    Raises:
        ValueError: as :class:`Budgeted`; a phase of less than one step; shares that are out of order.
    """

    _: KW_ONLY
    warmup: float = 0.1
    phase: float = 0.05
    final: float = 0.85

    info = Info(
        title="AC/DC",
        paper="Peste et al., NeurIPS 2021, arXiv 2106.12379",
        start="dense",
        targeted="always",
        training_flops="dense in decompressed phases, at the density of the weights in compressed ones",
    )
    default_distribution = "global"
    takes_global = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup < self.final < 1.0:
            raise ValueError(
                f"0 <= warmup < final < 1 must hold, as shares of the run; got {self.warmup} and {self.final}"
            )
        _checks.fraction("phase", self.phase, zero=False, one=False)
        super().__post_init__()
        if self.phase * self.total_steps < 1.0:
            raise ValueError(
                f"phase must be a share of the run and last a step at least, got {self.phase} of {self.total_steps} "
                f"steps: train {math.ceil(1.0 / self.phase)} or more, or give a longer phase"
            )
        self._sparse = False

    def compressed(self) -> bool:
        """Say whether the training is compressed after this step."""
        if self.progress < self.warmup:
            return False
        # The small number: 0.15 - 0.1 is not quite 0.05.
        turn = int((self.progress - self.warmup) / self.phase + 1e-9)
        return self.progress >= self.final or turn % 2 == 0

    def update_masks(self) -> list[Tensor] | None:
        """See :class:`Masked`: the largest weights, or all."""
        if self.compressed() == self._sparse:
            return None
        self._sparse = not self._sparse
        if self._sparse:
            return self.choose(self.magnitudes(), self.budget.goal)
        return [torch.ones_like(mask) for mask in self._live()]

    def _state(self) -> dict[str, Any]:
        return {"sparse": self._sparse}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._sparse = state["sparse"]
