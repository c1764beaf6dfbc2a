"""Static sparse training: masks that are there before the first step, and stay.

Drawn at random this is the baseline of sparse-to-sparse training (Mocanu et al. 2018; RigL, Evci et al. 2020, calls it
"Static"). Of a model that is sparse already, ``masks="nonzero"``, it is fine-tuning with the zeros held.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from rarefy import _checks
from rarefy.sparse.budget import Budget, sparsity_budget
from rarefy.sparse.families.masked import Masked
from rarefy.sparse.layers import DEFAULT_FLOOR
from rarefy.sparse.masks import count_all
from rarefy.sparse.reports import Info


@dataclass(eq=False, repr=False)
class Static(Masked):
    """Fixed masks.

    Args:
        masks: "random", "magnitude" (the largest weights), or "nonzero": the model's zeros stay zeros, and there is no
            target to give. None takes "nonzero" for a model that is sparse already (a tenth of its weights, in half of
            the layers), and "random" for any other.
        seed: of the random masks; every process of a run must have the same.

    Raises:
        ValueError: as :class:`Budgeted`; an option that the masks leave no use for; with
            masks="nonzero" a model that has no zeros.
    """

    _: KW_ONLY
    masks: str | None = None
    seed: int = 0

    info = Info(
        title="Static",
        paper="baseline of RigL, Evci et al., ICML 2020",
        start="sparse",
        targeted="always",
        training_flops="at the target's density",
    )
    takes_global = True

    def __post_init__(self) -> None:
        _checks.whole("seed", self.seed, least=0)
        if self.masks is not None:
            _checks.one_of("masks", self.masks, ("random", "magnitude", "nonzero"))
        if self.masks == "nonzero":
            free = {
                "target": None,
                "target_flops": None,
                "target_ms": None,
                "distribution": None,
                "floor": DEFAULT_FLOOR,
                "block": 1,
            }
            given = [name for name, default in free.items() if getattr(self, name) != default]
            if given:
                raise ValueError(f"masks='nonzero' holds the zeros that the model has: leave {' and '.join(given)} out")
        if self.masks in ("magnitude", "nonzero") and self.seed:
            raise ValueError(f"masks={self.masks!r} draws nothing: leave seed out")
        if self.distribution == "global" and self.masks != "magnitude":
            raise ValueError("distribution='global' takes the largest weights over all layers: pass masks='magnitude'")
        super().__post_init__()

    def initial_masks(self) -> list[Tensor]:
        """See :class:`Masked`."""
        if self.masks == "magnitude":
            return self.choose([weight.abs() for weight in self.weights()], self.budget.goal)
        if self.masks == "nonzero":
            return self.nonzero()
        found = None if self.masks == "random" else self.zeros_of_the_model()
        return self.random_masks(self.budget.goal, self.seed) if found is None else found

    def _check_target(self) -> None:
        if self.masks != "nonzero":
            super()._check_target()

    def _make_budget(self) -> Budget | None:
        if self.masks != "nonzero":
            return super()._make_budget()
        sizes = [layer.size for layer in self._chosen]
        counts = count_all([layer.local != 0 for layer in self._chosen], self._shards())
        live = sum(n or size for n, size in zip(counts, sizes, strict=True))  # as in Masked.nonzero
        if not 0 < live < sum(sizes):
            raise ValueError(
                f"masks='nonzero' holds the zeros that the model has, and of its {sum(sizes)} weights "
                f"{sum(sizes) - live} are 0: load the sparse weights before the sparsifier is made"
            )
        return sparsity_budget(live / sum(sizes), sizes)

    def _floors(self) -> float | Mapping[str, float]:
        return 0.0 if self.masks == "nonzero" else super()._floors()
