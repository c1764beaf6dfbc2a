"""Attention in a plan: views absorbed into its strides, and the products and softmax that it is put together from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

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
    if not seen:
        return plan
    values, steps = dict(plan.values), list[Step]()
    numbers = {str(number): torch.tensor(number, dtype=torch.float32) for number in (0.0, -math.inf)}

    def convert(name: str) -> None:
        if name in seen:
            made, of = f"{name}_added", values[name]
            values[made] = replace(of, dtype=torch.float32)
            args = (Ref(name), *map(Ref, numbers))
            steps.append(Operator(name=made, output=made, target="aten.where.self", args=args))

    for name in plan.inputs:
        convert(name)
    for step in plan.steps:
        if isinstance(step, Attention) and step.mask is not None and step.mask.value in seen:
            steps.append(replace(step, mask=replace(step.mask, value=f"{step.mask.value}_added")))
        else:
            steps.append(step)
        convert(step.output)
    return replace(plan, steps=tuple(steps), values=values, constants={**plan.constants, **numbers})
