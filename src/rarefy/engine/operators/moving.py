"""What moves numbers: rows of tables, concatenations, rolls, images of other sizes."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import fx

from rarefy.engine.nodes import dtype_of, is_call, sample_of, sample_shape
from rarefy.engine.operators.calls import Call, handles
from rarefy.engine.places import contiguous
from rarefy.engine.plan import (
    Concat,
    Embedding,
    Flatten,
    Join,
    Places,
    Reduction,
    Resize,
    Step,
    Upsample,
    View,
)

#: A part of a join: where its numbers lie, its shape, and where in the result it begins.
_Part: TypeAlias = tuple[Places, tuple[int, ...], tuple[int, ...]]


@handles("aten.embedding.default")
def _embedding(call: Call) -> Step | None:
    return _rows_of(call, call.args["indices"], None)


@handles("aten.embedding_bag.default", "aten.embedding_bag.padding_idx")
def _embedding_bag(call: Call) -> Step | None:
    """Bags that are the rows of a matrix of whole numbers: what :class:`torch.nn.EmbeddingBag` makes of one."""
    given, offsets, padding = call.args["indices"], call.args["offsets"], call.args.get("padding_idx")
    if any(user.target is operator.getitem and user.args[1] != 0 for user in call.node.users):
        return None
    if call.given("per_sample_weights") or call.args["include_last_offset"] or padding not in (None, -1):
        return None
    if not (is_call(given, "aten.view.default", "aten.reshape.default") and is_call(offsets, "aten.arange.start_step")):
        return None
    whole = given.args[0]
    shape, (begin, _, step) = sample_shape(whole, call.batch), (*offsets.args, 1)[:3]
    if shape is None or len(shape) != 1 or (begin, step) != (0, shape[0]):
        return None
    return _rows_of(call, whole, ("sum", "mean", "max")[call.args["mode"]])


def _rows_of(call: Call, indices: Any, reduction: Reduction | None) -> Step | None:
    weight = call.constant("weight")
    known = isinstance(indices, fx.Node) and indices.name in call.constants
    shape = None if known else sample_shape(indices, call.batch)
    if weight is None or weight.dim() != 2 or shape is None or dtype_of(indices) not in (torch.int32, torch.int64):
        return None
    if 0 in (*weight.shape, *shape) or len(shape) > 2:
        return None
    return Embedding(**call.layer(), input=indices.name, weight=weight, reduction=reduction)


@handles("aten.cat.default")
def _concat(call: Call) -> Step | None:
    return _channels(call) or _side_by_side(call, stacked=False)


@handles("aten.stack.default")
def _stack(call: Call) -> Step | None:
    return _side_by_side(call, stacked=True)


def _channels(call: Call) -> Step | None:
    operands = call.args["tensors"]
    shapes = [sample_shape(node, call.batch) for node in operands]
    plain = all(map(call.computes, operands))
    if not plain or any(shape is None for shape in shapes) or call.args["dim"] % (len(shapes[0] or ()) + 1) != 1:
        return None
    return Concat(**call.labels, operands=tuple(node.name for node in operands))


def _side_by_side(call: Call, stacked: bool) -> Step | None:
    """Values one after the other along any axis but the batch's, or along a new one."""
    nodes = call.args["tensors"]
    whole, folded = sample_of(call.node, call.batch)
    samples = [sample_of(node, call.batch) for node in nodes]
    axis = call.args["dim"] % call.node.meta["val"].dim() - 1 + folded
    if whole is None or axis < folded:
        return None
    parts, at = list[_Part](), 0
    for node, (sample, fold) in zip(nodes, samples, strict=True):
        if sample is None or fold != folded or not call.computes(node) or 0 in sample:
            return None
        axes: list[int] = [each + (stacked and each >= axis) for each in range(len(sample))]
        shape = (*sample[:axis], 1, *sample[axis:]) if stacked else sample
        begin = tuple(at if each == axis else 0 for each in range(len(whole)))
        parts.append((contiguous(node.name, sample, axes, len(whole)), shape, begin))
        at += shape[axis]
    return _joined(call, whole, parts, folded)


def _joined(call: Call, sizes: tuple[int, ...], parts: Sequence[_Part], folded: bool) -> Step:
    places, shapes, begins = zip(*parts, strict=True)
    return Join(**call.labels, sizes=sizes, parts=places, shapes=shapes, begins=begins, folded=folded)


@handles("aten.flip.default")
def _flip(call: Call) -> Step | None:
    """The numbers along some axes backwards."""
    x, sample = call.value("self"), call.shape("self")
    if x is None or not sample or 0 in sample:
        return None
    turned = {axis % (len(sample) + 1) - 1 for axis in call.args["dims"]}
    strides = [*contiguous(x, sample, [*range(len(sample))], len(sample)).strides]
    if -1 in turned:
        return None
    offset = sum((sample[axis] - 1) * strides[axis] for axis in turned)
    backwards = tuple(-each if axis in turned else each for axis, each in enumerate(strides))
    numbers = math.prod(sample)
    return View(**call.labels, input=x, numbers=numbers, sizes=sample, strides=backwards, offset=offset)


@handles("aten.roll.default")
def _roll(call: Call) -> Step | None:
    """The two ends along each rolled axis, exchanged."""
    x, (sample, folded), axes = call.value("self"), call.sample("self"), call.args["dims"]
    if x is None or sample is None or not axes or not all(isinstance(by, int) for by in call.args["shifts"]):
        return None
    rank, shifts = len(sample) + 1 - folded, [0] * len(sample)
    for axis, by in zip(axes, call.args["shifts"], strict=True):
        if axis % rank == 0:
            return None
        shifts[axis % rank - 1 + folded] += by
    strides = contiguous(x, sample, [*range(len(sample))], len(sample)).strides
    ends = list[list[tuple[int, int, int]]]()  # along each axis: where in the result, where in x, how many
    for size, by in zip(sample, shifts, strict=True):
        first = by % size
        ends.append([(first, 0, size - first), *([(0, size - first, first)] if first else [])])
    parts = list[_Part]()
    for corner in itertools.product(*ends):
        offset = sum(start * stride for (_, start, _), stride in zip(corner, strides, strict=True))
        begin, _, shape = zip(*corner, strict=True)
        parts.append((Places(x, math.prod(sample), strides, offset), shape, begin))
    return _joined(call, sample, parts, folded)


@handles("aten.upsample_nearest1d.vec", "aten.upsample_nearest2d.vec")
def _upsample(call: Call) -> Step | None:
    x, shape, out = call.value("input"), call.shape("input"), sample_shape(call.node, call.batch)
    if x is None or shape is None or out is None:
        return None
    return _repeated(call, x, shape, out) or (_resize(call, "nearest") if len(shape) == 3 else None)


@handles("aten.upsample_bilinear2d.vec")
def _bilinear(call: Call) -> Step | None:
    return _resize(call, "bilinear")


def _resize(call: Call, mode: Literal["nearest", "bilinear"]) -> Step | None:
    x, shape, out = call.value("input"), call.shape("input"), sample_shape(call.node, call.batch)
    if x is None or shape is None or out is None or len(shape) != 3:
        return None
    factors: tuple[float, float] | None = None
    if call.args["output_size"] is None:
        down, across = call.args["scale_factors"]
        factors = (float(down), float(across))
    aligned = bool(call.args.get("align_corners"))
    return Resize(**call.labels, input=x, mode=mode, sizes=(out[1], out[2]), factors=factors, align_corners=aligned)


def _repeated(call: Call, x: str, shape: tuple[int, ...], out: tuple[int, ...]) -> Step | None:
    """Every pixel so many times, where that is what the call does."""
    sizes, factor = shape[1:], tuple(after // before for before, after in zip(shape[1:], out[1:], strict=True))
    if any(after % before for before, after in zip(sizes, out[1:], strict=True)):
        return None
    # A scale that is no whole number (2.1), or rounds badly (1 / 49), takes other pixels though the sizes divide.
    for axis, (size, times) in enumerate(zip(sizes, factor, strict=True)):
        ramp = torch.arange(size, dtype=torch.float32).reshape(-1, *(1,) * (len(sizes) - 1 - axis))
        given = ramp.expand(1, 1, *sizes)
        taken = call.node.target(given, call.args["output_size"], call.args["scale_factors"])  # type: ignore[operator]
        if not torch.equal(taken, ramp.repeat_interleave(times, 0).expand_as(taken)):
            return None
    return Upsample(**call.labels, input=x, factor=factor)


@handles(
    *("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints"),
    *("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims"),
)
def _flatten(call: Call) -> Step | None:
    x, shape, out = call.value("self"), call.shape("self"), sample_shape(call.node, call.batch)
    if x is None or shape is None or out is None or len(out) != 1 or len(shape) < 2:
        return None
    return Flatten(**call.labels, input=x)
