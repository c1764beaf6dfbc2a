"""Rewriting a plan into fewer steps that compute the same to float rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rarefy.engine.plan import MOST_INSTRUCTIONS, MOST_TERMS, Affine, Binary, Conv, Linear, Plan, Pointwise, Step

#: Given a plan, what makes a value that one step alone reads, and a step: the step to absorb, and what to put instead.
_Rewrite = Callable[[Plan, Callable[[str], Step | None], Step], tuple[Step, Step] | None]


def optimize(plan: Plan) -> Plan:
    """Fold per-channel factors into the layer before, then fuse residual additions and activations into it."""
    for rewrite in (_fold_affine, _fold_features, _fuse_residual, _fuse_activation):
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


def _fold_affine(plan: Plan, only_use: Callable[[str], Step | None], step: Step) -> tuple[Step, Step] | None:
    """``scale (w x + b) + shift`` is ``(scale w) x + (scale b + shift)``."""
    if not isinstance(step, Affine) or (step.scale is None and step.shift is None):
        return None
    layer = only_use(step.input)
    # Behind a linear layer, channels are its features only where there is nothing but the batch before them.
    vectors = isinstance(layer, Linear) and len(plan.values[layer.output].shape or ()) == 1
    if not (isinstance(layer, Conv) or (isinstance(layer, Linear) and vectors)) or layer.activation != "none":
        return None
    scale = torch.ones(len(layer.weight)) if step.scale is None else step.scale
    folded = layer.weight.double() * scale.double().reshape(-1, *(1,) * (layer.weight.dim() - 1))
    bias = _sum(None if layer.bias is None else layer.bias.double() * scale.double(), step.shift)
    return layer, replace(
        layer, output=step.output, weight=folded.float(), weight_scale=None, bias=bias, activation=step.activation
    )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    terms = [term.double() for term in (a, b) if term is not None]
    return torch.stack(terms).sum(0).float() if terms else None


def _fold_features(plan: Plan, only_use: Callable[[str], Step | None], step: Step) -> tuple[Step, Step] | None:
    """A factor or a summand for each feature of a linear layer, or one for all, moves into its weights."""
    if not isinstance(step, Pointwise) or len(step.operands) != 1 or len(step.code) != 1 or len(step.sizes) != 1:
        return None
    layer, (operation, x, y), constant = only_use(step.operands[0]), step.code[0], step.constants
    if not isinstance(layer, Linear) or layer.activation != "none" or layer.residual is not None:
        return None
    features, sizes = len(layer.weight), step.sizes[0]
    each = constant.numel() == 1 or (constant.numel() == features == sizes[-1] and max(sizes) == features)
    if not each or {x, y} != {0, 1} or operation not in ("add", "mul"):
        return None
    if plan.values[layer.output].shape != plan.values[step.output].shape:
        return None
    if operation == "add":
        return layer, replace(layer, output=step.output, bias=_sum(layer.bias, constant.expand(features)))
    factors = constant.double()
    bias = None if layer.bias is None else (layer.bias.double() * factors).float()
    weight = (layer.weight.double() * factors.reshape(-1, 1)).float()
    return layer, replace(layer, output=step.output, weight=weight, weight_scale=None, bias=bias)


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
    return Pointwise(
        name=step.name,
        output=step.output,
        operands=operands,
        code=tuple(code),
        constants=torch.cat([each.reshape(-1) for each in constants] or [torch.zeros(0)]),
        sizes=tuple((len(each), *(1,) * (len(shape) - 1)) for each in constants),
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
    shapes = [plan.values[name].shape for name in step.inputs]
    if shapes[0] is None or shapes[0] != shapes[1]:
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
    if not isinstance(before, (Conv, Linear, Binary, Affine)) or before.activation != "none":
        return None
    return before, replace(before, output=step.output, activation=step.activation)
