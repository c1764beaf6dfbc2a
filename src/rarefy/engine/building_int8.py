"""Steps on quantised values as one native int8 program."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from rarefy.engine.builder import LAYOUTS, Layout, Result
from rarefy.engine.building import Building, CannotError, NativeSegment, Options, SegmentPort, laid
from rarefy.engine.explicit import on_cpu
from rarefy.engine.int8 import Int8, bounds, levels, packed, unpacked
from rarefy.engine.places import geometry
from rarefy.engine.plan import (
    Binary,
    Conv,
    Dequantize,
    GlobalAverage,
    Linear,
    Plan,
    Pool,
    Quantize,
    Quantized,
    Step,
    Table,
)
from rarefy.engine.programs import Int8Program

#: What a layer may end with where it gives float32.
_FLOAT_BOUNDS = {"none": (-np.inf, np.inf), "relu": (0.0, np.inf), "relu6": (0.0, 6.0)}


#: How often the programs to choose from run at least and at most.
_LEAST_ROUNDS, _ROUNDS = 3, 10


@dataclass(frozen=True, eq=False, kw_only=True)
class Int8Segment(NativeSegment):
    """A native int8 program, and what it was made of, to be made again by a copy and a file.

    ``source`` is a plan of its steps alone, with :func:`rarefy.engine.int8.packed` weights.
    """

    source: Plan
    options: Options

    def __reduce__(self) -> Any:
        return again, (self.source, self.options)


@on_cpu()
def again(source: Plan, options: Options) -> Int8Segment:
    """The segment of a plan all of whose steps one int8 program computes. Raises ValueError for another."""
    quantizers = {step.output: step for step in source.steps if isinstance(step, Quantize)}
    building = Int8Building(source, options, quantizers=quantizers)
    for step in source.steps:
        if isinstance(step, Quantize):
            continue
        reason = building.add(unpacked(step))  # one after the other: all in float32 would be four times the memory
        if reason is not None:
            raise ValueError(f"{step.name} does not go into an int8 program: {reason}")
    return building.finish()


@dataclass
class Int8Building(Building):
    """An int8 program that is being built; ``quantizers`` are steps that nobody has run yet, by what they make.

    Where there is time to measure in, each layer takes its weights as is fastest: a program of either kind is run.
    """

    quantizers: Mapping[str, Quantize] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)  # of the builder's steps
    layers: dict[str, int] = field(default_factory=dict)  # where in them those of layers are
    makes: list[SegmentPort] = field(default_factory=list)
    chosen: dict[str, Layout] = field(default_factory=dict)  # how layers take their weights, once the program is made

    def add(self, step: Step) -> str | None:
        """Add a step, which is kept with packed weights; gives the reason if it cannot be."""
        reason = super().add(step)
        if reason is None:
            self.steps[-1] = packed(step)
        return reason

    def _add(self, step: Step) -> tuple[int | None, int]:
        values = self.plan.values
        operands = tuple(values[name].quantized for name in step.inputs)
        item = Int8(step, operands, values[step.output].quantized)
        if isinstance(step, Conv | Pool) and len(step.stride) > 2:
            raise CannotError("native layers of three axes are float32")
        if isinstance(step, Dequantize):
            if step.input not in self.layouts:
                raise CannotError("what it reads is made elsewhere")
            layout = self.layouts[step.input]
            return layout, self.ids[step.input, layout or 0]
        result = _result(item)
        made = self._table(step) if isinstance(step, Table) else super()._add(_bare(step))
        if isinstance(step, (Conv, Linear)):
            self.layers[step.output] = len(self.results)
        self.results.append(result)
        return made

    def _table(self, step: Table) -> tuple[int | None, int]:
        layout = self.elementwise_layout(step)
        (x,) = self.values(step.inputs, layout)
        return laid(self.shape(step.input), layout), self.builder.affine(x, None, None, "none", name=step.output)

    def turn(self, name: str, layout: int) -> None:
        """Raise CannotError: bytes lie as they were made."""
        raise CannotError("it needs its input in another order of axes")

    def value(self, name: str, layout: int) -> int:
        """The number of a value in that layout; one made elsewhere becomes an input, of bytes or of their numbers."""
        shape = self.shape(name)
        key = self.key(name, layout)
        if key not in self.ids:
            of = self.plan.values[name].quantized
            assert of is not None  # all that a step on bytes reads
            self.ids[key] = self.builder.input(geometry(shape, key[1]), key[1], name)
            quantizer = self.quantizers.get(name)
            if quantizer is None:
                self.results.append(Result(zero_point=of.zero_point, multiplier=1.0))
                self.inputs[key] = replace(self.port(name, shape), quantized=of)
            else:
                self.results.append(
                    Result(zero_point=of.zero_point, multiplier=_float32(1 / of.scale), bias=of.zero_point)
                )
                self.inputs[key] = replace(self.port(name, shape), value=quantizer.input)
        return self.ids[key]

    def _output(self, value: str, layout: int) -> SegmentPort:
        """Make a value of the program an output of it."""
        port = super()._output(value, layout)
        of = self.plan.values[value].quantized
        made = next(step for step in self.steps if step.output == value)
        scale = 1.0
        if isinstance(made, Dequantize):
            from_ = self.plan.values[made.input].quantized
            assert from_ is not None
            scale = from_.scale
        self.results.append(Result(multiplier=scale))
        self.makes.append(port)
        return replace(port, quantized=of)

    def finish(self) -> Int8Segment:
        """The program of the steps so far, and they."""
        segment = super().finish()
        taken = {port.value for port in segment.inputs}
        read = {name for step in self.steps for name in step.inputs}
        quantizers = [step for step in self.quantizers.values() if step.output in read and step.input in taken]
        steps = (*quantizers, *self.steps)
        known = {*segment.reads, *(step.output for step in steps)}
        source = Plan(
            inputs=segment.reads,
            outputs=segment.makes,
            single=False,
            steps=steps,
            values={name: value for name, value in self.plan.values.items() if name in known},
            constants={},
            batch=self.plan.batch,
        )
        shapes = {name: shape for name, shape in self.options.shapes.items() if name in known}
        options = replace(self.options, shapes=shapes, layouts=self.chosen)
        return Int8Segment(**{each.name: getattr(segment, each.name) for each in fields(segment)}, source=source,
                           options=options)  # fmt: skip

    def _program(self, batch: int) -> Int8Program:
        given = {name: layout for name, layout in self.options.layouts.items() if name in self.layers}
        self.chosen = given if given or not self.options.tune_seconds else self._fastest(batch)
        return self._taking(self.chosen, batch)

    def _taking(self, layouts: Mapping[str, Layout], batch: int) -> Int8Program:
        """The program whose layers take their weights so, those that are left out by rule."""
        results = list(self.results)
        for name, layout in layouts.items():
            results[self.layers[name]] = replace(results[self.layers[name]], layout=layout)
        return self.builder.finish_int8(results, batch=batch, threads=self.options.threads)

    def _fastest(self, batch: int) -> dict[str, Layout]:
        """How each layer that may be taken in several ways takes the least time, with the copies that it reads."""
        programs = {layout: self._taking(dict.fromkeys(self.layers, layout), batch) for layout in LAYOUTS}
        kernels = {layout: [step.kernel for step in program.steps()] for layout, program in programs.items()}
        open_ = {name: i for name, i in self.layers.items() if len({kernels[layout][i] for layout in LAYOUTS}) > 1}
        if not open_:
            return {}
        outputs = [torch.empty((batch, *port.shape), dtype=torch.float32) for port in self.makes]
        inputs = [torch.zeros((batch, *port.shape), dtype=torch.float32) for port in self.inputs.values()]
        least = {layout: np.full(program.facts.steps, np.inf) for layout, program in programs.items()}
        end = time.thread_time() + self._tune_seconds()
        for done in range(_ROUNDS):
            if done >= _LEAST_ROUNDS and time.thread_time() > end:
                break
            for layout, program in programs.items():
                seconds = np.zeros_like(least[layout])
                program.run(inputs, outputs, batch, 1, seconds)
                np.minimum(least[layout], seconds, out=least[layout])
        return {name: min(LAYOUTS, key=lambda layout: float(least[layout][i])) for name, i in open_.items()}


def _bare(step: Step) -> Step:
    """The step without what its result says: its weights are whole numbers."""
    match step:
        case Conv() | Linear():
            return replace(step, weight=levels(step), bias=None, activation="none")
        case Binary():
            return replace(step, activation="none")
    return step


def _float32(number: float) -> float:
    return float(np.float32(number))


def _result(item: Int8) -> Result:
    """What the native program is told of a step; :mod:`rarefy.engine.int8` has the formulas."""
    step, to = item.step, item.result
    of = item.operands[0]
    assert of is not None
    match step:
        case Conv() | Linear():
            return _layer(item, step, of)
        case Binary():
            return _binary(step, of, item.operands[-1], to)
        case GlobalAverage() | Pool(op="average"):
            assert to is not None
            return Result(zero_point=to.zero_point, ratio=of.scale / to.scale)
        case Table():
            assert to is not None
            return Result(zero_point=to.zero_point, table=step.table.contiguous())
    return Result(zero_point=of.zero_point)


def _layer(item: Int8, step: Conv | Linear, of: Quantized) -> Result:
    if item.result is not None:
        f = item.factors
        return Result(
            zero_point=item.result.zero_point,
            other=f.residual,
            low=f.low,
            high=f.high,
            multipliers=f.m,
            biases=f.b,
        )
    if step.activation not in _FLOAT_BOUNDS:
        raise CannotError(f"there is no native {step.activation} behind sums of bytes")
    scale, bias = item.float_factors
    low, high = _FLOAT_BOUNDS[step.activation]
    return Result(floats=True, low=low, high=high, multipliers=scale, biases=bias)


def _binary(step: Binary, x: Quantized, y: Quantized | None, to: Quantized | None) -> Result:
    assert y is not None
    assert to is not None
    low, high = bounds(step.activation, to)
    if step.op == "mul":
        both: dict[str, Any] = {"multiplier": _float32(x.scale * y.scale / to.scale), "bias": to.zero_point}
    else:
        m_x, m_y = x.scale / to.scale, y.scale / to.scale
        b = to.zero_point - x.zero_point * m_x - y.zero_point * m_y
        both = {"multiplier": _float32(m_x), "other": _float32(m_y), "bias": _float32(b)}
    return Result(zero_point=to.zero_point, low=low, high=high, **both)
