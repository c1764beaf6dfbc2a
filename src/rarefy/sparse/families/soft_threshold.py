"""What moves learned soft thresholds, ``T = g(s)``: the pressure on s, and the landing on a budget.

The formula is that of :mod:`rarefy.sparse.families.reparameterized`.

What makes sparsity here is *pressure*: a decay of s towards 0, which raises g(s) towards g(0) until the loss holds
against it. STR and AutoSparse leave it to the optimizer's weight decay, where its effect hangs on the learning rate,
the momentum, the schedule, the length of the run and the kind of optimizer. Here the sparsifier applies it after every
step, decoupled, so that over a run ``log|s|`` falls by ``pressure`` if the loss does not answer. For SGD that equals a
decay d with ``pressure = sum over steps of lr * d / (1 - momentum)``.

Where the optimizer cannot move the weights or s far enough the thresholds take less from the weights that live, and
the pressure rests earlier: :mod:`rarefy.sparse.families.freedom`.

Blocks of n weights are thresholded by their mean |W|, which spreads sqrt(n) times less than |W|: all lie close about T,
and a shift of s moves the density, and what is left of W in use, sqrt(n) times as far. So what moves s moves that of
blocks by 1 / sqrt(n) of it: the loss, which otherwise holds them against the pressure at half as much density again;
and the trim, which then swings about the target and can mask a layer for good.

Blocks of more than four weights are of one size at first, to 13 % in blocks of 32, and the pressure takes T past most
of them between two measurements, where they stay. So they are steered: with each measurement s moves by the share
``1 - 2 / sqrt(n)`` of what brings the density to the curve, and the pressure is at most ``2 / sqrt(n)`` of its
greatest.
"""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy import _checks
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.budget import log_error
from rarefy.sparse.families import freedom
from rarefy.sparse.families.reparameterized import Reparameterized
from rarefy.sparse.layers import Layer
from rarefy.sparse.masks import block_expand, block_sum, count_all, least_kept, separate, top_k, within_budget
from rarefy.sparse.shards import total

#: The most that s moves in one optimizer step, a factor of 1.2 on a small threshold: the gradient of s is a sum over a
#: layer and can be huge while alpha is near 1.
MAX_MOVE = 0.2

#: The most that all s are shifted by at once.
MOST_SHIFT = 0.5

#: The most that pressure takes off log|s| in one step: the weights could not follow more, and ran away. In a very short
#: run it is this much over the whole run instead, to have an effect at all.
MAX_DECAY, LEAST_REACH = 0.05, 6.0

#: The share of the way to the target that the trim goes at most.
MOST_OF_GAP = 0.9

#: How far below its first value s may fall: a threshold of nothing has no gradient to come back by.
MAX_FALL = 3.0

#: The pace, as a share of that of single weights, below which blocks are steered: that of four weights.
STEERED = 0.5


def trim(error: float, gain: float = 0.3) -> float:
    """The common shift of all s that answers this error of the density: up when too dense."""
    return min(max(-gain * error, -MOST_SHIFT), MOST_SHIFT)


@dataclass(eq=False, repr=False)
class SoftThreshold(Reparameterized):
    """Pressure, floors and the landing on a budget: all but alpha, which is the method's (a subclass).

    Args:
        pressure: total decay of s over the run (see the module); None takes the method's own for the target, or without
            one as much of it as the optimizer can move the weights.
        threshold_lr: learning rate of s as a multiple of the weights' (over the root of ``block``). 1 suits SGD and
            Adam; a larger one lets the loss push the thresholds down.

    Raises:
        ValueError: as :class:`Reparameterized`; an option out of its range; weights so large that sigmoid thresholds,
            which end at 1, cannot reach the target.
    """

    drifts = True

    _: KW_ONLY
    pressure: float | None = None
    threshold_lr: float = 1.0

    def __post_init__(self) -> None:
        if self.pressure is not None:
            _checks.number("pressure", self.pressure)
        _checks.number("threshold_lr", self.threshold_lr)
        super().__post_init__()
        self._pace = 1.0 / math.sqrt(math.prod(self._block))  # of s, as a share of that of single weights
        self.own_rate = self.threshold_lr * self._pace
        self._steered = max(0.0, 1.0 - self._pace / STEERED)  # the share of the way to the curve
        self._pressure_yields = self.pressure is None and self.budget is None
        if self.pressure is None:
            self.pressure = self._default_pressure()
        self._density = self._freedom = 1.0
        if not any(layer.parameter.is_meta for layer in self._layers):
            self._check_reach()

    def _check_reach(self) -> None:
        """Refuse weights that no sigmoid threshold can mask."""
        if self.budget is None or self.threshold_function != "sigmoid":
            return
        beyond = torch.stack([(self._magnitude(layer.local) >= 1.0).sum() for layer in self._layers])
        least = self.budget.density([int(n) for n in total(beyond, self._shards()).tolist()])
        if least > self.budget.goal:
            raise ValueError(
                f"the weights are too large for sigmoid thresholds, which end at 1: {100 * least:.1f} % of the cost "
                f"lies above, and the target leaves {100 * self.budget.goal:.1f} %; take threshold_function='softplus'"
            )

    # What a method provides

    @abstractmethod
    def _default_pressure(self) -> float:
        """The pressure that suits the budget."""

    @abstractmethod
    def _steer(self, error: float | None) -> None:
        """Set alpha for the next step; ``error`` is the log error of the density, in the steps that measure it."""

    @property
    @abstractmethod
    def trim_from(self) -> float:
        """Share of the run after which the thresholds are trimmed to the target."""

    # What all have

    def prepare(self, bucket: Bucket) -> None:
        """See :class:`Sparsifier`."""
        super().prepare(bucket)
        bucket.per.update(dict.fromkeys(["moved", "shrink", "restored"], "layer"))
        bucket.per.update(dict.fromkeys(["lowest", "previous", "lower", "answered"], self.granularity))
        scale, s = bucket.kept["scale"], bucket.own["s"].detach()
        bucket.kept["moved"] = torch.zeros_like(scale)
        # What no optimizer holds does not move.
        bucket.kept["shrink"] = torch.full_like(scale, 0.0 if bucket.optimizer is None else 1.0)
        paper = self.budget is None  # without a target the formula is the paper's
        restored = [float(paper or freedom.is_restored(self.model, layer.key)) for layer in bucket.layers]
        bucket.kept["restored"] = torch.tensor(restored, dtype=scale.dtype, device=bucket.device)
        bucket.kept["soft"] = bucket.kept["shrink"] * bucket.kept["restored"]
        bucket.kept["lowest"] = s - MAX_FALL
        bucket.kept["previous"] = s.clone()
        bucket.kept["lower"] = torch.zeros_like(s)
        bucket.kept["answered"] = torch.zeros_like(s)

    def _update(self) -> None:
        parameters = [bucket.own["s"].detach() for bucket in self._buckets]
        self._limit(parameters)
        assert self.pressure is not None
        most = max(MAX_DECAY, LEAST_REACH / self.total_steps)
        measured = self.steps % self.interval == 0 or self.steps == self.total_steps
        if measured and self.budget is not None and self.pressure:
            greatest = min(2.0 * self.pressure / self.total_steps, most)
            for bucket in self._buckets:
                freedom.see_answer(bucket, greatest)
        if self.budget is None or self._density > self._rest():
            # ds/dstep = -pressure * (1 + cos(pi p)) / total_steps * s: the shape of a cosine learning rate, mean 1; no
            # more than a part of it where steered. It only raises thresholds: s above 0 is the trim's doing.
            share = min(1.0 + math.cos(math.pi * self.progress), 2.0 * (1.0 - self._steered)) / self.total_steps
            self._press(parameters, min(self.pressure * share, most))
        error = self._measure() if measured else None
        torch._foreach_copy_([bucket.kept["previous"] for bucket in self._buckets], parameters)
        self._steer(error)

    def _press(self, parameters: list[Tensor], decay: float) -> None:
        """Let s decay by this much of log|s|, or as much less as the loss can answer less."""
        if self._pressure_yields:
            shrinks = [self._rows_of(bucket, bucket.kept["shrink"]) for bucket in self._buckets]
            decayed = torch._foreach_mul(parameters, [torch.exp(-decay * shrink) for shrink in shrinks])
        else:
            decayed = torch._foreach_mul(parameters, math.exp(-decay))
        torch._foreach_maximum_(parameters, decayed)

    def _limit(self, parameters: list[Tensor]) -> None:
        """Bound what the optimizer did to s."""
        previous = [bucket.kept["previous"] for bucket in self._buckets]
        most = MAX_MOVE * self._pace
        lowest, highest = torch._foreach_sub(previous, most), torch._foreach_add(previous, most)
        torch._foreach_maximum_(lowest, [bucket.kept["lowest"] for bucket in self._buckets])
        torch._foreach_maximum_(parameters, lowest)
        torch._foreach_minimum_(parameters, highest)

    def _learn(self, bucket: Bucket) -> None:
        super()._learn(bucket)
        if self.steps == 0 or (self.steps + 1) % self.interval == 0:
            now = bucket.gather(bucket.weights())
            freedom.see_step(bucket, now)
            self._wake(bucket, now)
            freedom.see_reach(bucket, self.total_steps)

    def _wake(self, bucket: Bucket, now: Tensor) -> None:
        """Give layers a threshold whose weights, (N,), are all 0 no longer."""
        kept, size = bucket.kept, bucket.means(now.float().square()).sqrt()
        waking = (kept["awake"] == 0.0) & (size > 0.0)
        kept["scale"].copy_(torch.where(waking, size, kept["scale"]))
        kept["awake"].copy_((kept["scale"] > 0.0).float())
        first, rows = self._rows_of(bucket, self._first(kept["scale"])), self._rows_of(bucket, waking.float()) > 0.0
        for mine, given in (
            (bucket.own["s"].detach(), first),
            (kept["previous"], first),
            (kept["lowest"], first - MAX_FALL),
        ):
            mine.copy_(torch.where(rows, given, mine))

    def _rest(self) -> float:
        """The density at which the pressure rests."""
        assert self.budget is not None
        return freedom.resting_density(self.budget, self.progress, self._freedom)

    def _measure(self) -> float | None:
        """Keep floors, land on the budget; gives the log error of the density against the aim of now."""
        live = self._count()
        scores = None
        for index, (layer, count) in enumerate(zip(self._layers, live, strict=True)):
            bucket, place = self.where(layer)
            if count < layer.least and float(bucket.kept["awake"][place]):
                scores = scores or self._scores()
                blocks = top_k(scores[index], self._least_blocks()[index], layer.shard)
                self._move(layer, block_expand(blocks, self._block))
        if self.budget is None:
            return None
        self._density = self.budget.density(live)
        shares = [value for bucket in self._buckets for value in freedom.share(bucket).tolist()]
        self._freedom = statistics.fmean(shares)
        if self.steps == self.total_steps:
            for layer, mask in zip(self._layers, self._select(), strict=True):
                self._move(layer, mask)
        elif self.progress >= self.trim_from or self._density < self._rest():
            by = self._pace * trim(log_error(self._density, self._rest()))
            if self.progress >= self.trim_from and self._rest() < 1.0:
                # Weights that end close about their threshold would swing from one side of it to the other. Not the
                # whole way, which ends at a weight, whose last bit would then say whether it is masked.
                gap = MOST_OF_GAP * self._gap(self._rest())
                by = min(max(by, min(gap, 0.0)), max(gap, 0.0))
            self._shift(by)
        elif self._steered and self.budget.aim(self.progress) < 1.0:
            gap = self._gap(self.budget.aim(self.progress))
            self._shift(self._steered * min(max(gap, -MOST_SHIFT), MOST_SHIFT))
        return log_error(self._density, self.budget.aim(self.progress))

    def _shift(self, by: float) -> None:
        """Move all s together."""
        torch._foreach_add_([bucket.own["s"].detach() for bucket in self._buckets], by)

    def _scores(self) -> list[Tensor]:
        """How far s may rise before each block (weight) is masked: ``g^-1(|W|) - s``; see :func:`block_sum`."""
        scores = []
        for layer, weight in zip(self._layers, self.latents(), strict=True):
            bucket, place = self.where(layer)
            s = bucket.shaped(bucket.own["s"].detach())[place]
            magnitude = block_sum(weight.double().abs(), self._block) / math.prod(self._block)
            scores.append(self._g.inverse(magnitude) - s.double())
        return scores

    def _blocks(self, scores: list[Tensor], density: float, least: Sequence[int]) -> list[Tensor]:
        """The blocks that live when a common shift of s gives the network this density, and so many in each layer."""
        assert self.budget is not None
        prices = [each.of_blocks(math.prod(self._block)) for each in self.budget.prices]
        return within_budget(scores, prices, self.budget.available_at(density), least, self._shards())

    def _gap(self, density: float) -> float:
        """The common shift of s that gives the network this density, but for the floors."""
        scores = self._scores()
        return float(least_kept(scores, self._blocks(scores, density, [0] * len(scores)), self._shards()))

    def _select(self) -> list[Tensor]:
        """The masks that a common shift of s gives, cut exactly at the budget."""
        assert self.budget is not None
        masks = self._blocks(self._scores(), self.budget.goal, self._least_blocks())
        return [block_expand(mask, self._block) for mask in masks]

    def _move(self, layer: Layer, mask: Tensor) -> None:
        """Move s as little as makes the layer's mask this one."""
        bucket, place = self.where(layer)
        now = self._shaped(bucket)[place].double()
        weight = bucket.views(bucket.kept["latent"])[place]
        shard = layer.shard if self.granularity == "layer" else None  # rows are whole wherever they are
        wanted = separate(self._magnitude(weight).double(), now, mask, shard)
        s = bucket.parts(bucket.own["s"].detach())[place]
        s.copy_(torch.where((wanted != now).flatten(), self._g.inverse(wanted).flatten(), s.double()))

    def _settle(self) -> list[Tensor]:
        live = self._live()
        if self.budget is None or self.budget.met(count_all(live, self._shards())):
            return live
        masks = self._select()
        for layer, mask in zip(self._layers, masks, strict=True):
            self._move(layer, mask)
        return masks

    def _state(self) -> dict[str, Any]:
        return {"density": self._density, "freedom": self._freedom}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._density, self._freedom = state["density"], state["freedom"]
