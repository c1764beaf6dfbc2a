"""Learned soft thresholds ``W^ = sign(W) * max(|W| - T, 0)``, ``T = g(s)``.

Source: Soft Threshold Reparameterization (Kusupati et al., ICML 2020), equations 2 to 6.

What makes sparsity here is *pressure*: a decay of s towards 0, which raises g(s) towards g(0) until the loss holds
against it. STR and AutoSparse leave it to the optimizer's weight decay, where its effect hangs on the learning rate,
the momentum, the schedule, the length of the run and the kind of optimizer. Here the sparsifier applies it after every
step, decoupled, so that over a run ``log|s|`` falls by ``pressure`` if the loss does not answer. For SGD that equals a
decay d with ``pressure = sum over steps of lr * d / (1 - momentum)``.

A soft threshold takes T from every weight, and counts on training to give it back. Where the optimizer cannot move the
weights that far, as in fine-tuning at a small learning rate, it takes less::

    W^ = sign(W) (|W| - soft T)  for |W| > T, else 0
    soft = shrink where a normalisation stands to give the scale back, else 0
    shrink = min(1, (reach / FREE)^2),   reach = steps * (largest mean |step| of a layer's weights) / (their first size)

from the soft threshold (1: training from scratch) to the hard one (0). Without a normalisation, as in an LSTM, what a
soft threshold takes does not come back at all; with no target it is soft all the same, as in the paper. Nor can the
loss hold against the pressure then: the pressure rests where the density is below ``goal^shrink curve^(1 - shrink)``,
and with no target it is ``shrink`` of the method's own.

The loss answers the pressure through the optimizer's steps of s. SGD's are as large as the sum of gradients that they
follow; those of Adam are the learning rate, whatever the gradient, and those of a warm-up are small. Where they are
less than the pressure's, the density is at the goal before the weights have learned anything, from which a network
without normalisation does not recover. So there the exponent above is ``min(shrink, answer)``,
``answer = (largest |step of s| by the optimizer) / (largest by the pressure)``.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rarefy.kernels.thresholds import ThresholdedLayers
from rarefy.sparse import _checks
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.budget import log_error
from rarefy.sparse.families.latent import Latent
from rarefy.sparse.families.targeted import Targeted
from rarefy.sparse.layers import Layer
from rarefy.sparse.masks import (
    block_expand,
    block_sum,
    count_all,
    means,
    separate,
    top_k,
    within_budget,
)
from rarefy.sparse.shards import shared_group, total

#: The most that s moves in one optimizer step, a factor of 1.2 on a small threshold: the gradient of s is a sum over a
#: layer and can be huge while alpha is near 1.
MAX_MOVE = 0.2

#: The most that all s are shifted by at once.
MOST_SHIFT = 0.5

#: The most that pressure takes off log|s| in one step: the weights could not follow more, and ran away. In a very short
#: run it is this much over the whole run instead, to have an effect at all.
MAX_DECAY, LEAST_REACH = 0.05, 6.0

#: How far below its first value s may fall: a threshold of nothing has no gradient to come back by.
MAX_FALL = 3.0

#: The first threshold is at most this share of the root mean square of a layer's weights, which masks less than a tenth
#: of weights of a normal distribution: wide layers start dense too.
START = 0.12

#: How many times its own size the run must be able to move a layer's weights for the whole soft threshold. Training
#: from scratch has 3 to 60, AdamW at 1e-4 over 500 steps 0.3, SGD with momentum at 0.01 up to 1.5.
FREE = 2.0


#: The pace, as a share of that of single weights, below which blocks are steered: that of four weights.
STEERED = 0.5


class ThresholdFunction(NamedTuple):
    """g, its inverse, which keeps order over all magnitudes, and its derivative as a function of T = g(s)."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


# A sigmoid up to 1 - 1e-6, and on in a straight line, so that any magnitude can be masked in the end.
_EDGE = 1.0 - 1e-6
_BEND = math.log(_EDGE / (1.0 - _EDGE))


def _sigmoid(s: Tensor) -> Tensor:
    return torch.sigmoid(s.clamp(max=_BEND)) + 1e-6 * (s - _BEND).clamp(min=0.0)


def _sigmoid_inverse(threshold: Tensor) -> Tensor:
    return torch.logit(threshold.clamp(1e-30, _EDGE)) + 1e6 * (threshold - _EDGE).clamp(min=0.0)


def _softplus_inverse(threshold: Tensor) -> Tensor:
    return threshold + torch.log(-torch.expm1(-threshold.clamp(min=1e-30)))


def _log(threshold: Tensor) -> Tensor:
    return torch.log(threshold.clamp(min=1e-30))


THRESHOLD_FUNCTIONS = {
    "sigmoid": ThresholdFunction(_sigmoid, _sigmoid_inverse, lambda t: (1.0 - t).clamp(min=0.0) * t),
    "exp": ThresholdFunction(torch.exp, _log, lambda t: t),
    "softplus": ThresholdFunction(F.softplus, _softplus_inverse, lambda t: -torch.expm1(-t)),
}


def is_restored(model: nn.Module, key: str) -> bool:
    """Tell whether the network gives back the scale that a soft threshold takes from a parameter: by a normalisation.

    The gates of recurrent layers have none, whatever stands around them.
    """
    owner = model.get_submodule(key.rpartition(".")[0])
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        return False
    return any("Norm" in type(module).__name__ for module in model.modules())


def trim(error: float, gain: float = 0.3) -> float:
    """The common shift of all s that answers this error of the density: up when too dense."""
    return min(max(-gain * error, -MOST_SHIFT), MOST_SHIFT)


@dataclass(eq=False, repr=False)
class SoftThreshold(Targeted, Latent):
    """Thresholds, pressure, floors and the landing on a budget: all but alpha, which is the method's (a subclass).

    Args:
        pressure: total decay of s over the run (see the module); None takes the method's own for the target, or without
            one as much of it as the optimizer can move the weights.
        granularity: one threshold a "layer" or an output "channel", the weight's first dimension (which of transposed
            convolutions is the inputs).
        threshold_function: g: "sigmoid", "exp" or "softplus".
        threshold_init: the first s, where the layer's weights are large enough; -5 gives thresholds of 0.0067. A layer
            starts at no more than 0.12 times the root mean square of its weights, and one whose weights are all 0
            without a threshold, until they are not.
        threshold_lr: learning rate of s as a multiple of the weights' (over the root of ``block``). 1 suits SGD and
            Adam; a larger one lets the loss push the thresholds down.
        block: 4 thresholds blocks of 4 consecutive inputs of one output by their mean |W|, which integer dot products
            of CPUs want: W^ = W * max(1 - T/mean, 0); (8, 4) blocks of 8 consecutive outputs as well. 1 thresholds
            single weights. Of a convolution they are at one position of the kernel.

    Raises:
        ValueError: as :class:`Targeted`; an option out of its range; weights so large that sigmoid thresholds, which
            end at 1, cannot reach the target; a layer that blocks do not divide, or whose part on a process they do
            not; blocks of several outputs with a threshold each.
    """

    drifts = True

    _: KW_ONLY
    pressure: float | None = None
    granularity: str = "layer"
    threshold_function: str = "sigmoid"
    threshold_init: float = -5.0
    threshold_lr: float = 1.0
    block: int | Sequence[int] = 1

    def __post_init__(self) -> None:
        _checks.one_of("granularity", self.granularity, ("layer", "channel"))
        _checks.one_of("threshold_function", self.threshold_function, THRESHOLD_FUNCTIONS)
        if self.pressure is not None:
            _checks.number("pressure", self.pressure)
        _checks.number("threshold_lr", self.threshold_lr)
        _checks.number("threshold_init", self.threshold_init, least=-math.inf)
        self.block = self._block = _checks.block("block", self.block)
        if self.granularity == "channel" and self._block[0] > 1:
            raise ValueError(
                f"granularity='channel' has a threshold for each output, and block={self._block} needs one for "
                f"{self._block[0]} of them together: take granularity='layer'"
            )
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

    @property
    @abstractmethod
    def alpha_now(self) -> float:
        """The factor on the gradient of masked weights."""

    @property
    def _g(self) -> ThresholdFunction:
        return THRESHOLD_FUNCTIONS[self.threshold_function]

    # The formula

    def threshold(self, bucket: Bucket) -> Tensor:
        """T = g(s), one a row; 0 for layers whose weights are still all 0."""
        return self._g.forward(bucket.own["s"].detach()) * self._rows_of(bucket, bucket.kept["awake"])

    def value(self, weight: Tensor, bucket: Bucket) -> Tensor:
        """W^ = sign(W) (|W| - soft T) for |W| > T, else 0; for blocks W (1 - soft T/B), B the mean |W|."""
        used = bucket.flat()
        single = self._block == (1, 1)
        rows = zip(bucket.views(used), bucket.views(weight), self._shaped(bucket), bucket.kept["soft"], strict=True)
        for out, w, t, soft in rows:
            size = self._magnitude(w)
            kept = w - (soft * t).copysign(w) if single else w * (1.0 - soft * t / size.clamp(min=1e-30))
            out.copy_(torch.where(size <= t, 0.0, kept))
        return used

    def live(self, bucket: Bucket) -> Tensor:
        """See :class:`Latent`."""
        live = bucket.flat(dtype=torch.bool)
        for out, w, t in zip(
            bucket.views(live), bucket.views(bucket.kept["latent"]), self._shaped(bucket), strict=True
        ):
            out.copy_(self._magnitude(w) > t)
        return live

    def _magnitude(self, weight: Tensor) -> Tensor:
        """What is compared with T, in float32: |W|, or for each weight the mean |W| of its block."""
        magnitude = weight.float().abs()
        return block_expand(block_sum(magnitude, self._block) / math.prod(self._block), self._block)

    def _shaped(self, bucket: Bucket) -> list[Tensor]:
        """The thresholds of each layer, (1, ..., 1) or (out, 1, ..., 1)."""
        parts = bucket.parts(self.threshold(bucket))
        return [t.view(-1, *[1] * (len(shape) - 1)) for t, shape in zip(parts, bucket.shapes, strict=True)]

    def _rows_of(self, bucket: Bucket, values: Tensor) -> Tensor:
        """(L,) to one a row."""
        if self.granularity == "layer":
            return values
        return torch.cat([v.expand(n) for v, n in zip(values, bucket.rows, strict=True)])

    def prepare(self, bucket: Bucket) -> None:
        """See :class:`Sparsifier`."""
        channels = self.granularity == "channel"
        bucket.rows = [shape[0] if channels else 1 for shape in bucket.shapes]
        bucket.per = dict.fromkeys(["scale", "awake", "moved", "shrink", "restored", "soft"], "layer")
        bucket.per.update(dict.fromkeys(["s", "lowest", "previous", "lower", "answered"], self.granularity))
        weight, count = bucket.kept["latent"], len(bucket.layers)
        bucket.kept["scale"] = self._root_mean_square(bucket, weight)
        bucket.kept["awake"] = (bucket.kept["scale"] > 0.0).float()
        bucket.kept["moved"] = torch.zeros(count, device=bucket.device)
        # What no optimizer holds does not move.
        bucket.kept["shrink"] = torch.full((count,), 0.0 if bucket.optimizer is None else 1.0, device=bucket.device)
        paper = self.budget is None  # without a target the formula is the paper's
        restored = [float(paper or is_restored(self.model, layer.key)) for layer in bucket.layers]
        bucket.kept["restored"] = torch.tensor(restored, device=bucket.device)
        bucket.kept["soft"] = bucket.kept["shrink"] * bucket.kept["restored"]
        first = self._first(bucket.kept["scale"])
        bucket.own["s"] = nn.Parameter(self._rows_of(bucket, first).clone())
        bucket.kept["lowest"] = bucket.own["s"].detach() - MAX_FALL
        bucket.kept["previous"] = bucket.own["s"].detach().clone()
        bucket.kept["lower"] = torch.zeros_like(bucket.kept["previous"])
        bucket.kept["answered"] = torch.zeros_like(bucket.kept["previous"])

    def _root_mean_square(self, bucket: Bucket, weight: Tensor) -> Tensor:
        sizes = torch.tensor([float(layer.size) for layer in bucket.layers], device=bucket.device)
        return (bucket.sums(weight.float().square()) / sizes).sqrt()

    def _first(self, scale: Tensor) -> Tensor:
        """The first s of layers whose weights are of this size."""
        usual = torch.full_like(scale, self.threshold_init)
        return torch.minimum(usual, self._g.inverse((START * scale).double()).float())

    # Around the optimizer's steps

    def _kernel(self, bucket: Bucket) -> ThresholdedLayers:
        """The passes over all layers; made anew when a parameter's memory is another one."""
        pointers = tuple(weight.data_ptr() for weight in bucket.weights())
        cached: tuple[tuple[int, ...], ThresholdedLayers] | None = bucket.passes
        if cached is None or cached[0] != pointers:
            layers = ThresholdedLayers(bucket.weights(), bucket.views(bucket.kept["latent"]), bucket.rows)
            cached = bucket.passes = (pointers, layers)
        return cached[1]

    def _by_kernel(self, bucket: Bucket) -> bool:
        """Whether the passes of the kernels fit: single weights, laid out in memory as flat tensors are."""
        return self._block == (1, 1) and bucket.as_laid_out

    def _before(self, bucket: Bucket) -> None:
        grads = bucket.grads()
        threshold, s = self.threshold(bucket), bucket.own["s"]
        # A layer whose weights are all 0 gets its whole gradient.
        alpha = torch.where(bucket.kept["awake"] > 0.0, self.alpha_now, 1.0)
        if self._by_kernel(bucket):
            slope = self._kernel(bucket).before(grads, threshold, alpha, self._lower(bucket))
        else:
            slope = self._before_by_formula(bucket, grads, alpha)
        if self.granularity == "layer":
            slope = total(slope, [layer.shard for layer in bucket.layers])
        # dL/ds = dL/dT g'(s)
        if any(grad is not None for grad in grads):
            s.grad = slope * self._g.derivative(threshold) * self._rows_of(bucket, bucket.kept["awake"])

    def _lower(self, bucket: Bucket) -> Tensor | None:
        """The bound of the sparse backward, one a row; None where it reaches all weights."""
        return None

    def _before_by_formula(self, bucket: Bucket, grads: Sequence[Tensor | None], alpha: Tensor) -> Tensor:
        slopes = []
        latents = bucket.views(bucket.kept["latent"])
        for weight, w, grad, t, a in zip(bucket.weights(), latents, grads, self._shaped(bucket), alpha, strict=True):
            weight.copy_(w)
            if grad is None:
                slopes.append(torch.zeros_like(t).flatten())
                continue
            size = self._magnitude(w).clamp(min=1e-30)
            # 1 or alpha to W, and to T that along W/B
            grad.mul_(torch.where(size > t, 1.0, a))
            slopes.append(-(grad * w / size).sum_to_size(t.shape).flatten())
        return torch.cat(slopes)

    def _show(self, bucket: Bucket) -> None:
        if not self._by_kernel(bucket):
            super()._show(bucket)
            return
        if not bucket.dense:
            bucket.scatter(bucket.kept["latent"], bucket.weights())
        self._kernel(bucket).after(self.threshold(bucket), bucket.kept["soft"])

    # After them

    def _update(self) -> None:
        parameters = [bucket.own["s"].detach() for bucket in self._buckets]
        self._limit(parameters)
        measured = self.steps % self.interval == 0 or self.steps == self.total_steps
        if measured:
            self._see_answers(parameters)
        if self.budget is None or self._density > self._rest():
            # ds/dstep = -pressure * (1 + cos(pi p)) / total_steps * s: the shape of a cosine learning rate, mean 1; no
            # more than a part of it where steered. It only raises thresholds: s above 0 is the trim's doing.
            assert self.pressure is not None
            share = min(1.0 + math.cos(math.pi * self.progress), 2.0 * (1.0 - self._steered)) / self.total_steps
            self._press(parameters, min(self.pressure * share, max(MAX_DECAY, LEAST_REACH / self.total_steps)))
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
            self._see_moves(bucket)

    def _see_moves(self, bucket: Bucket) -> None:
        """See how far this step has moved the weights, and wake layers whose weights are no longer 0."""
        kept, now = bucket.kept, bucket.gather(bucket.weights())
        sizes = torch.tensor([float(layer.size) for layer in bucket.layers], device=bucket.device)
        step = bucket.sums((now - kept["latent"]).float().abs()) / sizes
        kept["moved"].copy_(torch.fmax(kept["moved"], step))  # NaN leaves it as it is
        size = self._root_mean_square(bucket, now)
        waking = (kept["awake"] == 0.0) & (size > 0.0)
        kept["scale"].copy_(torch.where(waking, size, kept["scale"]))
        kept["awake"].copy_((kept["scale"] > 0.0).float())
        first, rows = self._first(kept["scale"]), self._rows_of(bucket, waking.float()) > 0.0
        for name in ("s", "previous"):
            mine = bucket.own["s"].detach() if name == "s" else kept[name]
            mine.copy_(torch.where(rows, self._rows_of(bucket, first), mine))
        kept["lowest"].copy_(torch.where(rows, self._rows_of(bucket, first) - MAX_FALL, kept["lowest"]))
        reach = kept["moved"] * self.total_steps / kept["scale"].clamp(min=1e-30)
        kept["shrink"].copy_((reach / FREE).square().clamp(max=1.0))
        kept["soft"].copy_(kept["shrink"] * kept["restored"])

    def _see_answers(self, parameters: list[Tensor]) -> None:
        """See how far the optimizer has moved each s, as a share of what the pressure does at its greatest."""
        if self.budget is None or not self.pressure:
            return
        pressed = min(2.0 * self.pressure / self.total_steps, max(MAX_DECAY, LEAST_REACH / self.total_steps))
        for bucket, s in zip(self._buckets, parameters, strict=True):
            kept = bucket.kept
            answer = (s - kept["previous"]).abs() / (pressed * s.abs()).clamp(min=1e-30)
            kept["answered"].copy_(torch.fmax(kept["answered"], answer.clamp(max=1.0)))  # NaN leaves it as it is

    def _follows(self, bucket: Bucket) -> Tensor:
        """Of each layer, how well loss and weights follow the pressure, in [0, 1]."""
        kept = bucket.kept
        answered = torch.stack([part.mean() for part in bucket.parts(kept["answered"])])
        return torch.where(kept["restored"] > 0.0, kept["shrink"], torch.minimum(kept["shrink"], answered))

    def _rest(self) -> float:
        """The density at which the pressure rests: the goal, and the curve to it where loss or weights are too slow."""
        assert self.budget is not None
        return float(self.budget.goal**self._freedom * self.budget.aim(self.progress) ** (1.0 - self._freedom))

    def _count(self) -> list[int]:
        self._take_all()
        if all(self._by_kernel(bucket) for bucket in self._buckets):
            counts = self._by_layer(lambda bucket: self._kernel(bucket).count(self.threshold(bucket)).unbind())
        else:
            counts = [mask.sum() for mask in self._by_layer(lambda bucket: bucket.views(self.live(bucket)))]
        return [int(n) for n in total(torch.stack(counts), self._shards()).tolist()]

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
        shares = [value for bucket in self._buckets for value in self._follows(bucket).tolist()]
        self._freedom = statistics.fmean(shares)
        if self.steps == self.total_steps:
            for layer, mask in zip(self._layers, self._select(), strict=True):
                self._move(layer, mask)
        elif self.progress >= self.trim_from or self._density < self._rest():
            self._shift(self._pace * trim(log_error(self._density, self._rest())))
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
            s = bucket.parts(bucket.own["s"].detach())[place].view(-1, *[1] * (weight.dim() - 1))
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
        pairs = zip(scores, self._blocks(scores, density, [0] * len(scores)), strict=True)
        least = torch.cat([torch.where(live, score, torch.inf).flatten() for score, live in pairs])
        least = least.amin() if least.numel() else least.new_full((), torch.inf)
        group = shared_group(self._shards())
        if group is not None:
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group)
        return float(least)

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
        self._take_all()
        if self.budget is None:
            return self._by_layer(lambda bucket: bucket.views(self.live(bucket)))
        live = self._by_layer(lambda bucket: bucket.views(self.live(bucket)))
        if self.budget.met(count_all(live, self._shards())):
            return live
        masks = self._select()
        for layer, mask in zip(self._layers, masks, strict=True):
            self._move(layer, mask)
        return masks

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        return 1.0 if self.alpha_now > 0.0 else density

    def _alpha(self) -> float | None:
        return self.alpha_now

    def _thresholds(self) -> list[float]:
        return means(self._by_layer(self._shaped), self._shards() if self.granularity == "channel" else None)

    def _state(self) -> dict[str, Any]:
        return {"density": self._density, "freedom": self._freedom}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self._density, self._freedom = state["density"], state["freedom"]
