"""Masks learned by gradients under a penalty on what lives, and their landing on a budget.

The papers set the sparsity by the penalty's coefficient, found by search. With a target the coefficient is controlled
so that the density follows a cubic curve, the thresholds are trimmed from the end of the curve on, and the last step
cuts exactly. Without one the coefficient stays, and the sparsity is what comes of it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rarefy import _checks
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.budget import PIController, log_error
from rarefy.sparse.families.latent import Latent
from rarefy.sparse.families.targeted import Targeted
from rarefy.sparse.layers import Layer
from rarefy.sparse.masks import count_all, least_kept, means, separate, top_k, within_budget

#: Share of the run after which thresholds are trimmed to the target.
TRIM_FROM = 0.6

#: The share of the way that a trim goes at the start of the run; it rises to all of it at the end.
TRIM_GAIN = 0.3

#: How far the log of the factor on the penalty may go, either way.
RANGE = 12.0


@dataclass(eq=False, repr=False)
class Learned(Targeted, Latent):
    """The penalty, the floors and the landing; what a mask is and how it learns is the method's.

    Args:
        penalty: coefficient of the penalty, not negative; where its control begins if there is a target. None takes the
            method's own.
        mask_lr: learning rate of what the masks learn as a multiple of the weights', above 0. None takes the method's
            own.

    Raises:
        ValueError: as :class:`Targeted`; a negative penalty; a mask_lr that is not above 0.
    """

    _: KW_ONLY
    penalty: float | None = None
    mask_lr: float | None = None

    drifts = True

    #: The coefficient if nothing is asked for.
    default_penalty: ClassVar[float]

    #: The multiple of the learning rate if nothing is asked for.
    default_mask_lr: ClassVar[float] = 1.0

    #: Whether a target is followed by shifting the masks all along, with the penalty as it is; else by the penalty.
    tracks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.mask_lr is not None:
            _checks.number("mask_lr", self.mask_lr, above=True)
        if self.penalty is not None:
            _checks.number("penalty", self.penalty)
        super().__post_init__()
        self.penalty = self.default_penalty if self.penalty is None else self.penalty
        self.own_rate = self.default_mask_lr if self.mask_lr is None else self.mask_lr
        # Of the log of the factor on the penalty; too dense raises it.
        self._controller = PIController(0.0, proportional=1.0, gain=0.15, low=-RANGE, high=RANGE)
        self._factor = 1.0

    # What a method provides

    @abstractmethod
    def margin(self, bucket: Bucket) -> Tensor:
        """Say how far each weight is from being masked, in units of what is learned; masked below 0. (N,), double."""

    @abstractmethod
    def shift(self, bucket: Bucket, by: float) -> None:
        """Move what is learned so that all margins fall by this much."""

    @abstractmethod
    def settle(self, layer: Layer, mask: Tensor) -> None:
        """Move what is learned as little as makes the layer's mask this one."""

    def bound(self, bucket: Bucket) -> None:
        """Keep what is learned in its range after a step."""

    def steer(self) -> None:
        """Do what else the method does after a step."""

    # What all have

    def live(self, bucket: Bucket) -> Tensor:
        """See :class:`Latent`."""
        return self.margin(bucket) > 0.0

    @property
    def penalty_now(self) -> float:
        """The coefficient of the penalty in this step, whose slope a method's ``gradient`` adds to that of the loss."""
        assert self.penalty is not None
        return self.penalty * self._factor

    def _learn(self, bucket: Bucket) -> None:
        super()._learn(bucket)
        self.bound(bucket)

    def _margins(self) -> list[Tensor]:
        self._take_all()
        return self._by_layer(lambda bucket: bucket.views(self.margin(bucket)))

    def _update(self) -> None:
        self.steer()
        if self.steps % self.interval and self.steps != self.total_steps:
            return
        shards = self._shards()
        live = count_all(self._live(), shards)
        margins = None
        for index, (layer, count) in enumerate(zip(self._layers, live, strict=True)):
            if count < layer.least:
                margins = margins or self._margins()
                self.settle(layer, top_k(margins[index], layer.least, layer.shard))
                live[index] = layer.least
        if self.budget is None:
            return
        if self.steps == self.total_steps:
            self._settle()
            return
        density = self.budget.density(live)
        if not self.tracks:
            self._factor = math.exp(self._controller.update(-log_error(density, self.budget.aim(self.progress))))
        if self.tracks or self.progress >= TRIM_FROM or density < self.budget.goal:
            self._trim(self.budget.aim(self.progress) if self.tracks else self.budget.goal)

    def aim(self) -> float | None:
        """Return the density of the curve that a target is followed on, in (0, 1]."""
        return None if self.budget is None else self.budget.aim(self.progress)

    def _trim(self, density: float) -> None:
        """Shift all masks a part of the way to this density."""
        if density >= 1.0:
            return
        margins = self._margins()
        least = float(least_kept(margins, self._select(margins, density), self._shards()))
        for bucket in self._buckets:
            self.shift(bucket, (TRIM_GAIN + (1.0 - TRIM_GAIN) * self.progress) * least)

    def _select(self, margins: list[Tensor], density: float) -> list[Tensor]:
        """The masks that a common shift gives, cut exactly where the network has this density."""
        assert self.budget is not None
        least = [layer.least for layer in self._layers]
        return within_budget(margins, self.budget.prices, self.budget.available_at(density), least, self._shards())

    def _settle(self) -> list[Tensor]:
        if self.budget is None:
            return self._live()
        masks = self._select(self._margins(), self.budget.goal)
        for layer, mask in zip(self._layers, masks, strict=True):
            self.settle(layer, mask)
        return masks

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        return 1.0

    def _state(self) -> dict[str, Any]:
        return {"integral": self._controller.integral, "factor": self._factor}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._controller.integral, self._factor = state["integral"], state["factor"]


@dataclass(eq=False, repr=False)
class LearnedThreshold(Learned):
    """A mask that is a threshold on the size of each weight, ``bucket.own["threshold"]``, one a layer or a row."""

    #: The most that a threshold moves in a step: its gradient is a sum over many weights.
    max_move: ClassVar[float]

    #: Whether there is one threshold an output channel; else one a layer.
    channels: ClassVar[bool]

    @abstractmethod
    def size(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """What is compared with the threshold, (N,)."""

    def prepare(self, bucket: Bucket) -> None:
        """See :class:`Sparsifier`."""
        bucket.rows = [shape[0] if self.channels else 1 for shape in bucket.shapes]
        bucket.own["threshold"] = nn.Parameter(torch.zeros(sum(bucket.rows), dtype=torch.float32, device=bucket.device))
        bucket.kept["previous"] = torch.zeros_like(bucket.own["threshold"].detach())
        bucket.per = dict.fromkeys(["threshold", "previous"], "channel" if self.channels else "layer")

    def margin(self, bucket: Bucket) -> Tensor:
        """See :class:`Learned`."""
        size = self.size(bucket.kept["latent"].double(), bucket)
        return size - bucket.spread(bucket.own["threshold"].detach().double(), channels=self.channels)

    def shift(self, bucket: Bucket, by: float) -> None:
        """See :class:`Learned`."""
        bucket.own["threshold"].detach().add_(by).clamp_(min=0.0)

    def settle(self, layer: Layer, mask: Tensor) -> None:
        """See :class:`Learned`."""
        bucket, place = self.where(layer)
        size = bucket.views(self.size(bucket.kept["latent"].double(), bucket))[place]
        threshold = bucket.parts(bucket.own["threshold"].detach())[place]
        shaped = bucket.shaped(bucket.own["threshold"].detach().double())[place]
        threshold.copy_(separate(size, shaped, mask, None if self.channels else layer.shard).flatten())
        bucket.parts(bucket.kept["previous"])[place].copy_(threshold)

    def bound(self, bucket: Bucket) -> None:
        """See :class:`Learned`."""
        threshold, previous = bucket.own["threshold"].detach(), bucket.kept["previous"]
        threshold.copy_(threshold.maximum(previous - self.max_move).minimum(previous + self.max_move).clamp(min=0.0))
        previous.copy_(threshold)

    def shown(self, threshold: Tensor, bucket: Bucket) -> Tensor:
        """The thresholds as they are on the magnitude."""
        return threshold

    def _thresholds(self) -> list[float]:
        def thresholds(bucket: Bucket) -> Sequence[Tensor]:
            return bucket.parts(self.shown(bucket.own["threshold"].detach(), bucket))

        return means(self._by_layer(thresholds), self._shards() if self.channels else None)
