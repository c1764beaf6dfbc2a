"""Attention and softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.engine.operators.calls import Call, handles
from rarefy.engine.places import contiguous
from rarefy.engine.plan import Attention, Places, Softmax, Step


@handles("aten.scaled_dot_product_attention.default")
def _attention(call: Call) -> Step | None:
    """The step of ``scaled_dot_product_attention``; None where it is another one."""
    names = [call.value(name) for name in ("query", "key", "value")]
    samples = [call.sample(name) for name in ("query", "key", "value")]
    query, key, value = names
    (q, folded), (k, _), (v, _) = samples
    if query is None or key is None or value is None or q is None or k is None or v is None or call.args["dropout_p"]:
        return None
    if min(map(len, (q, k, v))) < 2:  # one sequence, whose tokens are in dimension 0
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


@handles("aten.softmax.int", "aten._softmax.default")
def _softmax(call: Call) -> Step | None:
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
    sample, folded_too = call.sample("attn_mask")
    if sample is None or len(sample) != len(outer) + 2 or folded_too != folded:
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
    return (
        torch.zeros(mask.shape, dtype=torch.float32).masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else mask
    )
