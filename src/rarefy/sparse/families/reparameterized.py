"""Weights under learned soft thresholds, ``W^ = sign(W) * max(|W| - T, 0)``, ``T = g(s)``: formula and gradient.

Source: Soft Threshold Reparameterization (Kusupati et al., ICML 2020), equations 2 to 6::

    forward     W^ = sign(W) (|W| - soft T)  for |W| > T, else 0      soft = 1 in the paper
    backward    dL/dW = dL/dW^  for |W| > T, else alpha dL/dW^        alpha = 0 in the paper
                dL/ds = -g'(s) * sum of sign(W) dL/dW

A layer whose weights are all 0 has no threshold, until they are not.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor, nn

from rarefy import _checks
from rarefy.kernels.thresholds import ThresholdedLayers
from rarefy.sparse import _options
from rarefy.sparse.buckets import Bucket
from rarefy.sparse.families.latent import Latent
from rarefy.sparse.families.targeted import Targeted
from rarefy.sparse.families.threshold_functions import THRESHOLD_FUNCTIONS, ThresholdFunction
from rarefy.sparse.masks import block_expand, block_sum, means
from rarefy.sparse.shards import total

#: The first threshold is at most this share of the root mean square of a layer's weights, which masks less than a tenth
#: of weights of a normal distribution: wide layers start dense too.
START = 0.12


@dataclass(eq=False, repr=False)
class Reparameterized(Targeted, Latent):
    """W^ = f(W, s), with ``bucket.own["s"]``, one a layer or a row; what moves s besides the loss is a subclass's.

    Args:
        granularity: one threshold a "layer" or an output "channel", the weight's first dimension (which of transposed
            convolutions is the inputs).
        threshold_function: g: "sigmoid", "exp" or "softplus".
        threshold_init: the first s, where the layer's weights are large enough; -5 gives thresholds of 0.0067. A layer
            starts at no more than 0.12 times the root mean square of its weights, and one whose weights are all 0
            without a threshold, until they are not.
        block: 4 thresholds blocks of 4 consecutive inputs of one output by their mean |W|, which integer dot products
            of CPUs want: W^ = W * max(1 - T/mean, 0); (8, 4) blocks of 8 consecutive outputs as well. 1 thresholds
            single weights. Of a convolution they are at one position of the kernel.

    Raises:
        ValueError: as :class:`Targeted`; an option out of its range; a layer that blocks do not divide, or whose part
            on a process they do not; blocks of several outputs with a threshold each.
    """

    _: KW_ONLY
    granularity: str = "layer"
    threshold_function: str = "sigmoid"
    threshold_init: float = -5.0
    block: int | Sequence[int] = 1

    def __post_init__(self) -> None:
        _checks.one_of("granularity", self.granularity, ("layer", "channel"))
        _checks.one_of("threshold_function", self.threshold_function, THRESHOLD_FUNCTIONS)
        _checks.number("threshold_init", self.threshold_init, least=-math.inf)
        self.block = self._block = _options.block("block", self.block)
        if self.granularity == "channel" and self._block[0] > 1:
            raise ValueError(
                f"granularity='channel' has a threshold for each output, and block={self._block} needs one for "
                f"{self._block[0]} of them together: take granularity='layer'"
            )
        super().__post_init__()

    # What a method provides

    @property
    @abstractmethod
    def alpha_now(self) -> float:
        """The factor on the gradient of masked weights."""

    def _lower(self, bucket: Bucket) -> Tensor | None:
        """The bound of the sparse backward, one a row; None where it reaches all weights."""
        return None

    # The formula

    @property
    def _g(self) -> ThresholdFunction:
        return THRESHOLD_FUNCTIONS[self.threshold_function]

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

    def unmasked(self, used: Tensor, bucket: Bucket) -> Tensor:
        """See :class:`Latent`: W^ + soft T sign(W^); for blocks W^ (1 + soft T/B^), B^ the mean |W^|."""
        found = bucket.flat()
        single = self._block == (1, 1)
        rows = zip(bucket.views(found), bucket.views(used), self._shaped(bucket), bucket.kept["soft"], strict=True)
        for out, w, t, soft in rows:
            out.copy_(
                w + (soft * t).copysign(w) if single else w * (1.0 + soft * t / self._magnitude(w).clamp(min=1e-30))
            )
        return found

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
        return bucket.shaped(self.threshold(bucket))

    def _rows_of(self, bucket: Bucket, values: Tensor) -> Tensor:
        """(L,) to one a row."""
        if self.granularity == "layer":
            return values
        return torch.cat([v.expand(n) for v, n in zip(values, bucket.rows, strict=True)])

    def prepare(self, bucket: Bucket) -> None:
        """See :class:`Sparsifier`."""
        bucket.rows = [shape[0] if self.granularity == "channel" else 1 for shape in bucket.shapes]
        bucket.per = {**dict.fromkeys(["scale", "awake", "soft"], "layer"), "s": self.granularity}
        bucket.kept["scale"] = bucket.means(bucket.kept["latent"].float().square()).sqrt()
        bucket.kept["awake"] = (bucket.kept["scale"] > 0.0).float()
        bucket.kept["soft"] = torch.ones_like(bucket.kept["scale"])
        first = self._first(bucket.kept["scale"])
        bucket.own["s"] = nn.Parameter(self._rows_of(bucket, first).clone())

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
        awake = bucket.kept["awake"]
        alpha = torch.full_like(awake, self.alpha_now).masked_fill_(awake == 0.0, 1.0)
        if self._by_kernel(bucket):
            slope = self._kernel(bucket).before(grads, threshold, alpha, self._lower(bucket))
        else:
            slope = self._before_by_formula(bucket, grads, alpha)
        if self.granularity == "layer":
            slope = total(slope, [layer.shard for layer in bucket.layers])
        # dL/ds = dL/dT g'(s)
        if any(grad is not None for grad in grads):
            s.grad = slope * self._g.derivative(threshold) * self._rows_of(bucket, awake)

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

    # What all have

    def _count(self) -> list[int]:
        """How many weights of each layer live."""
        self._take_all()
        if all(self._by_kernel(bucket) for bucket in self._buckets):
            counts = self._by_layer(lambda bucket: self._kernel(bucket).count(self.threshold(bucket)).unbind())
        else:
            counts = [mask.sum() for mask in self._live()]
        return [int(n) for n in total(torch.stack(counts), self._shards()).tolist()]

    def weight_grad_density(self, density: float) -> float:
        """See :class:`Sparsifier`."""
        return 1.0 if self.alpha_now > 0.0 else density

    def _alpha(self) -> float | None:
        return self.alpha_now

    def _thresholds(self) -> list[float]:
        return means(self._by_layer(self._shaped), self._shards() if self.granularity == "channel" else None)
