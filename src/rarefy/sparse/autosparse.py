"""AutoSparse: learned thresholds with Gradient Annealing (Kundu et al., arXiv 2304.06941).

    forward     W^ = sign(W) * h(|W| - g(s)),   h(x) = max(x, 0)
    backward    h'(x) = 1 if x > 0 else alpha           for W and for s
    annealing   alpha = alpha_0 * schedule(progress)     (never compounded)

alpha = 0 is STR, which lets sparsity run away since what is pruned early cannot come back; alpha = 1 is the identity
straight-through estimator, which holds on to too many weights. The forward and backward are one operator, in
:mod:`rarefy.kernels.soft_threshold`; the thresholds are :class:`rarefy.sparse.soft_threshold.SoftThreshold`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from rarefy.sparse.anneal import SCHEDULES
from rarefy.sparse.base import Info
from rarefy.sparse.budget import AlphaController
from rarefy.sparse.soft_threshold import SoftThreshold, SoftThresholdOptions, _one_of

#: policy -> (pressure times the goal's density, share of the run after which the thresholds are trimmed)
_POLICIES = {"accuracy": (1.5, 0.8), "cost": (1.0, 0.75)}


class AutoSparse(SoftThreshold):
    """Sparse training with learned thresholds and Gradient Annealing.

    With a ``target`` (or ``target_flops``) the run lands on it by itself, in one of two ways:

    - ``policy="accuracy"``: alpha is controlled against a cubic curve to the target, near 1 while the run is ahead;
      the thresholds are trimmed over the last fifth of the run.
    - ``policy="cost"``: alpha is annealed and 0 from 45 % of the run on, from where the weight gradient is sparse too;
      the thresholds are trimmed over the last quarter. Fewest training FLOPs.

    Without one this is the paper: alpha is annealed, and the sparsity is what the pressure and alpha make it.

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor: see :class:`Sparsifier`.
        policy: "accuracy" (the default) or "cost", with a target only.
        alpha: alpha_0, in [0, 1]; where the controller of ``policy="accuracy"`` starts.
        anneal: "sigmoid-cosine" (the default), "cosine", "sigmoid", "linear" or "constant".
        cutoff: share of the run after which alpha is 0, in [0, 1].
        steps_per_epoch: anneal once an epoch of so many steps, as in the paper; None anneals every step.
        backward_density: the sparse backward: only this share of each layer's weights, those of largest
            |W| - T, gets a gradient (the paper uses 0.5). None reaches all of them while alpha is not 0.
        pressure, granularity, threshold_function, threshold_init, threshold_lr, block: see :class:`SoftThreshold`.

    Raises:
        ValueError: as :class:`Sparsifier`; an option out of its range, or one that the policy leaves no use for.
    """

    info = Info(
        "AutoSparse",
        "Kundu et al., 2023, arXiv 2304.06941",
        "dense",
        "optional",
        "dense while alpha > 0 (or at backward_density), then at the density of the weights",
    )

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        policy: str | None = None,
        alpha: float = 0.75,
        anneal: str | None = None,
        cutoff: float | None = None,
        steps_per_epoch: int | None = None,
        backward_density: float | None = None,
        **options: Unpack[SoftThresholdOptions],
    ) -> None:
        targeted = options.get("target") is not None or options.get("target_flops") is not None
        if policy is not None:
            _one_of("policy", policy, _POLICIES)
            if not targeted:
                raise ValueError(f"policy={policy!r} needs a target or target_flops")
        for name, value in (("alpha", alpha), ("cutoff", cutoff), ("backward_density", backward_density)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if anneal is not None:
            _one_of("anneal", anneal, SCHEDULES)
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        self.policy = (policy or "accuracy") if targeted else None
        self._controller = AlphaController(alpha) if self.policy == "accuracy" else None
        if self._controller is not None and (anneal, cutoff, steps_per_epoch) != (None, None, None):
            raise ValueError(
                "policy='accuracy' controls alpha itself: anneal, cutoff and steps_per_epoch have no use; "
                "leave them out or take policy='cost'"
            )
        self._initial_alpha = alpha
        self.schedule = SCHEDULES[anneal or "sigmoid-cosine"]
        self.cutoff = 0.45 if cutoff is None and self.policy == "cost" else cutoff
        self.steps_per_epoch = steps_per_epoch or 1
        self.backward_density = backward_density
        if backward_density is not None and options.get("block", 1) != 1:
            raise ValueError("backward_density chooses single weights: leave it out with block")
        super().__init__(model, total_steps=total_steps, **options)
        if backward_density is not None:
            for layer in self._thresholded.values():
                layer.lower = torch.zeros_like(layer.raw_threshold)
        self._set_alpha(alpha if self._controller is not None else self._annealed())
        self._bound_backward()

    @property
    def trim_from(self) -> float:  # type: ignore[override]
        """Share of the run after which the thresholds are trimmed to the target."""
        return _POLICIES[self.policy or "accuracy"][1]

    def _default_pressure(self) -> float:
        # Without a target: what the paper's ImageNet recipe amounts to, if s shares the weights' decay (1.95 / 0.125).
        return 15.0 if self.budget is None else _POLICIES[self.policy or "accuracy"][0] / self.budget.goal

    def _annealed(self) -> float:
        """alpha_0 * schedule(progress), and 0 from the cut-off on."""
        step = min(self.steps, self.total_steps) // self.steps_per_epoch * self.steps_per_epoch
        progress = step / self.total_steps
        return (
            0.0
            if self.cutoff is not None and progress >= self.cutoff
            else self._initial_alpha * self.schedule(progress)
        )

    def _steer(self, error: float | None) -> None:
        if self._controller is None:
            self._set_alpha(self._annealed())
        elif error is not None:
            self._set_alpha(self._controller.update(error))
        if self.steps % self.interval == 0:
            self._bound_backward()

    def _set_alpha(self, alpha: float) -> None:
        torch._foreach_zero_([layer.alpha for layer in self._thresholded.values()])
        torch._foreach_add_([layer.alpha for layer in self._thresholded.values()], alpha)

    @torch.no_grad()
    def _bound_backward(self) -> None:
        """The sparse backward's bound: the k-th largest |W| - T of the layer, k the asked share of its weights."""
        for layer in self._thresholded.values():
            if layer.lower is None:
                return
            threshold = layer.threshold()
            excess = (layer.weight.abs() - threshold).flatten()
            k = max(1, int(self.backward_density * excess.numel()))  # type: ignore[operator]
            # What the forward uses always gets its gradient: the bound is never above the threshold.
            layer.lower.copy_(threshold + excess.topk(k).values[-1].clamp(max=0.0))

    def _weight_grad_density(self, alpha: float, density: float) -> float:
        if alpha == 0.0:
            return density
        return 1.0 if self.backward_density is None else max(density, self.backward_density)

    def _config(self) -> dict[str, Any]:
        own = {"policy": self.policy, "alpha": self._initial_alpha, "cutoff": self.cutoff}
        return {**super()._config(), **own, "backward_density": self.backward_density}

    def aim(self) -> float | None:
        """See :meth:`Sparsifier.aim`."""
        if self.budget is None or self._controller is None:
            return None
        return self.budget.aim(self.progress)

    def _state(self) -> dict[str, Any]:
        integral = None if self._controller is None else self._controller.integral
        return {**super()._state(), "integral": integral}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        super()._load_state(state)
        if self._controller is not None:
            self._controller.integral = state["integral"]
