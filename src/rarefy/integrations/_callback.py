"""What the callbacks have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn

from rarefy.sparse import Sparsifier

#: Makes the sparsifier of a model for so many optimizer steps.
Make: TypeAlias = Callable[[nn.Module, int], Sparsifier]


def checked(make: Make) -> Make:
    """Raise TypeError for what makes no sparsifier, such as one that is made already."""
    if isinstance(make, Sparsifier) or not callable(make):
        raise TypeError(
            "SparsifierCallback() takes how to make the sparsifier, since the trainer knows the number of steps: "
            "lambda model, total_steps: AutoSparse(model, target=0.9, total_steps=total_steps); got "
            f"{type(make).__name__}"
        )
    return make


def made(make: Make, model: nn.Module, total_steps: int) -> Sparsifier:
    """Return the sparsifier. Raises TypeError if it is none."""
    sparsifier = make(model, total_steps)
    if not isinstance(sparsifier, Sparsifier):
        raise TypeError(
            "the function given to SparsifierCallback() must return the sparsifier, as lambda model, total_steps: "
            f"AutoSparse(model, target=0.9, total_steps=total_steps) does; it returned {type(sparsifier).__name__}"
        )
    return sparsifier


def whole_state(sparsifier: Sparsifier) -> dict[str, Any]:
    """Return the sparsifier's state, shards made whole: for one process to write, and any number to read.

    All processes that train together must call it.
    """
    state = sparsifier.state_dict()
    state["layers"] = {
        layer: {name: _whole(value) for name, value in tensors.items()} for layer, tensors in state["layers"].items()
    }
    return state


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value
