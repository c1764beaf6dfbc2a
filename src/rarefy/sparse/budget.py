"""The budget that a run must land on, and the controllers that land it.

Everything is measured as a *density*, the share of the dense network's cost that is left: of its weights for a target
sparsity, of its inference MACs for a target in FLOPs (for one in milliseconds see :class:`LatencyBudget`). Errors are
logarithms of a ratio of densities, so the same gains serve 80 % and 98 %, and every controller acts a fixed number of
times in a run, so they serve any number of steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import nn

from rarefy import _checks, cost
from rarefy._prices import Prices
from rarefy.latency import Latency
from rarefy.sparse import schedules
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
        kind: "sparsity", "flops" or "ms".
        goal: the density to land on, in (0, 1).
        prices: what the live weights of each layer cost.
        fixed: what the rest of the network costs, whatever is pruned.
        total: what the dense network costs.
        together: how many weights live and die together.
    """

    kind: str
    goal: float
    prices: tuple[Prices, ...]
    fixed: float
    total: float
    together: int = field(default=1, kw_only=True)

    def cost(self, live: Sequence[int]) -> float:
        """What the network costs with these numbers of live weights."""
        return self.fixed + sum(each.cost(count) for each, count in zip(self.prices, live, strict=True))

    def density(self, live: Sequence[int]) -> float:
        """The density that these numbers of live weights give."""
        return self.cost(live) / self.total

    @property
    def available(self) -> float:
        """What the live weights may cost."""
        return self.available_at(self.goal)

    def available_at(self, density: float) -> float:
        """What the live weights may cost for the network to have this density."""
        return density * self.total - self.fixed

    def left(self, live: Sequence[int]) -> float:
        """What is left of the budget with these numbers of live weights; below 0 where they cost more."""
        return self.available - (self.cost(live) - self.fixed)

    @property
    def dearest(self) -> float:
        """The most that weights cost that live and die together."""
        return self.together * max(max(each.each) for each in self.prices)

    def met(self, live: Sequence[int]) -> bool:
        """Whether these numbers of live weights are on the budget, to the weight or block."""
        return -1e-9 * self.total <= self.left(live) < self.dearest

    def without(self, index: int, size: int) -> Budget:
        """The budget of the other layers alone, where one of this size turns out to take no part."""
        prices = self.prices[:index] + self.prices[index + 1 :]
        if self.kind == "sparsity":
            return replace(self, prices=prices, total=self.total - size)
        return replace(self, prices=prices, fixed=self.fixed + self.prices[index].cost(size))

    @property
    def asked(self) -> float:
        """The goal as the user says it: a sparsity, or a share of the FLOPs."""
        return 1.0 - self.goal if self.kind == "sparsity" else self.goal

    def refusal(self, least: Sequence[int]) -> str:
        """Say that these least numbers of live weights overrun it."""
        option = "target" if self.kind == "sparsity" else "target_flops"
        return (
            f"{option}={self.asked:g} cannot be reached: the floors of the layers and what stays dense already keep "
            f"{self.density(least):.4g} of the network, more than {self.goal:.4g}; lower floor, or exclude fewer layers"
        )

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


@dataclass(frozen=True)
class LatencyBudget(Budget):
    """Seconds, which are not in proportion to weights: the density is that of all layers alike in the same time.

    So schedules and controllers see what they see of a sparsity. Where more weights take no more time, as with a dense
    kernel, it is the highest such density.

    Attributes:
        latency: the seconds of the whole network.
        seconds: what it may take.
    """

    latency: Latency
    seconds: float

    @cached_property
    def _alike(self) -> tuple[list[float], list[float]]:
        """Densities between which the cost of all layers alike is a straight line, and those costs, rising."""
        densities = sorted({0.0, *(end / each.size for each in self.prices for end in each.ends)})
        costs = [self.fixed + sum(each.cost(d * each.size) for each in self.prices) for d in densities]
        return densities, costs

    def density(self, live: Sequence[int]) -> float:
        """See :class:`Budget`."""
        return self.density_at(self.cost(live))

    def density_at(self, cost: float) -> float:
        """The density at which the network costs so much."""
        densities, costs = self._alike
        above = bisect_right(costs, cost * (1 + 1e-12))  # what is on a level is so in spite of rounding
        if above == 0 or above == len(costs):
            return densities[min(above, len(costs) - 1)]
        share = max(0.0, cost - costs[above - 1]) / (costs[above] - costs[above - 1])
        return densities[above - 1] + share * (densities[above] - densities[above - 1])

    def available_at(self, density: float) -> float:
        """See :class:`Budget`."""
        if density == self.goal:
            return self.seconds - self.fixed
        return sum(each.cost(density * each.size) for each in self.prices)

    def without(self, index: int, size: int) -> Budget:
        """See :class:`Budget`."""
        prices = self.prices[:index] + self.prices[index + 1 :]
        fixed = self.fixed + self.prices[index].cost(size)
        return replace(latency_budget(self.latency, self.seconds, prices, fixed), together=self.together)

    @property
    def asked(self) -> float:
        """The milliseconds that were asked for."""
        return 1e3 * self.seconds

    def refusal(self, least: Sequence[int]) -> str:
        """See :class:`Budget`."""
        return (
            f"target_ms={self.asked:g} cannot be reached: by its table of latencies the network takes from "
            f"{1e3 * self.cost(least):.4g} ms, with the fewest weights that floor lets live, to "
            f"{1e3 * self.total:.4g} ms with all of them; ask for something between, lower floor, or exclude fewer "
            "layers"
        )


def sparsity_budget(density: float, sizes: Sequence[int]) -> Budget:
    """The budget of a share of all weights, by the layers' sizes."""
    return Budget("sparsity", density, tuple(Prices.one(1.0, size) for size in sizes), 0.0, float(sum(sizes)))


def latency_budget(latency: Latency, seconds: float, prices: tuple[Prices, ...], fixed: float) -> LatencyBudget:
    """The budget of so many seconds for the whole network, of which ``fixed`` are not these layers'."""
    total = fixed + sum(each.cost(each.size) for each in prices)
    budget = LatencyBudget("ms", 1.0, prices, fixed, total, latency, seconds)
    return replace(budget, goal=budget.density_at(seconds))


def check_targets(targets: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the targets, by option, that are given. Raises ValueError for several, and for one out of its range."""
    given = {option: value for option, value in targets.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"give one of target (a sparsity), target_flops and target_ms, not both {' and '.join(given)}")
    for option, value in given.items():
        if isinstance(value, Mapping):
            raise ValueError(f"{option} must be one number, got {value!r}; sparsities by layer: distribution")
        if option == "target_ms":
            _checks.number(option, value, above=True)
        else:
            _checks.fraction(option, value, zero=False, one=False, percent=True)
    return given


def make_budget(
    model: nn.Module,
    layers: Sequence[Layer],
    targets: Mapping[str, Any],
    example_input: Any,
    latency: Latency | None,
    block: tuple[int, int],
) -> Budget | None:
    """The budget that the options name, or None without a target; ``block`` is of what live together."""
    given = check_targets(targets)
    if example_input is not None and "target_flops" not in given:
        raise ValueError("example_input is what FLOPs are counted with: give it with target_flops, or leave it out")
    if latency is not None and "target_ms" not in given:
        raise ValueError("latency is what milliseconds are looked up in: give it with target_ms, or leave it out")
    sizes = [layer.size for layer in layers]
    if "target" in given:
        return sparsity_budget(1.0 - given["target"], sizes)
    if "target_flops" in given:
        return _flops_budget(model, layers, given["target_flops"], example_input)
    if "target_ms" in given:
        return _ms_budget(layers, given["target_ms"], latency, block)
    return None


def _flops_budget(model: nn.Module, layers: Sequence[Layer], target: float, example_input: Any) -> Budget:
    if example_input is None:
        raise ValueError("target_flops needs example_input, what the model is called with, to count FLOPs")
    counted = cost.count(model, example_input)
    reshard(model)  # so that an optimizer made next finds the shards
    dense = {layer.name: float(layer.dense) for layer in counted.layers}
    uncalled = [layer.name for layer in layers if not dense.get(layer.name)]
    if uncalled:
        raise ValueError(f"layer {uncalled[0]!r} is not called for example_input; pass exclude={uncalled}")
    prices = tuple(Prices.one(dense[layer.name] / layer.size, layer.size) for layer in layers)
    fixed = counted.dense - sum(dense[layer.name] for layer in layers)
    return Budget("flops", target, prices, fixed, float(counted.dense))


def _ms_budget(layers: Sequence[Layer], target: float, latency: Latency | None, block: tuple[int, int]) -> Budget:
    if not isinstance(latency, Latency):
        raise ValueError(
            "target_ms needs latency, the engine's time by the weights that live: "
            f"latency=rarefy.engine.latency(model, example_input), got {latency!r:.80}"
        )
    if latency.block != block:
        raise ValueError(
            f"the latency is of block={latency.block}, and block={block} lives together here: "
            f"measure it with engine.latency(..., block={block})"
        )
    known = {layer.name: layer for layer in latency.layers}
    missing = [layer.name for layer in layers if layer.name not in known]
    if missing:
        raise ValueError(
            f"layer {missing[0]!r} is not in the latency: the engine does not time it by its weights; pass "
            f"exclude={missing}, or measure the latency of this model"
        )
    for layer in layers:
        if known[layer.name].weights != layer.size:
            raise ValueError(
                f"layer {layer.name!r} has {layer.size} weights, and {known[layer.name].weights} in the latency: "
                "measure that of this model"
            )
    prices = tuple(known[layer.name].prices(math.prod(block)) for layer in layers)
    fixed = latency.seconds() - sum(each.cost(each.size) for each in prices)
    budget = latency_budget(latency, 1e-3 * target, prices, fixed)
    if budget.seconds >= budget.total:
        raise ValueError(
            f"target_ms={target:g} leaves nothing to prune: by its table of latencies the network takes "
            f"{1e3 * budget.total:.4g} ms with all its weights; ask for fewer milliseconds, or leave it dense"
        )
    return budget


def check_feasible(budget: Budget, least: Sequence[int]) -> None:
    """Raise ValueError for a budget that these least numbers of live weights already overrun."""
    if budget.density(least) > budget.goal:
        raise ValueError(budget.refusal(least))
