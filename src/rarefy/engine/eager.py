"""The model itself as what an engine runs: for those few that nothing made of their graph outruns.

A graph has no writes in place: what a model writes piece by piece into one tensor becomes a copy of the whole for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rarefy.engine.explicit import on_cpu


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
        """The model's outputs, which may be parameters and buffers of it, without gradient."""
        with on_cpu():
            result = self.model(*inputs)
        return tuple(x.detach() if x.requires_grad else x for x in ((result,) if self.single else result))

    def tensors(self) -> list[Tensor]:
        """What the model holds: parameters, buffers, and tensors among its attributes."""
        held = (tree_leaves(vars(module)) for module in self.model.modules())
        return [x for leaves in held for x in leaves if isinstance(x, Tensor)]
