"""Attention in a plan: what operators become it, views absorbed into its strides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.engine import operators
from rarefy.engine.operators import Call, Handler, sample_shapes
from rarefy.engine.places import contiguous, inverse, through
from rarefy.engine.plan import (
    Affine,
    Attention,
    Binary,
    MatMul,
    Operator,
    Placed,
    Places,
    Plan,
    Pointwise,
    Ref,
    Softmax,
    Step,
    View,
)
from rarefy.engine.views import in_order


def attention(call: Call) -> Step | None:
    """The step of ``scaled_dot_product_attention``; None where it is another one."""
    names = [call.value(name) for name in ("query", "key", "value")]
    samples = [call.sample(name) for name in ("query", "key", "value")]
    query, key, value = names
    (q, folded), (k, _), (v, _) = samples
    if query is None or key is None or value is None or q is None or k is None or v is None or call.args["dropout_p"]:
        return None
    (*outer, queries, size), (*shared, keys, _), results = q, k, v[-1]
    if len({folded for _, folded in samples}) > 1 or not len(q) == len(k) == len(v) or k[:-1] != v[:-1]:
        return None
    groups = 1
    if outer != shared:
        if not call.args["enable_gqa"] or outer[:-1] != shared[:-1] or outer[-1] % shared[-1]:
            return None
        groups = outer[-1] // shared[-1]
    heads = [*shared, groups] if groups > 1 else outer
    sizes = (*heads, queries, keys, size, results)
    count, of = len(sizes), len(heads)
    own, common = [*range(of)], [*range(len(shared))]
    made: dict[str, Any] = {}
    if call.given("attn_mask"):
        found = _mask(call, outer, heads, (queries, keys), folded)
        if found is None:
            return None
        made = {"bias" if isinstance(found, Tensor) else "mask": found}
    scale = call.args["scale"]
    name = call.node.name
    return Attention(
        **call.labels,
        sizes=sizes,
        query=contiguous(query, (*heads, queries, size), [*own, of, of + 2], count),
        key=contiguous(key, k, [*common, of + 1, of + 2], count),
        value=contiguous(value, v, [*common, of + 1, of + 3], count),
        result=contiguous(name, (*heads, queries, results), [*own, of, of + 3], count),
        shape=(*outer, queries, results),
        folded=folded,
        scale=1 / math.sqrt(size) if scale is None else float(scale),
        causal=call.args["is_causal"],
        **made,
    )


def product(call: Call) -> Step | None:
    """The step of a product: of two values, or of one with a constant, a layer."""
    layer = operators.handler(str(call.node.target))
    made = None if layer is None else layer(call)
    if made is not None:
        return made
    left, right = ("self", "mat2") if "mat2" in call.args else ("self", "other")
    scale = 1.0
    if "batch1" in call.args:
        left, right, scale = "batch1", "batch2", float(call.args["alpha"])
        if call.args["beta"] != 0:
            return None
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


def softmax(call: Call) -> Step | None:
    """The step of a softmax along any axis but the batch."""
    x, (shape, folded) = call.value("self"), call.sample("self")
    if (
        x is None
        or shape is None
        or call.args.get("dtype") not in (None, torch.float32)
        or call.args.get("half_to_float")
    ):
        return None
    axis = call.args["dim"] % (len(shape) + 1 - folded) - 1 + folded
    if axis < (1 if folded else 0):
        return None
    order = [each for each in range(len(shape)) if each != axis] + [axis]
    axes = [order.index(each) for each in range(len(shape))]
    places = contiguous(x, shape, axes, len(shape))
    return Softmax(
        **call.labels,
        sizes=tuple(shape[each] for each in order),
        x=places,
        result=replace(places, value=call.node.name),
        shape=shape,
        folded=folded,
    )


def handler(target: str) -> Handler | None:
    """What makes a step of this operator, as :func:`rarefy.engine.operators.handler`."""
    return _HANDLERS.get(target)


_HANDLERS: dict[str, Handler] = {
    "aten.scaled_dot_product_attention.default": attention,
    **dict.fromkeys((f"aten.{name}.default" for name in ("matmul", "bmm", "baddbmm")), product),
    **dict.fromkeys(("aten.softmax.int", "aten._softmax.default"), softmax),
}


def _mask(
    call: Call, outer: Sequence[int], heads: Sequence[int], ends: tuple[int, int], folded: bool
) -> Tensor | Places | None:
    """A mask as a constant that is added, or as the places of a value; None where it is neither."""
    node = call.args["attn_mask"]
    constant = call.constants.get(node.name) if isinstance(node, fx.Node) else None
    if constant is not None:
        if constant.dim() == len(outer) + 3 - folded:
            if constant.shape[0] != 1 or folded:
                return None
            constant = constant[0]
        if constant.dtype not in (torch.bool, torch.float32) or constant.dim() > len(outer) + 2 - folded:
            return None
        added = _added(constant)
        if folded:  # the first of the outer axes is part of dimension 0, which a constant has not
            return added if added.dim() <= len(outer) + 1 else None
        if len(heads) > len(outer) and added.dim() > 2:
            split = heads[-2:] if added.shape[-3] > 1 else (1, 1)
            added = added.reshape(*added.shape[:-3], *split, *added.shape[-2:])
        return added
    shape, fold, inner = sample_shapes(node, call.batch)
    sample = shape if inner is None else (fold, *inner)
    if sample is None or len(sample) != len(outer) + 2 or (inner is not None) != folded:
        return None
    if node.meta["val"].dtype not in (torch.bool, torch.float32):
        return None
    axes: list[int | None] = [*range(len(sample) - 2), len(heads), len(heads) + 1]
    if len(heads) > len(outer):
        if sample[-3] > 1:
            sample = (*sample[:-3], *heads[-2:], *sample[-2:])
            axes = [*range(len(heads) + 2)]
        else:
            axes[-3] = None
    full = (*heads, *ends)
    axes = [
        axis if axis is not None and (size > 1 or full[axis] == 1) else None
        for axis, size in zip(axes, sample, strict=True)
    ]
    return contiguous(node.name, sample, axes, len(heads) + 4)


def _added(mask: Tensor) -> Tensor:
    """What is added to scores for a mask that may be one of what is seen."""
    return torch.where(mask, 0.0, -math.inf) if mask.dtype is torch.bool else mask


def absorb_views(plan: Plan) -> Plan:
    """Read and write through the views around steps whose values lie at places; then nobody needs these views."""
    sources = {
        step.output: step
        for step in plan.steps
        if (isinstance(step, View) or _factor(step) is not None) and _is_float(plan, step.inputs[0])
    }
    users, steps = plan.users(), dict[str, Step]()
    for step in plan.steps:
        if step.output in steps:  # a view that what it views was written through
            continue
        through_views = _written(plan, users, _read(step, sources)) if isinstance(step, Placed) else step
        steps[through_views.output] = through_views
        if through_views.output != step.output:
            del sources[through_views.output]  # what it was a view of is not there any more
    return replace(plan, steps=tuple(steps.values()))


def _is_float(plan: Plan, name: str) -> bool:
    return name in plan.values and plan.values[name].dtype is torch.float32


def _factor(step: Step | None) -> tuple[str, float] | None:
    """The value that a step multiplies by a number, and the number; None for another step."""
    match step:
        case Affine(shift=None, activation="none", scale=Tensor() as scale) if bool((scale == scale[0]).all()):
            return step.input, float(scale[0])
        case Pointwise(operands=(x,), code=(("mul" | "div" as how, 0, 1),)) if step.constants.numel() == 1:
            number = float(step.constants)
            return (x, number) if how == "mul" else (x, 1 / number) if number else None
        case Operator(target="aten.mul.Tensor" | "aten.mul.Scalar", args=(Ref(x), int() | float() as number)):
            return x, float(number)
        case Operator(target="aten.div.Tensor" | "aten.div.Scalar", args=(Ref(x), int() | float() as number)) if number:
            return x, 1 / float(number)
    return None


def _read(step: Placed, sources: Mapping[str, Step]) -> Placed:
    """A step that reads what the views which it read were made of, and multiplies by itself what factors can."""
    moved: dict[str, Any] = {}
    scale = 1.0
    for name, places in step.operands.items():
        scales = isinstance(step, MatMul) or name in ("query", "key")
        moved[name], factor = _source(places, step.sizes, sources, scales)
        scale *= factor
    if isinstance(step, (Attention, MatMul)) and scale != 1:
        moved["scale"] = step.scale * scale
    return replace(step, **moved)


def _source(places: Places, sizes: tuple[int, ...], sources: Mapping[str, Step], scales: bool) -> tuple[Places, float]:
    """Where numbers come from, before views and, where it ``scales``, factors; and the product of these."""
    source = sources.get(places.value)
    factor = _factor(source) if scales else None
    if isinstance(source, View):
        found = through(places, sizes, source)
    else:
        found = None if factor is None else replace(places, value=factor[0])
    if found is None:
        return places, 1.0
    places, scale = _source(found, sizes, sources, scales)
    return places, scale * (1.0 if factor is None else factor[1])


def _written(plan: Plan, users: Mapping[str, Sequence[Step]], step: Placed) -> Placed:
    """A step that writes its result as the view of it which alone is read."""
    readers = users[step.output]
    view = readers[0] if len(readers) == 1 and step.output not in plan.outputs else None
    back = inverse(view) if isinstance(view, View) else None
    moved = None if back is None else through(step.result, step.sizes, back)
    if not isinstance(view, View) or moved is None:
        return step
    result = replace(moved, value=view.output)
    made = replace(step, output=view.output, result=result, shape=view.sizes, folded=view.folded)
    return _written(plan, users, made)


def join_attention(plan: Plan) -> Plan:
    """Two products with a softmax between them, and what is added before that, become one step."""
    users, made = plan.users(), {step.output: step for step in plan.steps}

    def only_use(value: str) -> Step | None:
        return made.get(value) if value not in plan.outputs and len(users.get(value, ())) == 1 else None

    def joined(step: Step) -> Step:
        found = _joined(plan, only_use, step) if isinstance(step, MatMul) else None
        return step if found is None else found

    return replace(plan, steps=tuple(joined(step) for step in plan.steps))


def _joined(plan: Plan, only_use: Callable[[str], Step | None], second: MatMul) -> Attention | None:
    softmax = only_use(second.left.value)
    *outer, m, n, k = range(len(second.sizes))
    if second.scale != 1 or not isinstance(softmax, Softmax):
        return None
    if softmax.sizes != tuple(second.sizes[axis] for axis in (*outer, m, k)):
        return None
    if replace(second.left, strides=tuple(second.left.strides[axis] for axis in (*outer, m, k))) != softmax.result:
        return None
    mask: dict[str, Any] = {}
    scale, value = 1.0, softmax.x.value
    while not isinstance(first := only_use(value), MatMul):
        factor = _factor(first)
        if factor is not None:
            value, scale = factor[0], scale * factor[1]
            continue
        if isinstance(first, View) and in_order(first) and plan.values[first.input].sample == first.sizes:
            value = first.input  # the windows of all samples, and those of each
            continue
        added = None if scale != 1 else _sum(plan, first, softmax.shape, len(second.sizes) + 1)
        if added is None or (mask and not (added[1].keys() == mask.keys() == {"bias"})):
            return None
        value, others = added
        mask = {"bias": mask["bias"] + others["bias"]} if mask else others
    shape = first.sizes[:-1]
    scores = contiguous(first.output, shape, range(len(shape)), len(shape))
    if softmax.sizes != shape or first.shape != shape or first.folded != softmax.folded:
        return None
    if replace(first.result, strides=first.result.strides[:-1]) != scores or softmax.shape != shape:
        return None
    if softmax.x != replace(scores, value=softmax.x.value):
        return None

    def over(places: Places, *axes: int | None) -> Places:
        """Places by the axes of attention, from those of a product."""
        inner = tuple(0 if axis is None else places.strides[axis] for axis in axes)
        return replace(places, strides=(*places.strides[:m], *inner))

    return Attention(
        name=second.name,
        output=second.output,
        sizes=(*first.sizes, second.sizes[n]),
        query=over(first.left, m, None, k, None),
        key=over(first.right, None, n, k, None),
        value=over(second.right, None, k, None, n),
        result=over(second.result, m, None, None, n),
        shape=second.shape,
        folded=second.folded,
        scale=first.scale * scale,
        empty_is_zero=False,
        **mask,
    )


def _sum(
    plan: Plan, step: Step | None, shape: tuple[int, ...], axes: int
) -> tuple[str, dict[str, Tensor | Places]] | None:
    """The scores that a step adds a mask to, and the mask, by the name of the field that it is of an attention."""
    match step:
        case Binary(op="add", activation="none"):
            pairs = [(step.x, step.y), (step.y, step.x)]
        case Operator(target="aten.add.Tensor", args=(Ref(x), Ref(y)), kwargs=kwargs) if not kwargs:
            pairs = [(x, y), (y, x)]
        case Pointwise(operands=(x,), code=(("add", 0 | 1, 0 | 1),), sizes=(size,)) if len(size) <= len(shape):
            folded = plan.values[x].fold > 1
            same = plan.values[x].sample == shape and len(size) <= len(shape) - folded
            return (x, {"bias": step.split()[0]}) if same else None
        case Pointwise(operands=(x, y), code=(("add", _, _),), sizes=()):
            pairs = [(x, y), (y, x)]
        case _:
            return None
    for scores, mask in pairs:
        if scores in plan.constants or plan.values[scores].sample != shape:
            continue
        folded = plan.values[scores].fold > 1
        if (constant := plan.constants.get(mask)) is not None:
            if constant.dim() == len(shape) + 1 - folded and constant.shape[0] == 1:
                constant = constant[0]
            if constant.dtype is torch.float32 and constant.dim() <= len(shape) - folded:
                return scores, {"bias": constant}
            continue
        known = plan.values[mask]
        sample = known.sample
        if sample is None or known.dtype is not torch.float32 or known.fold != plan.values[scores].fold:
            continue
        if len(sample) == len(shape) and all(a in (1, b) for a, b in zip(sample, shape, strict=True)):
            own = [axis if size > 1 else None for axis, size in enumerate(sample)]
            return scores, {"mask": contiguous(mask, sample, own, axes)}
    return None


def float_masks(plan: Plan) -> Plan:
    """Masks of what is seen become masks that are added, each of them once and as soon as it is there."""
    seen = {
        step.mask.value
        for step in plan.steps
        if isinstance(step, Attention) and step.mask is not None and plan.values[step.mask.value].dtype is torch.bool
    }
    values, steps = dict(plan.values), list[Step]()

    def convert(name: str) -> None:
        if name in seen:
            made, of = f"{name}_added", values[name]
            values[made] = replace(of, dtype=torch.float32)
            steps.append(Operator(name=made, output=made, target="aten.where.Scalar", args=(Ref(name), 0.0, -math.inf)))

    for name in plan.inputs:
        convert(name)
    for step in plan.steps:
        if isinstance(step, Attention) and step.mask is not None and step.mask.value in seen:
            steps.append(replace(step, mask=replace(step.mask, value=f"{step.mask.value}_added")))
        else:
            steps.append(step)
        convert(step.output)
    return replace(plan, steps=tuple(steps), values=values)
