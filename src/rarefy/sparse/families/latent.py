"""Weights that are used as a function of dense ones, W^ = f(W, own), and the gradient that comes of it.

The dense ("latent") weights W live here while the parameters hold W^, and are trained by the optimizer: it finds W in
the parameters, and dL/dW in their gradients, for as long as its step takes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rarefy.sparse import _options
from rarefy.sparse.base import Sparsifier
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.budgeted import Budgeted
from rarefy.sparse.layers import Layer
from rarefy.sparse.masks import count_all, separate, top_k_each


def wide(weight: Tensor) -> Tensor:
    """The same in float32, or in float64 where it is in that."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


@dataclass(eq=False, repr=False)
class Latent(Sparsifier):
    """Dense weights kept as ``bucket.kept["latent"]``, and a formula over all layers of a bucket at once.

    The tensors of a formula are flat, (N,): see :class:`Bucket`.
    """

    # What a method provides

    @abstractmethod
    def value(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """W^ of the dense weights W, (N,) to (N,); zero where masked."""

    def gradient(self, grad: Tensor, weight: Tensor, bucket: Bucket) -> Tensor:
        """dL/dW, (N,), of dL/dW^, and the gradients of ``bucket.own`` into their ``grad``; by default of value."""
        weight = weight.detach().requires_grad_()
        own = list(bucket.own.values())
        with torch.enable_grad():
            used = self.value(weight, bucket)
        first, *others = torch.autograd.grad(used, [weight, *own], grad.to(used.dtype), materialize_grads=True)
        for parameter, found in zip(own, others, strict=True):
            parameter.grad = found
        return first

    def latent(self, weight: Tensor) -> Tensor:
        """Return the dense weights whose value, without a mask, is this; in the beginning."""
        return weight

    def dense(self, weight: Tensor) -> Tensor:
        """Return what W is worth without a mask: the inverse of :meth:`latent`."""
        return weight

    def unmasked(self, used: Tensor, bucket: Bucket) -> Tensor:
        """Return the dense weights, as :meth:`dense` does, whose value is this where it is not 0, (N,) to (N,).

        By default for methods that take something from the weights that live, as soft thresholds do.
        """
        latent = bucket.kept["latent"]
        taken = (self.dense(latent) - self.value(latent, bucket)).abs()
        return used + taken.copysign(used)

    def live(self, bucket: Bucket) -> Tensor:
        """Say which weights are used, (N,), boolean."""
        return self.value(bucket.kept["latent"], bucket) != 0

    # What all have

    def latents(self) -> list[Tensor]:
        """Return the dense weights, one tensor a layer: this process's part of it."""
        self._take_all()
        return self.kept("latent")

    def _dense(self) -> list[Tensor]:
        return [self.dense(weight) for weight in self.latents()]

    def _live(self) -> list[Tensor]:
        self._take_all()
        return self._by_layer(lambda bucket: bucket.views(self.live(bucket)))

    def _begin(self) -> None:
        for bucket in self._buckets:
            bucket.keep("latent", self.latent(bucket.gather(bucket.weights())))
            self.prepare(bucket)

    def _lift(self, bucket: Bucket) -> None:
        bucket.scatter(bucket.kept["latent"], bucket.weights())

    def _before(self, bucket: Bucket) -> None:
        grads, weight = bucket.grads(), bucket.kept["latent"]
        if any(grad is not None for grad in grads):
            bucket.scatter(self.gradient(bucket.gather(grads, bucket.scratch()), weight, bucket), grads)
        bucket.scatter(weight, bucket.weights())

    def _take(self, bucket: Bucket) -> None:
        if bucket.dense:
            bucket.gather(bucket.weights(), bucket.kept["latent"])

    def _take_all(self) -> None:
        for bucket in self._buckets:
            self._take(bucket)

    def _show(self, bucket: Bucket) -> None:
        self._take(bucket)
        bucket.scatter(self.value(bucket.kept["latent"], bucket), bucket.weights())

    def _changed(self, bucket: Bucket) -> bool:
        # Where the parameters are not what was put there, they are the dense weights from here on; those that live stay
        # what they are in use, whatever the method makes of the others.
        latent = bucket.kept["latent"]
        ours, theirs = self.value(latent, bucket).to(bucket.dtype), bucket.gather(bucket.weights())
        other = (theirs != ours) & ~(theirs.isnan() & ours.isnan())
        # Rounding, as of a step aside and back (SAM), is no change; what replaces NaN and inf is.
        close, lost = max(1e-5, 2.0 * torch.finfo(bucket.dtype).eps), other & ~(ours.isfinite() & latent.isfinite())
        near = (theirs - ours).abs().amax() <= close * ours.abs().amax()
        if not bool(other.any()) or bool(near & ~lost.any()):
            return False
        stays = ((ours != 0.0) | lost) & (theirs != 0.0)
        latent.copy_(torch.where(lost, self.latent(theirs), latent))  # what is taken from the others may hang on these
        found = torch.where(stays, self.unmasked(theirs, bucket), theirs)
        latent.copy_(torch.where(other, self.latent(found), latent))
        return True

    def _values(self, bucket: Bucket) -> list[Tensor]:
        return bucket.views(self.value(bucket.kept["latent"], bucket).to(bucket.dtype))


@dataclass(eq=False, repr=False)
class Projected(Budgeted, Latent):
    """Masks of the best weights, chosen anew every few steps, exactly at the density of the schedule.

    Unlike hard masks the weights outside keep their values, and what reaches them of the gradient is the method's; so
    they can come back. ``bucket.kept["mask"]`` is the mask, (N,).

    Args:
        update_every: steps from one choice of the masks to the next; None takes a 125th of the run.
        start, end: shares of the run between which the sparsity rises, on a cubic curve; both 0 for the target's from
            the first step on. None takes the method's own.
    """

    _: KW_ONLY
    update_every: int | None = None
    start: float | None = None
    end: float | None = None

    takes_global = True
    default_distribution = "global"

    #: start and end if nothing is asked for.
    ramp: ClassVar[tuple[float, float]] = (0.0, 0.0)

    def __post_init__(self) -> None:
        self.start = self.ramp[0] if self.start is None else self.start
        self.end = self.ramp[1] if self.end is None else self.end
        if (self.start, self.end) != (0.0, 0.0):
            _options.ramp(self.start, self.end)
        super().__post_init__()
        _options.update_every(self.update_every, self.total_steps)
        self._every = self.update_every or self.interval

    def scores(self, layer: Layer, weight: Tensor) -> Tensor:
        """Return what the masks of a layer are chosen by, shaped as its weight; the magnitude by default."""
        return self.dense(weight).abs()

    def value(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """W^ = W M, unless a method says otherwise."""
        return self.dense(weight) * bucket.kept["mask"]

    def live(self, bucket: Bucket) -> Tensor:
        """See :class:`Latent`."""
        return bucket.kept["mask"]

    def project(self, masks: Sequence[Tensor]) -> None:
        """Use these masks, one a layer, from now on."""
        for mine, new in zip(self.kept("mask"), masks, strict=True):
            mine.copy_(new)

    def aim(self) -> float:
        """See :meth:`Sparsifier.aim`: d = 1 - (1 - d_T) ramp."""
        assert self.start is not None
        return self.ramped(1.0, self.start, self.end) if self.end else self.budget.goal

    def _begin(self) -> None:
        for bucket in self._buckets:
            bucket.keep("mask", bucket.flat(1, torch.bool))
        super()._begin()
        self._project(self.aim())

    def _best(self, density: float) -> list[Tensor]:
        pairs = zip(self._layers, self.latents(), strict=True)
        return self.choose([self.scores(layer, weight) for layer, weight in pairs], density)

    def _project(self, density: float) -> None:
        self.project(self._best(density))

    def _update(self) -> None:
        if self.steps % self._every == 0 or self.steps == self.total_steps:
            self._project(self.aim())

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        return 1.0

    def _settle(self) -> list[Tensor]:
        used, best = self._live(), self._best(self.budget.goal)
        now, then = (self.budget.density(count_all(masks, self._shards())) for masks in (used, best))
        if math.isclose(now, then, rel_tol=1e-9):  # landed: what the model computes stays as it is
            return used
        self.project(best)
        return best


@dataclass(eq=False, repr=False)
class Thresholding(Projected):
    """Projected masks held by a threshold a layer, ``bucket.kept["threshold"]``, (L,): live is what lies above it."""

    drifts = True

    def __post_init__(self) -> None:
        if _options.block("block", self.block) != (1, 1):
            raise ValueError(f"{type(self).__name__} thresholds single weights: leave block out")
        super().__post_init__()

    def prepare(self, bucket: Bucket) -> None:
        """See :class:`Sparsifier`."""
        bucket.per["threshold"] = "layer"
        bucket.kept["threshold"] = torch.zeros(len(bucket.layers), dtype=torch.float32, device=bucket.device)

    def threshold(self, bucket: Bucket) -> Tensor:
        """T of every weight, (N,)."""
        return bucket.spread(bucket.kept["threshold"])

    def live(self, bucket: Bucket) -> Tensor:
        """See :class:`Latent`."""
        return bucket.kept["latent"].abs() > self.threshold(bucket)

    def project(self, masks: Sequence[Tensor]) -> None:
        """See :class:`Projected`; the thresholds move as little as makes the masks these."""
        super().project(masks)
        for layer, weight, mask in zip(self._layers, self.latents(), masks, strict=True):
            bucket, place = self.where(layer)
            threshold = bucket.kept["threshold"][place]
            one = bucket.shaped(bucket.kept["threshold"].double())[place]
            threshold.copy_(separate(weight.double().abs(), one, mask, layer.shard).view(()))

    def _thresholds(self) -> list[float]:
        return [float(t) for t in self._by_layer(lambda bucket: bucket.kept["threshold"].tolist())]


@dataclass(eq=False, repr=False)
class Exploring(Projected):
    """Projected masks beside which the next largest weights get a gradient too: ``bucket.kept["explore"]``, (N,)."""

    @abstractmethod
    def reach(self, layer: Layer, live: int) -> int:
        """How many weights of the layer get a gradient, when so many are live."""

    def prepare(self, bucket: Bucket) -> None:
        """See :class:`Sparsifier`."""
        bucket.kept["explore"] = bucket.flat(0, torch.bool)
        bucket.per["density"] = "layer"
        bucket.kept["density"] = torch.ones(len(bucket.layers), dtype=torch.float32, device=bucket.device)

    def project(self, masks: Sequence[Tensor]) -> None:
        """See :class:`Projected`."""
        super().project(masks)
        shards = self._shards()
        live = count_all(masks, shards)
        # What the forward uses comes first, whatever its size: floors and blocks may have chosen smaller ones.
        scores = [weight.abs().masked_fill(m, torch.inf) for weight, m in zip(self.latents(), masks, strict=True)]
        reached = [self.reach(layer, count) for layer, count in zip(self._layers, live, strict=True)]
        rows = zip(self._layers, top_k_each(scores, reached, shards), masks, live, strict=True)
        for layer, best, mask, count in rows:
            bucket, place = self.where(layer)
            bucket.views(bucket.kept["explore"])[place].copy_(best & ~mask)
            bucket.kept["density"][place] = count / layer.size
