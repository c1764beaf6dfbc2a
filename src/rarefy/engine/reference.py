"""The plan in plain PyTorch: what every other way to run a step must equal, and what runs without native kernels."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.engine import views
from rarefy.engine.expressions import pointwise
from rarefy.engine.functions import CONVOLUTIONS, MAX_POOLS, TRANSPOSED, activate, function_of, symmetric_padding
from rarefy.engine.int8 import Int8, item
from rarefy.engine.named import binding, resolve
from rarefy.engine.plan import (
    Activation,
    Affine,
    Attention,
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
    MatMul,
    Norm,
    Operator,
    Placed,
    Places,
    Plan,
    Pointwise,
    Pool,
    Recurrence,
    Reduce,
    Ref,
    Resize,
    Softmax,
    Step,
    Upsample,
    View,
)
from rarefy.engine.sequence import over_sequence

_AVERAGE_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def bind(step: Step | Int8) -> tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]:
    """What computes a step, and the arguments to call it with: plain ones, and a :class:`Ref` for each value."""
    match step:
        case Int8():
            compute: Callable[..., Any] = step.run
        case Conv():
            compute = functools.partial(_conv, step)
        case ConvTranspose():
            compute = functools.partial(_conv_transpose, step)
        case Linear():
            compute = functools.partial(_linear, step)
        case Affine():
            compute = function_of(step.activation) if step.kind == "activation" else functools.partial(_affine, step)
        case Binary():
            both = torch.add if step.op == "add" else torch.mul
            compute = both if step.activation == "none" else functools.partial(_binary, both, step.activation)
        case Pool():
            compute = functools.partial(_pool, step)
        case GlobalAverage():
            compute = functools.partial(_global_average, step)
        case Embedding(reduction=None):
            return torch.embedding, (step.weight, Ref(step.input)), {}
        case Embedding():
            compute = functools.partial(F.embedding_bag, weight=step.weight, mode=str(step.reduction))
        case Reduce():
            compute = functools.partial(_reduce, step)
        case Concat():
            return torch.cat, ([Ref(name) for name in step.operands], 1), {}
        case View():
            compute = _view(step)
        case Join():
            return _join(step), tuple(map(Ref, step.inputs)), {}
        case Norm():
            compute = functools.partial(_norm, step)
        case GroupNorm():
            compute = functools.partial(_group_norm, step)
        case MatMul():
            compute = functools.partial(_matmul, step)
        case Softmax():
            compute = functools.partial(_softmax, step)
        case Attention():
            compute = functools.partial(_attention, step)
        case Pointwise():
            return pointwise(step)
        case LSTMHidden():
            compute = functools.partial(_lstm_hidden, step)
        case LSTMCell():
            compute = functools.partial(_lstm_cell, step)
        case GRUGates():
            compute = functools.partial(_gru_gates, step)
        case Recurrence():
            compute = functools.partial(_recurrence, step)
        case Upsample():
            compute = functools.partial(F.interpolate, scale_factor=tuple(map(float, step.factor)))
        case Resize():
            return _resize(step)
        case Flatten():
            return torch.flatten, (Ref(step.input), 1), {}
        case Operator(target="aten.slice.Tensor", args=(Ref() as x, int(axis), *bounds)) if _are_plain(axis, bounds):
            return operator.getitem, (x, (slice(None),) * axis + (slice(*bounds),)), step.kwargs
        case Operator():
            return binding(step.target), step.args, step.kwargs
        case _:
            raise TypeError(f"not a step: {step!r}")
    return compute, tuple(Ref(name) for name in step.inputs), {}


def _are_plain(axis: int, bounds: Sequence[Any]) -> bool:
    """Whether a slice is one that Python's own brackets take: most calls, and half the time."""
    return axis >= 0 and len(bounds) in (2, 3) and all(each is None or isinstance(each, int) for each in bounds)


def run_step(step: Step | Int8, values: Mapping[str, Any]) -> Any:
    """What a step makes of the values that it reads (and the constants, for an :class:`Operator`)."""
    compute, args, kwargs = bind(step)
    return compute(*_given(args, values), **{name: _given(value, values) for name, value in kwargs.items()})


def items(plan: Plan) -> tuple[Step | Int8, ...]:
    """The steps of a plan as they are run: those on quantised values with the quantisation of these."""
    return tuple(item(plan, step) for step in plan.steps)


def run(plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a plan. Values are freed as soon as no step needs them any more."""
    values: dict[str, Any] = {**plan.constants, **dict(zip(plan.inputs, inputs, strict=True))}
    for step, freed in zip(items(plan), plan.last_uses(), strict=True):
        values[step.output] = run_step(step, values)
        for name in freed:
            del values[name]
    return [values[name] for name in plan.outputs]


def _conv(step: Conv, x: Tensor, residual: Tensor | None = None) -> Tensor:
    added, padding = symmetric_padding(step)
    x = F.pad(x, added) if added else x
    convolution = CONVOLUTIONS[len(step.stride)]
    y = convolution(x, step.weight, step.bias, step.stride, padding, step.dilation, step.groups)
    return activate(y if residual is None else y + residual, step.activation)


def _conv_transpose(step: ConvTranspose, x: Tensor) -> Tensor:
    groups = step.weight.reshape(step.groups, -1, *step.weight.shape[1:])
    weight = groups.transpose(1, 2).flatten(0, 1)  # (in, out / groups, *kernel)
    transposed, sizes = TRANSPOSED[len(step.stride)], (step.stride, step.padding, step.output_padding)
    return activate(transposed(x, weight, step.bias, *sizes, step.groups, step.dilation), step.activation)


def _linear(step: Linear, x: Tensor, residual: Tensor | None = None) -> Tensor:
    y = F.linear(x, step.weight, step.bias)
    return activate(y if residual is None else y + residual, step.activation)


def _affine(step: Affine, x: Tensor) -> Tensor:
    per_channel = (-1,) + (1,) * (x.dim() - 2) if step.axis == 1 else (-1,)
    x = x if step.scale is None else x * step.scale.reshape(per_channel)
    x = x if step.shift is None else x + step.shift.reshape(per_channel)
    return activate(x, step.activation)


def _binary(both: Callable[[Tensor, Tensor], Tensor], activation: Activation, x: Tensor, y: Tensor) -> Tensor:
    return activate(both(x, y), activation)


def _pool(step: Pool, x: Tensor) -> Tensor:
    if step.op == "max":
        pool = MAX_POOLS[len(step.kernel)]
        return pool(x, step.kernel, step.stride, step.padding, step.dilation, step.ceil_mode)
    average = _AVERAGE_POOLS[len(step.kernel)]
    return average(x, step.kernel, step.stride, step.padding, step.ceil_mode, step.count_include_pad)


def _global_average(step: GlobalAverage, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=step.keepdim)


def _view(step: View) -> Callable[[Tensor], Tensor]:
    """What computes a view: as one of the tensor's memory, without a copy, where it is one."""
    turned = [axis + 1 for axis, stride in enumerate(step.strides) if stride < 0]  # which as_strided does not know
    last: list[tuple[Any, ...]] = [(None, None)]  # how a tensor lay, and whether to copy it, sizes, strides, offset

    def placed(x: Tensor) -> tuple[Any, ...]:
        batch, rest = divmod(x.numel(), step.numbers)
        if rest:
            raise ValueError(f"{step.input} must have {step.numbers} numbers a sample, got the shape {tuple(x.shape)}")
        found = None if x.is_contiguous() or turned else views.through(step, x)
        copied = found is None and not x.is_contiguous()
        if found is None:
            first = sum((step.sizes[axis - 1] - 1) * step.strides[axis - 1] for axis in turned)
            found = (step.numbers, *map(abs, step.strides)), step.offset + first
        return copied, (batch, *step.sizes), *found

    def view(x: Tensor) -> Tensor:
        lies = (x.shape, x.stride())
        known, how = last[0]
        if known != lies:
            how = placed(x)
            last[0] = lies, how
        copied, sizes, strides, offset = how
        x = x.contiguous() if copied else x
        y = x.as_strided(sizes, strides, x.storage_offset() + offset)
        y = y.flip(turned) if turned else y
        return y.flatten(0, 1) if step.folded else y

    return view


def _join(step: Join) -> Callable[..., Tensor]:
    """What computes a join: the views of its values, each copied to its place."""
    made = list[tuple[int, Callable[[Tensor], Tensor], tuple[slice, ...]]]()
    for part, shape, begin in zip(step.parts, step.shapes, step.begins, strict=True):
        about = views.of_places(step, part, shape)
        inside = tuple(slice(at, at + size) for at, size in zip(begin, shape, strict=True))
        made.append((step.inputs.index(part.value), _view(about), inside))
    cut = [axis for axis, size in enumerate(step.sizes) if any(shape[axis] != size for shape in step.shapes)]
    along = cut[0] if len(cut) == 1 and sorted(step.begins) == list(step.begins) else None

    def join(*values: Tensor) -> Tensor:
        parts = [view(values[index]) for index, view, _ in made]
        if along is not None:
            y = torch.cat(parts, along + 1)
        else:
            y = values[0].new_empty(len(parts[0]), *step.sizes)
            for part, (_, _, inside) in zip(parts, made, strict=True):
                y[(slice(None), *inside)] = part
        return y.flatten(0, 1) if step.folded else y

    return join


def _norm(step: Norm, x: Tensor) -> Tensor:
    x = x.movedim(step.axis, -1)
    if step.centred:
        y = F.layer_norm(x, x.shape[-1:], step.weight, step.bias, step.eps)
    else:
        y = F.rms_norm(x, x.shape[-1:], step.weight, step.eps)
        y = y if step.bias is None else y + step.bias
    return y.movedim(-1, step.axis)


def _reduce(step: Reduce, x: Tensor) -> Tensor:
    axes = [axis + 1 for axis in step.axes]
    match step.op:
        case "sum":
            return x.sum(axes, step.keepdim)
        case "mean":
            return x.mean(axes, step.keepdim)
        case "norm":
            return cast(Tensor, torch.linalg.vector_norm(x, dim=axes, keepdim=step.keepdim))
        case "max":
            return x.amax(axes, step.keepdim)
        case "min":
            return x.amin(axes, step.keepdim)


def _group_norm(step: GroupNorm, x: Tensor) -> Tensor:
    return torch.group_norm(x, step.groups, step.weight, step.bias, step.eps)


def _placed(step: Placed, places: Places, axes: Sequence[int], x: Tensor) -> Tensor:
    """The numbers at some axes of places: (B, *sizes)."""
    samples = x.reshape(-1, places.numbers)
    sizes, strides = [step.sizes[axis] for axis in axes], [places.strides[axis] for axis in axes]
    between = (samples.stride(0), *(stride * samples.stride(1) for stride in strides))
    first = samples.storage_offset() + places.offset * samples.stride(1)
    return samples.as_strided((len(samples), *sizes), between, first)


def _result(step: Placed, axes: Sequence[int], y: Tensor) -> Tensor:
    """What a step makes of the numbers (B, *sizes) that belong to its result's places."""
    made = y.new_empty(len(y), step.result.numbers)
    _placed(step, step.result, axes, made).copy_(y)
    return made.reshape(-1, *step.shape[1:]) if step.folded else made.reshape(-1, *step.shape)


def _matmul(step: MatMul, *values: Tensor) -> Tensor:
    given, outer = dict(zip(step.inputs, values, strict=True)), len(step.sizes) - 3
    m, n, k = range(outer, outer + 3)
    x = _placed(step, step.left, (*range(outer), m, k), given[step.left.value])
    y = _placed(step, step.right, (*range(outer), k, n), given[step.right.value])
    product = torch.matmul(x, y)
    return _result(step, (*range(outer), m, n), product if step.scale == 1 else product * step.scale)


def _softmax(step: Softmax, x: Tensor) -> Tensor:
    axes = range(len(step.sizes))
    return _result(step, axes, _placed(step, step.x, axes, x).softmax(-1))


def _attention(step: Attention, *values: Tensor) -> Tensor:
    given, outer = dict(zip(step.inputs, values, strict=True)), len(step.sizes) - 4
    queries, keys, features, results = range(outer, outer + 4)

    def placed(places: Places, *axes: int) -> Tensor:
        return _placed(step, places, (*range(outer), *axes), given[places.value])

    q, k = placed(step.query, queries, features), placed(step.key, keys, features)
    samples = len(q)
    v, mask = placed(step.value, keys, results), step.bias
    mask = mask if step.mask is None else placed(step.mask, queries, keys)
    mask = mask.unsqueeze(0) if mask is not None and mask.dim() == 1 else mask
    if mask is not None and mask.dtype is torch.bool:
        mask = q.new_zeros(()).where(mask, -math.inf)
    if step.causal:
        seen = torch.ones(step.sizes[queries], step.sizes[keys], dtype=torch.bool, device=q.device).tril()
        mask = q.new_zeros(()).where(seen, -math.inf) + (0 if mask is None else mask)
    if step.empty_is_zero:
        if len(step.sizes) > 5 and mask is not None:  # the fast ones of PyTorch's have batch and heads alone
            mask = mask.expand(samples, *step.sizes[: outer + 2]).flatten(0, outer - 1)
        q, k, v = (each.flatten(0, outer - 1) if outer > 1 else each for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=step.scale)
        y = y.reshape(samples, *(step.sizes[axis] for axis in (*range(outer), queries, results)))
    else:
        scores = q @ k.transpose(-1, -2) * step.scale
        y = (scores if mask is None else scores + mask).softmax(-1) @ v
    return _result(step, (*range(outer), queries, results), y)


def _resize(step: Resize) -> tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]:
    sizes, factors = (list(step.sizes), None) if step.factors is None else (None, list(step.factors))
    if step.mode == "nearest":
        return resolve("aten.upsample_nearest2d.vec"), (Ref(step.input), sizes, factors), {}
    return resolve("aten.upsample_bilinear2d.vec"), (Ref(step.input), sizes, step.align_corners, factors), {}


def _activated(x: Tensor, function: str, step: LSTMCell | GRUGates) -> Tensor:
    if step.mode == "exact":
        return torch.sigmoid(x) if function == "sigmoid" else torch.tanh(x)
    return activate(x, f"{function} {step.mode} {step.table}".rstrip())


def _lstm_cell(step: LSTMCell, gates: Tensor, c: Tensor) -> Tensor:
    i, f, g, _ = gates.chunk(4, -1)
    kept, taken = (_activated(x, "sigmoid", step) for x in (f, i))
    return kept * c + taken * _activated(g, "tanh", step)


def _lstm_hidden(step: LSTMHidden, gates: Tensor, c: Tensor) -> Tensor:
    return _activated(gates.chunk(4, -1)[3], "sigmoid", step) * _activated(c, "tanh", step)


def _gru_gates(step: GRUGates, x: Tensor, h: Tensor, state: Tensor) -> Tensor:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    r, z = _activated(x_r + h_r, "sigmoid", step), _activated(x_z + h_z, "sigmoid", step)
    fresh = _activated(torch.addcmul(x_n, r, h_n), "tanh", step)
    return (state - fresh) * z + fresh


def _recurrence(step: Recurrence, products: Tensor, *states: Tensor) -> Tensor:
    if products.is_meta:
        return products.new_empty(*products.shape[:2], step.weight.shape[1] * (1 + step.cells))
    options = (step.reverse, step.cells, step.mode, step.table)
    return over_sequence(products, step.weight, step.bias, states, *options)


def _given(argument: Any, values: Mapping[str, Any]) -> Any:
    """An argument with its references looked up."""
    if isinstance(argument, Ref):
        return values[argument.name]
    if isinstance(argument, (list, tuple)):
        return type(argument)(_given(each, values) for each in argument)
    return argument
