"""N:M sparsity by SR-STE: of every M consecutive inputs of an output N live (Zhou et al., ICLR 2021, arXiv 2102.04010).

    forward     W^ = W * M,   M = 1 for the N largest |W| of each M
    backward    dL/dW = dL/dW^ + lambda * (1 - M) * W         (sparse-refined straight-through estimator, equation 9)

The refinement pulls what is not used towards 0, so that masks settle. Sparse tensor cores take 2:4. The inputs of a
convolution are its input channels, at each position of the kernel, as these units want them. The masks are those of the
current weights in every step.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from rarefy import _checks
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.latent import Latent
from rarefy.sparse.masks import check_divisible
from rarefy.sparse.reports import Info


def best_of_each(scores: Tensor, n: int, m: int) -> Tensor:
    """Mask of the n best of every m consecutive scores, (N,), ties to the lower index."""
    groups = scores.view(-1, m)
    better = torch.zeros_like(groups, dtype=torch.uint8)  # how many of its group come before each
    for index in range(m):
        other = groups[:, index : index + 1]
        better[:, :index] += other > groups[:, :index]
        better[:, index + 1 :] += other >= groups[:, index + 1 :]
    return (better < n).flatten()


@dataclass(eq=False, repr=False)
class NM(Latent):
    """N:M sparse training. There is no target: the sparsity is 1 - n/m in every layer throughout.

    Args:
        n, m: how many of how many live, 0 < n < m; 2 of 4. M must divide the inputs of every layer.
        refinement: lambda, not negative; the paper's by default.

    Raises:
        ValueError: as :class:`Sparsifier`; n and m out of order; a layer whose inputs m does not divide, by name.
    """

    _: KW_ONLY
    n: int = 2
    m: int = 4
    refinement: float = 2e-4

    info = Info(
        title="N:M by SR-STE",
        paper="Zhou et al., ICLR 2021, arXiv 2102.04010",
        start="sparse",
        targeted="never",
        training_flops="dense",
    )
    inputs_last = True

    def __post_init__(self) -> None:
        whole = all(hasattr(x, "__index__") and not isinstance(x, bool) for x in (self.n, self.m))
        if not whole or not 0 < self.n < self.m:
            raise ValueError(
                f"n and m must be whole numbers with 0 < n < m, such as 2 and 4, got {self.n!r} and {self.m!r}"
            )
        _checks.number("refinement", self.refinement)
        super().__post_init__()

    def _check_shapes(self) -> None:
        check_divisible(self._layers, (1, self.m), f"groups of {self.m}")

    def value(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """W^ = W M."""
        mask = best_of_each(weight.abs(), self.n, self.m)
        bucket.kept["mask"].copy_(mask)
        return weight * mask

    def gradient(self, grad: Tensor, weight: Tensor, bucket: Bucket) -> Tensor:
        """dL/dW = dL/dW^ + lambda (1 - M) W."""
        return grad.add_(weight.masked_fill(bucket.kept["mask"], 0.0), alpha=self.refinement)

    def live(self, bucket: Bucket) -> Tensor:
        """M."""
        return best_of_each(bucket.kept["latent"].abs(), self.n, self.m)

    def prepare(self, bucket: Bucket) -> None:
        """See :class:`Sparsifier`."""
        bucket.kept["mask"] = bucket.flat(1, torch.bool)

    def _update(self) -> None:
        """Nothing: the masks follow from the weights."""

    def _settle(self) -> list[Tensor]:
        return self._live()

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        return 1.0

    def _alpha(self) -> float | None:
        return 1.0
