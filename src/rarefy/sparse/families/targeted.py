"""Methods that can land on a budget: a sparsity, or a share of the FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from rarefy.sparse.base import Sparsifier
from rarefy.sparse.budget import Budget, check_feasible, make_budget
from rarefy.sparse.layers import DEFAULT_FLOOR


@dataclass(eq=False, repr=False)
class Targeted(Sparsifier):
    """A sparsifier that can land on a budget.

    Args:
        target: sparsity to land on, in (0, 1): the share of zeros among the weights of the sparsified layers.
        target_flops: instead of it, the inference FLOPs to land on as a share of the whole dense network's, in (0, 1).
        example_input: what ``model`` is called with, to count FLOPs; goes with ``target_flops``.
        floor: the least density of a layer, in [0, 1], or a mapping of shell patterns to floors (others: the default).
            No layer ends below it, nor below one weight; while training this is seen to 125 times in the run.

    Raises:
        ValueError: as :class:`Sparsifier`; a target that the floors or the dense layers make impossible.
    """

    _: KW_ONLY
    target: float | None = None
    target_flops: float | None = None
    example_input: Any = None
    floor: float | Mapping[str, float] = DEFAULT_FLOOR

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            check_feasible(self.budget, [layer.least for layer in self._layers])

    def _floors(self) -> float | Mapping[str, float]:
        return self.floor

    def _make_budget(self) -> Budget | None:
        return make_budget(self.model, self._chosen, self.target, self.target_flops, self.example_input)
