"""A plan in int8, step by step, from the layout of one in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rarefy.engine import int8
from rarefy.engine.calibrate import weight_scales
from rarefy.engine.int8_layout import Layout, key
from rarefy.engine.plan import (
    Affine,
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
    Value,
)


def levels(weight: Tensor, scale: Tensor) -> Tensor:
    """The whole numbers nearest to weights."""
    wide = scale.reshape(-1, *(1,) * (weight.dim() - 1))
    return (weight / wide).round().clamp(-int8.LARGEST, int8.LARGEST)


@dataclass
class Int8Plan:
    """The steps of a plan in int8, as they come.

    ``scales`` are those of layers' weights by the layers' keys, and ``shifts`` the mean errors of channels.
    """

    layout: Layout
    scales: Mapping[str, Tensor]
    shifts: Mapping[str, Tensor]
    steps: list[Step] = field(default_factory=list)
    values: dict[str, Value] = field(init=False)
    made: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.values = dict(self.layout.plan.values)
        self.made = {*self.layout.plan.inputs, *self.layout.plan.constants}

    def plan(self) -> Plan:
        """The whole plan."""
        base = self.layout.plan
        for step in base.steps:
            if step.output in self.layout.inside:
                self._add(self._int8(step))
            else:
                for name in dict.fromkeys(step.inputs):
                    self._float32(name)
                self._add(step)
        for name in base.outputs:
            self._float32(name)
        known = {*base.inputs, *base.outputs, *(name for step in self.steps for name in (*step.inputs, step.output))}
        values = {name: value for name, value in self.values.items() if name in known}
        return replace(base, steps=tuple(self.steps), values=values)

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        self.made.add(step.output)

    def _float32(self, name: str) -> None:
        """Make sure that a value is there in float32."""
        if name not in self.made:
            self._add(Dequantize(name=name, input=f"{name}.uint8", output=name))

    def _uint8(self, name: str, to: Quantized | None = None) -> str:
        """The bytes of a value, of another quantisation where one is given."""
        own, of = f"{name}.uint8", self.layout.quantized[name]
        if own not in self.made:
            self._bytes(own, name, of)
            self._add(Quantize(name=name, input=name, output=own))
        if to is None or to == of:
            return own
        other = f"{own}.{to.scale}.{to.zero_point}"
        if other not in self.made:
            self._bytes(other, name, to)
            self._add(Table(name=name, input=own, output=other, table=int8.table("none", of, to)))
        return other

    def _bytes(self, name: str, like: str, quantized: Quantized) -> None:
        self.values[name] = replace(self.values[like], dtype=torch.uint8, quantized=quantized)

    def _int8(self, step: Step) -> Step:
        """The step on bytes."""
        output, to = step.output, self.layout.quantized.get(step.output)
        if to is not None:
            output = f"{step.output}.uint8"
            self._bytes(output, step.output, to)
        match step:
            case Conv() | Linear():
                return self._layer(step, output)
            case Affine(activation=activation) if step.kind == "activation":
                assert to is not None
                bytes_of = int8.table(activation, self.layout.quantized[step.input], to)
                return Table(name=step.name, input=self._uint8(step.input), output=output, table=bytes_of)
            case Affine():
                shape = self.values[step.input].shape
                assert shape is not None
                return replace(_depthwise(step, shape), input=self._uint8(step.input), output=output)
            case Binary():
                return replace(step, x=self._uint8(step.x), y=self._uint8(step.y), output=output)
            case Concat():
                operands = tuple(self._uint8(name, to) for name in step.operands)
                return replace(step, operands=operands, output=output)
            case Pool() | GlobalAverage() | Upsample() | Flatten():
                return replace(step, input=self._uint8(step.input), output=output)
        raise AssertionError(f"a {step.kind} is not computed in int8")

    def _layer(self, step: Layer, output: str) -> Layer:
        scale, shift, bias = self.scales[key(step)], self.shifts.get(key(step)), step.bias
        if shift is not None:
            bias = ((0.0 if bias is None else bias.double()) - shift).float()
        return replace(
            step,
            input=self._uint8(step.input),
            residual=None if step.residual is None else self._uint8(step.residual),
            output=output,
            weight=int8.weights(levels(step.weight, scale), scale),
            weight_scale=scale,
            bias=bias,
        )


def _depthwise(step: Affine, shape: tuple[int, ...]) -> Conv:
    """Factors for channels as a convolution, whose weights are then exact: 127 or -127 times a scale, or 0."""
    factors = torch.ones(shape[0], dtype=torch.float32) if step.scale is None else step.scale
    scale = weight_scales(factors[:, None])
    axes = len(shape) - 1
    weight = int8.weights(levels(factors, scale), scale).reshape(-1, *(1,) * (axes + 1))
    return Conv(
        name=step.name,
        input=step.input,
        output=step.output,
        weight=weight,
        bias=step.shift,
        stride=(1,) * axes,
        padding=((0, 0),) * axes,
        dilation=(1,) * axes,
        groups=shape[0],
        activation=step.activation,
        weight_scale=scale,
    )
