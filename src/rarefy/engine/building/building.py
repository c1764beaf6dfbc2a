"""The building of native programs from steps of a plan that follow each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rarefy.engine import plan
from rarefy.engine.binding import CHANNELS_FIRST, NativeError
from rarefy.engine.building import arithmetic, layers, moving, places
from rarefy.engine.building.draft import CannotError, Draft, Made
from rarefy.engine.building.segments import NativeSegment, SegmentPort
from rarefy.engine.places import geometry
from rarefy.engine.plan import Conv, Linear, Recurrence, Step
from rarefy.engine.programs import Program

#: What adds each kind of step to a program; it raises CannotError or NativeError for one that does not go into it.
_ADD: Mapping[type[Step], Callable[[Draft, Any], Made]] = {
    plan.Conv: layers.conv,
    plan.ConvTranspose: layers.conv_transpose,
    plan.Linear: layers.linear,
    plan.Norm: layers.norm,
    plan.GroupNorm: layers.group_norm,
    plan.Embedding: layers.embedding,
    plan.LSTMCell: layers.gates,
    plan.LSTMHidden: layers.gates,
    plan.GRUGates: layers.gates,
    plan.Recurrence: layers.recurrence,
    plan.Affine: arithmetic.affine,
    plan.Binary: arithmetic.binary,
    plan.Pointwise: arithmetic.pointwise,
    plan.Pool: arithmetic.pool,
    plan.GlobalAverage: arithmetic.global_average,
    plan.Reduce: arithmetic.reduce,
    plan.Concat: moving.concat,
    plan.Upsample: moving.upsample,
    plan.Resize: moving.resize,
    plan.Flatten: moving.flatten,
    plan.View: moving.view,
    plan.Join: moving.join,
    plan.MatMul: places.placed,
    plan.Softmax: places.placed,
    plan.Attention: places.placed,
}


@dataclass
class Building(Draft):
    """A program that is being built; ``measured`` are programs whose kernels its steps take, by what the steps make."""

    measured: Mapping[str, Program] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

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
        return self.port(value, self.shapes[value])

    def _program(self, batch: int) -> Program:
        """The program of the steps, its kernels chosen for so many samples."""
        measured = next((self.measured[step.output] for step in self.steps if step.output in self.measured), None)
        return self.builder.finish(
            batch=batch, threads=self.options.threads, tune_seconds=self._tune_seconds(), measured=measured
        )

    def _tune_seconds(self) -> float:
        """Give this program's share of the time to measure in."""
        kinds = (Conv, Linear, Recurrence)
        own, all_ = (sum(isinstance(step, kinds) for step in steps) for steps in (self.steps, self.plan.steps))
        return self.options.tune_seconds * own / max(1, all_)

    def _add(self, step: Step) -> Made:
        """Layout and number of the value that the step makes."""
        if isinstance(step, Recurrence) if self.rows else self.sequences and not isinstance(step, Recurrence):
            raise CannotError("its samples are not those of the steps before")
        if type(step) not in _ADD:
            raise CannotError(f"there is no native {step.kind}")
        return _ADD[type(step)](self, step)
