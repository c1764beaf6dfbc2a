"""What int8 means: the arithmetic of quantised values, in PyTorch. Whatever else computes it gives the same bytes.

A quantised value is uint8, with one scale and one zero point z: x = scale (q - z). Weights are whole numbers in
[-127, 127] times a scale for each output channel, so that a zero stays zero; a model that comes quantised may have -128
among them. Sums are exact whole numbers; what follows
is float32, each operation rounded, in the order written here; its factors are computed in float64 and rounded once::

    layer            t = sum * m + b  (+ q_residual * m_residual)      q = clamp(rint(t), low, high), ties to even
    layer, float32   y = activation(sum * (scale_x scale_w) + bias)
    add              t = q_x * m_x + b; t = t + q_y * m_y
    mul              t = (q_x - z_x) (q_y - z_y) * m + z
    average          t = sum * m + b, of what a window counts: see :func:`_average`
    Table            q = table[q]
    Quantize         q = clamp(rint(x * (1 / scale) + z), 0, 255); NaN becomes z, which stands for 0
    Dequantize       (q - z) * scale

Maximum, Concat, Upsample and Flatten take bytes as they are: their result has the quantisation of their operands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.engine.functions import CONVOLUTIONS, MAX_POOLS, activate, symmetric_padding
from rarefy.engine.plan import (
    ACTIVATIONS,
    Activation,
    Binary,
    Concat,
    Conv,
    Dequantize,
    Flatten,
    GlobalAverage,
    Layer,
    Linear,
    Plan,
    Pool,
    Quantize,
    Quantized,
    Step,
    Table,
    Upsample,
)

#: The activations that are bounds of what a step makes; others are a :class:`Table`.
CLAMPS: tuple[Activation, ...] = ("none", "relu", "relu6")
LARGEST = 127  # of a weight
#: Sums of whole numbers are exact in float32 as long as none on the way leaves this.
_EXACT = 1 << 24


@dataclass(frozen=True)
class Factors:
    """What a sum is finished by: ``clamp(rint(sum * m + b + q_residual * residual), low, high)``.

    ``m`` and ``b`` are (out,) float32, ``residual`` a float32 number; the bounds are in 0..255.
    """

    m: Tensor
    b: Tensor
    residual: float
    low: int
    high: int


@dataclass(frozen=True, eq=False)
class Int8:
    """A step on quantised values, and what their bytes mean: of each of its inputs, and of its result.

    Raises ValueError for a step that has no meaning with these.
    """

    step: Step
    operands: tuple[Quantized | None, ...]
    result: Quantized | None

    def __post_init__(self) -> None:
        wrong = self._wrong()
        if wrong:
            raise ValueError(f"{self.step.name} cannot be computed in int8: {wrong}")

    @property
    def name(self) -> str:
        """The step's."""
        return self.step.name

    @property
    def inputs(self) -> tuple[str, ...]:
        """The values that it reads."""
        return self.step.inputs

    @property
    def output(self) -> str:
        """The value that it makes."""
        return self.step.output

    def _wrong(self) -> str | None:
        step, given = self.step, [self.result is not None, *(each is not None for each in self.operands)]
        if len(self.operands) != len(step.inputs):
            return f"it has {len(step.inputs)} inputs, and the quantisation of {len(self.operands)} is given"
        match step:
            case Quantize() | Dequantize():
                into = isinstance(step, Quantize)
                return None if given == [into, not into] else "one of what it reads and makes is quantised, one is not"
            case Conv() | Linear():
                if not all(given[1:]) or (step.residual is not None and self.result is None):
                    return "it reads float32, or adds a residual without quantising"
                if self.result is not None and step.activation not in CLAMPS:
                    return f"{step.activation} is no bound: it needs a table"
                if step.weight_scale is None or step.weight_scale.shape != (len(step.weight),):
                    return "it needs a scale of the weights for every output channel"
                return None
            case Binary() | GlobalAverage() | Pool() | Concat() | Upsample() | Flatten() | Table():
                if not all(given):
                    return "some of what it reads or makes is float32"
                if isinstance(step, Binary) and step.activation not in CLAMPS:
                    return f"{step.activation} is no bound: it needs a table"
                if isinstance(step, Table) and (step.table.dtype, step.table.shape) != (torch.uint8, (256,)):
                    return f"its table is {tuple(step.table.shape)} of {step.table.dtype}, not (256,) of torch.uint8"
                if copies(step) and {*self.operands} != {self.result}:
                    return "it copies bytes, and its operands and its result have different scales or zero points"
                return None
        return f"a {step.kind} has no meaning on bytes"

    def run(self, *inputs: Tensor) -> Tensor:
        """Compute what it makes of its inputs."""
        x = inputs[0]
        match self.step:
            case Quantize():
                return quantize(x, _known(self.result))
            case Dequantize():
                return dequantize(x, _known(self.operands[0]))
            case Conv() | Linear():
                return self._layer(self.step, *inputs)
            case Binary():
                return self._binary(self.step, *inputs)
            case GlobalAverage():
                return self._global_average(self.step, x)
            case Pool(op="average"):
                return self._average(self.step, x)
            case Pool():
                return _maximum(self.step, x)
            case Concat(operands=names):
                given = dict(zip(self.inputs, inputs, strict=True))
                return torch.cat([given[name] for name in names], 1)
            case Upsample(factor=factor):
                for axis, times in enumerate(factor, 2):
                    x = x.repeat_interleave(times, axis)
                return x
            case Flatten():
                return x.flatten(1)
            case Table(table=table):
                return table.index_select(0, x.reshape(-1).int()).reshape(x.shape)
        raise AssertionError("a step on quantised values is one of those above")

    @cached_property
    def factors(self) -> Factors:
        """What finishes the sums of a layer whose result is quantised."""
        step, x, y = self._as_layer, _known(self.operands[0]), _known(self.result)
        scale, bias = _double(step.weight_scale, step), _double(step.bias, step)
        residual = self.operands[1] if step.residual is not None else None
        m_residual = 0.0 if residual is None else residual.scale / y.scale
        b = bias / y.scale + y.zero_point - (0.0 if residual is None else residual.zero_point * m_residual)
        low, high = bounds(step.activation, y)
        return Factors((x.scale * scale / y.scale).float(), b.float(), float(np.float32(m_residual)), low, high)

    @cached_property
    def float_factors(self) -> tuple[Tensor, Tensor]:
        """What the sums of a layer whose result is float32 are multiplied with, and what is added: (out,) each."""
        step, x = self._as_layer, _known(self.operands[0])
        return (x.scale * _double(step.weight_scale, step)).float(), _double(step.bias, step).float()

    @property
    def _as_layer(self) -> Layer:
        if not isinstance(self.step, Layer):
            raise TypeError(f"a {self.step.kind} has no sums of weights")
        return self.step

    @cached_property
    def _weight(self) -> Tensor:
        """The whole numbers of the weights, in float32 where no sum of them can round, otherwise in float64."""
        whole = levels(self._as_layer)
        if whole.is_meta:
            return whole
        least = _known(self.operands[0]).zero_point
        above, below = (part.flatten(1).double().sum(1) for part in (whole.clamp(min=0), -whole.clamp(max=0)))
        # The sums on the way to one lie between what the positive terms and what the negative ones come to at most.
        up, down = (255 - least) * above + least * below, least * above + (255 - least) * below
        return whole if torch.maximum(up, down).max() <= _EXACT else whole.double()

    def _layer(self, step: Layer, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight, of = self._weight, _known(self.operands[0])
        centred = x.to(weight.dtype) - of.zero_point
        if isinstance(step, Linear):
            sums, ending = F.linear(centred, weight), (-1,)
        else:
            added, padding = symmetric_padding(step)
            centred = F.pad(centred, added) if added else centred
            convolution = CONVOLUTIONS[len(step.stride)]
            sums = convolution(centred, weight, None, step.stride, padding, step.dilation, step.groups)
            ending = (-1, *(1,) * len(step.stride))  # type: ignore[assignment]
        sums = sums.float()
        if self.result is None:
            scale, bias = self.float_factors
            return activate(sums * scale.reshape(ending) + bias.reshape(ending), step.activation)
        finish = self.factors
        t = sums * finish.m.reshape(ending) + finish.b.reshape(ending)
        if residual is not None:
            t = t + residual.float() * finish.residual
        return _bytes(t, finish.low, finish.high)

    def _binary(self, step: Binary, x: Tensor, y: Tensor) -> Tensor:
        (of_x, of_y), to = map(_known, self.operands), _known(self.result)
        if step.op == "add":
            m_x, m_y = of_x.scale / to.scale, of_y.scale / to.scale
            b = to.zero_point - of_x.zero_point * m_x - of_y.zero_point * m_y
            t = x.float() * _float32(m_x) + _float32(b) + y.float() * _float32(m_y)
        else:
            product = (x.float() - of_x.zero_point) * (y.float() - of_y.zero_point)
            t = product * _float32(of_x.scale * of_y.scale / to.scale) + to.zero_point
        return _bytes(t, *bounds(step.activation, to))

    def _global_average(self, step: GlobalAverage, x: Tensor) -> Tensor:
        of, to = _known(self.operands[0]), _known(self.result)
        axes = tuple(range(2, x.dim()))
        count = math.prod(x.shape[2:])
        sums = x.sum(axes, keepdim=step.keepdim, dtype=torch.int64).float()
        m, b = of.scale / to.scale / count, to.zero_point - of.zero_point * of.scale / to.scale
        return _bytes(sums * _float32(m) + _float32(b), 0, 255)

    def _average(self, step: Pool, x: Tensor) -> Tensor:
        """``m = scale_x / scale / count`` and ``b = z - z_x scale_x / scale (there / count)``.

        ``count`` is what the window divides by, ``there`` how many of its pixels are none of padding.
        """
        of, to = _known(self.operands[0]), _known(self.result)
        ones = x.new_ones((1, 1, *x.shape[2:]), dtype=torch.float64)
        sums, there, average = _pooled(step, x.double(), 1), _pooled(step, ones, 1), _pooled(step, ones, None)
        count = (there / average).round()
        m = of.scale / to.scale / count
        b = to.zero_point - of.zero_point * of.scale / to.scale * (there / count)
        return _bytes(sums.float() * m.float() + b.float(), 0, 255)


Runnable: TypeAlias = Step | Int8


def item(plan: Plan, step: Step) -> Runnable:
    """The step as it is run: with the quantisation of its values where one of them has one."""
    values = [plan.values.get(name) for name in (*step.inputs, step.output)]
    *operands, result = [None if value is None else value.quantized for value in values]
    return step if result is None and not any(operands) else Int8(step, tuple(operands), result)


def copies(step: Step) -> bool:
    """Whether a step takes bytes as they are, so that its operands and its result are quantised alike."""
    return isinstance(step, (Concat, Upsample, Flatten)) or (isinstance(step, Pool) and step.op == "max")


def levels(step: Layer) -> Tensor:
    """The whole numbers in [-127, 127] that the weights of a layer are times their channel's scale, as float32."""
    if step.weight_scale is None:
        raise ValueError(f"the weights of {step.name} are not quantised")
    return (step.weight / step.weight_scale.reshape(-1, *(1,) * (step.weight.dim() - 1))).round()


def packed(step: Step) -> Step:
    """A step with the whole numbers of its weights, as int8, in their place: a quarter of the memory."""
    return replace(step, weight=levels(step).to(torch.int8)) if isinstance(step, Layer) else step


def unpacked(step: Step) -> Step:
    """The step that :func:`packed` made another of."""
    if not isinstance(step, Layer):
        return step
    assert step.weight_scale is not None
    return replace(step, weight=weights(step.weight, step.weight_scale))


def weights(whole: Tensor, scale: Tensor) -> Tensor:
    """The float32 weights of whole numbers (out, ...) and the scales (out,) of their channels."""
    return whole.float() * scale.reshape(-1, *(1,) * (whole.dim() - 1))


def quantize(x: Tensor, to: Quantized) -> Tensor:
    """The bytes nearest to float32 numbers. What lies beyond them is the first or the last; NaN is the zero point."""
    t = x * _float32(1 / to.scale) + to.zero_point
    return _bytes(torch.where(t.isnan(), float(to.zero_point), t), 0, 255)


def dequantize(q: Tensor, of: Quantized) -> Tensor:
    """The float32 numbers that bytes stand for."""
    return (q.float() - of.zero_point) * of.scale


def table(function: Activation, of: Quantized, to: Quantized) -> Tensor:
    """The 256 bytes of an activation function ("none" goes to another quantisation).

    They are computed in float64; the modes of :mod:`rarefy.act`, which has none, in float32.
    """
    x = of.scale * (torch.arange(256, dtype=torch.float64, device="cpu") - of.zero_point)
    y = activate(x if function in ACTIVATIONS else x.float(), function).double()
    return _bytes(y / to.scale + to.zero_point, 0, 255)


def bounds(activation: Activation, of: Quantized) -> tuple[int, int]:
    """The least and the largest byte behind an activation that is a clamp."""
    low = 0 if activation == "none" else of.zero_point
    return low, min(255, round(6 / of.scale + of.zero_point)) if activation == "relu6" else 255


def _known(quantized: Quantized | None) -> Quantized:
    assert quantized is not None  # __post_init__ made sure
    return quantized


def _double(numbers: Tensor | None, step: Layer) -> Tensor:
    """One number for each output channel in float64, zeros where there are none."""
    return step.weight.new_zeros(len(step.weight), dtype=torch.float64) if numbers is None else numbers.double()


def _float32(number: float) -> float:
    return float(np.float32(number))


def _bytes(t: Tensor, low: int, high: int) -> Tensor:
    """Rounded to even, between two bytes."""
    return t.round().clamp(low, high).to(torch.uint8)


def _pooled(step: Pool, x: Tensor, divisor: int | None) -> Tensor:
    """Sums (for a divisor of 1) or averages (for None) of windows."""
    sizes = (step.kernel, step.stride, step.padding)
    if len(step.kernel) == 1:
        kernel, stride, padding = ((first, *each) for first, each in zip((1, 1, 0), sizes, strict=True))
        x = x.unsqueeze(2)
    else:
        kernel, stride, padding = sizes
    average = F.avg_pool3d if len(step.kernel) == 3 else F.avg_pool2d
    found: Tensor = average(x, kernel, stride, padding, step.ceil_mode, step.count_include_pad, divisor)
    return found.squeeze(2) if len(step.kernel) == 1 else found


def _maximum(step: Pool, x: Tensor) -> Tensor:
    found: Tensor = MAX_POOLS[len(step.kernel)](
        x.float(), step.kernel, step.stride, step.padding, step.dilation, step.ceil_mode
    )
    return found.to(torch.uint8)
