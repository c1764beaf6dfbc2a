"""How a budget is spread over the layers: uniform, ERK, or a sparsity for some layers named by the user.

Every distribution is ``density_l = min(1, eps * r_l)`` with one eps for the whole network, found so that the budget is
met; layers that would be over 1 stay dense and the others share what is left, as in RigL's code.

    uniform   r_l = 1
    ERK       r_l = (sum of the weight's dimensions) / (their product)

Sources: SET (Mocanu et al. 2018) for the Erdos-Renyi rule; RigL (Evci et al. 2020, section 3) for its kernel form, ERK.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rarefy._names import matches
from rarefy._prices import Prices

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
        matching = [s for pattern, s in distribution.items() if matches(name, pattern)]
        found.append(1.0 - matching[0] if matching else None)
    return found


def densities(
    relative: Sequence[float],
    fixed: Sequence[float | None],
    prices: Sequence[Prices],
    least: Sequence[float],
    available: float,
) -> list[float]:
    """The density of every layer, in [0, 1], that together cost ``available``.

    Args:
        relative: r of every layer.
        fixed: the density of layers that do not take part, else None.
        prices: what the weights of each layer cost.
        least: floors, as densities.
        available: what all layers together may cost.

    Raises:
        ValueError: what is fixed and the floors leave no density that costs this.
    """

    def at(eps: float) -> list[float]:
        rows = zip(relative, fixed, least, strict=True)
        return [f if f is not None else min(1.0, max(low, eps * r)) for r, f, low in rows]

    def cost_at(eps: float) -> float:
        return sum(each.cost(density * each.size) for each, density in zip(prices, at(eps), strict=True))

    total = sum(each.cost(each.size) for each in prices)
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
    prices: Sequence[Prices],
    least: Sequence[int],
    available: float,
) -> list[int]:
    """Whole numbers of weights as near to the densities as the budget allows, never over it.

    ``least`` is in weights. Every layer is rounded down; what that leaves goes to the layers that lost most, so that
    with one price the total is exactly ``floor(available)`` of it.
    """
    exact = [density * each.size for density, each in zip(layer_densities, prices, strict=True)]
    slack = 1e-9 * sum(each.cost(each.size) for each in prices)
    live = [max(low, math.floor(value + 1e-6)) for value, low in zip(exact, least, strict=True)]
    left = available + slack - sum(each.cost(count) for each, count in zip(prices, live, strict=True))
    order = sorted(range(len(live)), key=lambda i: (live[i] - exact[i], i))
    for _ in range(2):  # twice, since floors may have taken from one layer what another can use
        for i in order:
            price = prices[i].next(live[i])
            if live[i] < prices[i].size and price <= left:
                live[i] += 1
                left -= price
    for i in reversed(order):  # the floors cost more than rounding down saved
        while left < 0 and live[i] > least[i]:
            live[i] -= 1
            left += prices[i].next(live[i])
    return live
