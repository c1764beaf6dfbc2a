"""Normalisations: over the last axis, over groups of channels, and by statistics that are constants."""

from __future__ import annotations

from typing import Literal

import torch
from torch import fx

from rarefy.engine.nodes import is_call
from rarefy.engine.operators.calls import Call, handles
from rarefy.engine.plan import Affine, GroupNorm, Norm, Operator, Ref, Step


@handles("aten.layer_norm.default")
def _layer_norm(call: Call) -> Step | None:
    x, (shape, _) = call.value("input"), call.sample("input")
    weight, bias = call.constant("weight"), call.constant("bias")
    if x is None or shape is None or tuple(call.args["normalized_shape"]) != shape[-1:]:
        return None
    if call.unknown("weight", "bias"):
        return None
    return Norm(**call.layer(), input=x, weight=weight, bias=bias, eps=call.args["eps"])


@handles("aten.rms_norm.default")
def _rms_norm(call: Call) -> Step | None:
    x, (shape, _), weight = call.value("input"), call.sample("input"), call.constant("weight")
    if x is None or shape is None or tuple(call.args["normalized_shape"]) != shape[-1:]:
        return None
    if call.unknown("weight"):
        return None
    eps = torch.finfo(torch.float32).eps if call.args["eps"] is None else call.args["eps"]
    return Norm(**call.layer(), input=x, weight=weight, bias=None, eps=eps, centred=False)


def written_out_rms_norm(call: Call) -> Step | None:
    """``weight * x * rsqrt(mean(x^2) + eps)``: what of it is no product by itself is then read by nothing."""
    left, right = call.args["self"], call.args["other"]
    weight = None
    for constant, value in (("self", right), ("other", left)):
        if (found := call.constant(constant)) is not None and is_call(value, "aten.mul.Tensor"):
            weight, (left, right) = found, value.args[:2]
    for x, factor in ((left, right), (right, left)):
        if not (isinstance(x, fx.Node) and is_call(factor, "aten.rsqrt.default")):
            continue
        total = factor.args[0]
        if not (is_call(total, "aten.add.Tensor", "aten.add.Scalar") and len(total.args) == 2 and not total.kwargs):
            continue
        mean, eps = total.args
        if not (isinstance(eps, (int, float)) and eps >= 0 and is_call(mean, "aten.mean.dim") and not mean.kwargs):
            continue
        square, axes, *keepdim = mean.args
        powers = [(x, 2), (x, 2.0), (x, x)]
        squared = is_call(square, "aten.pow.Tensor_Scalar", "aten.mul.Tensor") and tuple(square.args) in powers
        shape = x.meta["val"].shape
        known = call.computes(x) and isinstance(shape[-1], int)
        if not squared or keepdim != [True] or [a % len(shape) for a in axes] != [len(shape) - 1] or not known:
            continue
        if weight is not None and (weight.dim() != 1 or weight.shape[0] != shape[-1]):
            return None
        about = call.layer("self") if weight is not None and call.constant("self") is not None else call.layer("other")
        return Norm(**about, input=x.name, weight=weight, bias=None, eps=float(eps), centred=False)
    return None


@handles("aten.group_norm.default", "aten.instance_norm.default")
def _group_norm(call: Call) -> Step | None:
    x, shape = call.value("input"), call.shape("input")
    weight, bias = call.constant("weight"), call.constant("bias")
    if call.args.get("use_input_stats") is False:
        return _batch_norm(call)
    if x is None or shape is None:
        return None
    if call.unknown("weight", "bias"):
        return None
    groups = call.args.get("num_groups", shape[0])  # a group each is an instance norm
    return GroupNorm(**call.layer(), input=x, groups=groups, weight=weight, bias=bias, eps=call.args["eps"])


@handles("aten._native_batch_norm_legit_no_training.default", "aten.batch_norm.default")
def _batch_norm(call: Call) -> Step | None:
    x, (shape, folded) = call.value("input"), call.sample("input")
    mean, variance = call.constant("running_mean"), call.constant("running_var")
    if (
        x is None
        or shape is None
        or (folded and len(shape) != 2)
        or mean is None
        or variance is None
        or call.args.get("training")
    ):
        return None
    weight, bias = call.constant("weight"), call.constant("bias")
    # gamma (x - mean) / sqrt(var + eps) + beta
    scale = torch.rsqrt(variance.double() + call.args["eps"])
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    shift = shift if bias is None else shift + bias.double()
    axis: Literal[1, -1] = -1 if folded else 1
    return Affine(**call.layer(), input=x, scale=scale.float(), shift=shift.float(), axis=axis)


@handles("aten._native_batch_norm_legit.no_stats")
def _batch_norm_of_the_batch(call: Call) -> Step:
    """The public operator that comes to it: one that looks at its arguments, so that a file may name it."""
    x, weight, bias = (Ref(node.name) if (node := call.args[name]) else None for name in ("input", "weight", "bias"))
    args = (x, weight, bias, None, None, True, call.args["momentum"], call.args["eps"], False)
    return Operator(**call.labels, target="aten.batch_norm.default", args=args)
