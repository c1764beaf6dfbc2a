"""Models that PyTorch's PT2E quantised: what stands between its quantize and dequantize operators computes in int8.

A value that is dequantised where it is read, computed with in float32 and quantised again is what a step in int8 does.
``torchao``'s ``convert_pt2e`` writes models so; activations in int8 become bytes with a zero point 128 higher. What
does not fit stays float32 between Quantize and Dequantize.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from rarefy.engine import int8
from rarefy.engine.plan import (
    Affine,
    Binary,
    Conv,
    Dequantize,
    GlobalAverage,
    Layer,
    Linear,
    Operator,
    Plan,
    Pool,
    Quantize,
    Quantized,
    Ref,
    Step,
    Table,
    Value,
)
from rarefy.engine.quantization import Quantization, QuantizedLayer

_LIBRARY = "quantized_decomposed"
_QUANTIZE, _DEQUANTIZE = (f"{_LIBRARY}.{name}_per_tensor.default" for name in ("quantize", "dequantize"))
#: What is added to the zero point of a dtype, and the bounds that all its numbers lie in.
_DTYPES = {torch.uint8: (0, (0, 255)), torch.int8: (128, (-128, 127))}


def is_quantized(model: nn.Module) -> bool:
    """Whether a model is a graph with PT2E's operators in it."""
    return isinstance(model, fx.GraphModule) and any(
        str(node.target).startswith(f"{_LIBRARY}.") for node in model.graph.nodes
    )


def read(plan: Plan) -> tuple[Plan, Quantization]:
    """Make a plan with PT2E's operators, optimized, one of quantised values; and tell which layers are."""
    return _Reading(plan).all()


@dataclass
class _Reading:
    """The steps of a plan as they become steps on bytes."""

    plan: Plan
    users: dict[str, list[Step]] = field(init=False)
    values: dict[str, Value] = field(init=False)
    steps: list[Step] = field(default_factory=list)
    bytes_of: dict[str, str] = field(default_factory=dict)  # of float32 values, and of what PT2E's operators make
    made: set[str] = field(init=False)
    layers: list[QuantizedLayer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.users, self.values = self.plan.users(), dict(self.plan.values)
        self.made = {*self.plan.inputs, *self.plan.constants}

    def all(self) -> tuple[Plan, Quantization]:
        """The whole plan and its report."""
        ours = {step.output: of for step in self.plan.steps if (of := self._ours(step)) is not None}
        for step in self.plan.steps:
            if step.output in ours:
                self._quantize(step, ours[step.output])
            elif _is(step, _DEQUANTIZE) and step.inputs[0] in ours:
                self.bytes_of[step.output] = self.bytes_of[step.inputs[0]]
            else:
                self._other(step, ours)
        for name in self.plan.outputs:
            self._float32(name)
        known = {*self.plan.inputs, *self.plan.outputs}
        known.update(name for step in self.steps for name in (*step.inputs, step.output))
        values = {name: value for name, value in self.values.items() if name in known}
        return (
            replace(self.plan, steps=tuple(self.steps), values=values),
            Quantization("given", 0, None, None, tuple(self.layers)),
        )

    def _ours(self, step: Step) -> Quantized | None:
        """What a quantize operator makes bytes of, where all that reads them takes them for that."""
        of = _meaning(step, _QUANTIZE)
        users = self.users[step.output]
        if of is None or step.output in self.plan.outputs or any(_meaning(user, _DEQUANTIZE) != of for user in users):
            return None
        return of

    def _quantize(self, step: Step, of: Quantized) -> None:
        """Bytes of a value: those that a step in int8 made, moved to another quantisation, or new ones."""
        (x,) = step.inputs
        if step.output in self.made:
            return
        before = self.bytes_of.get(x)
        self.bytes_of[step.output] = step.output
        if before is None:
            self._add(Quantize(name=step.name, input=x, output=step.output), of)
        elif (has := self.values[before].quantized) == of:
            self.bytes_of[step.output] = before
        else:
            assert has is not None
            table = int8.table("none", has, of)
            self._add(Table(name=step.name, input=before, output=step.output, table=table), of)

    def _other(self, step: Step, ours: dict[str, Quantized]) -> None:
        """A step that is none of PT2E's: on bytes where all that it reads is, and what it makes becomes it."""
        operands = [self.bytes_of.get(name) for name in step.inputs]
        meanings = [None if name is None else self.values[name].quantized for name in operands]
        made = self.users[step.output]
        into = made[0].output if len(made) == 1 and step.output not in self.plan.outputs else ""
        to = ours.get(into)
        if operands and None not in operands and int8.copies(step):
            if len({*meanings}) == 1:  # it copies bytes, whether or not PT2E says that they are quantised again
                self.bytes_of[step.output] = f"{step.output}.uint8"
                self._add(_reading(step, self.bytes_of, f"{step.output}.uint8"), meanings[0])
                return
        elif operands and None not in operands and (found := self._int8(step, meanings, into, to)) is not None:
            self._add(found, to if found.output == into else None)
            if found.output == into:
                self.bytes_of[into] = into
            if isinstance(step, Layer):
                self._told(step, None)
            return
        for name in dict.fromkeys(step.inputs):
            self._float32(name)
        self._add(step, None)
        if isinstance(step, Layer):
            self._told(step, "what it reads, its weights or what it makes is not quantised as int8 is here")

    def _int8(self, step: Step, of: Sequence[Quantized | None], into: str, to: Quantized | None) -> Step | None:
        """The step on bytes, giving bytes where it can and float32 where a layer may; None where neither goes."""
        match step:
            case Affine(activation=activation) if step.kind == "activation" and to is not None and of[0] is not None:
                return Table(
                    name=step.name,
                    input=self.bytes_of[step.input],
                    output=into,
                    table=int8.table(activation, of[0], to),
                )
            case Binary() | GlobalAverage() | Pool():
                fits = to is not None and (not isinstance(step, Binary) or step.activation in int8.CLAMPS)
                return _reading(step, self.bytes_of, into) if fits else None
            case Conv() | Linear():
                scale = step.weight_scale
                if scale is None or not torch.equal(int8.weights(int8.levels(step), scale), step.weight):
                    return None
                if to is not None and step.activation in int8.CLAMPS:
                    return _reading(step, self.bytes_of, into)
                return _reading(step, self.bytes_of, step.output) if step.residual is None else None
        return None

    def _told(self, step: Layer, kept: str | None) -> None:
        low, high = (float(each) for each in step.weight.aminmax())
        self.layers.append(QuantizedLayer(step.name, step.kind, None, 0.0, (low, high), kept))

    def _add(self, step: Step, quantized: Quantized | None) -> None:
        self.steps.append(step)
        self.made.add(step.output)
        if quantized is not None:
            like = step.output.removesuffix(".uint8")
            self.values[step.output] = replace(self.values[like], dtype=torch.uint8, quantized=quantized)

    def _float32(self, name: str) -> None:
        """Make sure that a value is there in float32."""
        if name not in self.made and name in self.bytes_of:
            self._add(Dequantize(name=name, input=self.bytes_of[name], output=name), None)


def _is(step: Step, target: str) -> bool:
    return isinstance(step, Operator) and step.target == target


def _meaning(step: Step, target: str) -> Quantized | None:
    """What the bytes of a quantize or dequantize operator mean; None for another, or for bounds within its dtype."""
    if not isinstance(step, Operator) or step.target != target or step.kwargs:
        return None
    x, scale, zero_point, *bounds, dtype = step.args
    moved, whole = _DTYPES.get(dtype, (0, (0, 0)))
    plain = isinstance(x, Ref) and type(scale) is float and type(zero_point) is int
    if not plain or tuple(bounds) != whole or not 0 <= zero_point + moved <= 255:
        return None
    return Quantized(float(np.float32(scale)), zero_point + moved)


def _reading(step: Step, bytes_of: dict[str, str], output: str) -> Step:
    """The step reading bytes in the place of float32 values."""
    names = ("input", "residual", "x", "y")
    moved: dict[str, Any] = {
        name: bytes_of[value] for name in names if (value := getattr(step, name, None)) is not None
    }
    if (operands := getattr(step, "operands", None)) is not None:
        moved["operands"] = tuple(bytes_of[name] for name in operands)
    return replace(step, output=output, **moved)
