"""A recurrent layer over a sequence as a native program of one step, which is run for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rarefy.engine.building import CannotError, NativeSegment, Options, SegmentPort
from rarefy.engine.plan import Layer, Plan, Recurrence
from rarefy.engine.programs import CHANNELS_FIRST, Builder, Program


@dataclass(frozen=True, eq=False, kw_only=True)
class RecurrentSegment(NativeSegment):
    """A program of one step in the place of a :class:`Recurrence`.

    Its first input are the products of all steps, its first output is y; the others are states. It makes one value, a
    tuple of what comes out.
    """

    reverse: bool

    @property
    def output(self) -> str:
        """The value that it makes."""
        return self.steps[0]

    @property
    def makes(self) -> tuple[str, ...]:
        """The tuple."""
        return self.steps

    def run(
        self, threads: int, *values: Tensor, seconds: np.ndarray[Any, np.dtype[np.float64]] | None = None
    ) -> list[Any]:
        """The tuple, in a list; the time of each step of the program is added to ``seconds``."""
        products, *states = (self._input(x, port) for x, port in zip(values, self.inputs, strict=True))
        batch, rows = states[0].shape[0], products.shape[0]
        self.check(tuple(products.shape), [tuple(state.shape) for state in states])
        y = torch.empty(rows, *self.outputs[0].shape)
        after = [torch.empty_like(state) for state in states]
        if batch:
            self.program.run_steps(
                *([products, *states], [y, *after], batch, threads, seconds), steps=rows // batch, reverse=self.reverse
            )
        return [(y, *after)]

    def check(self, products: tuple[int, ...], states: list[tuple[int, ...]]) -> None:
        """Raise ValueError unless there are as many rows of each state, and of products some times as many."""
        batch = states[0][0]
        whole = products[0] % batch == 0 and products[0] > 0 if batch else products[0] == 0
        if {len(products), *map(len, states)} != {2} or any(state[0] != batch for state in states) or not whole:
            raise ValueError(
                f"{self.inputs[0].value} of the shape {products} is no whole number of steps of states of the shapes "
                f"{', '.join(map(str, states))}"
            )


def recurrent(plan: Plan, step: Recurrence, options: Options, measured: Mapping[str, Program]) -> RecurrentSegment:
    """The program of a recurrence. Raises CannotError or NativeError where there is none, or none that is of use."""
    batch, hidden = options.shapes[step.states[0]]
    builder, count = Builder(), len(step.weight)
    products = builder.input((count, 1, 1), CHANNELS_FIRST, step.products)
    states = [builder.input((hidden, 1, 1), CHANNELS_FIRST, name) for name in step.states]
    lstm, how = step.kind == "lstm", {"mode": step.mode, "table": step.table}
    bias = None if step.bias is None else torch.nn.functional.pad(step.bias, (2 * hidden, 0))
    gates = builder.conv(
        states[0],
        step.weight[:, :, None, None],
        bias,
        residual=products if lstm else -1,
        storage=options.storage,
        choice=options.choice,
        name=step.output,
    )
    if lstm:
        cell = builder.lstm_cell(gates, states[1], **how, name=f"{step.name} cell")
        after = [builder.lstm_hidden(gates, cell, **how, name=f"{step.name} hidden"), cell]
    else:
        after = [builder.gru(products, gates, states[0], **how, name=f"{step.name} gates")]
    for value in (after[0], *after):  # y is h of every step
        builder.output(value, CHANNELS_FIRST)
    layers = sum(isinstance(each, (Layer, Recurrence)) for each in plan.steps)
    program = builder.finish(
        batch=max(1, batch),
        threads=options.threads,
        tune_seconds=options.tune_seconds / layers,
        measured=measured.get(step.output),
    )
    if options.choice == "measure" and not any(each.kernel.startswith("sparse") for each in program.steps()):
        raise CannotError("few of its weights are zero: rarefy's kernel for dense ones runs it")
    names = (step.products, *step.states)
    shapes = ((count,), *((hidden,) for _ in states))
    return RecurrentSegment(
        program=program,
        inputs=tuple(map(SegmentPort, names, shapes)),
        outputs=tuple(SegmentPort(f"{step.output}.{name}", (hidden,)) for name in ("y", "h", "c")[: 1 + len(states)]),
        steps=(step.output,),
        rows=options.shapes[step.products][0] / options.samples,
        reverse=step.reverse,
    )
