"""Rewriting a plan into fewer steps that compute the same to float rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rarefy.engine.plan import Affine, Binary, Conv, Linear, Plan, Step
from rarefy.engine.views import simplify

#: Given a plan, what makes a value that one step alone reads, and a step: the step to absorb, and what to put instead.
_Rewrite = Callable[[Plan, Callable[[str], Step | None], Step], tuple[Step, Step] | None]


def optimize(plan: Plan) -> Plan:
    """Fold per-channel factors into the layer before, then fuse residual additions and activations into it."""
    plan = _without_unused(simplify(plan))
    for rewrite in (_fold_affine, _fuse_residual, _fuse_activation):
        plan = _rewritten(plan, rewrite)
    return _without_unused(plan)


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
    if not isinstance(before, (Conv, Linear, Binary, Affine)) or before.activation != "none":
        return None
    return before, replace(before, output=step.output, activation=step.activation)
