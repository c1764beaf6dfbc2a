"""AC/DC: alternating compressed and decompressed training (Peste et al., NeurIPS 2021, arXiv 2106.12379).

    warm up dense, then in turn: compressed (the best weights by magnitude over all layers, the others held at 0) and
    decompressed (all weights train, those pruned from 0), and compressed for good at the end

The paper trains 100 epochs: 10 to warm up, then 5 and 5 in turn, the last compressed phase up to the end. Here the same
in shares of the run. In a compressed phase forward and both gradients are sparse.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.base import Info
from rarefy.sparse.masked import Masked, MaskedOptions


class ACDC(Masked):
    """Compressed and decompressed training in turn.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor, distribution, block: see
            :class:`Budgeted`.
        seed: see :class:`Masked`; nothing is random here. ``update_every`` has no effect.
        warmup: share of the run before the first compressed phase, in [0, 1).
        phase: share of the run that a phase takes, in (0, 1).
        final: share of the run after which it stays compressed.

    Raises:
        ValueError: as :class:`Budgeted`; a phase of less than one step; shares that are out of order.
    """

    info = Info(
        "AC/DC",
        "Peste et al., NeurIPS 2021, arXiv 2106.12379",
        "dense",
        "always",
        "dense in decompressed phases, at the density of the weights in compressed ones",
    )
    default_distribution = "global"
    takes_global = True

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        warmup: float = 0.1,
        phase: float = 0.05,
        final: float = 0.85,
        **options: Unpack[MaskedOptions],
    ) -> None:
        if not 0.0 <= warmup < final < 1.0:
            raise ValueError(f"0 <= warmup < final < 1 must hold, as shares of the run; got {warmup} and {final}")
        if not 0.0 < phase < 1.0 or phase * total_steps < 1.0:
            raise ValueError(
                f"phase must be a share of the run and last a step at least, got {phase} of {total_steps} steps"
            )
        self.warmup, self.phase, self.final = warmup, phase, final
        super().__init__(model, total_steps=total_steps, **options)

    def _compressed(self) -> bool:
        """Whether the training is compressed after this step."""
        if self.progress < self.warmup:
            return False
        # The small number: 0.15 - 0.1 is not quite 0.05.
        turn = int((self.progress - self.warmup) / self.phase + 1e-9)
        return self.progress >= self.final or turn % 2 == 0

    def _change(self) -> list[Tensor] | None:
        assert self.budget is not None
        sparse = not all(bool(mask.all()) for mask in self._masks)
        if self._compressed() == sparse:
            return None
        if sparse:
            return [torch.ones_like(mask) for mask in self._masks]
        return self._choose(self._live_magnitudes(), self.budget.goal)
