"""Where the weights of a layer live, the indices that kernels read of that, and what it costs to keep them."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rarefy import kernels
from rarefy.kernels import sparse_layers
from rarefy.kernels.sparse_layers import Index, Shape
from rarefy.sparse.acceleration.choices import PRODUCTS, Choice
from rarefy.sparse.layers import Layer

if TYPE_CHECKING:
    from rarefy.sparse.acceleration.handle import Acceleration

#: Places of weights that have become 0 are dropped once they are more than this share.
SLACK = 0.1
#: Over so many calls of a layer what its indices cost is averaged.
MEMORY = 10

_NOWHERE = torch.empty(0, dtype=torch.int32, device="cpu")


class AcceleratedLayer:
    """A layer that is accelerated: where its weights live, the indices made of that, and the choices."""

    def __init__(self, layer: Layer, owner: Acceleration) -> None:
        self.layer, self.owner = layer, weakref.ref(owner)
        self.places: Tensor | None = None
        self.values = torch.empty(0, dtype=torch.float32)  # of the weights there, as refresh() found them
        self.seen: object = None
        self.indices: dict[tuple[Shape, int], Index | None] = {}
        self.choices: dict[object, dict[str, Choice]] = {}
        self.spent = 0.0  # seconds, on indices
        self.upkeep = 0.0  # of that, a call now

    def refresh(self, weight: Tensor, channels_last: bool, choices: Mapping[str, Choice], graded: list[bool]) -> bool:
        """Know where the weights live, and their values; False where no product is to be sparse.

        ``graded`` says whether gradients of the input and of the weight are wanted.
        """
        owner = self.owner()
        if owner is None or not owner.active:
            return False
        known = _NOWHERE if self.places is None else self.places
        self.values, nonzero, inside = sparse_layers.take(weight, known)
        needed = [True, graded[0], graded[1] and not owner.dense_gradients()]
        wanted = [product for product, need in zip(PRODUCTS, needed, strict=True) if need]
        density = nonzero / weight.numel()
        if not any(choices[product].possible(density) for product in wanted):
            self._forget()
            return False
        self.upkeep *= 1.0 - 1.0 / MEMORY
        mask = owner.mask_of(self.layer)
        seen = (channels_last, None if mask is None else (mask.data_ptr(), mask._version))
        stale = self.places is None or inside < nonzero or seen != self.seen
        if mask is None and not stale:
            stale = nonzero < (1.0 - SLACK) * len(known)
        if stale:
            # Where masks change in every step the indices may cost more than the zeros save.
            timed = not any(choices[product].open(density) for product in wanted)
            if timed and self.upkeep > sum(choices[product].gain(density) for product in wanted):
                self._forget()
                return False
            began = time.perf_counter()
            self._forget()
            self.places, self.seen = sparse_layers.live_places(weight, mask), seen
            self.values, _, _ = sparse_layers.take(weight, self.places)
            self._spend(time.perf_counter() - began)
        return True

    def _spend(self, seconds: float) -> None:
        self.spent += seconds
        self.upkeep += seconds / MEMORY

    def _forget(self) -> None:
        self.places = None
        self.indices.clear()

    def index(self, shape: Shape, channels_last: bool) -> Index | None:
        """The index for a shape, None where there is none."""
        key = (shape, sparse_layers.lanes())
        if key not in self.indices:
            assert self.places is not None
            began = time.perf_counter()
            try:
                grid = sparse_layers.grid(shape)
                fits = grid.largest < 2**31
                self.indices[key] = Index(grid, self.places, channels_last) if fits else None
            except ValueError:  # more padding than the kernel reaches over
                self.indices[key] = None
            self._spend(time.perf_counter() - began)
        return self.indices[key]

    def choices_for(self, shape: tuple[int, ...], memory: torch.memory_format) -> dict[str, Choice]:
        """The choices for inputs of a shape, by the product."""
        key = (shape, memory, torch.get_num_threads(), kernels.isa())
        if key not in self.choices:
            self.choices[key] = {product: Choice(self.layer.name, product, shape) for product in PRODUCTS}
        return self.choices[key]
