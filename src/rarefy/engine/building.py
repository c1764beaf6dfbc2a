"""Native programs made of steps that follow each other: what they read and give, and how a plan's steps are added."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.engine.binding import CHANNELS_FIRST, CHANNELS_LAST, NativeError
from rarefy.engine.builder import OPERATIONS, Builder, Depth, Function, Layout, bits
from rarefy.engine.building_places import describe
from rarefy.engine.places import geometry
from rarefy.engine.plan import (
    NATIVE,
    REDUCTIONS,
    Affine,
    Binary,
    Concat,
    Conv,
    ConvTranspose,
    Embedding,
    Flatten,
    GlobalAverage,
    GroupNorm,
    GRUGates,
    Join,
    Linear,
    LSTMCell,
    LSTMHidden,
    Norm,
    Placed,
    Plan,
    Pointwise,
    Pool,
    Quantized,
    Recurrence,
    Reduce,
    Resize,
    Step,
    Upsample,
    View,
)
from rarefy.engine.programs import Program
from rarefy.engine.reference import bind
from rarefy.engine.transposed import phases
from rarefy.engine.views import apart, in_order, of_places, row_major

#: Steps that read a value of their program where it lies.
_READS_PLANES = tuple(kind for kind in NATIVE if kind is not View)


#: Whole numbers that programs read, by their bytes.
INTEGERS = {4: torch.int32, 8: torch.int64}
#: Of so many shapes of inputs a segment remembers what it makes of them.
_MOST_KNOWN = 64


@dataclass(frozen=True)
class SegmentPort:
    """A value that goes into or comes out of a program: its shape behind the axes that the program counts as batch.

    Programs read and write float32; ``quantized`` is what the bytes of a value mean that are bytes outside, too. One
    sample of the program are ``fold`` entries of dimension 0. ``integer`` is how many bytes each number of a value of
    whole numbers has, which goes in as it is; 0 where it is float32.
    """

    value: str
    shape: tuple[int, ...]
    quantized: Quantized | None = None
    fold: int = 1
    integer: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of the value outside."""
        if self.integer:
            return INTEGERS[self.integer]
        return torch.float32 if self.quantized is None else torch.uint8

    @property
    def numbers(self) -> int:
        """Of one sample, as the program has them."""
        return self.fold * math.prod(self.shape) * max(1, self.integer // 4)

    def batch(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The axes that the program counts as batch, of a tensor of that shape, ``fold`` taken out of the first.

        Raises ValueError for a tensor that is no value of this port.
        """
        axes = len(shape) - len(self.shape)
        batch = tuple(shape[: max(axes, 0)])
        if tuple(shape[len(batch) :]) != self.shape or (self.fold > 1 and (axes != 1 or batch[0] % self.fold)):
            folded = f", after {self.fold} entries a sample" if self.fold > 1 else ""
            raise ValueError(f"{self.value} must end in {self.shape}{folded}, got {tuple(shape)}")
        return (batch[0] // self.fold,) if self.fold > 1 else batch

    def whole(self, batch: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor for such a batch."""
        return (batch[0] * self.fold, *self.shape) if self.fold > 1 else (*batch, *self.shape)


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
        shapes = tuple([x.shape for x in values])
        if (known := self._known.get(shapes)) is None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            known = self._known[shapes] = self._sizes(shapes)
        count, sizes = known
        outputs = [torch.empty(size, dtype=torch.float32) for size in sizes]
        if count:
            self.program.run(inputs, outputs, count, threads, seconds, known=True)
        if not self._gives_bytes:
            return outputs
        return [_as_bytes(y, port) for y, port in zip(outputs, self.outputs, strict=True)]

    @cached_property
    def _known(self) -> dict[tuple[torch.Size, ...], tuple[int, list[tuple[int, ...]]]]:
        """What :meth:`_sizes` said of inputs."""
        return {}

    @cached_property
    def _gives_bytes(self) -> bool:
        return any(port.quantized is not None for port in self.outputs)

    def _sizes(self, shapes: Sequence[Sequence[int]]) -> tuple[int, list[tuple[int, ...]]]:
        """How many samples inputs of these shapes are, and the shapes of the outputs."""
        batch = self.inputs[0].batch(shapes[0])
        for shape, port in zip(shapes, self.inputs, strict=True):
            if port.batch(shape) != batch:  # the program would read past the end of the shorter
                raise ValueError(
                    f"{port.value} of the shape {tuple(shape)} and {self.inputs[0].value} of the shape "
                    f"{tuple(shapes[0])} must have the same axes before the last {len(port.shape)}"
                )
        return math.prod(batch), [port.whole(batch) for port in self.outputs]

    def _input(self, x: Tensor, port: SegmentPort) -> Tensor:
        if x.dtype is not port.dtype:
            raise ValueError(f"{port.value} must be {port.dtype}, got {x.dtype}")
        if port.integer:
            return x.contiguous().view(torch.float32)
        plain = x.dtype is torch.float32 and x.is_contiguous() and not x.is_neg()
        return x if plain else x.float().resolve_neg().contiguous()


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
    sequences: bool = False  # dimension 0 counts as batch where the graph has it elsewhere: recurrences alone

    @cached_property
    def users(self) -> Mapping[str, Sequence[Step]]:
        """The steps that read each value."""
        return self.plan.users()

    def add(self, step: Step) -> str | None:
        """Add a step; gives the reason if it cannot be."""
        if not self.steps:
            self.rows = isinstance(step, Linear) and self.plan.values[step.input].sample is None
            self.sequences = isinstance(step, Recurrence) and self.plan.values[step.products].sample is None
        try:
            made = self._add(step)
        except (CannotError, NativeError) as error:
            return str(error)
        self.steps.append(step)
        layout, number = made
        self.ids[step.output, CHANNELS_FIRST if layout is None else layout] = number
        self.layouts[step.output] = layout
        channels, height, width = self.builder.shape(number)
        known = self.plan.values[step.output].sample
        if self.sequences:
            known = self.options.shapes[step.output][1:]
        self.shapes[step.output] = (channels,) if self.rows else known if known is not None else ()
        expected = geometry(self.shapes[step.output], CHANNELS_FIRST if layout is None else layout)
        if (channels, height, width) != expected:
            raise AssertionError(f"{step.name}: the plan says {expected}, the program {(channels, height, width)}")
        return None

    def finish(self) -> NativeSegment:
        """The program of the steps so far."""
        own, users = {step.output for step in self.steps}, self.users
        outputs = []
        for step in self.steps:
            outside = any(user.output not in own for user in users[step.output])
            if outside or step.output in self.plan.outputs:
                layout = self.layouts[step.output]
                layout = CHANNELS_FIRST if layout is None else layout
                outputs.append(self._output(step.output, layout))
        inputs = tuple(self.inputs.values())
        example = self.options.shapes[inputs[0].value]
        batch = max(1, math.prod(inputs[0].batch(example)))
        program = self._program(batch)
        rows = batch / self.options.samples
        return NativeSegment(program, inputs, tuple(outputs), tuple(step.output for step in self.steps), rows)

    def _output(self, value: str, layout: int) -> SegmentPort:
        """Make a value of the program an output of it."""
        self.builder.output(self.ids[value, layout], layout)
        return self._port(value, self.shapes[value])

    def _port(self, value: str, shape: tuple[int, ...]) -> SegmentPort:
        """The port of a value whose sample has that shape."""
        fold = 1 if self.rows or self.sequences else self.plan.values[value].fold
        return SegmentPort(value, shape if fold == 1 else shape[1:], fold=fold)

    def _program(self, batch: int) -> Program:
        """The program of the steps, its kernels chosen for so many samples."""
        measured = next((self.measured[step.output] for step in self.steps if step.output in self.measured), None)
        return self.builder.finish(
            batch=batch, threads=self.options.threads, tune_seconds=self._tune_seconds(), measured=measured
        )

    def _tune_seconds(self) -> float:
        """Give this program's share of the time to measure in."""
        kinds = (Conv, Linear, Recurrence)
        layers = [len([s for s in steps if isinstance(s, kinds)]) for steps in (self.steps, self.plan.steps)]
        return self.options.tune_seconds * layers[0] / max(1, layers[1])

    def _add(self, step: Step) -> tuple[int | None, int]:
        """Layout and number of the value that the step makes."""
        name = step.output  # what it is known by in the profile
        if isinstance(step, Recurrence) if self.rows else self.sequences and not isinstance(step, Recurrence):
            raise CannotError("its samples are not those of the steps before")
        match step:
            case Conv():
                x, *residual = self._values(step.inputs, CHANNELS_FIRST)
                return CHANNELS_FIRST, self._conv(step, x, *residual)
            case ConvTranspose():
                (x,) = self._values(step.inputs, CHANNELS_FIRST)
                return CHANNELS_FIRST, self._conv_transpose(step, x)
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
                layout = CHANNELS_FIRST if step.axis == 1 else CHANNELS_LAST
                layout = self._elementwise_layout(step) if even else layout
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
            case Embedding():
                return self._embedding(step)
            case Reduce():
                return self._reduce(step)
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
                if self.layouts.get(step.input) == CHANNELS_LAST:
                    shape = self._shape(step.input)
                    whole = math.prod(shape)
                    return self._copy(
                        View(**labels(step), input=step.input, numbers=whole, sizes=(whole,), strides=(1,))
                    )
                (x,) = self._values(step.inputs, CHANNELS_FIRST)
                return None, self.builder.flatten(x, name=name)
            case View():
                return self._view(step)
            case Join():
                return self._join(step)
            case Norm():
                return self._norm(step)
            case GroupNorm():
                (x,) = self._values(step.inputs, CHANNELS_FIRST)
                number = self._normalised("group norm", step, x, [bits(step.eps), step.groups])
                return self._layout_of(step.input, CHANNELS_FIRST), number
            case Placed():
                return self._placed(step)
            case Pointwise():
                return self._pointwise(step)
            case Recurrence():
                return CHANNELS_LAST, self._recurrence(step)
            case LSTMCell() | GRUGates():
                return None, self._gates(step)
        raise CannotError(f"there is no native {step.kind}")

    def _conv(self, step: Conv, x: int, residual: int = -1) -> int:
        windows = _Windows(self._shape(step.input)[1:], step.weight.shape[2:], step.stride, step.dilation, step.padding)
        return self.builder.conv(
            x,
            step.weight[:, :, None] if step.weight.dim() == 3 else step.weight,
            step.bias,
            stride=windows.stride,
            dilation=windows.dilation,
            padding=windows.padding,
            depth=windows.depth,
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

    def _conv_transpose(self, step: ConvTranspose, x: int) -> int:
        """A convolution to all phases of the result, and their shuffle."""
        made = phases(step, self._shape(step.input)[1:])
        ones = (1,) * len(step.stride)
        conv = Conv(
            **labels(step),
            input=step.input,
            weight=made.weight,
            bias=made.bias,
            stride=ones,
            padding=made.padding,
            dilation=ones,
            groups=step.groups,
            activation=step.activation,
        )
        places = self._conv(conv, x)
        numbers, count = list[int](), math.prod(step.stride)
        before, after = row_major(made.made), row_major(made.sizes)  # pixels from one place of an axis to the next
        for phase, begin in enumerate(itertools.product(*map(range, step.stride))):
            rest = [-(-(size - at) // s) for size, at, s in zip(made.sizes, begin, step.stride, strict=True)]
            if min(rest) < 1:
                continue
            pixel = sum(at * each for at, each in zip(begin, after, strict=True))
            numbers += [1 + len(rest), phase, 0, 0, pixel]  # channel and pixel in what it reads, and in the result
            numbers += [len(step.weight), count, 0, 1, 0]
            for each in zip(rest, before, step.stride, after, strict=True):
                numbers += [each[0], 0, each[1], 0, each[2] * each[3]]
        parts = len(numbers) // (10 + 5 * len(step.stride))
        shape = (*geometry((len(step.weight), *made.sizes), CHANNELS_FIRST), parts)
        return self.builder.tensor("view", [places] * parts, [*shape, *numbers], name=step.output)

    def _placed(self, step: Placed) -> tuple[int | None, int]:
        if self.rows:
            raise CannotError("its samples are not those of the network")
        shapes = {name: self._shape(name) for name in step.inputs}
        layouts = dict[str, tuple[int, ...]]()
        for name in step.inputs:
            made = self.layouts.get(name)
            layouts[name] = (CHANNELS_LAST, CHANNELS_FIRST) if made is None else (made,)
        users = self.plan.users()[step.output]
        linear = any(isinstance(user, Linear) or (isinstance(user, Norm) and user.axis == -1) for user in users)
        layouts[step.output] = (CHANNELS_LAST,) if linear else (CHANNELS_LAST, CHANNELS_FIRST)
        found = describe(step, shapes, layouts)
        if found is None:
            raise CannotError("its numbers lie in another order than a program has them")
        xs = [self._value(name, layout) for name, layout in found.values]
        number = self.builder.tensor(found.function, xs, found.numbers, found.constants, name=step.output)
        return None if len(step.shape) == 1 else found.layout, number

    def _resize(self, step: Resize, x: int) -> int:
        sizes = self._shape(step.input)[1:]
        tables = [places(step, sizes, axis) for axis in (0, 1)]
        numbers = [int(step.mode == "bilinear"), *step.sizes, *(int(place) for taken, _ in tables for place in taken)]
        shares = [share for _, share in tables] if step.mode == "bilinear" else []
        return self.builder.tensor("resize", [x], numbers, shares, name=step.output)

    def _embedding(self, step: Embedding) -> tuple[int | None, int]:
        made, value = self.plan.values[step.output].sample, self.plan.values[step.input]
        if self.rows or not made or value.shape is None:
            raise CannotError("its samples are not those of the network")
        key = (step.input, CHANNELS_FIRST)
        if key not in self.ids:
            port = SegmentPort(step.input, value.shape, integer=value.dtype.itemsize)
            self.ids[key] = self.builder.input((port.numbers, 1, 1), CHANNELS_FIRST, step.input)
            self.inputs[key] = port
        reduction = -1 if step.reduction is None else REDUCTIONS.index(step.reduction)
        pixels = geometry(made, CHANNELS_LAST)[1:]
        numbers = [value.dtype.itemsize // 4, len(step.weight), reduction, *pixels]
        number = self.builder.tensor("embedding", [self.ids[key]], numbers, [step.weight], name=step.output)
        return None if len(made) == 1 else CHANNELS_LAST, number

    def _reduce(self, step: Reduce) -> tuple[int | None, int]:
        if self.rows:
            raise CannotError("its samples are not those of the network")
        shape, first = self._shape(step.input), self._elementwise_layout(step)
        whole = {layout: over(shape, step.axes, layout) for layout in (first, 1 - first)}
        layout = next((each for each, axes in whole.items() if axes is not None), None)
        if layout is None:
            raise CannotError("its axes are no channels, rows or columns")
        (x,) = self._values(step.inputs, layout)
        numbers = [REDUCTIONS.index(step.op), whole[layout] or 0]
        made = self.builder.tensor("reduce", [x], numbers, name=step.output)
        kept = tuple(1 if axis in step.axes else size for axis, size in enumerate(shape))
        sizes = kept if step.keepdim else tuple(size for axis, size in enumerate(shape) if axis not in step.axes)
        wanted = self._wanted(step.output)
        to = layout if wanted is None or step.keepdim else wanted
        if geometry(sizes, to) != geometry(kept, layout) or (to != layout and len(sizes) > 1):
            count = math.prod(sizes)
            view = View(**labels(step), input=step.output, numbers=count, sizes=sizes, strides=row_major(sizes))
            moved = described(view, kept, layout, to)
            assert moved is not None
            made = self.builder.tensor("view", [made], [*geometry(sizes, to), 1, *moved], name=step.output)
        return None if len(sizes) == 1 else to, made

    def _pointwise(self, step: Pointwise) -> tuple[int | None, int]:
        made = self.plan.values[step.output].shape
        if made is None or self.rows or any(len(self._shape(name, 3)) != len(made) for name in step.operands):
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
        if any(len(self._shape(name)) != 1 for name in step.inputs):
            raise CannotError("its state is no vector")
        values, mode, table = self._values(step.inputs, CHANNELS_FIRST), step.mode, step.table
        match step:
            case LSTMHidden():
                return self.builder.lstm_hidden(*values, mode=mode, table=table, name=step.output)
            case LSTMCell():
                return self.builder.lstm_cell(*values, mode=mode, table=table, name=step.output)
        return self.builder.gru(*values, mode=mode, table=table, name=step.output)

    def _recurrence(self, step: Recurrence) -> int:
        (products,) = self._values((step.products,), CHANNELS_LAST)
        states = self._values(step.states, CHANNELS_FIRST)
        hidden = step.weight.shape[1]
        return self.builder.recurrence(
            products,
            states,
            step.weight,
            None if step.bias is None else torch.nn.functional.pad(step.bias, (2 * hidden, 0)),
            reverse=step.reverse,
            cells=step.cells,
            mode=step.mode,
            table=step.table,
            storage=self.options.storage,
            choice=self.options.choice,
            name=step.output,
        )

    def _pool(self, step: Pool, x: int) -> int:
        sizes = self._shape(step.input)[1:]
        outs = (self.plan.values[step.output].shape or ())[1:]
        ends = []
        for axis, size in enumerate(sizes):
            reach = (outs[axis] - 1) * step.stride[axis] + step.dilation[axis] * (step.kernel[axis] - 1) + 1
            ends.append(reach - size - step.padding[axis] if step.ceil_mode else step.padding[axis])
            if step.op == "average" and step.count_include_pad and ends[-1] > step.padding[axis]:
                raise CannotError("the native average pool does not divide by windows cut off by ceil_mode")
        pads = tuple(zip(step.padding, (max(0, end) for end in ends), strict=True))
        windows = _Windows(sizes, step.kernel, step.stride, step.dilation, pads)
        return self.builder.pool(
            x,
            average=step.op == "average",
            count_padding=step.count_include_pad,
            kernel=windows.kernel,
            stride=windows.stride,
            dilation=windows.dilation,
            padding=windows.padding,
            depth=windows.depth,
            name=step.output,
        )

    def _shape(self, value: str, most: int | None = None) -> tuple[int, ...]:
        """The shape of a value behind the axes that count as batch; of at most so many axes."""
        if self.rows and value not in self.shapes:
            return self.options.shapes[value][-1:]
        if self.sequences and value not in self.shapes:
            return self.options.shapes[value][1:]
        shape = self.shapes.get(value, self.plan.values[value].sample)
        if not shape or (most is not None and len(shape) > most):
            raise CannotError("its shape is only known when it runs" if not shape else "it has too many axes")
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
        return self._wanted(step.output) or CHANNELS_FIRST

    def _wanted(self, value: str) -> int | None:
        """The layout that the first reader of a value which has one needs it in."""
        for user in self.users.get(value, ()):
            if isinstance(user, (Linear, Recurrence)) or (isinstance(user, Norm) and user.axis == -1):
                return CHANNELS_LAST
            if isinstance(user, (Conv, Pool, GlobalAverage, Upsample, Concat, Norm)):
                return CHANNELS_FIRST
        return None

    def _view(self, step: View) -> tuple[int | None, int]:
        """A view of a value of the program, where a copy here costs less than PyTorch's view outside."""
        if self.rows or step.input not in self.layouts:
            raise CannotError("what it views is made elsewhere: PyTorch copies nothing")
        readers = self.users[step.output]
        outside = [user for user in self.users[step.input] if not isinstance(user, (View, *_READS_PLANES))]
        torch_alone = step.output in self.plan.outputs or not any(isinstance(user, NATIVE) for user in readers)
        if torch_alone and (in_order(step) or outside or step.input in self.plan.outputs):
            raise CannotError("PyTorch reads both what it views and the view, and copies nothing")
        return self._copy(step)

    def _copy(self, step: View) -> tuple[int | None, int]:
        """A view as a copy between planes, or as a range of channels that needs none."""
        layout, wanted = self.layouts[step.input], self._wanted(step.output)
        from_layout = CHANNELS_FIRST if layout is None else layout
        x, shape, sizes = self.ids[step.input, from_layout], self._shape(step.input), step.sizes
        if not sizes:
            raise CannotError("it has no axes")
        found = {to: described(step, shape, from_layout, to) for to in (CHANNELS_FIRST, CHANNELS_LAST)}
        if wanted is None:
            free = [to for to, numbers in found.items() if numbers is not None and is_range(numbers)]
            wanted = free[0] if free else CHANNELS_FIRST
        numbers = found[wanted]
        if numbers is None:
            raise CannotError("its numbers lie in no even steps")
        made = self.builder.tensor("view", [x], [*geometry(sizes, wanted), 1, *numbers], name=step.output)
        return None if len(sizes) == 1 else wanted, made

    def _join(self, step: Join) -> tuple[int | None, int]:
        """Parts of values as copies between planes, at least one of them of a value of the program."""
        if self.rows or not any(name in self.layouts for name in step.inputs):
            raise CannotError("its parts are made elsewhere: PyTorch copies them as fast")
        there = [layout for name in step.inputs if (layout := self.layouts.get(name)) is not None]
        known, wanted = (there or [CHANNELS_LAST])[0], self._wanted(step.output)
        wanted = known if wanted is None else wanted
        numbers, operands = list[int](), list[tuple[str, int]]()
        for places, shape, begin in zip(step.parts, step.shapes, step.begins, strict=True):
            layout = self.layouts.get(places.value, wanted)
            layout = CHANNELS_FIRST if layout is None else layout
            part = of_places(step, places, shape)
            known_shape = self._shape(places.value)
            found = described(part, known_shape, layout, wanted, step.sizes, begin)
            if found is None:  # in the other layout they may
                layout = 1 - layout
                found = described(part, known_shape, layout, wanted, step.sizes, begin)
                if found is None or len(known_shape) == 1:
                    raise CannotError("its numbers lie in no even steps")
                if places.value in self.layouts:
                    self._turn(places.value, layout)
            operands.append((places.value, layout))
            numbers += found
        xs = [self._value(name, layout) for name, layout in operands]
        about = [*geometry(step.sizes, wanted), len(xs), *numbers]
        made = self.builder.tensor("view", xs, about, name=step.output)
        return None if len(step.sizes) == 1 else wanted, made

    def _turn(self, name: str, layout: int) -> None:
        """Lay a value of the program out in the other layout, too."""
        if (name, layout) not in self.ids:
            shape = self._shape(name)
            whole = math.prod(shape)
            same = View(name=name, output=name, input=name, numbers=whole, sizes=shape, strides=row_major(shape))
            numbers = described(same, shape, 1 - layout, layout)
            assert numbers is not None
            about = [*geometry(shape, layout), 1, *numbers]
            self.ids[name, layout] = self.builder.tensor("view", [self.ids[name, 1 - layout]], about, name=name)

    def _values(self, names: tuple[str, ...], layout: int) -> list[int]:
        """The numbers of values in that layout; those made elsewhere become inputs."""
        for name in names:
            made = self.layouts.get(name, layout)
            if made is not None and made != layout:
                self._turn(name, layout)
            if self.rows and name not in self.layouts:
                if len(self.options.shapes[name]) < 2:
                    raise CannotError("it has too few axes")
                first = next((port.value for port in self.inputs.values()), name)
                if not self._same_rows(name, first):
                    raise CannotError("it has other rows than what runs before")
            self._shape(name)
        return [self._value(name, layout) for name in names]

    def _value(self, name: str, layout: int) -> int:
        shape = self._shape(name, None)
        key = self._key(name, layout)
        if key not in self.ids:
            self.ids[key] = self.builder.input(geometry(shape, key[1]), key[1], name)
            self.inputs[key] = self._port(name, shape)
        return self.ids[key]

    def _key(self, name: str, layout: int) -> tuple[str, int]:
        """What a value is known by: vectors have one layout."""
        vector = len(self._shape(name, None)) == 1 or self.layouts.get(name, 0) is None
        return name, CHANNELS_FIRST if vector else layout


def over(shape: Sequence[int], axes: Sequence[int], layout: int) -> int | None:
    """The axes of a sample as those of planes: 1 channels, 2 rows, 4 columns, added up; None where they are none."""
    count = len(shape)
    order = [*range(count)] if layout == CHANNELS_FIRST else [count - 1, *range(count - 1)]
    found = 0
    for bit, part in ((1, order[:1]), (2, order[1:-1]), (4, order[1:][-1:])):
        inside = {axis in axes for axis in part if shape[axis] > 1}
        if len(inside) > 1:
            return None
        found |= bit if True in inside else 0
    return found or None


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


def samples(shape: Sequence[int]) -> int:
    """How many samples an input of the network holds."""
    return shape[0] if shape else 1


def planes(shape: tuple[int, ...], layout: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sizes of channels and pixels of a sample in the order in which it counts them, and which are the channels."""
    channels, height, width = geometry(shape, layout)
    pixels = height * width
    return ((channels, pixels), (0, 1)) if layout == CHANNELS_FIRST else ((pixels, channels), (1, 0))


def described(
    view: View,
    shape: tuple[int, ...],
    layout: int,
    to: int,
    whole: tuple[int, ...] | None = None,
    begin: tuple[int, ...] = (),
) -> list[int] | None:
    """One part of a native view (``rarefy_function``): of a value of that shape and layout, to another layout.

    It is the whole result, or what begins there in one of the shape ``whole``.

    None where a stride of it is no step along channels or pixels.
    """
    sizes, (channel, pixel) = planes(shape, layout)
    found = apart(view, sizes)
    if found is None:
        return None
    whole = whole or view.sizes
    (*_, fastest), (channel_out, pixel_out) = planes(whole, to)
    entries, dimensions = row_major(whole), list[int]()
    first = divmod(sum(at * entry for at, entry in zip(begin, entries, strict=False)), fastest)
    for atoms, entry in zip(found.atoms, entries, strict=True):
        step = entry * math.prod(atom.size for atom in atoms)
        for atom in atoms:
            step //= atom.size
            into = divmod(step, fastest) if step >= fastest else (0, step)
            moved = [0, 0]
            moved[atom.axis] = atom.step
            dimensions += [atom.size, moved[channel], moved[pixel], into[channel_out], into[pixel_out]]
    start = [found.start[channel], found.start[pixel], first[channel_out], first[pixel_out]]
    return [len(dimensions) // 5, *start, *dimensions]


def is_range(part: Sequence[int]) -> bool:
    """Whether a part of a native view takes channels as they are."""
    count, _, pixel, *_ = part
    steps = [part[at + 1 : at + 5] for at in range(5, 5 + 5 * count, 5)]
    return pixel == 0 and all(a == c and b == d for a, b, c, d in steps)


def labels(step: Step) -> dict[str, Any]:
    """The name of a step and of what it makes."""
    return {"name": step.name, "output": step.output}


class _Windows:
    """Windows along one, two or three axes of these sizes, as a builder takes them."""

    def __init__(
        self,
        sizes: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        padding: Sequence[tuple[int, int]],
    ) -> None:
        self.kernel, self.stride, self.dilation = (_two(each, 1) for each in (kernel, stride, dilation))
        top_bottom, left_right = _two(padding, (0, 0))
        self.padding = (*top_bottom, *left_right)
        deep = len(sizes) == 3
        self.depth = Depth(sizes[0], kernel[0], stride[0], dilation[0], padding[0]) if deep else None


def _two(sizes: Sequence[Any], first: Any) -> tuple[Any, Any]:
    """A pair, of rows and columns, from sizes along one axis or more."""
    return (first, sizes[0]) if len(sizes) == 1 else (sizes[-2], sizes[-1])
