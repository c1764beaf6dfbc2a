"""What a live weight of a layer costs, by how many live already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise


@dataclass(frozen=True)
class Prices:
    """The price of each live weight of a layer: one for the first so many, another for those after them, and so on.

    A sparsity or FLOPs have one price a layer; seconds have several, as a kernel has them that a dense one replaces.

    Attributes:
        ends: up to how many live weights each price holds, rising; the last is all that the layer has.
        each: the prices, none negative. Where they are whole numbers, so are all sums.
    """

    ends: tuple[int, ...]
    each: tuple[float, ...]

    @classmethod
    def one(cls, price: float, size: int) -> Prices:
        """The same price for every weight."""
        return cls((size,), (price,))

    @classmethod
    def between(cls, counts: Sequence[int], costs: Sequence[float]) -> Prices:
        """Give the prices whose sums are straight lines between these numbers of weights, rising, and their costs.

        A cost below one before it is taken to be that one: prices are not negative.
        """
        pairs = list(zip(counts, costs, strict=True))
        each, highest = [], pairs[0][1]
        for (begun, _), (end, cost) in pairwise(pairs):
            each.append(max(cost - highest, 0.0) / (end - begun))
            highest = max(highest, cost)
        return cls(tuple(counts[1:]), tuple(each))

    @property
    def size(self) -> int:
        """How many weights there are."""
        return self.ends[-1]

    def cost(self, live: float) -> float:
        """What so many live weights cost together."""
        cost, begun = 0 * self.each[0], 0
        for end, price in zip(self.ends, self.each, strict=True):
            if live <= end:
                return cost + price * (live - begun)
            cost, begun = cost + price * (end - begun), end
        return cost

    def next(self, live: int) -> float:
        """What one more costs when so many live."""
        return next((price for end, price in zip(self.ends, self.each, strict=True) if live < end), self.each[-1])

    def affordable(self, live: int, purse: float) -> int:
        """How many more the purse pays for when so many live."""
        more = 0
        for end, price in zip(self.ends, self.each, strict=True):
            room = max(end - live - more, 0)
            if price * room > purse:
                return more + int(purse // price)
            more, purse = more + room, purse - price * room
        return more

    def of_blocks(self, block: int) -> Prices:
        """The prices of blocks of so many weights, of which all ends are multiples."""
        return Prices(tuple(end // block for end in self.ends), tuple(price * block for price in self.each))

    def in_units(self, units: float) -> Prices:
        """The prices in whole numbers, of which one is worth so many ``units``."""
        return replace(self, each=tuple(round(price * units) for price in self.each))
