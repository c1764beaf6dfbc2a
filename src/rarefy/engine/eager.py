"""The model itself as what an engine runs: for those few that nothing made of their graph outruns.

A graph has no writes in place: what a model writes piece by piece into one tensor becomes a copy of the whole for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Eager:
    """A model, called with the values of ``reads``; its outputs become those of ``makes``.

    ``note`` says why it is that which runs.
    """

    model: nn.Module
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    single: bool
    note: str = "the model as it is, which is faster than what is made of its graph"

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The model's outputs."""
        result = self.model(*inputs)
        return (result,) if self.single else tuple(result)
