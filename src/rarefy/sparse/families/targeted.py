"""Methods that can land on a budget: a sparsity, a share of the FLOPs, or milliseconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from rarefy.latency import Latency
from rarefy.sparse.base import Sparsifier
from rarefy.sparse.budget import Budget, check_feasible, make_budget
from rarefy.sparse.layers import DEFAULT_FLOOR
from rarefy.sparse.masks import Block, check_divisible


@dataclass(eq=False, repr=False)
class Targeted(Sparsifier):
    """A sparsifier that can land on a budget.

    Args:
        target: sparsity to land on, in (0, 1): the share of zeros among the weights of the sparsified layers.
        target_flops: instead of it, the inference FLOPs to land on as a share of the whole dense network's, in (0, 1).
        example_input: what ``model`` is called with, to count FLOPs; goes with ``target_flops``.
        target_ms: instead of them, the milliseconds that a call of the engine is to take, on one thread of the machine
            where ``latency`` was measured.
        latency: what :func:`rarefy.engine.latency` gave for this model; goes with ``target_ms``.
        floor: the least density of a layer, in [0, 1], or a mapping of shell patterns to floors (others: the default).
            No layer ends below it, nor below one weight; while training this is seen to 125 times in the run.

    Raises:
        ValueError: as :class:`Sparsifier`; a target that the floors or the dense layers make impossible.
    """

    _: KW_ONLY
    target: float | None = None
    target_flops: float | None = None
    example_input: Any = None
    target_ms: float | None = None
    latency: Latency | None = None
    floor: float | Mapping[str, float] = DEFAULT_FLOOR

    #: What lives and dies together, for methods with an option for it.
    _block: Block = field(init=False, default=(1, 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None:
            check_feasible(self.budget, [math.prod(self._block) * least for least in self._least_blocks()])

    @property
    def targeted(self) -> bool:
        """Whether there is a target to land on."""
        return any(target is not None for target in (self.target, self.target_flops, self.target_ms))

    def _check_shapes(self) -> None:
        check_divisible(self._layers, self._block, "blocks of {}x{}".format(*self._block))

    def _least_blocks(self) -> list[int]:
        """How many blocks of each layer live at least."""
        return [math.ceil(layer.least / math.prod(self._block)) for layer in self._layers]

    def _floors(self) -> float | Mapping[str, float]:
        return self.floor

    def _make_budget(self) -> Budget | None:
        targets = {"target": self.target, "target_flops": self.target_flops, "target_ms": self.target_ms}
        budget = make_budget(self.model, self._chosen, targets, self.example_input, self.latency, self._block)
        return None if budget is None else replace(budget, together=math.prod(self._block))
