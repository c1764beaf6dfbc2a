"""Sums of products for relations: for every input a whole interval of outputs is right, and the logic picks.

A function with an error bound is such a relation: each input allows every number within the bound. The output bits are
decided from the highest down. Given the bits above, a bit of an input must be 1, must be 0, or is free, because the
interval still holds numbers of either kind; an irredundant sum of products is found between what must be and what may
be 1 (Minato, "Fast generation of irredundant sum-of-products forms from binary decision diagrams", 1992). Afterwards
any bit can be decided again with the others fixed. Truth tables are Python integers, bit ``i`` of assignment ``i``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from rarefy.act.spec.formats import Bits

Booleans = npt.NDArray[np.bool_]
#: A product: (variable, 1 for itself and 0 for its complement) each.
Cube: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cover:
    """A sum of products, or the complement of one."""

    cubes: tuple[Cube, ...]
    inverted: bool = False

    @property
    def cost(self) -> int:
        """Literals and products."""
        return len(self.cubes) + sum(map(len, self.cubes))

    def evaluate(self, variables: int) -> Booleans:
        """Compute its value for every assignment, the first variable in the lowest bit."""
        assignment = np.arange(1 << variables)
        value = np.zeros(assignment.size, dtype=bool)
        for cube in self.cubes:
            product = np.ones(assignment.size, dtype=bool)
            for variable, polarity in cube:
                product &= ((assignment >> variable) & 1) == polarity
            value |= product
        return ~value if self.inverted else value


def isop(least: int, most: int, variables: int) -> tuple[tuple[Cube, ...], int]:
    """Find an irredundant sum of products between two truth tables, and its own truth table.

    ``least`` must imply ``most``. The variables are split from the last one down.
    """
    full = [(1 << (1 << k)) - 1 for k in range(variables + 1)]
    known: dict[tuple[int, int, int], tuple[tuple[Cube, ...], int]] = {}

    def find(low: int, high: int, k: int) -> tuple[tuple[Cube, ...], int]:
        if low == 0:
            return (), 0
        if high == full[k]:
            return ((),), full[k]
        key = (low, high, k)
        if key not in known:
            half, mask, v = 1 << (k - 1), full[k - 1], k - 1
            l0, l1, h0, h1 = low & mask, low >> half, high & mask, high >> half
            # what only the complement can cover, what only the variable can, and the rest by neither
            c0, f0 = find(l0 & ~h1, h0, v)
            c1, f1 = find(l1 & ~h0, h1, v)
            c2, f2 = find((l0 & ~f0) | (l1 & ~f1), h0 & h1, v)
            cubes = (*(((v, 0), *c) for c in c0), *(((v, 1), *c) for c in c1), *c2)
            known[key] = cubes, (f0 | f2) | (f1 | f2) << half
        return known[key]

    return find(least, most, variables)


def pack(values: Booleans) -> int:
    """Make an array of booleans a truth table."""
    return int.from_bytes(np.packbits(values, bitorder="little").tobytes(), "little")


def unpack(table: int, size: int) -> Booleans:
    """Make a truth table an array of ``size`` booleans."""
    stored = np.frombuffer(table.to_bytes((size + 7) // 8, "little"), dtype=np.uint8)
    return np.unpackbits(stored, bitorder="little")[:size].astype(bool)


def between(least: Booleans, most: Booleans, order: Sequence[int], inverted: bool) -> tuple[Cover, Booleans]:
    """Find a cover between two functions, split by ``order`` from its last variable down, and its value."""
    n, size = len(order), least.size
    assignment, permuted = np.arange(size), np.zeros(size, dtype=np.int64)
    for position, variable in enumerate(order):
        permuted |= ((assignment >> position) & 1) << variable
    low, high = (~most, ~least) if inverted else (least, most)
    cubes, table = isop(pack(low[permuted]), pack(high[permuted]), n)
    value = np.zeros(size, dtype=bool)
    value[permuted] = unpack(table, size)
    named = tuple(tuple(sorted((order[v], polarity) for v, polarity in cube)) for cube in cubes)
    return Cover(named, inverted), ~value if inverted else value


@dataclass(frozen=True)
class Choice:
    """One function out of a relation: a cover for each output bit, lowest first, and the numbers that they give."""

    covers: tuple[Cover, ...]
    values: Bits = field(compare=False, repr=False)

    @property
    def cost(self) -> int:
        """Literals and products of all covers."""
        return sum(cover.cost for cover in self.covers)


class Relation:
    """For every assignment of ``len(ranks)`` variables an interval of right outputs, or none where all are.

    Args:
        least: the smallest right output of each assignment.
        most: the largest.
        width: bits of the output.
        ranks: of each variable, how early it is to be split; the highest first. Variables that few outputs need, like
            low mantissa bits, belong first.

    Raises ValueError for an empty interval.

    """

    def __init__(self, least: Bits, most: Bits, width: int, ranks: Sequence[float]) -> None:
        if least.size != 1 << len(ranks) or most.size != least.size:
            raise ValueError(f"{len(ranks)} variables have {1 << len(ranks)} assignments, got {least.size} intervals")
        if (least > most).any() or least.max() >= 1 << width or most.min() < 0:
            raise ValueError(f"every interval must hold a number of {width} bits")
        self.least, self.most, self.width, self.ranks = least, most, width, tuple(ranks)

    def _cover(
        self, must: Booleans, may: Booleans, rng: random.Random, tries: int, noise: float
    ) -> tuple[Cover, Booleans]:
        """Find the cheapest of several covers, with costs disturbed by ``noise`` (relative)."""
        found: list[tuple[float, int, Cover, Booleans]] = []
        for _ in range(tries):
            keys = [rank + rng.gauss(0.0, 2.0) for rank in self.ranks]
            order = sorted(range(len(keys)), key=keys.__getitem__)
            for inverted in (False, True):
                cover, value = between(must, may, order, inverted)
                found.append((cover.cost * (1.0 + noise * rng.random()), len(found), cover, value))
        _, _, cover, value = min(found, key=lambda entry: entry[:2])
        return cover, value

    def choose(
        self,
        rng: random.Random,
        start: Choice | None = None,
        bit: int | None = None,
        tries: int = 3,
        noise: float = 0.0,
    ) -> Choice:
        """Decide the bits from ``bit`` (default: the highest) down; those above are taken from ``start``."""
        top = self.width - 1 if start is None or bit is None else bit
        values = np.zeros(self.least.size, dtype=np.int64) if start is None else start.values & ~((2 << top) - 1)
        covers = [Cover(())] * self.width if start is None else list(start.covers)
        for b in range(top, -1, -1):
            step = 1 << b
            zero = (values <= self.most) & (values + step - 1 >= self.least)
            one = (values + step <= self.most) & (values + 2 * step - 1 >= self.least)
            covers[b], value = self._cover(~zero, one, rng, tries, noise)
            values = values + step * value
        return Choice(tuple(covers), values)

    def revise(
        self, choice: Choice, bits: Sequence[int], rng: random.Random, tries: int = 2, noise: float = 0.2
    ) -> Choice:
        """Decide some bits again, one after the other, with all others as they are."""
        covers, values = list(choice.covers), choice.values
        for b in bits:
            zero, one = values & ~(1 << b), values | 1 << b
            may_zero = (zero >= self.least) & (zero <= self.most)
            may_one = (one >= self.least) & (one <= self.most)
            covers[b], value = self._cover(~may_zero, may_one, rng, tries, noise)
            values = np.where(value, one, zero)
        return Choice(tuple(covers), values)
