"""AutoSparse: learned thresholds with Gradient Annealing (Kundu et al., arXiv 2304.06941).

    forward     W^ = sign(W) * h(|W| - g(s)),   h(x) = max(x, 0)
    backward    h'(x) = 1 if x > 0 else alpha           for W and for s
    annealing   alpha = alpha_0 * schedule(progress)     (never compounded)

alpha = 0 is STR, which lets sparsity run away since what is pruned early cannot come back; alpha = 1 is the identity
straight-through estimator, which holds on to too many weights. Forward and backward are the two passes of
:mod:`rarefy.kernels.thresholds`, called in :mod:`rarefy.sparse.families.reparameterized`; what moves the thresholds is
:class:`rarefy.sparse.families.soft_threshold.SoftThreshold`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from rarefy import _checks
from rarefy.sparse import _options
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.budget import PIController
from rarefy.sparse.families.soft_threshold import SoftThreshold
from rarefy.sparse.masks import least_kept, top_k
from rarefy.sparse.reports import Info
from rarefy.sparse.schedules import Annealed


class Policy(NamedTuple):
    """How a run lands on its target."""

    pressure: float  # times the goal's density
    trim_from: float  # share of the run after which the thresholds are trimmed


POLICIES = {"accuracy": Policy(1.5, 0.8), "cost": Policy(1.0, 0.75)}


@dataclass(eq=False, repr=False)
class AutoSparse(SoftThreshold):
    """Sparse training with learned thresholds and Gradient Annealing.

    With a ``target`` (or ``target_flops``, or ``target_ms``) the run lands on it by itself, in one of two ways:

    - ``policy="accuracy"``: alpha is controlled against a cubic curve to the target, near 1 while the run is ahead;
      the thresholds are trimmed over the last fifth of the run.
    - ``policy="cost"``: alpha is annealed and 0 from 45 % of the run on, from where the weight gradient is sparse too;
      the thresholds are trimmed over the last quarter. Fewest training FLOPs.

    Without one this is the paper: alpha is annealed, and the sparsity is what the pressure and alpha make it.

    Args:
        policy: "accuracy" (what None takes) or "cost", with a target only.
        alpha: alpha_0, in [0, 1]; where the controller of ``policy="accuracy"`` starts.
        anneal: "sigmoid-cosine" (what None takes), "cosine", "sigmoid", "linear" or "constant".
        cutoff: share of the run after which alpha is 0, in [0, 1].
        steps_per_epoch: anneal once an epoch of so many steps, as in the paper; None anneals every step.
        backward_density: the sparse backward: only this share of each layer's weights, those of largest
            |W| - T, gets a gradient (the paper uses 0.5). None reaches all of them while alpha is not 0.

    Raises:
        ValueError: as :class:`SoftThreshold`; an option out of its range, or one that the policy leaves no use for.
    """

    _: KW_ONLY
    policy: str | None = None
    alpha: float = 0.75
    anneal: str | None = None
    cutoff: float | None = None
    steps_per_epoch: int | None = None
    backward_density: float | None = None

    info = Info(
        title="AutoSparse",
        paper="Kundu et al., 2023, arXiv 2304.06941",
        start="dense",
        targeted="optional",
        training_flops="dense while alpha > 0 (or at backward_density), then at the density of the weights",
    )

    def __post_init__(self) -> None:
        if self.policy is not None:
            _checks.one_of("policy", self.policy, POLICIES)
            if not self.targeted:
                raise ValueError(f"policy={self.policy!r} needs a target, target_flops or target_ms")
        self.policy = (self.policy or "accuracy") if self.targeted else None
        if self.backward_density is not None:
            _checks.fraction("backward_density", self.backward_density)
            if _options.block("block", self.block) != (1, 1):
                raise ValueError("backward_density chooses single weights: leave it out with block")
        if self.steps_per_epoch is not None:
            _checks.whole("steps_per_epoch", self.steps_per_epoch)
        cutoff = 0.45 if self.cutoff is None and self.policy == "cost" else self.cutoff
        self._annealed = Annealed(self.alpha, self.anneal or "sigmoid-cosine", cutoff)
        self._controller: PIController | None = None
        if self.policy == "accuracy":
            if (self.anneal, self.cutoff, self.steps_per_epoch) != (None, None, None):
                raise ValueError(
                    "policy='accuracy' controls alpha itself: anneal, cutoff and steps_per_epoch have no use; "
                    "leave them out or take policy='cost'"
                )
            # Too sparse raises alpha, so that masked weights can come back.
            self._controller = PIController(self.alpha, proportional=0.5, gain=0.05, low=0.0, high=1.0)
        super().__post_init__()
        self._alpha_now = self.alpha

    @property
    def alpha_now(self) -> float:
        """The factor on the gradient of masked weights."""
        return self._alpha_now if self._controller is not None else self._annealed(self._annealing_progress())

    @property
    def trim_from(self) -> float:
        """See :class:`SoftThreshold`."""
        return POLICIES[self.policy or "accuracy"].trim_from

    def _default_pressure(self) -> float:
        # Without a target: what the paper's ImageNet recipe amounts to, if s shares the weights' decay (1.95 / 0.125).
        return 15.0 if self.budget is None else POLICIES[self.policy or "accuracy"].pressure / self.budget.goal

    def _annealing_progress(self) -> float:
        each = self.steps_per_epoch or 1
        return min(self.steps, self.total_steps) // each * each / self.total_steps

    def _steer(self, error: float | None) -> None:
        if self._controller is not None and error is not None:
            self._alpha_now = self._controller.update(error)
        if self.steps % self.interval == 0:
            self._take_all()
            self._bound_backward()

    def _begin(self) -> None:
        super()._begin()
        odd = [layer.name for bucket in self._buckets if not bucket.as_laid_out for layer in bucket.layers]
        if odd and self.backward_density is not None:
            raise ValueError(
                f"backward_density takes weights whose elements lie row after row in memory, and that of {odd[0]!r} or "
                "one beside it does not (a transpose, a slice): make the parameters of .contiguous() tensors"
            )
        self._bound_backward()

    def _lower(self, bucket: Bucket) -> Tensor | None:
        return None if self.backward_density is None else bucket.kept["lower"]

    def _bound_backward(self) -> None:
        """The sparse backward's bound: the k-th largest |W| - T of the layer, k the asked share of its weights."""
        if self.backward_density is None:
            return
        for layer, weight in zip(self._layers, self.latents(), strict=True):
            bucket, place = self.where(layer)
            threshold = self._shaped(bucket)[place]
            excess = weight.float().abs() - threshold
            best = top_k(excess, max(1, int(self.backward_density * layer.size)), layer.shard)
            least = least_kept([excess], [best], [layer.shard])
            # What the forward uses always gets its gradient: the bound is never above the threshold.
            bucket.parts(bucket.kept["lower"])[place].copy_((threshold + least.clamp(max=0.0)).flatten())

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        if self.alpha_now == 0.0:
            return density
        return 1.0 if self.backward_density is None else max(density, self.backward_density)

    def aim(self) -> float | None:
        """See :meth:`Sparsifier.aim`."""
        if self.budget is None or self._controller is None:
            return None
        return self.budget.aim(self.progress)

    def _state(self) -> dict[str, Any]:
        integral = None if self._controller is None else self._controller.integral
        return {**super()._state(), "integral": integral, "alpha": self.alpha_now}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        super()._load_state(state)
        self._alpha_now = state["alpha"]
        if self._controller is not None:
            self._controller.integral = state["integral"]
