"""Rewriting a plan into fewer steps that compute the same to float rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rarefy.engine.attending import absorb_views, float_masks, join_attention
from rarefy.engine.plan import (
    ACTIVATIONS,
    MOST_INSTRUCTIONS,
    MOST_TERMS,
    Affine,
    Binary,
    Conv,
    ConvTranspose,
    Linear,
    Operator,
    Plan,
    Pointwise,
    Ref,
    Step,
    View,
)
from rarefy.engine.views import in_order, simplify

#: Given a plan, what makes a value that one step alone reads, and a step: the step to absorb, and what to put instead.
_Rewrite = Callable[[Plan, Callable[[str], Step | None], Step], tuple[Step, Step] | None]


def optimize(plan: Plan) -> Plan:
    """Fold per-channel factors into the layer before, then fuse residual additions and activations into it."""
    plan = _before_reshapes(plan)
    plan = float_masks(join_attention(_without_unused(absorb_views(_without_unused(simplify(plan))))))
    for rewrite in (_fuse_padding, _fold_affine, _fold_into_next, _fuse_residual, _fuse_activation):
        plan = _rewritten(_without_unused(plan), rewrite)
    plan, before = _rewritten(plan, _fuse_pointwise), plan
    while len(plan.steps) < len(before.steps):
        plan, before = _rewritten(plan, _fuse_pointwise), plan
    return plan


def fuse_activations(plan: Plan) -> Plan:
    """Move activation functions into the steps before them alone."""
    return _rewritten(plan, _fuse_activation)


def _without_unused(plan: Plan) -> Plan:
    """The plan without steps whose value nobody reads; those that check something stay."""
    needed, kept = set(plan.outputs), list[Step]()
    for step in reversed(plan.steps):
        if step.output in needed or "_assert" in step.kind:
            needed.update(step.inputs)
            kept.append(step)
    return replace(plan, steps=tuple(reversed(kept)))


def _rewritten(plan: Plan, rewrite: _Rewrite) -> Plan:
    users, made = plan.users(), dict[str, Step]()

    def only_use(value: str) -> Step | None:
        alone = value not in plan.outputs and len(users[value]) == 1
        return made.get(value) if alone else None

    for step in plan.steps:
        found = rewrite(plan, only_use, step)
        if found is None:
            made[step.output] = step
        else:  # what was absorbed now runs where the other did, when all that both read is there
            del made[found[0].output]
            made[step.output] = found[1]
    return replace(plan, steps=tuple(made.values()))


def _before_reshapes(plan: Plan) -> Plan:
    """Factors of the last axis move before a reshape that keeps it, to the layer that made what is reshaped."""
    users, values, made = plan.users(), dict(plan.values), dict[str, Step]()
    for step in plan.steps:
        made[step.output] = step
        if not isinstance(step, Affine) or step.axis != -1 or step.kind != "affine":
            continue
        view, alone = made.get(step.input), step.input not in plan.outputs and len(users[step.input]) == 1
        if not alone or not isinstance(view, View) or not in_order(view):
            continue
        before = values[view.input].sample
        if before is not None and before[-1] == view.sizes[-1]:
            values[view.output] = values[view.input]
            made[view.output] = replace(step, input=view.input, output=view.output)
            made[step.output] = replace(view, input=view.output, output=step.output)
    return replace(plan, steps=tuple(made.values()), values=values)


def _fuse_padding(plan: Plan, only_use: Callable[[str], Step | None], step: Step) -> tuple[Step, Step] | None:
    """Zeros around the input of a convolution become the convolution's own."""
    before = only_use(step.input) if isinstance(step, Conv) else None
    match before:
        case Operator(target="aten.pad.default", args=(Ref(x), [*pads], *rest), kwargs=kwargs) if not kwargs:
            mode, value = (*rest, "constant", None)[:2] if len(rest) < 2 else rest
        case Operator(target="aten.constant_pad_nd.default", args=(Ref(x), [*pads], *rest), kwargs=kwargs) if (
            not kwargs
        ):
            mode, value = "constant", (*rest, None)[0]
        case _:
            return None
    assert isinstance(step, Conv)
    pairs = [*zip(pads[::2], pads[1::2], strict=True)][::-1]  # of the last axes, from the first of them on
    if mode != "constant" or value not in (None, 0) or len(pairs) > len(step.padding) or min(pads) < 0:
        return None
    added = [(0, 0)] * (len(step.padding) - len(pairs)) + pairs
    padding = tuple((a + c, b + d) for (a, b), (c, d) in zip(step.padding, added, strict=True))
    return before, replace(step, input=x, padding=padding)


def _fold_affine(plan: Plan, only_use: Callable[[str], Step | None], step: Step) -> tuple[Step, Step] | None:
    """``scale (w x + b) + shift`` is ``(scale w) x + (scale b + shift)``."""
    if not isinstance(step, Affine) or (step.scale is None and step.shift is None):
        return None
    layer = only_use(step.input)
    if not isinstance(layer, (Conv, ConvTranspose, Linear, Affine)) or layer.activation != "none":
        return None
    if isinstance(layer, (Conv, Linear)) and layer.residual is not None:
        return None
    axis = layer.axis if isinstance(layer, Affine) else -1 if isinstance(layer, Linear) else 1
    if isinstance(layer, Affine):
        sizes = [len(each) for each in (layer.scale, layer.shift) if each is not None]
        if not sizes:
            return None
        channels = sizes[0]
    else:
        channels = len(layer.weight)
    # One axis behind the batch is the last one, too.
    same_axis = step.axis == axis or len(plan.values[layer.output].shape or ()) == 1
    scale, shift = (_along(each, channels, same_axis) for each in (step.scale, step.shift))
    if (scale is None and step.scale is not None) or (shift is None and step.shift is not None):
        return None
    if isinstance(layer, Affine):
        both = [each for each in (layer.scale, scale) if each is not None]
        factors = torch.stack([each.double() for each in both]).prod(0).float() if both else None
        moved = layer.shift if layer.shift is None or scale is None else (layer.shift.double() * scale.double())
        return layer, replace(
            layer, output=step.output, scale=factors, shift=_sum(moved, shift), activation=step.activation
        )
    scale = torch.ones(channels, dtype=torch.float32) if scale is None else scale
    folded = layer.weight.double() * scale.double().reshape(-1, *(1,) * (layer.weight.dim() - 1))
    bias = _sum(None if layer.bias is None else layer.bias.double() * scale.double(), shift)
    made = replace(layer, output=step.output, weight=folded.float(), bias=bias, activation=step.activation)
    return layer, made if isinstance(made, ConvTranspose) else replace(made, weight_scale=None)


def _fold_into_next(plan: Plan, only_use: Callable[[str], Step | None], step: Step) -> tuple[Step, Step] | None:
    """``w (scale x + shift) + b`` is ``(w scale) x + (w shift + b)``."""
    if not isinstance(step, Linear) or step.weight_scale is not None or step.residual == step.input:
        return None
    before = only_use(step.input)
    if not isinstance(before, Affine) or before.activation != "none" or before.scale is before.shift is None:
        return None
    channels = step.weight.shape[1]
    # One axis behind the batch is the last one, too.
    same_axis = before.axis == -1 or len(plan.values[step.input].shape or ()) == 1
    scale, shift = (_along(each, channels, same_axis) for each in (before.scale, before.shift))
    if (scale is None and before.scale is not None) or (shift is None and before.shift is not None):
        return None
    weight = step.weight if scale is None else (step.weight.double() * scale.double()).float()
    moved = None if shift is None else step.weight.double() @ shift.double()
    return before, replace(step, input=before.input, weight=weight, bias=_sum(moved, step.bias))


def _along(numbers: Tensor | None, channels: int, same_axis: bool) -> Tensor | None:
    """Numbers of another axis, one for each of the channels; None unless they are all the same there."""
    if numbers is None or (same_axis and len(numbers) == channels):
        return numbers
    return numbers[:1].expand(channels) if bool((numbers == numbers[0]).all()) else None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    terms = [term.double() for term in (a, b) if term is not None]
    return torch.stack(terms).sum(0).float() if terms else None


def _fuse_pointwise(plan: Plan, only_use: Callable[[str], Step | None], step: Step) -> tuple[Step, Step] | None:
    """An expression that one other alone reads becomes part of that one."""
    if not isinstance(step, (Pointwise, Affine, Binary)):
        return None
    for value in step.inputs:
        before = only_use(value)
        if not isinstance(before, (Pointwise, Affine, Binary)) or not any(
            isinstance(each, Pointwise) for each in (before, step)
        ):
            continue
        if plan.values[value].shape != plan.values[step.output].shape:
            continue  # it would be computed again for every place
        first, second = _expression(plan, before), _expression(plan, step)
        if first is None or second is None:
            continue
        joined = _joined(first, second, value)
        if joined is not None:
            return before, joined
    return None


def _expression(plan: Plan, step: Pointwise | Affine | Binary) -> Pointwise | None:
    """The same as an expression."""
    if isinstance(step, Pointwise):
        return step
    shape, operands = plan.values[step.output].shape, tuple(dict.fromkeys(step.inputs))
    if (
        shape is None
        or step.activation not in ACTIVATIONS
        or not 1 <= len(shape) <= 3
        or any(len(plan.values[name].shape or ()) != len(shape) for name in operands)
    ):
        return None
    code: list[tuple[str, int, int]] = []
    constants: list[Tensor] = []
    if isinstance(step, Binary):
        code.append((step.op, operands.index(step.x), operands.index(step.y)))
        begin = len(operands)
    else:
        parts = [("mul", step.scale), ("add", step.shift)]
        given = [(operation, part) for operation, part in parts if part is not None]
        begin = 1 + len(given)
        for operation, part in given:
            code.append((operation, 0 if not code else begin, 1 + len(constants)))
            constants.append(part[:1] if bool((part == part[0]).all()) else part)
    if step.activation != "none":
        code.append((step.activation, begin + len(code) - 1 if code else 0, -1))
    ones = (1,) * (len(shape) - 1)
    last = isinstance(step, Affine) and step.axis == -1
    return Pointwise(
        name=step.name,
        output=step.output,
        operands=operands,
        code=tuple(code),
        constants=torch.cat([each.reshape(-1) for each in constants] or [torch.zeros(0, dtype=torch.float32)]),
        sizes=tuple((*ones, len(each)) if last else (len(each), *ones) for each in constants),
    )


def _joined(first: Pointwise, second: Pointwise, value: str) -> Pointwise | None:
    """The second expression with the first one in the place of a value; None where that is too long."""
    operands = tuple(dict.fromkeys((*first.operands, *(name for name in second.operands if name != value))))
    sizes, code = (*first.sizes, *second.sizes), list[tuple[str, int, int]]()
    given = len(operands) + len(sizes)
    if given > MOST_TERMS or len(first.code) + len(second.code) > MOST_INSTRUCTIONS:
        return None

    def places(step: Pointwise, skipped: int, results: int) -> list[int]:
        """Where the terms of an expression are in the whole."""
        found = [given + len(first.code) - 1 if name == value else operands.index(name) for name in step.operands]
        found += [len(operands) + skipped + index for index in range(len(step.sizes))]
        return found + [results + index for index in range(len(step.code))]

    for step, skipped, results in ((first, 0, given), (second, len(first.sizes), given + len(first.code))):
        at = places(step, skipped, results)
        code += [(operation, at[x], at[y] if y >= 0 else -1) for operation, x, y in step.code]
    return Pointwise(
        name=second.name,
        output=second.output,
        operands=operands,
        code=tuple(code),
        constants=torch.cat([first.constants, second.constants]),
        sizes=sizes,
    )


def _fuse_residual(plan: Plan, only_use: Callable[[str], Step | None], step: Step) -> tuple[Step, Step] | None:
    """An addition of two values of one shape becomes the residual of the layer that made one of them."""
    if not isinstance(step, Binary) or step.op != "add" or step.x == step.y:
        return None
    known = [plan.values[name] for name in step.inputs]
    if known[0].sample is None or (known[0].sample, known[0].fold) != (known[1].sample, known[1].fold):
        return None
    order = {each.output: index for index, each in enumerate(plan.steps)}
    # Of two layers the later one: the other's result is there when it runs.
    for value, other in sorted([(step.x, step.y), (step.y, step.x)], key=lambda pair: -order.get(pair[0], -1)):
        layer = only_use(value)
        if isinstance(layer, (Conv, Linear)) and layer.residual is None and layer.activation == "none":
            return layer, replace(layer, output=step.output, residual=other, activation=step.activation)
    return None


def _fuse_activation(plan: Plan, only_use: Callable[[str], Step | None], step: Step) -> tuple[Step, Step] | None:
    """An activation function moves into the step that made what it reads."""
    if not isinstance(step, Affine) or step.kind != "activation":
        return None
    before = only_use(step.input)
    if not isinstance(before, (Conv, ConvTranspose, Linear, Binary, Affine)) or before.activation != "none":
        return None
    return before, replace(before, output=step.output, activation=step.activation)
