"""The plan in plain PyTorch: what every other way to run a step must equal, and what runs without native kernels."""

from __future__ import annotations

import functools
import importlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.engine.plan import (
    Activation,
    Affine,
    Binary,
    Concat,
    Conv,
    Flatten,
    GlobalAverage,
    Linear,
    Operator,
    Plan,
    Pool,
    Ref,
    Step,
    Upsample,
)

#: The functions on numbers (sizes) that a graph may hold beside operators.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"python.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "getitem")
    },
    **{f"python.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")},
    **{f"python.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    "python.sym_max": torch.sym_max,
    "python.sym_min": torch.sym_min,
    "python.sym_not": torch.sym_not,
    "python.sym_float": torch.sym_float,
    "python.sym_int": torch.sym_int,
}

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": F.leaky_relu,
}
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d}
_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d}


def activate(x: Tensor, function: Activation) -> Tensor:
    """The activation function of every element."""
    return x if function == "none" else _ACTIVATIONS[function](x)


@functools.cache
def resolve(target: str) -> Callable[..., Any]:
    """The function that an :class:`Operator` names. Raises ValueError for one that is not there."""
    if target in FUNCTIONS:
        return FUNCTIONS[target]
    found: Any = torch.ops
    if target.startswith("rarefy."):
        importlib.import_module("rarefy.act.functional")  # registers them
    try:
        namespace, name, overload = target.split(".")
        found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"PyTorch {torch.__version__} has no operator {target!r}") from error
    result: Callable[..., Any] = found
    return result


def run_step(step: Step, values: Mapping[str, Any]) -> Any:
    """What a step makes of the values that it reads (and the constants, for an :class:`Operator`)."""
    match step:
        case Conv():
            return _conv(step, values)
        case Linear():
            y = F.linear(values[step.input], step.weight, step.bias)
            return activate(y if step.residual is None else y + values[step.residual], step.activation)
        case Affine():
            x = values[step.input]
            per_channel = (-1,) + (1,) * (x.dim() - 2)
            x = x if step.scale is None else x * step.scale.reshape(per_channel)
            x = x if step.shift is None else x + step.shift.reshape(per_channel)
            return activate(x, step.activation)
        case Binary():
            x, y = values[step.x], values[step.y]
            return activate(x + y if step.op == "add" else x * y, step.activation)
        case Pool():
            return _pool(step, values[step.input])
        case GlobalAverage():
            x = values[step.input]
            return x.mean(tuple(range(2, x.dim())), keepdim=step.keepdim)
        case Concat():
            return torch.cat([values[name] for name in step.operands], 1)
        case Upsample():
            return F.interpolate(values[step.input], scale_factor=tuple(map(float, step.factor)))
        case Flatten():
            return values[step.input].flatten(1)
        case Operator():
            function = resolve(step.target)
            args = _given(list(step.args), values)
            return function(*args, **{name: _given(value, values) for name, value in step.kwargs.items()})
    raise TypeError(f"not a step: {step!r}")


def run(plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a plan. Values are freed as soon as no step needs them any more."""
    values: dict[str, Any] = {**plan.constants, **dict(zip(plan.inputs, inputs, strict=True))}
    for step, freed in zip(plan.steps, plan.last_uses(), strict=True):
        values[step.output] = run_step(step, values)
        for name in freed:
            del values[name]
    return [values[name] for name in plan.outputs]


def symmetric_padding(step: Conv) -> tuple[list[int], tuple[int, ...]]:
    """What to pad the input with before the convolution, as ``F.pad`` takes it, and then the convolution's padding."""
    if any(before != after for before, after in step.padding):
        return [size for pair in reversed(step.padding) for size in pair], (0,) * len(step.padding)
    return [], tuple(before for before, _ in step.padding)


def _conv(step: Conv, values: Mapping[str, Any]) -> Tensor:
    x: Tensor = values[step.input]
    added, padding = symmetric_padding(step)
    x = F.pad(x, added) if added else x
    convolution = _CONVOLUTIONS[len(step.stride)]
    y = convolution(x, step.weight, step.bias, step.stride, padding, step.dilation, step.groups)
    return activate(y if step.residual is None else y + values[step.residual], step.activation)


def _pool(step: Pool, x: Tensor) -> Tensor:
    if step.op == "max":
        pool = _MAX_POOLS[len(step.kernel)]
        return pool(x, step.kernel, step.stride, step.padding, step.dilation, step.ceil_mode)
    average = F.avg_pool1d if len(step.kernel) == 1 else F.avg_pool2d
    return average(x, step.kernel, step.stride, step.padding, step.ceil_mode, step.count_include_pad)


def _given(argument: Any, values: Mapping[str, Any]) -> Any:
    """An argument with its references looked up."""
    if isinstance(argument, Ref):
        return values[argument.name]
    if isinstance(argument, (list, tuple)):
        return type(argument)(_given(each, values) for each in argument)
    return argument
