"""Whose a layer is: the optimizer that trains it, and the sparsifier that is attached to it."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TypeVar

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from rarefy.sparse.layers import Layer

#: An optimizer and the index of its group; None for what no optimizer trains.
Owner = tuple[Optimizer | None, int | None]

S = TypeVar("S")

#: The layers that each sparsifier is attached to. No weak references to parameters: PyTorch swaps no tensor that has
#: one (torch.__future__.set_swap_module_params_on_conversion).
_TAKEN: MutableMapping[Any, list[Layer]] = weakref.WeakKeyDictionary()

#: Every sparsifier that is alive, and what it does about a step of any optimizer.
_LIVING: MutableMapping[Any, Callable[[Any, Optimizer], None]] = weakref.WeakKeyDictionary()


def trainer_of(layer: Layer, optimizers: Sequence[Optimizer]) -> Owner:
    """The one of the optimizers that holds the layer's weight. Raises ValueError for several, and for none."""
    owners = [
        (optimizer, index)
        for optimizer in optimizers
        for index, group in enumerate(optimizer.param_groups)
        if any(parameter is layer.parameter for parameter in group["params"])
    ]
    if len(owners) > 1:
        kinds = " and ".join(type(optimizer).__name__ for optimizer, _ in owners)
        raise ValueError(
            f"the weight of layer {layer.name!r} is in several of the optimizers, {kinds}: attach the one that "
            "trains it now, the outer one if one wraps the other, and call attach() again when that changes"
        )
    if owners:
        return owners[0]
    if layer.parameter.requires_grad:
        raise ValueError(
            f"the optimizer does not hold the weight of layer {layer.name!r}: give attach() every optimizer that "
            f"trains the model, made after it was sharded or cast, or pass exclude=[{layer.name!r}]"
        )
    return None, None


def held(optimizer: Optimizer, layers: Sequence[Layer]) -> list[str]:
    """The names of those of the layers whose weights an optimizer holds."""
    mine = {id(layer.parameter): layer.name for layer in layers}
    return [mine[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in mine]


def check_free(layers: Sequence[Layer], sparsifier: object) -> None:
    """Raise ValueError for a layer that another sparsifier is attached to."""
    if _taken(layers, sparsifier) is not None:
        gc.collect()  # what goes with an optimizer that is gone
    taken = _taken(layers, sparsifier)
    if taken is not None:
        name, by = taken
        raise ValueError(
            f"layer {name!r} is being sparsified already, by {by}: finalize() that one, make the model and its "
            f"optimizer anew, or pass exclude=[{name!r}]"
        )


def _taken(layers: Sequence[Layer], sparsifier: object) -> tuple[str, str] | None:
    """The first of the layers that another sparsifier is attached to, and the name of its class."""
    others = {
        id(layer.parameter): type(other).__name__
        for other, theirs in _TAKEN.items()
        if other is not sparsifier
        for layer in theirs
    }
    return next(((layer.name, others[id(layer.parameter)]) for layer in layers if id(layer.parameter) in others), None)


def take(layers: Sequence[Layer], sparsifier: object) -> None:
    """Say that this sparsifier is attached to the layers."""
    _TAKEN[sparsifier] = list(layers)


def let_go(sparsifier: object) -> None:
    """Take that back."""
    _TAKEN.pop(sparsifier, None)


def watch(sparsifier: S, stepped: Callable[[S, Optimizer], None]) -> None:
    """Have a sparsifier told, as long as it lives, of the steps of all optimizers: also of those it is not given."""
    _LIVING[sparsifier] = stepped
    _watch_all_optimizers()


@functools.cache
def _watch_all_optimizers() -> None:
    """One hook for all sparsifiers, which is never taken away.

    A hook of each, removed when it is collected, could be removed while an optimizer walks through its hooks.
    """

    def seen(optimizer: Optimizer, *_: Any) -> None:
        for sparsifier, stepped in list(_LIVING.items()):
            stepped(sparsifier, optimizer)

    register_optimizer_step_post_hook(seen)
