"""Which steps of a plan run in int8."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from rarefy.engine import int8
from rarefy.engine.plan import (
    Affine,
    Binary,
    Concat,
    Flatten,
    GlobalAverage,
    Layer,
    Plan,
    Pool,
    Quantized,
    Step,
    Upsample,
)

#: What computes in int8 beside layers.
OTHERS = (Affine, Binary, Pool, GlobalAverage, Concat, Upsample, Flatten)


def key(step: Step) -> str:
    """What a step is known by however it is taken apart: the value it made at first."""
    return step.output.partition(".")[0]


@dataclass(frozen=True)
class Layout:
    """What of a plan runs in int8.

    Attributes:
        plan: the plan, taken apart as needed.
        inside: the values that steps in int8 make.
        quantized: what the bytes of the values mean that such steps read.

    """

    plan: Plan
    inside: frozenset[str]
    quantized: Mapping[str, Quantized]


def lay_out(
    plan: Plan,
    kept: Iterable[str],
    quantized: Callable[[Collection[str], Mapping[str, str]], Mapping[str, Quantized]],
    wild: Collection[str] = (),
) -> Layout:
    """Tell what runs in int8 when these layers do not.

    ``quantized`` gives what the bytes of values mean, from the values that are read as bytes, and from those that must
    have the same bytes as another. No step reads or makes bytes of ``wild`` values.
    """
    left = {*kept}
    while True:
        inside, float32 = _inside(plan, left, wild)
        read = {name for step in plan.steps if step.output in inside for name in step.inputs}
        # A sum with what is float32 for its own reasons, or that nothing in int8 reads, is better float32.
        apart = {
            step.output
            for step in plan.steps
            if isinstance(step, Layer) and step.residual is not None and step.output in inside
            if step.residual in float32 or step.output not in read
        }
        if not apart:
            return Layout(plan, frozenset(inside), quantized(read, _groups(plan, inside)))
        plan = _without_residuals(plan, apart)


def _inside(plan: Plan, kept: set[str], wild: Collection[str]) -> tuple[set[str], set[str]]:
    """The values that steps in int8 make, and those that are float32 for reasons of their own.

    What is no layer is int8 where it reads something that is, and nothing of what PyTorch's operators make; and where
    something in int8 reads it.
    """
    inside, float32 = set[str](), {name for name in plan.inputs if plan.values[name].dtype is not torch.float32}
    float32.update(plan.constants, wild)
    for step in plan.steps:
        if isinstance(step, Layer):
            if key(step) not in kept:
                inside.add(step.output)
        elif (
            not isinstance(step, OTHERS)
            or not _has_int8(plan, step)
            or float32.intersection((*step.inputs, step.output))
        ):
            float32.add(step.output)
        elif inside.intersection(step.inputs):
            inside.add(step.output)
    read = set[str]()
    for step in reversed(plan.steps):
        if step.output in inside and (isinstance(step, Layer) or step.output in read):
            read.update(step.inputs)
        else:
            inside.discard(step.output)
    return inside, float32


def _has_int8(plan: Plan, step: Step) -> bool:
    """A factor for each channel is a depthwise convolution, which needs places."""
    shape = plan.values[step.output].shape
    per_channel = shape is not None and 2 <= len(shape) <= 4 and getattr(step, "axis", 1) == 1
    return not isinstance(step, Affine) or step.kind == "activation" or per_channel


def _without_residuals(plan: Plan, apart: set[str]) -> Plan:
    """The plan with the additions of these layers in steps of their own."""
    steps, values = list[Step](), dict(plan.values)
    for step in plan.steps:
        if step.output not in apart:
            steps.append(step)
            continue
        assert isinstance(step, Layer)
        assert step.residual is not None
        own = f"{step.output}.own"
        values[own] = values[step.output]
        steps += [
            replace(step, output=own, residual=None, activation="none"),
            Binary(name=step.name, op="add", x=own, y=step.residual, output=step.output, activation=step.activation),
        ]
    return replace(plan, steps=tuple(steps), values=values)


def _groups(plan: Plan, inside: set[str]) -> dict[str, str]:
    """Values that must have the same bytes, by the name of one of them: what copies bytes, copies their meaning.

    An operand of a concatenation that others read, too, keeps its own.
    """
    parent: dict[str, str] = {}
    users = plan.users()

    def root(name: str) -> str:
        while name in parent:
            name = parent[name]
        return name

    for step in plan.steps:
        if step.output in inside and int8.copies(step):
            for name in dict.fromkeys(step.inputs):
                alone = not isinstance(step, Concat) or len(users[name]) == 1
                if alone and root(name) != root(step.output):
                    parent[root(name)] = root(step.output)
    return {name: root(name) for name in parent}
