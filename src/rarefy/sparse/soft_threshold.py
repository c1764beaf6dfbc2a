"""Learned soft thresholds ``W^ = sign(W) * max(|W| - g(s), 0)``, and STR, which trains them by plain gradients.

Source: Soft Threshold Reparameterization (Kusupati et al., ICML 2020), equations 2 to 6.

What makes sparsity here is *pressure*: a decay of s towards 0, which raises g(s) towards g(0) until the loss holds
against it. STR and AutoSparse leave it to the optimizer's weight decay, where its effect hangs on the learning rate,
the momentum, the schedule, the length of the run and the kind of optimizer. Here the sparsifier applies it after every
step, decoupled, so that over a run ``log|s|`` falls by ``pressure`` if the loss does not answer. For SGD that equals a
decay d with ``pressure = sum over steps of lr * d / (1 - momentum)``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from rarefy.sparse.base import Info, LayerState, Selection, Sparsifier
from rarefy.sparse.budget import Budget, log_error, trim
from rarefy.sparse.masked import write_sparse
from rarefy.sparse.masks import block_expand, block_sum, check_divisible, top_k, within_budget
from rarefy.sparse.swapped import check_swapped, guard_fast_paths
from rarefy.sparse.thresholded import THRESHOLD_FUNCTIONS, Thresholded, attach, detach, separate

#: The most that s moves in one optimizer step, a factor of 1.2 on a small threshold: the gradient of s is a sum over a
#: layer and can be huge while alpha is near 1.
MAX_MOVE = 0.2

#: The most that pressure takes off log|s| in one step: the weights could not follow more, and ran away. In a very short
#: run it is this much over the whole run instead, to have an effect at all.
MAX_DECAY, LEAST_REACH = 0.05, 6.0

#: How far below its first value s may fall: a threshold of nothing has no gradient to come back by.
MAX_FALL = 3.0


class SoftThresholdOptions(Selection, total=False):
    """The keyword arguments of :class:`SoftThreshold`, for the methods built on it."""

    pressure: float | None
    granularity: str
    threshold_function: str
    threshold_init: float
    threshold_lr: float
    block: int


class SoftThreshold(Sparsifier):
    """Thresholds, pressure, floors and the landing on a budget: all but alpha, which is the method's (a subclass).

    Args:
        model, total_steps, target, target_flops, example_input, include, exclude, floor: see :class:`Sparsifier`.
        pressure: total decay of s over the run (see the module); None takes the method's own for the target.
        granularity: one threshold a "layer" or an output "channel".
        threshold_function: g: "sigmoid", "exp" or "softplus".
        threshold_init: the first s; -5 gives thresholds of 0.0067.
        threshold_lr: learning rate of s as a multiple of the weights'. 1 suits SGD and Adam; a larger one lets the loss
            push the thresholds down.
        block: 4 thresholds blocks of 4 consecutive inputs of one output by their mean |W|, which integer dot products
            of CPUs want: W^ = W * max(1 - T/mean, 0). 1 thresholds single weights.

    Raises:
        ValueError: as :class:`Sparsifier`; an option out of its range; weights so large that sigmoid thresholds, which
            end at 1, cannot reach the target; a layer whose inputs blocks do not divide.
    """

    #: Share of the run after which the thresholds are trimmed to the target.
    trim_from: ClassVar[float]

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int,
        pressure: float | None = None,
        granularity: str = "layer",
        threshold_function: str = "sigmoid",
        threshold_init: float = -5.0,
        threshold_lr: float = 1.0,
        block: int = 1,
        **selection: Unpack[Selection],
    ) -> None:
        _one_of("granularity", granularity, ("layer", "channel"))
        _one_of("threshold_function", threshold_function, THRESHOLD_FUNCTIONS)
        for option, value in (("pressure", pressure), ("threshold_lr", threshold_lr)):
            if value is not None and not 0.0 <= value < math.inf:
                raise ValueError(f"{option} must be a finite number that is not negative, got {value}")
        if not math.isfinite(threshold_init):
            raise ValueError(f"threshold_init must be a finite number, got {threshold_init}")
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"block must be a positive whole number of weights, got {block!r}")
        super().__init__(model, total_steps=total_steps, **selection)
        for name, layer in self._layers.items():
            if layer.weight.is_meta:
                raise ValueError(f"the weight of layer {name!r} is on the meta device; give it memory first (to_empty)")
        shapes = {name: tuple(layer.weight.shape) for name, layer in self._layers.items()}
        check_divisible(shapes, block, f"blocks of {block}")
        self.block = block
        if threshold_function == "sigmoid" and self.budget is not None:
            self._check_reach(self.budget)
        self.threshold_lr = threshold_lr
        self.threshold_function = threshold_function
        self.pressure = self._default_pressure() if pressure is None else pressure
        self._inverse = THRESHOLD_FUNCTIONS[threshold_function].inverse
        self._thresholded: dict[str, Thresholded] = {}
        for name, layer in self._layers.items():
            weight = layer.weight
            out = weight.shape[0] if granularity == "channel" else 1
            shape = (out,) + (1,) * (weight.dim() - 1)
            s = torch.full(shape, float(threshold_init), dtype=torch.float32, device=weight.device)
            self._thresholded[name] = attach(layer, s, threshold_function, block)
        guard_fast_paths(model)
        self._least_s = threshold_init - MAX_FALL
        self._before = [s.detach().clone() for s in self._own_parameters()]
        self._density = 1.0 if self.budget is None else self.budget.density(self._count())

    def _check_reach(self, budget: Budget) -> None:
        """Refuse weights that no sigmoid threshold can mask."""
        beyond = [int((layer.weight.detach().abs() >= 1.0).sum()) for layer in self._layers.values()]
        least = budget.density(beyond)
        if least > budget.goal:
            raise ValueError(
                f"the weights are too large for sigmoid thresholds, which end at 1: {100 * least:.1f} % of the cost "
                f"lies above, and the target leaves {100 * budget.goal:.1f} %; take threshold_function='softplus'"
            )

    @abstractmethod
    def _default_pressure(self) -> float:
        """The pressure that suits the budget."""

    @abstractmethod
    def _steer(self, error: float | None) -> None:
        """Set alpha for the next step; ``error`` is the log error of the density, in the steps that measure it."""

    def _weight_grad_density(self, alpha: float, density: float) -> float:
        return 1.0 if alpha > 0.0 else density

    def layers(self) -> list[LayerState]:
        """See :meth:`Sparsifier.layers`."""
        states = []
        for (name, layer), live in zip(self._thresholded.items(), self._count(), strict=True):
            alpha = float(layer.alpha)
            weight_grad = self._weight_grad_density(alpha, live / layer.weight.numel())
            threshold = float(layer.threshold().detach().mean())
            states.append(LayerState(name, tuple(layer.weight.shape), live, weight_grad, threshold, alpha))
        return states

    def _count(self) -> list[int]:
        if self._finalized:
            raise RuntimeError("the model is finalized: count what is left with rarefy.cost.count(model, x)")
        counts = [layer.count() for layer in self._thresholded.values()]
        return [int(count) for count in torch.stack(counts).tolist()]

    def _own_parameters(self) -> list[Tensor]:
        return [layer.raw_threshold for layer in self._thresholded.values()]

    def _own_options(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = {"weight_decay": 0.0}
        if self.threshold_lr != 1.0:
            if "lr" not in defaults:
                raise ValueError(f"threshold_lr={self.threshold_lr:g} is a multiple of lr: call param_groups(lr=...)")
            options["lr"] = defaults["lr"] * self.threshold_lr
        return options

    def _update(self) -> None:
        if self.steps > self.total_steps:
            return
        parameters = self._own_parameters()
        if parameters[0].dtype != torch.float32:
            raise RuntimeError(
                f"the thresholds became {parameters[0].dtype}, too coarse to train them: cast the model before the "
                "sparsifier is made, or use autocast"
            )
        self._limit(parameters)
        if self.budget is None or self._density > self.budget.goal:
            # ds/dstep = -pressure * (1 + cos(pi p)) / total_steps * s: the shape of a cosine learning rate, mean 1.
            # It only raises thresholds: s above 0 is the trim's doing.
            share = (1.0 + math.cos(math.pi * self.progress)) / self.total_steps
            self._press(parameters, self.pressure * share, max(MAX_DECAY, LEAST_REACH / self.total_steps))
        error = None
        if self.steps % self.interval == 0 or self.steps == self.total_steps:
            error = self._measure()
        torch._foreach_copy_(self._before, parameters)
        self._steer(error)

    def _press(self, parameters: list[Tensor], decay: float, most: float) -> None:
        """Let s decay by this much of log|s|, and no more than ``most``."""
        torch._foreach_maximum_(parameters, torch._foreach_mul(parameters, math.exp(-min(decay, most))))

    def _limit(self, parameters: list[Tensor]) -> None:
        """Bound what the optimizer did to s."""
        if self._before[0].device != parameters[0].device:  # the model was moved
            self._before = [before.to(s.device) for before, s in zip(self._before, parameters, strict=True)]
        lowest, highest = torch._foreach_sub(self._before, MAX_MOVE), torch._foreach_add(self._before, MAX_MOVE)
        torch._foreach_clamp_min_(lowest, self._least_s)
        torch._foreach_maximum_(parameters, lowest)
        torch._foreach_minimum_(parameters, highest)

    def _measure(self) -> float | None:
        """Keep floors, land on the budget; gives the log error of the density against the aim of now."""
        live = self._count()
        for (name, layer), count in zip(self._thresholded.items(), live, strict=True):
            if count < self._least[name]:
                blocks = top_k(self._scores(layer), self._least_blocks(name))
                self._move(layer, block_expand(blocks, self.block))
        if self.budget is None:
            return None
        self._density = self.budget.density(live)
        if self.steps == self.total_steps:
            for layer, mask in zip(self._thresholded.values(), self._select(self._thresholded), strict=True):
                self._move(layer, mask)
        elif self.progress >= self.trim_from or self._density < self.budget.goal:
            self._shift(trim(log_error(self._density, self.budget.goal)))
        return log_error(self._density, self.budget.aim(self.progress))

    def _shift(self, by: float) -> None:
        """Move all s together."""
        torch._foreach_add_(self._own_parameters(), by)

    def _scores(self, layer: Thresholded) -> Tensor:
        """How far s may rise before each block (weight) is masked: ``g^-1(|W|) - s``; (out, in / block, ...)."""
        magnitude = block_sum(layer.weight.detach().double().abs(), self.block) / self.block
        return self._inverse(magnitude) - layer.raw_threshold.detach().double()

    def _least_blocks(self, name: str) -> int:
        return math.ceil(self._least[name] / self.block)

    def _select(self, layers: Mapping[str, Thresholded]) -> list[Tensor]:
        """The masks that a common shift of s gives, cut exactly at the budget."""
        scores = [self._scores(layer) for layer in layers.values()]
        assert self.budget is not None
        least = [self._least_blocks(name) for name in layers]
        costs = [cost * self.block for cost in self.budget.costs]
        masks = within_budget(scores, costs, self.budget.available, least)
        return [block_expand(mask, self.block) for mask in masks]

    def _move(self, layer: Thresholded, mask: Tensor) -> None:
        """Move s as little as makes the layer's mask this one."""
        threshold = separate(layer.magnitude().double(), layer.threshold().double(), mask)
        moved = threshold != layer.threshold().double()
        layer.raw_threshold.copy_(torch.where(moved, self._inverse(threshold), layer.raw_threshold.double()))

    def _config(self) -> dict[str, Any]:
        own = {"pressure": self.pressure, "threshold_function": self.threshold_function}
        return {**super()._config(), **own}

    def _state(self) -> dict[str, Any]:
        return {"density": self._density, "before": [s.clone() for s in self._before]}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._density = state["density"]
        for mine, saved in zip(self._before, state["before"], strict=True):
            mine.copy_(saved)

    def _finalize(self, layers: Mapping[str, nn.Module]) -> None:
        thresholded: dict[str, Thresholded] = check_swapped(layers)  # type: ignore[assignment]
        if self.budget is not None:
            masks: Sequence[Tensor] = self._select(thresholded)
        else:
            masks = [layer.magnitude() > layer.threshold() for layer in thresholded.values()]
        for layer, mask in zip(thresholded.values(), masks, strict=True):
            size = layer.magnitude()
            share = (1.0 - separate(size, layer.threshold(), mask) / size.clamp(min=1e-30)).clamp(min=0.0)
            # sign(W) * (|W| - T), or for blocks W * (1 - T/B)
            write_sparse(layer.weight, layer.weight * share, mask)
            detach(layer)


class STR(SoftThreshold):
    """Soft Threshold Reparameterization (Kusupati et al., ICML 2020): masked weights get no gradient from the loss.

    The paper's sparsity is whatever the weight decay on s gives, from thresholds that start at 0. Here s starts at -5
    and its decay is the pressure (see the module), with the bounds and floors of :class:`SoftThreshold`; with a
    ``target`` the pressure is chosen for it, and the thresholds are trimmed to it over the last quarter of the run.

    Args: see :class:`SoftThreshold`.
    """

    info = Info(
        "STR",
        "Soft Threshold Reparameterization, Kusupati et al., ICML 2020, arXiv 2002.03231",
        "dense",
        "optional",
        "at the density of the weights",
    )
    trim_from = 0.75

    def _steer(self, error: float | None) -> None:
        """Alpha stays 0."""

    def _default_pressure(self) -> float:
        # Fitted on a small network (fashion_cnn, 8 epochs), where 6.1, 10 and 17.5 gave 90, 95 and 98 %.
        return 10.0 if self.budget is None else 1.37 * self.budget.goal**-0.65


def _one_of(option: str, value: object, known: Sequence[str] | Mapping[str, object]) -> None:
    if value not in known:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, known))}, got {value!r}")
