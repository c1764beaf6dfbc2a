"""Steps that compute and are no layers: number by number, over windows and axes, and on bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rarefy.engine.plan.base import Activation, Step, Unary


@dataclass(frozen=True, eq=False, kw_only=True)
class Affine(Unary):
    """``activation(scale[c] * input + shift[c])`` for every channel c; None stands for 1 and 0.

    Channels are dimension ``axis`` of the tensor: 1, or the last one, -1.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: Activation = "none"
    axis: Literal[1, -1] = 1

    @property
    def kind(self) -> str:  # noqa: D102
        return "activation" if self.scale is self.shift is None else "affine"


@dataclass(frozen=True, eq=False, kw_only=True)
class Binary(Step):
    """``activation(x + y)`` or ``activation(x * y)``; y has the shape of x, or one number a channel: (B, C, 1, 1)."""

    op: Literal["add", "mul"]
    x: str
    y: str
    activation: Activation = "none"

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.x, self.y)

    @property
    def kind(self) -> str:  # noqa: D102
        return self.op


#: What a :class:`Pointwise` step is made of: operations on x and y, and on x alone, besides the activations.
OF_TWO = ("add", "sub", "mul", "div", "min", "max", "leaky", "elu")
OF_ONE = ("neg", "abs", "sqrt", "rsqrt", "exp", "log", "softplus", "mish")
#: How many instructions, and how many values and constants, a :class:`Pointwise` step has at most.
MOST_INSTRUCTIONS = MOST_TERMS = 64


@dataclass(frozen=True, eq=False, kw_only=True)
class Pointwise(Step):
    """An expression, number by number, of values and constants that broadcast to the shape of the result.

    ``code`` has instructions (operation, x, y): one of :data:`OF_TWO`, or of :data:`OF_ONE` or an activation, where y
    is -1. x and y are numbers of terms: the operands, then the constants, then the results of the instructions; the
    last of these is the step's. "leaky" is x, and x y where x < 0, "elu" y (e^x - 1) there. ``constants`` has the
    numbers of all constants, float32, one constant's after the other's, and ``sizes`` the shape of each, aligned with
    the last axis of the result and without its batch.
    """

    operands: tuple[str, ...]
    code: tuple[tuple[str, int, int], ...]
    constants: Tensor
    sizes: tuple[tuple[int, ...], ...] = ()

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return self.operands

    @property
    def kind(self) -> str:  # noqa: D102
        return self.code[0][0] if len(self.code) == 1 else "pointwise"

    def split(self) -> list[Tensor]:
        """The constants, each in its shape."""
        parts = torch.split(self.constants, [math.prod(size) for size in self.sizes])
        return [part.reshape(size) for part, size in zip(parts, self.sizes, strict=True)] if self.sizes else []


@dataclass(frozen=True, eq=False, kw_only=True)
class Pool(Unary):
    """Maximum or average over windows, with the meaning of the options in ``max_pool2d`` and ``avg_pool2d``."""

    op: Literal["max", "average"]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False
    count_include_pad: bool = True


@dataclass(frozen=True, eq=False, kw_only=True)
class GlobalAverage(Unary):
    """The mean over all axes but batch and channels: (B, C, H, W) -> (B, C), or (B, C, 1, 1) with ``keepdim``."""

    keepdim: bool

    @property
    def kind(self) -> str:  # noqa: D102
        return "global average"


#: What a :class:`Reduce` step makes, in the order of ``rarefy_reduction``.
Reduction = Literal["sum", "mean", "norm", "max", "min"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


@dataclass(frozen=True, eq=False, kw_only=True)
class Reduce(Unary):
    """One number of all along some axes, counted in the sample: 0 is dimension 1 of the tensor.

    ``op`` "norm" is the root of the sum of the squares. The axes stay, of size 1, with ``keepdim``.
    """

    op: Reduction
    axes: tuple[int, ...]
    keepdim: bool

    def __post_init__(self) -> None:
        if self.op not in REDUCTIONS:
            raise ValueError(f"a reduction is one of {', '.join(REDUCTIONS)}, got {self.op!r}")
        if not self.axes or min(self.axes) < 0 or len(set(self.axes)) < len(self.axes):
            raise ValueError(f"a reduction has one axis or more, each once and at least 0, got {self.axes}")

    @property
    def kind(self) -> str:  # noqa: D102
        return self.op


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantize(Unary):
    """The bytes nearest to float32 numbers, by the quantisation of the value that it makes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Dequantize(Unary):
    """The float32 numbers that bytes stand for, by the quantisation of the value that it reads."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Table(Unary):
    """A byte for every byte: any function of quantised values, also to another quantisation; (256,) uint8."""

    table: Tensor
