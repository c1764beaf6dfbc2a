"""What is told about methods and layers: what the registry knows of a method, and where a layer stands now."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerState:
    """One sparsified layer, now.

    Attributes:
        name: of its parameter, without a trailing ".weight".
        shape: of the weight, (out, in, ...).
        live: how many weights are used in the forward pass.
        weight_grad_density: share of the weights whose gradient is needed, in [0, 1].
        threshold: on the magnitude (the mean over the channels where there are several); None if the method has none.
        alpha: factor on the gradient of masked weights; None if the method has none.
    """

    name: str
    shape: tuple[int, ...]
    live: int
    weight_grad_density: float
    threshold: float | None = None
    alpha: float | None = None

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Share of live weights, in [0, 1]."""
        return self.live / self.weights


@dataclass(frozen=True, kw_only=True)
class Info:
    """What :func:`rarefy.sparse.list_methods` tells about a method.

    Attributes:
        title: the method's own name.
        paper: where it is from.
        start: "dense" (dense to sparse) or "sparse" (sparse to sparse, from the first step).
        targeted: "always" (a target must be given), "optional", or "never".
        training_flops: what a training step costs, as ``LayerState`` reports it: forward and input gradient at the
            density of the weights used, and the weight gradient as said here.
    """

    title: str
    paper: str
    start: Literal["dense", "sparse"]
    targeted: Literal["always", "optional", "never"]
    training_flops: str
