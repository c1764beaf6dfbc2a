"""Steps that move numbers: concatenations, images of other sizes, views, joins."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rarefy.engine.plan.base import Step, Unary
from rarefy.engine.plan.places import Places


@dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Step):
    """The channels of all operands, one after the other."""

    operands: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return self.operands


@dataclass(frozen=True, eq=False, kw_only=True)
class Upsample(Unary):
    """Every pixel ``factor`` times along each axis (nearest neighbour)."""

    factor: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Resize(Unary):
    """An image of another size: (B, C, H, W) -> (B, C, *sizes), with the meaning of ``F.interpolate``'s options.

    ``factors`` are the scales that were given, for which pixels are taken otherwise than for the sizes alone.
    """

    mode: Literal["nearest", "bilinear"]
    sizes: tuple[int, int]
    factors: tuple[float, float] | None = None
    align_corners: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Flatten(Unary):
    """(B, C, H, W) -> (B, C * H * W)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class View(Unary):
    """The numbers of every sample in another order and shape: reshapes, permutations, slices, expansions.

    Entry (i, j, ...) of a sample of shape ``sizes`` is number ``offset + i strides[0] + j strides[1] + ...`` of the
    input's sample (:attr:`Value.sample`), which has ``numbers`` of them, counted in the order of its axes, the last one
    fastest. A stride may be 0 or less than 0. ``folded``: the first of the sizes belongs to dimension 0 of the result,
    together with the batch.
    """

    numbers: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    folded: bool = False

    def __post_init__(self) -> None:
        reach = [(size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True)]
        low = self.offset + sum(min(0, each) for each in reach)
        high = self.offset + sum(max(0, each) for each in reach)
        if not (0 <= low <= high < self.numbers) or any(size < 1 for size in self.sizes):
            raise ValueError(
                f"a view of {self.numbers} numbers must lie within them, got the sizes {self.sizes}, the strides "
                f"{self.strides} and the offset {self.offset}"
            )
        if self.folded and len(self.sizes) < 2:
            raise ValueError(f"a folded view has two sizes or more, got {self.sizes}")


@dataclass(frozen=True, eq=False, kw_only=True)
class Join(Step):
    """Parts of values beside each other in a sample of shape ``sizes``: concatenations, stacks, rolls.

    Part p has the shape ``shapes[p]``, its numbers lie at ``parts[p]`` over the axes of that, and its first entry is
    the result's at ``begins[p]``. The parts fill the result, and none lies in another. ``folded``: the first of the
    sizes belongs to dimension 0 of the result, together with the batch.
    """

    sizes: tuple[int, ...]
    parts: tuple[Places, ...]
    shapes: tuple[tuple[int, ...], ...]
    begins: tuple[tuple[int, ...], ...]
    folded: bool = False

    def __post_init__(self) -> None:
        taken = list[tuple[tuple[int, ...], tuple[int, ...]]]()
        for places, shape, begin in zip(self.parts, self.shapes, self.begins, strict=True):
            places.check(shape)
            end = tuple(at + size for at, size in zip(begin, shape, strict=True))
            if min(begin, default=0) < 0 or any(at > size for at, size in zip(end, self.sizes, strict=True)):
                raise ValueError(f"a part of the shape {shape} at {begin} leaves the sizes {self.sizes}")
            for low, high in taken:
                if all(a < d and c < b for a, b, c, d in zip(begin, end, low, high, strict=True)):
                    raise ValueError(f"the part at {begin} lies in the one at {low}")
            taken.append((begin, end))
        if sum(map(math.prod, self.shapes)) != math.prod(self.sizes) or len(self.sizes) < 1 + self.folded:
            raise ValueError(f"parts of the shapes {self.shapes} do not fill the sizes {self.sizes}")

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(dict.fromkeys(places.value for places in self.parts))
