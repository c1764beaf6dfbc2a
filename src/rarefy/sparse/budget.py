"""The budget that a run must land on, and the controllers that land it.

Everything is measured as a *density*, the share of the dense network's cost that is left: of its weights for a target
sparsity, of its inference MACs for a target in FLOPs. Errors are logarithms of a ratio of densities, so the same gains
serve 80 % and 98 %, and every controller acts a fixed number of times in a run, so they serve any number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rarefy import cost
from rarefy.sparse import _checks, schedules
from rarefy.sparse.layers import Layer
from rarefy.sparse.shards import reshard

#: How often in a run the controllers act.
ACTIONS = 125

#: The target's density is approached on a cubic curve between these shares of the run.
RAMP = (0.05, 0.6)


@dataclass(frozen=True)
class Budget:
    """What the sparsified layers may cost together with the rest of the network.

    Attributes:
        kind: "sparsity" or "flops".
        goal: the density to land on, in (0, 1).
        costs: what one live weight of each layer costs.
        fixed: what the rest of the network costs, whatever is pruned.
        total: what the dense network costs.
    """

    kind: str
    goal: float
    costs: tuple[float, ...]
    fixed: float
    total: float

    def density(self, live: Sequence[int]) -> float:
        """The density that these numbers of live weights give."""
        return (self.fixed + sum(cost * count for cost, count in zip(self.costs, live, strict=True))) / self.total

    @property
    def available(self) -> float:
        """What the live weights may cost."""
        return self.available_at(self.goal)

    def available_at(self, density: float) -> float:
        """What the live weights may cost for the network to have this density."""
        return density * self.total - self.fixed

    def without(self, index: int, size: int) -> Budget:
        """The budget of the other layers alone, where one of this size turns out to take no part."""
        costs = self.costs[:index] + self.costs[index + 1 :]
        if self.kind == "sparsity":
            return replace(self, costs=costs, total=self.total - size)
        return replace(self, costs=costs, fixed=self.fixed + self.costs[index] * size)

    def aim(self, progress: float) -> float:
        """The density to be at, now: cubic from 1 to the goal."""
        return 1.0 - (1.0 - self.goal) * schedules.cubic_ramp(progress, *RAMP)


def log_error(density: float, aim: float) -> float:
    """``log(aim / density)``: above 0 when too sparse."""
    return math.log(aim / max(density, 1e-6))


@dataclass
class PIController:
    """Proportional-integral control, whose integral and answer stay within bounds; the integral is its state.

    Attributes:
        integral: where it stands.
        proportional, gain: what an error adds to the answer at once, and to the integral.
        low, high: the bounds.
    """

    integral: float
    proportional: float
    gain: float
    low: float
    high: float

    def update(self, error: float) -> float:
        """The answer to this error (see :func:`log_error`)."""
        self.integral = min(max(self.integral + self.gain * error, self.low), self.high)
        return min(max(self.integral + self.proportional * error, self.low), self.high)


def make_budget(
    model: nn.Module, layers: Sequence[Layer], target: Any, target_flops: Any, example_input: Any
) -> Budget | None:
    """The budget that the options name, or None without a target."""
    if target is not None and target_flops is not None:
        raise ValueError("give target (a sparsity) or target_flops, not both")
    for option, value in (("target", target), ("target_flops", target_flops)):
        if isinstance(value, Mapping):
            raise ValueError(f"{option} must be one number in (0, 1), got {value!r}; sparsities by layer: distribution")
        if value is not None:
            _checks.fraction(option, value, zero=False, one=False, percent=True)
    if example_input is not None and target_flops is None:
        raise ValueError("example_input is what FLOPs are counted with: give it with target_flops, or leave it out")
    sizes = [layer.size for layer in layers]
    if target is not None:
        return Budget("sparsity", 1.0 - target, (1.0,) * len(sizes), 0.0, float(sum(sizes)))
    if target_flops is None:
        return None
    if example_input is None:
        raise ValueError("target_flops needs example_input, what the model is called with, to count FLOPs")
    counted = cost.count(model, example_input)
    reshard(model)  # so that an optimizer made next finds the shards
    dense = {layer.name: float(layer.dense) for layer in counted.layers}
    uncalled = [layer.name for layer in layers if not dense.get(layer.name)]
    if uncalled:
        raise ValueError(f"layer {uncalled[0]!r} is not called for example_input; pass exclude={uncalled}")
    costs = tuple(dense[layer.name] / size for layer, size in zip(layers, sizes, strict=True))
    fixed = counted.dense - sum(dense[layer.name] for layer in layers)
    return Budget("flops", target_flops, costs, fixed, float(counted.dense))


def check_feasible(budget: Budget, least: Sequence[int]) -> None:
    """Raise ValueError for a budget that these least numbers of live weights already overrun."""
    lowest = budget.density(least)
    if lowest > budget.goal:
        asked = f"target={1 - budget.goal:g}" if budget.kind == "sparsity" else f"target_flops={budget.goal:g}"
        raise ValueError(
            f"{asked} cannot be reached: the floors of the layers and what stays dense already keep {lowest:.4g} of "
            f"the network, more than {budget.goal:.4g}; lower floor, or exclude fewer layers"
        )
