"""What a sparsifier tells its user: of steps, weights and optimizers that are not as they should be."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from rarefy.sparse.budget import Budget
from rarefy.sparse.layers import Layer

#: finalize() warns where it changes the density by more than this share of it.
CUT = 0.05

CHANGED = (
    "weights were changed outside the optimizer's step(), and training goes on from those that are there in its next "
    "one: after load_state_dict() that is right; if an optimizer or a wrapper moves them, attach() that one"
)

MASKS_STAY = "masks stay as they are; lower the learning rate, clip, or skip such batches"


def over(total_steps: int) -> str:
    """Of steps after the last."""
    return (
        f"training goes on after total_steps={total_steps}: from here on weights cross thresholds that nothing moves, "
        "and only finalize() lands on the target again; finalize() first, or give the steps of the whole run"
    )


def not_finite(bad: Sequence[Layer], layers: Sequence[Layer], steps: int) -> str:
    """Of layers with weights that are NaN or infinite."""
    return (
        f"the weights of {len(bad)} of {len(layers)} sparsified layers, {bad[0].name!r} first, are not finite "
        f"(NaN or inf) after {steps} steps"
    )


def unused(aside: Sequence[Layer], layers: Sequence[Layer]) -> str:
    """Of layers that are set aside."""
    names = ", ".join(repr(layer.name) for layer in aside[:3]) + (", ..." if len(aside) > 3 else "")
    return (
        f"{len(aside)} of {len(layers)} layers ({names}) have no gradient in the first step, as if nothing used them: "
        "they stay dense and take no share of the target; name them in include to keep them"
    )


def unattached(optimizer: Optimizer, held: Sequence[str], sparsifier: object) -> str:
    """Of an optimizer that holds these layers and was not given to the sparsifier."""
    return (
        f"{type(optimizer).__name__} has moved the weights of {len(held)} sparsified layers, {held[0]!r} first, and "
        f"the sparsifier of {type(sparsifier).__name__} is not attached to it: call attach(optimizer) before training"
    )


def is_far(budget: Budget, live: Sequence[int]) -> bool:
    """Whether so many live weights are far from the budget: :func:`cut` is to be told."""
    off = abs(budget.density(live) - budget.goal)
    return off > CUT * budget.goal and abs(budget.left(live)) > budget.dearest


def cut(budget: Budget, live: Sequence[int], steps: int, total_steps: int) -> str:
    """Of a run that is ended before it has landed, or long after."""
    advice = "train to the last step" if steps < total_steps else "train no further than that"
    return (
        f"finalize() after {steps} of {total_steps} steps goes from a density of {budget.density(live):.4f} to "
        f"{budget.goal:.4f} at once, which costs accuracy; {advice} (an optimizer step after finalize() fills zeros "
        "again)"
    )
