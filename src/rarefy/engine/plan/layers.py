"""Steps with weights: products, norms, tables of rows and recurrent layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from rarefy.engine.plan.arithmetic import Reduction
from rarefy.engine.plan.base import Activation, Step, Unary


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
class ConvTranspose(Unary):
    """``activation(conv_transpose(input, weight) + bias)``: (B, in, [[D,] H,] W) -> (B, out, [[D',] H',] W').

    ``weight`` is (out, in / groups, *kernel) float32, as that of a :class:`Conv`; PyTorch's has in and out the other
    way round. ``padding`` is cut off on both sides of the result, which has ``output_padding`` more at its end.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    activation: Activation = "none"

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


#: The steps with weights.
Layer: TypeAlias = Conv | Linear


@dataclass(frozen=True, eq=False, kw_only=True)
class Norm(Unary):
    """``weight (x - mean) / sqrt(variance + eps) + bias`` over the last axis of a value, weight and bias (channels,).

    ``centred`` False is RMSNorm: the mean is not taken off, and the variance is the mean of the squares. ``axis`` 1
    normalises over dimension 1 of the tensor, the channels of an image.
    """

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool = True
    axis: Literal[-1, 1] = -1

    @property
    def kind(self) -> str:  # noqa: D102
        return "layer norm" if self.centred else "rms norm"


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupNorm(Unary):
    """``weight (x - mean) / sqrt(variance + eps) + bias``, mean and variance those of a group of channels.

    ``groups`` are of channels (dimension 1) that follow each other, with all that is behind them; weight and bias are
    (channels,).
    """

    groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def kind(self) -> str:  # noqa: D102
        return "group norm"


@dataclass(frozen=True, eq=False, kw_only=True)
class Embedding(Unary):
    """Rows of ``weight`` (rows, features) by whole numbers: (B, ...) -> (B, ..., features).

    With a ``reduction``, which is a sum, a mean or a maximum, it is that of all rows along the last axis of the input.
    """

    weight: Tensor
    reduction: Reduction | None = None

    def __post_init__(self) -> None:
        if self.reduction not in (None, "sum", "mean", "max"):
            raise ValueError(f"an embedding gives rows, their sum, mean or maximum, got {self.reduction!r}")


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
