"""Products: convolutions and linear layers, which multiply by constants, and the products of two values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from rarefy.engine.nodes import is_call
from rarefy.engine.operators.calls import Call, handles, per_axis
from rarefy.engine.places import contiguous
from rarefy.engine.plan import Conv, ConvTranspose, Linear, MatMul, Step


def _same_padding(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return tuple((total // 2, total - total // 2) for total in totals)


@handles(*(f"aten.conv{axes}d.{overload}" for axes in (1, 2, 3) for overload in ("default", "padding")))
def _conv(call: Call) -> Step | None:
    weight, bias, x, shape = call.constant("weight"), call.constant("bias"), call.value("input"), call.shape("input")
    if weight is None or x is None or shape is None or len(shape) != weight.dim() - 1:
        return None
    if call.unknown("bias"):
        return None
    axes = weight.dim() - 2
    dilation = per_axis(call.args["dilation"], axes)
    given = call.args["padding"]
    if given == "same":
        padding = _same_padding(weight.shape[2:], dilation)
    else:
        sizes = (0,) * axes if given == "valid" else per_axis(given, axes)
        padding = tuple((size, size) for size in sizes)
    return Conv(
        **call.layer(),
        input=x,
        weight=weight,
        bias=bias,
        stride=per_axis(call.args["stride"], axes),
        padding=padding,
        dilation=dilation,
        groups=call.args["groups"],
        weight_scale=call.scale("weight"),
    )


@handles("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def _conv_transpose(call: Call) -> Step | None:
    weight, bias, x, shape = call.constant("weight"), call.constant("bias"), call.value("input"), call.shape("input")
    if weight is None or x is None or shape is None or len(shape) != weight.dim() - 1:
        return None
    if call.unknown("bias"):
        return None
    axes, groups = weight.dim() - 2, call.args["groups"]
    turned = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return ConvTranspose(
        **call.layer(),
        input=x,
        weight=turned.contiguous(),
        bias=bias,
        stride=per_axis(call.args["stride"], axes),
        padding=per_axis(call.args["padding"], axes),
        output_padding=per_axis(call.args["output_padding"], axes),
        dilation=per_axis(call.args["dilation"], axes),
        groups=groups,
    )


@handles("aten.linear.default")
def _linear(call: Call) -> Step | None:
    weight, bias, x = call.constant("weight"), call.constant("bias"), call.value("input")
    if weight is None or weight.dim() != 2 or x is None or call.unknown("bias"):
        return None
    return Linear(**call.layer(), input=x, weight=weight, bias=bias, weight_scale=call.scale("weight"))


@handles("aten.mm.default")
def _mm(call: Call) -> Step | None:
    return _by_constant(call, "self", "mat2")


@handles("aten.matmul.default")
def _matmul(call: Call) -> Step | None:
    return _by_constant(call, "self", "other") or _of_values(call, "self", "other")


@handles("aten.bmm.default")
def _bmm(call: Call) -> Step | None:
    return _by_constant(call, "self", "mat2") or _of_values(call, "self", "mat2")


def _by_constant(call: Call, left: str, right: str) -> Step | None:
    """``x @ w`` is a linear layer of w^T; ``w @ x``, for x (B, in, places), a convolution over the places."""
    weight, x = _matrix(call, right, left), call.value(left)
    if weight is not None and x is not None and _rank(call, left) > 1:
        return Linear(**call.layer(right), input=x, weight=weight.T.contiguous())
    weight, x, shape = _matrix(call, left, right), call.value(right), call.shape(right)
    if weight is None or x is None or shape is None or len(shape) != 2:
        return None
    return Conv(**call.layer(left), input=x, weight=weight[:, :, None], stride=(1,), padding=((0, 0),), dilation=(1,))


def _matrix(call: Call, name: str, other: str) -> Tensor | None:
    """A constant matrix, which may come again for every sample; None where that argument is something else.

    One of more axes than the other operand has would give the result more axes, too.
    """
    node = call.args[name]
    if isinstance(node, fx.Node) and _rank(call, name) > max(2, _rank(call, other)):
        return None
    while is_call(node, "aten.expand.default", "aten.unsqueeze.default"):
        node = node.args[0]
    found = call.constants.get(node.name) if isinstance(node, fx.Node) else None
    if found is None or found.dtype is not torch.float32 or found.dim() < 2 or found.shape[:-2].numel() != 1:
        return None
    return found.reshape(found.shape[-2:])


@handles("aten.addmm.default")
def _addmm(call: Call) -> Step | None:
    return _with_bias(call, "mat1", "mat2")


@handles("aten.baddbmm.default")
def _baddbmm(call: Call) -> Step | None:
    if (layer := _with_bias(call, "batch1", "batch2")) is not None:
        return layer
    return _of_values(call, "batch1", "batch2", float(call.args["alpha"])) if call.args["beta"] == 0 else None


def _with_bias(call: Call, left: str, right: str) -> Step | None:
    """``beta bias + alpha x @ w``: how transformers' Conv1D, all of GPT-2, computes its layers."""
    weight, bias, x = _matrix(call, right, left), call.constant("self"), call.value(left)
    if weight is None or bias is None or x is None or bias.numel() != bias.shape[-1] or bias.numel() != weight.shape[1]:
        return None
    weight, bias = weight * call.args["alpha"], bias.reshape(-1) * call.args["beta"]
    return Linear(**call.layer(right), input=x, weight=weight.T.contiguous(), bias=bias)


def _rank(call: Call, name: str) -> int:
    return int(call.args[name].meta["val"].dim())


def _of_values(call: Call, left: str, right: str, scale: float = 1.0) -> Step | None:
    """``scale x @ y``, of values that both have the batch."""
    names, samples = [call.value(each) for each in (left, right)], [call.sample(each) for each in (left, right)]
    (x, folded), (y, folded_y) = samples
    if None in names or x is None or y is None:
        return None
    if min(len(x), len(y)) < 2 or len(x) != len(y) or folded != folded_y or x[:-2] != y[:-2]:
        return None
    (*outer, m, k), n = x, y[-1]
    of, count = [*range(len(outer))], len(outer) + 3
    return MatMul(
        **call.labels,
        sizes=(*outer, m, n, k),
        left=contiguous(str(names[0]), x, [*of, count - 3, count - 1], count),
        right=contiguous(str(names[1]), y, [*of, count - 1, count - 2], count),
        result=contiguous(call.node.name, (*outer, m, n), [*of, count - 3, count - 2], count),
        shape=(*outer, m, n),
        folded=folded,
        scale=scale,
    )
