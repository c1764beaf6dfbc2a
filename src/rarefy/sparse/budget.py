"""The budget that a run must land on, and the controllers that land it.

Everything is measured as a *density*, the share of the dense network's cost that is left: of its weights for a target
sparsity, of its inference MACs for a target in FLOPs. Errors are logarithms of a ratio of densities, so the same gains
serve 80 % and 98 %, and every controller acts a fixed number of times in a run, so they serve any number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rarefy.sparse import anneal

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
        return self.goal * self.total - self.fixed

    def aim(self, progress: float) -> float:
        """The density to be at, now: cubic from 1 to the goal."""
        return 1.0 - (1.0 - self.goal) * anneal.cubic_ramp(progress, *RAMP)


def log_error(density: float, aim: float) -> float:
    """``log(aim / density)``: above 0 when too sparse."""
    return math.log(aim / max(density, 1e-6))


@dataclass
class AlphaController:
    """PI control of alpha: too sparse raises it, so that masked weights can come back; the integral is the state."""

    integral: float
    proportional_gain: float = 0.5
    integral_gain: float = 0.05

    def update(self, error: float) -> float:
        """The alpha in [0, 1] that answers this error (see :func:`log_error`)."""
        self.integral = min(max(self.integral + self.integral_gain * error, 0.0), 1.0)
        return min(max(self.integral + self.proportional_gain * error, 0.0), 1.0)


def trim(error: float, gain: float = 0.3, limit: float = 0.5) -> float:
    """The common shift of all threshold parameters that answers this error: up when too dense."""
    return min(max(-gain * error, -limit), limit)
