"""Where numbers of values lie, and the steps that are told so: products of values, softmax, attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from torch import Tensor

from rarefy.engine.plan.base import Step


@dataclass(frozen=True)
class Places:
    """Where numbers of every sample of a value lie, by the indices of some axes.

    Index (i, j, ...) is number ``offset + i strides[0] + j strides[1] + ...`` of the ``numbers`` that a sample has,
    counted as those of a :class:`View`. No stride is less than 0.
    """

    value: str
    numbers: int
    strides: tuple[int, ...]
    offset: int = 0

    def check(self, sizes: tuple[int, ...]) -> None:
        """Raise ValueError where not all indices of axes of these sizes are numbers of the sample."""
        steps = zip(sizes, self.strides, strict=True)
        last = self.offset + sum((size - 1) * stride for size, stride in steps)
        if min((*sizes, self.numbers), default=1) < 1 or min((*self.strides, self.offset)) < 0 or last >= self.numbers:
            raise ValueError(f"{self} is no part of axes of the sizes {sizes}")


@dataclass(frozen=True, eq=False, kw_only=True)
class Placed(Step):
    """A step whose values lie at places over common axes of ``sizes``; the outer axes of all come first.

    A stride is 0 along an axis that a value has not. ``result`` are the places of what the step makes, which has the
    sample ``shape``, its first size a part of dimension 0 where ``folded``.
    """

    sizes: tuple[int, ...]
    result: Places
    shape: tuple[int, ...]
    folded: bool = False

    def __post_init__(self) -> None:
        for places in (*self.operands.values(), self.result):
            places.check(self.sizes)
        if self.result.value != self.output or math.prod(self.shape) != self.result.numbers:
            raise ValueError(f"{self.result} is not the result {self.output} of the shape {self.shape}")

    @property
    def operands(self) -> dict[str, Places]:
        """The places of the values that it reads, by the names of its fields."""
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "result"}
        return {name: value for name, value in given.items() if isinstance(value, Places)}

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(dict.fromkeys(places.value for places in self.operands.values()))


@dataclass(frozen=True, eq=False, kw_only=True)
class MatMul(Placed):
    """``result[..., m, n] = scale sum_k left[..., m, k] right[..., k, n]``: the axes are (..., m, n, k)."""

    left: Places
    right: Places
    scale: float = 1.0


@dataclass(frozen=True, eq=False, kw_only=True)
class Softmax(Placed):
    """``e^x / sum e^x`` over the last axis."""

    x: Places


@dataclass(frozen=True, eq=False, kw_only=True)
class Attention(Placed):
    """``softmax(scale query key^T + mask) value``, the axes (..., query, key, feature of these two, feature of value).

    ``mask`` is a value, ``bias`` a constant whose shape broadcasts to (..., query, key); one of them at most is there.
    ``causal``: query i sees no key after key i. A query that sees no key gives 0 where ``empty_is_zero``, as in
    ``scaled_dot_product_attention``, and NaN otherwise, as in a softmax.
    """

    query: Places
    key: Places
    value: Places
    scale: float
    mask: Places | None = None
    bias: Tensor | None = None
    causal: bool = False
    empty_is_zero: bool = True
