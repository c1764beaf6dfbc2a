"""Whose a layer is: the optimizer that trains it, and the sparsifier that is attached to it."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from rarefy.sparse.layers import Layer

#: An optimizer and the index of its group; None for what no optimizer trains.
Owner = tuple[Optimizer | None, int | None]

S = TypeVar("S")

#: Which sparsifier is attached to a parameter.
_TAKEN: MutableMapping[nn.Parameter, weakref.ref[Any]] = WeakIdKeyDictionary()

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
    for layer in layers:
        if _is_taken(layer, sparsifier):
            gc.collect()  # what goes with an optimizer that is gone
        if _is_taken(layer, sparsifier):
            raise ValueError(
                f"layer {layer.name!r} is being sparsified already, by {type(_TAKEN[layer.parameter]()).__name__}: "
                f"finalize() that one, make the model and its optimizer anew, or pass exclude=[{layer.name!r}]"
            )


def _is_taken(layer: Layer, sparsifier: object) -> bool:
    other = _TAKEN[layer.parameter]() if layer.parameter in _TAKEN else None
    return other is not None and other is not sparsifier


def take(layers: Sequence[Layer], sparsifier: object) -> None:
    """Say that this sparsifier is attached to the layers."""
    for layer in layers:
        _TAKEN[layer.parameter] = weakref.ref(sparsifier)


def let_go(layers: Sequence[Layer], sparsifier: object) -> None:
    """Take that back for those of the layers that it is attached to."""
    for layer in layers:
        if layer.parameter in _TAKEN and _TAKEN[layer.parameter]() is sparsifier:
            del _TAKEN[layer.parameter]


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
