"""Native programs made of steps that follow each other: what they read and give, and how a plan's steps are added."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.engine.plan import (
    Affine,
    Binary,
    Concat,
    Conv,
    Flatten,
    GlobalAverage,
    GroupNorm,
    GRUGates,
    Linear,
    LSTMCell,
    LSTMHidden,
    Norm,
    Plan,
    Pointwise,
    Pool,
    Quantized,
    Resize,
    Step,
    Upsample,
)
from rarefy.engine.programs import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    OPERATIONS,
    Builder,
    Function,
    Layout,
    NativeError,
    Program,
    bits,
)
from rarefy.engine.reference import bind


@dataclass(frozen=True)
class SegmentPort:
    """A value that goes into or comes out of a program: its shape behind the axes that the program counts as batch.

    Programs read and write float32; ``quantized`` is what the bytes of a value mean that are bytes outside, too.
    """

    value: str
    shape: tuple[int, ...]
    quantized: Quantized | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the value outside."""
        return torch.float32 if self.quantized is None else torch.uint8


@dataclass(frozen=True, eq=False)
class NativeSegment:
    """A native program in the place of steps that follow each other.

    ``rows`` is how many of its samples there are for one of the network's: more than one where it takes each row of a
    matrix as a sample.
    """

    program: Program
    inputs: tuple[SegmentPort, ...]
    outputs: tuple[SegmentPort, ...]
    steps: tuple[str, ...]  # the values that they make
    rows: float = 1.0

    @property
    def reads(self) -> tuple[str, ...]:
        """The values that it needs."""
        return tuple(port.value for port in self.inputs)

    @property
    def makes(self) -> tuple[str, ...]:
        """The values that are there afterwards."""
        return tuple(port.value for port in self.outputs)

    def run(
        self, threads: int, *values: Tensor, seconds: np.ndarray[Any, np.dtype[np.float64]] | None = None
    ) -> list[Tensor]:
        """The outputs for the inputs; the time of each step is added to ``seconds``."""
        inputs = [self._input(x, port) for x, port in zip(values, self.inputs, strict=True)]
        batch = inputs[0].shape[: inputs[0].dim() - len(self.inputs[0].shape)]
        for x, port in zip(inputs, self.inputs, strict=True):
            if x.shape[: x.dim() - len(port.shape)] != batch:  # the program would read past the end of the shorter
                raise ValueError(
                    f"{port.value} of the shape {tuple(x.shape)} and {self.inputs[0].value} of the shape "
                    f"{tuple(inputs[0].shape)} must have the same axes before the last {len(port.shape)}"
                )
        outputs = [torch.empty((*batch, *port.shape), dtype=torch.float32) for port in self.outputs]
        if (count := math.prod(batch)) > 0:
            self.program.run(inputs, outputs, count, threads, seconds)
        return [_as_bytes(y, port) for y, port in zip(outputs, self.outputs, strict=True)]

    def _input(self, x: Tensor, port: SegmentPort) -> Tensor:
        if x.dtype is not port.dtype or tuple(x.shape[x.dim() - len(port.shape) :]) != port.shape:
            raise ValueError(
                f"{port.value} must end in {port.shape} of {port.dtype}, got {tuple(x.shape)} of {x.dtype}"
            )
        return x.float().resolve_neg().contiguous()


def _as_bytes(y: Tensor, port: SegmentPort) -> Tensor:
    """What a program gives of a value, as bytes where it has such outside: it gives them less their zero point."""
    return y if port.quantized is None else y.add_(port.quantized.zero_point).to(torch.uint8)


@dataclass(frozen=True)
class Options:
    """How programs are made.

    Attributes:
        choice: "measure", or what alone may compute convolutions: "sparse", "dense".
        storage: how weights are stored: "float32" or "bfloat16".
        threads: the number to choose kernels for.
        tune_seconds: at most about so much time for measuring in the whole plan; 0 chooses by rule.
        shapes: of the values, batch and all, when the plan runs on the example.
        samples: how many the example holds.
        layouts: how int8 layers take their weights, by the value that they make; the others are measured, or by rule.
    """

    choice: str
    storage: str
    threads: int
    tune_seconds: float
    shapes: Mapping[str, tuple[int, ...]]
    samples: int
    layouts: Mapping[str, Layout] = field(default_factory=dict)


class CannotError(Exception):
    """A step does not go into the program that is being built."""


@dataclass
class Building:
    """A program that is being built; ``measured`` are programs whose kernels its steps take, by what the steps make."""

    plan: Plan
    options: Options
    measured: Mapping[str, Program] = field(default_factory=dict)
    builder: Builder = field(default_factory=Builder)
    inputs: dict[tuple[str, int], SegmentPort] = field(default_factory=dict)
    ids: dict[tuple[str, int], int] = field(default_factory=dict)
    layouts: dict[str, int | None] = field(
        default_factory=dict
    )  # of what its steps make; None: vectors, which have any
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    rows: bool = False  # all axes but the last count as batch

    def add(self, step: Step) -> str | None:
        """Add a step; gives the reason if it cannot be."""
        if not self.steps:
            self.rows = isinstance(step, Linear) and self.plan.values[step.input].shape is None
        try:
            made = self._add(step)
        except (CannotError, NativeError) as error:
            return str(error)
        self.steps.append(step)
        layout, number = made
        self.ids[step.output, CHANNELS_FIRST if layout is None else layout] = number
        self.layouts[step.output] = layout
        channels, height, width = self.builder.shape(number)
        known = self.plan.values[step.output].shape
        self.shapes[step.output] = (channels,) if self.rows else known if known is not None else ()
        expected = geometry(self.shapes[step.output], CHANNELS_FIRST if layout is None else layout)
        if (channels, height, width) != expected:
            raise AssertionError(f"{step.name}: the plan says {expected}, the program {(channels, height, width)}")
        return None

    def finish(self) -> NativeSegment:
        """The program of the steps so far."""
        own, users = {step.output for step in self.steps}, self.plan.users()
        outputs = []
        for step in self.steps:
            outside = any(user.output not in own for user in users[step.output])
            if outside or step.output in self.plan.outputs:
                layout = self.layouts[step.output]
                layout = CHANNELS_FIRST if layout is None else layout
                outputs.append(self._output(step.output, layout))
        inputs = tuple(self.inputs.values())
        example = self.options.shapes[inputs[0].value]
        batch = max(1, math.prod(example[: len(example) - len(inputs[0].shape)]))
        program = self._program(batch)
        rows = batch / self.options.samples
        return NativeSegment(program, inputs, tuple(outputs), tuple(step.output for step in self.steps), rows)

    def _output(self, value: str, layout: int) -> SegmentPort:
        """Make a value of the program an output of it."""
        self.builder.output(self.ids[value, layout], layout)
        return SegmentPort(value, self.shapes[value])

    def _program(self, batch: int) -> Program:
        """The program of the steps, its kernels chosen for so many samples."""
        measured = next((self.measured[step.output] for step in self.steps if step.output in self.measured), None)
        return self.builder.finish(
            batch=batch, threads=self.options.threads, tune_seconds=self._tune_seconds(), measured=measured
        )

    def _tune_seconds(self) -> float:
        """Give this program's share of the time to measure in."""
        layers = [len([s for s in steps if isinstance(s, (Conv, Linear))]) for steps in (self.steps, self.plan.steps)]
        return self.options.tune_seconds * layers[0] / max(1, layers[1])

    def _add(self, step: Step) -> tuple[int | None, int]:
        """Layout and number of the value that the step makes."""
        name = step.output  # what it is known by in the profile
        match step:
            case Conv():
                x, *residual = self._values(step.inputs, CHANNELS_FIRST)
                return CHANNELS_FIRST, self._conv(step, x, *residual)
            case Linear():
                x, *residual = self._values(step.inputs, CHANNELS_LAST)
                number = self.builder.conv(
                    x,
                    step.weight[:, :, None, None],
                    step.bias,
                    residual=residual[0] if residual else -1,
                    activation=step.activation,
                    storage=self.options.storage,
                    choice=self.options.choice,
                    name=name,
                )
                vectors = self.rows or len(self._shape(step.input)) == 1
                return None if vectors else CHANNELS_LAST, number
            case Affine():
                scale, shift = step.scale, step.shift
                even = all(part is None or bool((part == part[0]).all()) for part in (scale, shift))
                layout = self._elementwise_layout(step) if even else CHANNELS_FIRST
                (x,) = self._values(step.inputs, layout)
                if even:
                    channels = self.builder.shape(x)[0]
                    scale, shift = (None if part is None else part[:1].expand(channels) for part in (scale, shift))
                number = self.builder.affine(x, scale, shift, step.activation, name=name)
                return self._layout_of(step.input, layout), number
            case Binary():
                layout = self._elementwise_layout(step)
                x, y = self._values(step.inputs, layout)
                multiply = step.op == "mul"
                number = self.builder.binary(x, y, multiply=multiply, activation=step.activation, name=name)
                return self._layout_of(step.x, layout), number
            case Pool():
                (x,) = self._values(step.inputs, CHANNELS_FIRST)
                return CHANNELS_FIRST, self._pool(step, x)
            case GlobalAverage():
                (x,) = self._values(step.inputs, CHANNELS_FIRST)
                return CHANNELS_FIRST if step.keepdim else None, self.builder.global_average(x, name=name)
            case Concat():
                xs = self._values(step.inputs, CHANNELS_FIRST)
                by_name = dict(zip(step.inputs, xs, strict=True))
                layout_out = self._layout_of(step.operands[0], CHANNELS_FIRST)
                return layout_out, self.builder.concat([by_name[each] for each in step.operands], name=name)
            case Upsample():
                (x,) = self._values(step.inputs, CHANNELS_FIRST)
                return CHANNELS_FIRST, self.builder.upsample(x, _two(step.factor, 1), name=name)
            case Resize():
                (x,) = self._values(step.inputs, CHANNELS_FIRST)
                return CHANNELS_FIRST, self._resize(step, x)
            case Flatten():
                (x,) = self._values(step.inputs, CHANNELS_FIRST)
                return None, self.builder.flatten(x, name=name)
            case Norm():
                return self._norm(step)
            case GroupNorm():
                (x,) = self._values(step.inputs, CHANNELS_FIRST)
                number = self._normalised("group norm", step, x, [bits(step.eps), step.groups])
                return self._layout_of(step.input, CHANNELS_FIRST), number
            case Pointwise():
                return self._pointwise(step)
            case LSTMCell() | GRUGates():
                return None, self._gates(step)
        raise CannotError(f"there is no native {step.kind}")

    def _conv(self, step: Conv, x: int, residual: int = -1) -> int:
        weight: Tensor = step.weight if step.weight.dim() == 4 else step.weight[:, :, None]
        top_bottom, left_right = _two(step.padding, (0, 0))
        return self.builder.conv(
            x,
            weight,
            step.bias,
            stride=_two(step.stride, 1),
            dilation=_two(step.dilation, 1),
            padding=(*top_bottom, *left_right),
            groups=step.groups,
            residual=residual,
            activation=step.activation,
            storage=self.options.storage,
            choice=self.options.choice,
            name=step.output,
        )

    def _norm(self, step: Norm) -> tuple[int | None, int]:
        layout = CHANNELS_LAST if step.axis == -1 else CHANNELS_FIRST
        (x,) = self._values(step.inputs, layout)
        function: Function = "layer norm" if step.centred else "rms norm"
        return self._layout_of(step.input, layout), self._normalised(function, step, x, [bits(step.eps)])

    def _normalised(self, function: Function, step: Norm | GroupNorm, x: int, numbers: list[int]) -> int:
        channels = self.builder.shape(x)[0]
        weight = torch.ones(channels) if step.weight is None else step.weight
        bias = torch.zeros(channels) if step.bias is None else step.bias
        return self.builder.tensor(function, [x], numbers, [weight, bias], name=step.output)

    def _resize(self, step: Resize, x: int) -> int:
        sizes = self._shape(step.input)[1:]
        tables = [places(step, sizes, axis) for axis in (0, 1)]
        numbers = [int(step.mode == "bilinear"), *step.sizes, *(int(place) for taken, _ in tables for place in taken)]
        shares = [share for _, share in tables] if step.mode == "bilinear" else []
        return self.builder.tensor("resize", [x], numbers, shares, name=step.output)

    def _pointwise(self, step: Pointwise) -> tuple[int | None, int]:
        made = self.plan.values[step.output].shape
        if made is None or self.rows or any(len(self._shape(name)) != len(made) for name in step.operands):
            raise CannotError("its operands have other axes than its result")
        layout = self._elementwise_layout(step)
        values = dict(zip(step.operands, self._values(step.operands, layout), strict=True))
        numbers, constants = [len(step.sizes)], []
        for size, constant in zip(step.sizes, step.split(), strict=True):
            whole = constant.reshape(*(1,) * (len(made) - len(size)), *size)
            numbers += geometry(tuple(whole.shape), layout)
            constants.append(whole.movedim(-1, 0) if layout == CHANNELS_LAST else whole)
        for operation, x, y in step.code:
            numbers += [OPERATIONS.index(operation), x, y]
        number = self.builder.tensor(
            "pointwise", [values[name] for name in step.operands], numbers, constants, name=step.output
        )
        return None if len(made) == 1 else layout, number

    def _gates(self, step: LSTMCell | GRUGates) -> int:
        check_mode(step.mode)
        if any(len(self._shape(name)) != 1 for name in step.inputs):
            raise CannotError("its state is no vector")
        values = self._values(step.inputs, CHANNELS_FIRST)
        match step:
            case LSTMHidden():
                return self.builder.lstm_hidden(*values, name=step.output)
            case LSTMCell():
                return self.builder.lstm_cell(*values, name=step.output)
        return self.builder.gru(*values, name=step.output)

    def _pool(self, step: Pool, x: int) -> int:
        sizes = self._shape(step.input)[1:]
        outs = (self.plan.values[step.output].shape or ())[1:]
        ends = []
        for axis, size in enumerate(sizes):
            reach = (outs[axis] - 1) * step.stride[axis] + step.dilation[axis] * (step.kernel[axis] - 1) + 1
            ends.append(reach - size - step.padding[axis] if step.ceil_mode else step.padding[axis])
            if step.op == "average" and step.count_include_pad and ends[-1] > step.padding[axis]:
                raise CannotError("the native average pool does not divide by windows cut off by ceil_mode")
        pads = _two(tuple(zip(step.padding, (max(0, end) for end in ends), strict=True)), (0, 0))
        return self.builder.pool(
            x,
            average=step.op == "average",
            count_padding=step.count_include_pad,
            kernel=_two(step.kernel, 1),
            stride=_two(step.stride, 1),
            dilation=_two(step.dilation, 1),
            padding=(*pads[0], *pads[1]),
            name=step.output,
        )

    def _shape(self, value: str) -> tuple[int, ...]:
        """The shape of a value behind the axes that count as batch."""
        known = self.shapes.get(value)
        if known is not None:
            return known
        if self.rows:
            return self.options.shapes[value][-1:]
        shape = self.plan.values[value].shape
        if shape is None or not 1 <= len(shape) <= 3:
            raise CannotError("its shape is only known when it runs" if shape is None else "it has too many axes")
        return shape

    def _same_rows(self, a: str, b: str) -> bool:
        """Whether two values have the same axes but the last, at every batch size."""
        known = self.plan.values[a].rows == self.plan.values[b].rows
        return known and self.options.shapes[a][:-1] == self.options.shapes[b][:-1]

    def _layout_of(self, value: str, layout: int) -> int | None:
        return None if len(self._shape(value)) == 1 else layout

    def _elementwise_layout(self, step: Step) -> int:
        """That of an operand which is there; otherwise the one that the next step needs."""
        there = [layout for name in step.inputs if (layout := self.layouts.get(name)) is not None]
        if there:
            return there[0]
        users = self.plan.users()[step.output]
        last = any(isinstance(user, Linear) or (isinstance(user, Norm) and user.axis == -1) for user in users)
        return CHANNELS_LAST if last else CHANNELS_FIRST

    def _values(self, names: tuple[str, ...], layout: int) -> list[int]:
        """The numbers of values in that layout; those made elsewhere become inputs."""
        for name in names:
            made = self.layouts.get(name, layout)
            if made is not None and made != layout:
                raise CannotError("it needs its input in another order of axes")
            if self.rows and name not in self.layouts:
                if len(self.options.shapes[name]) < 2:
                    raise CannotError("it has too few axes")
                first = next((port.value for port in self.inputs.values()), name)
                if not self._same_rows(name, first):
                    raise CannotError("it has other rows than what runs before")
            self._shape(name)
        return [self._value(name, layout) for name in names]

    def _value(self, name: str, layout: int) -> int:
        shape = self._shape(name)
        key = self._key(name, layout)
        if key not in self.ids:
            self.ids[key] = self.builder.input(geometry(shape, key[1]), key[1], name)
            self.inputs[key] = SegmentPort(name, shape)
        return self.ids[key]

    def _key(self, name: str, layout: int) -> tuple[str, int]:
        """What a value is known by: vectors have one layout."""
        vector = len(self._shape(name)) == 1 or self.layouts.get(name, 0) is None
        return name, CHANNELS_FIRST if vector else layout


def places(step: Resize, sizes: Sequence[int], axis: int) -> tuple[Tensor, Tensor]:
    """Where each row or column begins in an image of those sizes, and the share of the next one: both (size,)."""
    size, out = sizes[axis], step.sizes[axis]
    if step.mode == "nearest":
        compute, (_, *options), _ = bind(step)
        ramp = torch.arange(float(size)).reshape((-1, 1) if axis == 0 else (1, -1)).expand(1, 1, *sizes)
        taken = compute(ramp, *options)[0, 0].select(1 - axis, 0)
        return taken.long(), torch.zeros(out)
    factor = None if step.factors is None else step.factors[axis]
    to = torch.arange(out, dtype=torch.float32)
    if step.align_corners:
        at = to * torch.tensor((size - 1) / (out - 1) if out > 1 else 0.0)
    else:
        at = (torch.tensor(1.0 / factor if factor else size / out) * (to + 0.5) - 0.5).clamp(min=0)
    taken = at.long().clamp(max=size - 1)
    return taken, (at - taken).clamp(0, 1)


def check_mode(mode: str) -> None:
    """Raise CannotError for a mode of activation functions that native programs do not have."""
    if mode not in ("exact", "fast"):
        raise CannotError(f'native gates are of mode "exact", not {mode!r}')


def samples(shape: Sequence[int]) -> int:
    """How many samples an input of the network holds."""
    return shape[0] if shape else 1


def geometry(shape: tuple[int, ...], layout: int) -> tuple[int, int, int]:
    """Channels, height and width of a sample of that shape."""
    if layout == CHANNELS_LAST:
        shape = (shape[-1], *shape[:-1])
    channels, *sizes = shape
    height, width = ((1, 1), (1, *sizes), tuple(sizes))[len(sizes)]
    return channels, height, width


def _two(sizes: tuple[Any, ...], first: Any) -> tuple[Any, Any]:
    """A pair, of rows and columns, from sizes along one axis or two."""
    return (first, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])
