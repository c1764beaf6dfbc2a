"""Which of two functions computes a product of a layer: the one that was the faster when both were timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

PRODUCTS = ("output", "input gradient", "weight gradient")

#: Denser layers are not timed: what some products gain there is little (benchmarks/sparse_steps.py).
DENSEST = 0.6
#: A product that was slower is timed again once the density is this part of that at which it was.
AGAIN = 0.8
#: One that was faster is timed again once the density is this part of that at which it was: it saves more by then.
STALE = 0.5
#: How often each function is timed at least and at most, and after how many seconds no more than at least.
ROUNDS, ENOUGH = (3, 12), 0.05


@dataclass
class Choice:
    """How one product of a layer is computed for inputs of one shape, and by what measurement.

    Attributes:
        layer: its name.
        product: one of :data:`PRODUCTS`.
        shape: of the input.
        sparse_from: the largest density at which the sparse kernel was the faster, -1 if at none.
        dense_from: the smallest density above it at which PyTorch's function was, 1 if at none.
        density: at which they were timed last, and what both took in seconds.
        calls: how many sparse products were computed.
        seconds_saved: by them, going by what was timed at the time.
    """

    layer: str
    product: str
    shape: tuple[int, ...]
    sparse_from: float = -1.0
    dense_from: float = 1.0
    density: float = 1.0
    seconds_dense: float = 0.0
    seconds_sparse: float = 0.0
    calls: int = 0
    seconds_saved: float = 0.0
    _gain: float = field(default=0.0, repr=False)

    def open(self, density: float) -> bool:
        """Whether the two are to be timed at this density: nothing tells which is faster, or no more by how much."""
        unknown = self.sparse_from < density <= min(DENSEST, AGAIN * self.dense_from)
        return unknown or density < min(self.sparse_from, STALE * self.density)

    def possible(self, density: float) -> bool:
        """Whether the sparse kernel may be used at this density."""
        return density <= self.sparse_from or self.open(density)

    def measure(self, density: float, dense: Callable[[], object], sparse: Callable[[], object]) -> None:
        """Time both at this density."""
        self.density = density
        self.seconds_dense, self.seconds_sparse = fastest(dense, sparse)
        if self.seconds_sparse < self.seconds_dense:
            self.sparse_from = max(self.sparse_from, density)
            self.dense_from = max(self.dense_from, self.sparse_from)
            self._gain = self.seconds_dense - self.seconds_sparse
        else:
            self.dense_from = density
            self.sparse_from = min(self.sparse_from, AGAIN * density) if density else -1.0

    def gain(self, density: float) -> float:
        """Seconds that the sparse kernel saves at this density, as far as is known."""
        return self._gain if density <= self.sparse_from else 0.0

    def sparse(self, density: float) -> bool:
        """Whether the sparse kernel computes the product at this density; counts what it saves."""
        if density > self.sparse_from:
            return False
        self.calls += 1
        self.seconds_saved += self._gain
        return True


def fastest(*functions: Callable[[], object]) -> tuple[float, ...]:
    """The least seconds of each of some functions that are called in turn.

    With one thread they are its own, which do not grow with what else the machine does: the choice stands for long.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(functions)
    least, most = ROUNDS
    begin = clock()
    for turn in range(most):
        if turn >= least and clock() - begin > ENOUGH:
            break
        for i, function in enumerate(functions):
            start = clock()
            function()
            best[i] = min(best[i], clock() - start)
    return tuple(best)
