"""Attention in a plan: what operators become it, views absorbed into its strides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.engine.operators import Call, Handler, sample_shapes
from rarefy.engine.places import contiguous, inverse, through
from rarefy.engine.plan import Attention, Operator, Placed, Places, Plan, Ref, Step, View


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


def handler(target: str) -> Handler | None:
    """What makes a step of this operator, as :func:`rarefy.engine.operators.handler`."""
    return _HANDLERS.get(target)


_HANDLERS: dict[str, Handler] = {"aten.scaled_dot_product_attention.default": attention}


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
    views = {step.output: step for step in plan.steps if isinstance(step, View)}
    users, steps = plan.users(), dict[str, Step]()
    for step in plan.steps:
        if step.output in steps:  # a view that what it views was written through
            continue
        through_views = _written(plan, users, _read(step, views)) if isinstance(step, Placed) else step
        steps[through_views.output] = through_views
    return replace(plan, steps=tuple(steps.values()))


def _read(step: Placed, views: Mapping[str, View]) -> Placed:
    """A step that reads what the views which it read were made of."""
    sources: dict[str, Any] = {name: _source(places, step, views) for name, places in step.operands.items()}
    return replace(step, **sources)


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


def _source(places: Places, step: Placed, views: Mapping[str, View]) -> Places:
    """Where numbers come from, before the views that they went through."""
    while places.value in views:
        found = through(places, step.sizes, views[places.value])
        if found is None:
            break
        places = found
    return places


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
