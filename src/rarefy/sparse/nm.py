"""N:M sparsity by SR-STE: of every M consecutive inputs of an output N live (Zhou et al., ICLR 2021, arXiv 2102.04010).

    forward     W^ = W * M,   M = 1 for the N largest |W| of each M
    backward    dL/dW = dL/dW^ + lambda * (1 - M) * W         (sparse-refined straight-through estimator, equation 9)

The refinement pulls what is not used towards 0, so that masks settle. Sparse tensor cores take 2:4. The inputs of a
convolution are its input channels, at each position of the kernel, as these units want them. The masks are those of the
current weights in every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.base import Info, LayerState, Selection, Sparsifier
from rarefy.sparse.masked import write_sparse
from rarefy.sparse.masks import best_of_each, check_divisible
from rarefy.sparse.selection import Prunable, select_layers
from rarefy.sparse.swapped import check_swapped, guard_fast_paths, swap, swap_back


class _Refined(nn.Module):
    """The masked weight with SR-STE's gradient."""

    def __init__(self, n: int, m: int, decay: float) -> None:
        super().__init__()
        self.n, self.m, self.decay = n, m, decay

    def mask(self, weight: Tensor) -> Tensor:
        """Boolean, what lives of this weight."""
        return best_of_each(weight.detach().abs(), self.n, self.m)

    def forward(self, weight: Tensor) -> Tensor:
        mask = self.mask(weight)
        return (weight * mask).detach() + (weight - weight.detach())


class NM(Sparsifier):
    """N:M sparse training.

    Args:
        model, total_steps, example_input: see :class:`Sparsifier`; there is no target.
        include, exclude: see :class:`Sparsifier`; M must divide the inputs of every layer that is left.
        n, m: how many of how many live, 0 < n < m. The sparsity is 1 - n/m throughout.
        refinement: lambda, not negative; 2e-4 in the paper.

    Raises:
        ValueError: as :class:`Sparsifier`; n and m out of order; a target or a floor; a layer whose inputs m does not
            divide, by name.
    """

    info = Info("N:M by SR-STE", "Zhou et al., ICLR 2021, arXiv 2102.04010", "sparse", "never", "dense")
    needs_optimizer = True

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        n: int = 2,
        m: int = 4,
        refinement: float = 2e-4,
        **selection: Unpack[Selection],
    ) -> None:
        if isinstance(n, bool) or isinstance(m, bool) or not 0 < n < m:
            raise ValueError(f"n and m must be whole numbers with 0 < n < m, such as 2 and 4, got {n} and {m}")
        if refinement < 0.0:
            raise ValueError(f"refinement must not be negative, got {refinement}")
        for option in ("target", "target_flops", "floor"):
            if option in selection:
                raise ValueError(
                    f"the sparsity of N:M is 1 - n/m, here {1 - n / m:g}, in every layer: leave {option} out"
                )
        chosen = select_layers(model, selection.get("include"), selection.get("exclude"))
        check_divisible({name: tuple(layer.weight.shape) for name, layer in chosen.items()}, m, f"groups of {m}")
        # The groups themselves are the floor.
        selection["target"], selection["floor"] = 1.0 - n / m, 0.0
        super().__init__(model, total_steps=total_steps, **selection)
        self.n, self.m, self.refinement = n, m, refinement
        self._parts = [_Refined(n, m, refinement) for _ in self._layers]
        for layer, part in zip(self._layers.values(), self._parts, strict=True):
            swap(layer, part)
        guard_fast_paths(model)

    def layers(self) -> list[LayerState]:
        """See :meth:`Sparsifier.layers`."""
        return [
            LayerState(name, tuple(layer.weight.shape), layer.weight.numel() * self.n // self.m, 1.0, alpha=1.0)
            for name, layer in self._layers.items()
        ]

    @torch.no_grad()
    def _before_optimizer(self) -> None:
        for part, layer in zip(self._parts, self._layers.values(), strict=True):
            if layer.weight.grad is not None:
                layer.weight.grad.add_(layer.weight.masked_fill(part.mask(layer.weight), 0.0), alpha=self.refinement)

    def _update(self) -> None:
        """Nothing: the masks follow from the weights."""

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "n": self.n, "m": self.m}

    def _state(self) -> dict[str, Any]:
        return {}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing: see :meth:`_state`."""

    def _finalize(self, layers: Mapping[str, Prunable]) -> None:
        for layer in check_swapped(layers).values():
            part = cast(_Refined, layer.reparam)
            write_sparse(layer.weight, layer.weight, part.mask(layer.weight))
            swap_back(layer)
