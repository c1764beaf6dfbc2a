"""How a budget is spread over the layers: uniform, ERK, or a sparsity for some layers named by the user.

Every distribution is ``density_l = min(1, eps * r_l)`` with one eps for the whole network, found so that the budget is
met; layers that would be over 1 stay dense and the others share what is left, as in RigL's code.

    uniform   r_l = 1
    ERK       r_l = (sum of the weight's dimensions) / (their product)

Sources: SET (Mocanu et al. 2018) for the Erdos-Renyi rule; RigL (Evci et al. 2020, section 3) for its kernel form, ERK.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

#: What can be asked for by name.
NAMES = ("uniform", "erk")

Distribution = str | Mapping[str, float]


def relative_densities(distribution: Distribution, shapes: Mapping[str, Sequence[int]]) -> list[float]:
    """R of every layer. A mapping shares uniformly what its own sparsities leave; "global" starts as ERK."""
    if distribution in ("erk", "global"):
        return [sum(shape) / math.prod(shape) for shape in shapes.values()]
    return [1.0] * len(shapes)


def fixed_densities(distribution: Distribution, names: Sequence[str]) -> list[float | None]:
    """The density that a mapping of shell patterns to sparsities gives each layer; None for the others."""
    if isinstance(distribution, str):
        return [None] * len(names)
    found = []
    for name in names:
        matching = [s for pattern, s in distribution.items() if fnmatch.fnmatchcase(name, pattern)]
        found.append(1.0 - matching[0] if matching else None)
    return found


def densities(
    relative: Sequence[float],
    fixed: Sequence[float | None],
    costs: Sequence[float],
    least: Sequence[float],
    available: float,
) -> list[float]:
    """The density of every layer, in [0, 1], that together cost ``available``.

    Args:
        relative: r of every layer.
        fixed: the density of layers that do not take part, else None.
        costs: what each whole layer costs.
        least: floors, as densities.
        available: what all layers together may cost.

    Raises:
        ValueError: what is fixed and the floors leave no density that costs this.
    """

    def at(eps: float) -> list[float]:
        rows = zip(relative, fixed, least, strict=True)
        return [f if f is not None else min(1.0, max(low, eps * r)) for r, f, low in rows]

    def cost_at(eps: float) -> float:
        return sum(cost * density for cost, density in zip(costs, at(eps), strict=True))

    total = sum(costs)
    low, high = 0.0, 2.0 / min(relative)
    if cost_at(low) > available + 1e-9 * total or cost_at(high) < available - 1e-9 * total:
        raise ValueError(
            f"distribution: with these sparsities and floors the layers keep between {cost_at(low) / total:.4g} and "
            f"{cost_at(high) / total:.4g} of their cost, but the target asks for {available / total:.4g}"
        )
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_at(middle) < available else (low, middle)
    return at((low + high) / 2)


def counts(
    layer_densities: Sequence[float],
    sizes: Sequence[int],
    costs: Sequence[float],
    least: Sequence[int],
    available: float,
) -> list[int]:
    """Whole numbers of weights as near to the densities as the budget allows, never over it.

    ``sizes`` and ``least`` are in weights and ``costs`` for one weight of each layer. Every layer is rounded down; what
    that leaves goes to the layers that lost most, so that with equal costs the total is exactly ``floor(available)``.
    """
    exact = [density * size for density, size in zip(layer_densities, sizes, strict=True)]
    slack = 1e-9 * sum(cost * size for cost, size in zip(costs, sizes, strict=True))
    live = [max(low, math.floor(value + 1e-6)) for value, low in zip(exact, least, strict=True)]
    left = available + slack - sum(cost * count for cost, count in zip(costs, live, strict=True))
    order = sorted(range(len(live)), key=lambda i: (live[i] - exact[i], i))
    for _ in range(2):  # twice, since floors may have taken from one layer what another can use
        for i in order:
            if live[i] < sizes[i] and costs[i] <= left:
                live[i] += 1
                left -= costs[i]
    for i in reversed(order):  # the floors cost more than rounding down saved
        while left < 0 and live[i] > least[i]:
            live[i] -= 1
            left += costs[i]
    return live
