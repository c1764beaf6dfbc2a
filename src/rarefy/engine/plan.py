"""The plan: a network as typed steps in the order in which they run, with nothing left of modules and of training.

A *value* is a tensor that a step makes or that is an input; it has a name. Dimension 0 is the batch, dimension 1 the
channels, as in PyTorch. Weights are part of the step that uses them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

#: The name of a function; or, as ``rarefy::activation`` has them, function, mode and, where there is one, the JSON of a
#: table, with spaces between: "silu ktanh".
Activation: TypeAlias = str
#: The functions, as PyTorch has them.
ACTIVATIONS: tuple[Activation, ...] = (
    *("none", "relu", "relu6", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "hardswish", "hardsigmoid"),
    "leaky_relu",
)
#: Those that have modes.
MODED: tuple[Activation, ...] = ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid")
_Name = TypeVar("_Name", bound=Hashable)


@dataclass(frozen=True)
class Ref:
    """A value, or a constant of the plan, among the arguments of an :class:`Operator`."""

    name: str


@dataclass(frozen=True)
class Quantized:
    """What the bytes q of a quantised value mean: ``scale * (q - zero_point)``.

    ``scale`` is a float32 number above 0, ``zero_point`` in 0..255; :mod:`rarefy.engine.int8` has the arithmetic.
    """

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if not (0 < self.scale < math.inf and self.scale == float(np.float32(self.scale))):
            raise ValueError(f"the scale of a quantised value must be a float32 number above 0, got {self.scale!r}")
        if type(self.zero_point) is not int or not 0 <= self.zero_point <= 255:
            raise ValueError(f"the zero point of a quantised value must be in 0..255, got {self.zero_point!r}")


@dataclass(frozen=True)
class Value:
    """What is known of a value before it is there.

    Attributes:
        shape: of one sample, without the batch in dimension 0; None where dimension 0 is not the batch, or where
            another dimension is only known when the plan runs.
        dtype: of its elements.
        rows: its axes but the last, as the graph writes their sizes for any batch: values where they are the same have
            as many rows.
        quantized: what its bytes mean; None where it is not quantised.
        fold: how many entries of dimension 0 belong to one sample, one sample's after the other: 1 where that is the
            batch.
        inner: the shape behind dimension 0 where ``fold`` is more than 1.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype
    rows: str = ""
    quantized: Quantized | None = None
    fold: int = 1
    inner: tuple[int, ...] | None = None

    @property
    def sample(self) -> tuple[int, ...] | None:
        """The shape of one sample, ``fold`` first where there is more than one; None where it is not known."""
        return self.shape if self.shape is not None or self.inner is None else (self.fold, *self.inner)


@dataclass(frozen=True, eq=False, kw_only=True)
class Step(ABC):
    """One step: ``name`` is the layer's in the model where it has one, ``output`` the value that it makes."""

    name: str
    output: str

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """The values that it reads."""

    @property
    def kind(self) -> str:
        """What it is, in one word."""
        return type(self).__name__.lower()


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv(Step):
    """``activation(conv(input, weight) + bias + residual)``: (B, in, [[D,] H,] W) -> (B, out, [[D',] H',] W').

    ``weight`` is (out, in / groups, *kernel) float32; stride, dilation and padding have one entry an axis, a padding is
    (before, after), of zeros. In int8 ``weight_scale`` is (out,), and every weight a whole number times its channel's.
    """

    input: str
    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    residual: str | None = None
    activation: Activation = "none"
    weight_scale: Tensor | None = None

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,) if self.residual is None else (self.input, self.residual)

    @property
    def kind(self) -> str:  # noqa: D102
        return "depthwise" if self.groups > 1 and self.weight.shape[1] == 1 else "conv"


@dataclass(frozen=True, eq=False, kw_only=True)
class ConvTranspose(Step):
    """``activation(conv_transpose(input, weight) + bias)``: (B, in, [[D,] H,] W) -> (B, out, [[D',] H',] W').

    ``weight`` is (out, in / groups, *kernel) float32, as that of a :class:`Conv`; PyTorch's has in and out the other
    way round. ``padding`` is cut off on both sides of the result, which has ``output_padding`` more at its end.
    """

    input: str
    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    activation: Activation = "none"

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)

    @property
    def kind(self) -> str:  # noqa: D102
        return "transposed conv"


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear(Step):
    """``activation(input @ weight^T + bias + residual)``: (..., in) -> (..., out).

    ``weight`` is (out, in) float32; ``weight_scale`` as that of :class:`Conv`.
    """

    input: str
    weight: Tensor
    bias: Tensor | None = None
    residual: str | None = None
    activation: Activation = "none"
    weight_scale: Tensor | None = None

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,) if self.residual is None else (self.input, self.residual)


@dataclass(frozen=True, eq=False, kw_only=True)
class Affine(Step):
    """``activation(scale[c] * input + shift[c])`` for every channel c; None stands for 1 and 0.

    Channels are dimension ``axis`` of the tensor: 1, or the last one, -1.
    """

    input: str
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: Activation = "none"
    axis: Literal[1, -1] = 1

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)

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


@dataclass(frozen=True, eq=False, kw_only=True)
class Pool(Step):
    """Maximum or average over windows, with the meaning of the options in ``max_pool2d`` and ``avg_pool2d``."""

    input: str
    op: Literal["max", "average"]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False
    count_include_pad: bool = True

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)


@dataclass(frozen=True, eq=False, kw_only=True)
class GlobalAverage(Step):
    """The mean over all axes but batch and channels: (B, C, H, W) -> (B, C), or (B, C, 1, 1) with ``keepdim``."""

    input: str
    keepdim: bool

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)

    @property
    def kind(self) -> str:  # noqa: D102
        return "global average"


#: What a :class:`Reduce` step makes, in the order of ``rarefy_reduction``.
Reduction = Literal["sum", "mean", "norm", "max", "min"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


@dataclass(frozen=True, eq=False, kw_only=True)
class Reduce(Step):
    """One number of all along some axes, counted in the sample: 0 is dimension 1 of the tensor.

    ``op`` "norm" is the root of the sum of the squares. The axes stay, of size 1, with ``keepdim``.
    """

    input: str
    op: Reduction
    axes: tuple[int, ...]
    keepdim: bool

    def __post_init__(self) -> None:
        if self.op not in REDUCTIONS:
            raise ValueError(f"a reduction is one of {', '.join(REDUCTIONS)}, got {self.op!r}")
        if not self.axes or min(self.axes) < 0 or len(set(self.axes)) < len(self.axes):
            raise ValueError(f"a reduction has one axis or more, each once and at least 0, got {self.axes}")

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)

    @property
    def kind(self) -> str:  # noqa: D102
        return self.op


@dataclass(frozen=True, eq=False, kw_only=True)
class Embedding(Step):
    """Rows of ``weight`` (rows, features) by whole numbers: (B, ...) -> (B, ..., features).

    With a ``reduction``, which is a sum, a mean or a maximum, it is that of all rows along the last axis of the input.
    """

    input: str
    weight: Tensor
    reduction: Reduction | None = None

    def __post_init__(self) -> None:
        if self.reduction not in (None, "sum", "mean", "max"):
            raise ValueError(f"an embedding gives rows, their sum, mean or maximum, got {self.reduction!r}")

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)


@dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Step):
    """The channels of all operands, one after the other."""

    operands: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return self.operands


@dataclass(frozen=True, eq=False, kw_only=True)
class Upsample(Step):
    """Every pixel ``factor`` times along each axis (nearest neighbour)."""

    input: str
    factor: tuple[int, ...]

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)


@dataclass(frozen=True, eq=False, kw_only=True)
class Resize(Step):
    """An image of another size: (B, C, H, W) -> (B, C, *sizes), with the meaning of ``F.interpolate``'s options.

    ``factors`` are the scales that were given, for which pixels are taken otherwise than for the sizes alone.
    """

    input: str
    mode: Literal["nearest", "bilinear"]
    sizes: tuple[int, int]
    factors: tuple[float, float] | None = None
    align_corners: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)


@dataclass(frozen=True, eq=False, kw_only=True)
class Flatten(Step):
    """(B, C, H, W) -> (B, C * H * W)."""

    input: str

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)


@dataclass(frozen=True, eq=False, kw_only=True)
class View(Step):
    """The numbers of every sample in another order and shape: reshapes, permutations, slices, expansions.

    Entry (i, j, ...) of a sample of shape ``sizes`` is number ``offset + i strides[0] + j strides[1] + ...`` of the
    input's sample (:attr:`Value.sample`), which has ``numbers`` of them, counted in the order of its axes, the last one
    fastest. A stride may be 0 or less than 0. ``folded``: the first of the sizes belongs to dimension 0 of the result,
    together with the batch.
    """

    input: str
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

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)


@dataclass(frozen=True, eq=False, kw_only=True)
class Norm(Step):
    """``weight (x - mean) / sqrt(variance + eps) + bias`` over the last axis of a value, weight and bias (channels,).

    ``centred`` False is RMSNorm: the mean is not taken off, and the variance is the mean of the squares. ``axis`` 1
    normalises over dimension 1 of the tensor, the channels of an image.
    """

    input: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool = True
    axis: Literal[-1, 1] = -1

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)

    @property
    def kind(self) -> str:  # noqa: D102
        return "layer norm" if self.centred else "rms norm"


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


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupNorm(Step):
    """``weight (x - mean) / sqrt(variance + eps) + bias``, mean and variance those of a group of channels.

    ``groups`` are of channels (dimension 1) that follow each other, with all that is behind them; weight and bias are
    (channels,).
    """

    input: str
    groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)

    @property
    def kind(self) -> str:  # noqa: D102
        return "group norm"


@dataclass(frozen=True, eq=False, kw_only=True)
class LSTMCell(Step):
    """``sigmoid(f) state + sigmoid(i) tanh(g)``: (B, n), of gates (B, 4 n) in PyTorch's order i, f, g, o.

    ``mode`` and ``table``, one's JSON or "", say how the activations are computed, as ``rarefy::activation`` has them;
    so in all steps of recurrent layers.
    """

    gates: str
    state: str
    mode: str
    table: str

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.gates, self.state)

    @property
    def kind(self) -> str:  # noqa: D102
        return "lstm cell"


@dataclass(frozen=True, eq=False, kw_only=True)
class LSTMHidden(LSTMCell):
    """``sigmoid(o) tanh(state)``: (B, n), of the gates that :class:`LSTMCell` reads and of what it makes."""

    @property
    def kind(self) -> str:  # noqa: D102
        return "lstm hidden"


@dataclass(frozen=True, eq=False, kw_only=True)
class GRUGates(Step):
    """``z state + (1 - z) tanh(x_n + r h_n)``, r and z the sigmoid of x + h: (B, n), of products (B, 3 n).

    ``x`` and ``h`` are those of the input and of the state with their weights, biases added, in PyTorch's order r, z,
    n.
    """

    x: str
    h: str
    state: str
    mode: str
    table: str

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.x, self.h, self.state)

    @property
    def kind(self) -> str:  # noqa: D102
        return "gru"


@dataclass(frozen=True, eq=False, kw_only=True)
class Recurrence(Step):
    """One layer of an LSTM or a GRU over a sequence, in one direction: (B, steps, 4 n or 3 n) -> (B, steps, n or 2 n).

    ``products`` are those of the input with its weights; ``weight`` is (4 n or 3 n, n) float32; ``bias`` (n,) is that
    of a GRU's third gate. It begins from ``states``, h and of an LSTM c, (B, n) each, or from zeros where there are
    none, with the last step where ``reverse``. The result is h after every step, and with ``cells`` c behind it.
    """

    products: str
    states: tuple[str, ...]
    weight: Tensor
    bias: Tensor | None = None
    reverse: bool
    cells: bool
    mode: str
    table: str

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.products, *self.states)

    @property
    def kind(self) -> str:  # noqa: D102
        return "lstm" if len(self.weight) == 4 * self.weight.shape[1] else "gru"


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantize(Step):
    """The bytes nearest to float32 numbers, by the quantisation of the value that it makes."""

    input: str

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)


@dataclass(frozen=True, eq=False, kw_only=True)
class Dequantize(Step):
    """The float32 numbers that bytes stand for, by the quantisation of the value that it reads."""

    input: str

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)


@dataclass(frozen=True, eq=False, kw_only=True)
class Table(Step):
    """A byte for every byte: any function of quantised values, also to another quantisation; (256,) uint8."""

    input: str
    table: Tensor

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return (self.input,)


@dataclass(frozen=True, eq=False, kw_only=True)
class Operator(Step):
    """An operator that PyTorch runs, as ``torch.ops`` names it: ``aten.softmax.int``.

    The arguments are numbers, strings, dtypes and the like, lists and tuples of such, and :class:`Ref`.
    """

    target: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(dict.fromkeys(refs((self.args, tuple(self.kwargs.values())))))

    @property
    def kind(self) -> str:  # noqa: D102
        return self.target.split(".")[1]


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


#: The steps that a native kernel may compute.
NATIVE = (
    *(Conv, ConvTranspose, Linear, Affine, Binary, Pool, GlobalAverage, Concat, Upsample, Resize, Flatten),
    *(Embedding, Reduce, View, Join, Norm, GroupNorm, Pointwise, MatMul, Softmax, Attention),
    *(LSTMCell, LSTMHidden, GRUGates, Recurrence),
)
#: The steps on quantised values alone, and those into and out of them.
INT8 = (Quantize, Dequantize, Table)
#: The steps with weights.
Layer: TypeAlias = Conv | Linear


def refs(argument: Any) -> Iterator[str]:
    """The names of the values among an argument of an :class:`Operator`."""
    if isinstance(argument, Ref):
        yield argument.name
    elif isinstance(argument, (list, tuple)):
        for each in argument:
            yield from refs(each)


@dataclass(frozen=True, eq=False)
class Plan:
    """A network.

    Attributes:
        inputs: the values it is called with, in order.
        outputs: the values it gives back, in order.
        single: whether it gives a tensor back (then there is one output), or a tuple of them.
        steps: in an order in which they can run.
        values: what is known of each value that is a tensor.
        constants: tensors that :class:`Operator` steps read.
        batch: the only batch size that it takes; None takes any.
        fixed_because: why it takes one alone.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    single: bool
    steps: tuple[Step, ...]
    values: Mapping[str, Value]
    constants: Mapping[str, Tensor]
    batch: int | None
    fixed_because: str | None = None

    def last_uses(self) -> list[tuple[str, ...]]:
        """For each step the values that nothing needs after it."""
        return last_uses([(step.inputs, (step.output,)) for step in self.steps], {*self.outputs, *self.constants})

    def users(self) -> dict[str, list[Step]]:
        """The steps that read each value; a step that reads it twice is there once."""
        found: dict[str, list[Step]] = {name: [] for name in self.inputs}
        for step in self.steps:
            found[step.output] = []
            for name in dict.fromkeys(step.inputs):
                found.setdefault(name, []).append(step)
        return found


def parts(activation: Activation) -> tuple[str, str, str]:
    """Function, mode and table of an activation; both are empty for a function of PyTorch's."""
    function, mode, table = (*activation.split(" ", 2), "", "")[:3]
    return function, mode, table


def last_uses(
    steps: Sequence[tuple[Sequence[_Name], Sequence[_Name]]], kept: Collection[_Name]
) -> list[tuple[_Name, ...]]:
    """For steps given as (values read, values made): the values that no later one reads, but those to be kept."""
    seen = set(kept)
    freed: list[tuple[_Name, ...]] = []
    for reads, makes in reversed(steps):
        now = tuple(name for name in dict.fromkeys((*reads, *makes)) if name not in seen)
        seen.update(now)
        freed.append(now)
    return freed[::-1]


def tensors(step: Step) -> dict[str, Tensor]:
    """The weights of a step, by the names of its fields."""
    found = {each.name: getattr(step, each.name) for each in fields(step)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}
