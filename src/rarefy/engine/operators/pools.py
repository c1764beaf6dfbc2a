"""One number of several: pools over windows, and reductions over axes."""

from __future__ import annotations

import operator
from typing import Any, cast

from rarefy.engine.operators.calls import Call, handles, per_axis
from rarefy.engine.plan import GlobalAverage, Pool, Reduce, Reduction, Step


@handles("aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default")
def _max_pool(call: Call) -> Step | None:
    return _pool(call, "max", call.args["dilation"], count_include_pad=False)


@handles("aten.avg_pool1d.default", "aten.avg_pool2d.default", "aten.avg_pool3d.default")
def _avg_pool(call: Call) -> Step | None:
    return None if call.given("divisor_override") else _pool(call, "average", 1, call.args["count_include_pad"])


def _pool(call: Call, op: Any, dilation: Any, count_include_pad: bool) -> Step | None:
    axes = int(call.operator[-2])  # max_pool2d
    x, shape = call.value("self"), call.shape("self")
    if x is None or shape is None or len(shape) != axes + 1:
        return None
    kernel = per_axis(call.args["kernel_size"], axes)
    return Pool(
        **call.labels,
        input=x,
        op=op,
        kernel=kernel,
        stride=per_axis(call.args["stride"], axes) if call.args["stride"] else kernel,
        padding=per_axis(call.args["padding"], axes),
        dilation=per_axis(dilation, axes),
        ceil_mode=call.args["ceil_mode"],
        count_include_pad=count_include_pad,
    )


@handles(*(f"aten.adaptive_avg_pool{axes}d.default" for axes in (1, 2, 3)))
def _adaptive_average(call: Call) -> Step | None:
    x, shape, sizes = call.value("self"), call.shape("self"), call.args["output_size"]
    if x is None or shape is None or len(shape) != len(sizes) + 1 or any(size != 1 for size in sizes):
        return None
    return GlobalAverage(**call.labels, input=x, keepdim=True)


@handles("aten.mean.dim")
def _mean(call: Call) -> Step | None:
    x, shape, axes = call.value("self"), call.shape("self"), call.args["dim"]
    if x is None or shape is None or call.given("dtype"):
        return None
    rank = len(shape) + 1
    if rank not in (3, 4, 5) or not axes or {axis % rank for axis in axes} != set(range(2, rank)):
        return _reduce(call, "mean")
    return GlobalAverage(**call.labels, input=x, keepdim=call.args["keepdim"])


@handles("aten.sum.dim_IntList", "aten.amax.default", "aten.amin.default", "aten.max.dim", "aten.min.dim")
def _reduction(call: Call) -> Step | None:
    """Those that give back indices, too, where nobody reads them."""
    found = call.operator.removeprefix("a")
    if any(user.target is operator.getitem and user.args[1] != 0 for user in call.node.users):
        return None
    return None if call.given("dtype") else _reduce(call, cast(Reduction, found))


@handles("aten.linalg_vector_norm.default", "aten.norm.ScalarOpt_dim")
def _vector_norm(call: Call) -> Step | None:
    plain = call.args.get("ord", call.args.get("p")) in (2, None) and not call.given("dtype")
    return _reduce(call, "norm") if plain else None


def _reduce(call: Call, op: Reduction) -> Step | None:
    x, shape, given = call.value("self"), call.shape("self"), call.args["dim"]
    if x is None or not shape or given is None or given == []:
        return None
    rank = len(shape) + 1
    axes = tuple(sorted({axis % rank - 1 for axis in per_axis(given, 1)}))
    alone = len(axes) == len(shape) and not call.args["keepdim"]  # a number a sample has no axis to be a plane of
    if axes[0] < 0 or alone or 0 in shape:
        return None
    return Reduce(**call.labels, input=x, op=op, axes=axes, keepdim=call.args["keepdim"])
