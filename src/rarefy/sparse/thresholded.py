"""Layers that compute with a thresholded weight while they train, under the names and keys of the plain ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rarefy.kernels import soft_threshold as kernel
from rarefy.sparse.masks import block_expand, block_sum
from rarefy.sparse.selection import Prunable
from rarefy.sparse.swapped import Swapped, SwappedConv1d, SwappedConv2d, SwappedConv3d, SwappedLinear, unguard


def _sigmoid_inverse(threshold: Tensor) -> Tensor:
    # Above 1 - 1e-6, which no sigmoid threshold passes, on in a straight line, so that magnitudes keep their order.
    edge = 1.0 - 1e-6
    return torch.logit(threshold.clamp(1e-30, edge)) + 1e6 * (threshold - edge).clamp(min=0.0)


def _softplus_inverse(threshold: Tensor) -> Tensor:
    return threshold + torch.log(-torch.expm1(-threshold.clamp(min=1e-30)))


def _log(threshold: Tensor) -> Tensor:
    return torch.log(threshold.clamp(min=1e-30))


class ThresholdFunction(NamedTuple):
    """g, its inverse, which keeps order over all magnitudes, and its derivative as a function of T = g(s)."""

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


THRESHOLD_FUNCTIONS = {
    "sigmoid": ThresholdFunction(torch.sigmoid, _sigmoid_inverse, lambda t: (1.0 - t) * t),
    "exp": ThresholdFunction(torch.exp, _log, lambda t: t),
    "softplus": ThresholdFunction(F.softplus, _softplus_inverse, lambda t: -torch.expm1(-t)),
}


class _SparseWeight(torch.autograd.Function):
    """W^ from W and s in one node of the graph, since it runs for every layer in every step."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, s: Tensor, alpha: Tensor, lower: Tensor | None, g: ThresholdFunction
    ) -> Tensor:
        threshold = g.forward(s.float())
        ctx.save_for_backward(weight, threshold, alpha, lower)
        ctx.g, ctx.dtype = g, s.dtype
        return kernel.forward(weight, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, threshold, alpha, lower = ctx.saved_tensors
        grad_weight, grad_threshold = kernel.backward(grad, weight, threshold, alpha, lower)
        # dL/ds = dL/dT g'(s)
        return grad_weight, (grad_threshold * ctx.g.derivative(threshold)).to(ctx.dtype), None, None, None


class Thresholded(Swapped):
    """What a layer gains while it trains: s, alpha, and a forward that uses the thresholded weight."""

    raw_threshold: nn.Parameter  # s, of shape (1, ..., 1) or (out, 1, ..., 1)
    alpha: Tensor  # a buffer: a Python float would recompile at every change
    lower: Tensor | None  # bound of the sparse backward, shaped as s
    threshold_function: str
    block: int  # consecutive inputs that are thresholded together

    def threshold(self) -> Tensor:
        """T = g(s) in float32, shaped as s."""
        return THRESHOLD_FUNCTIONS[self.threshold_function].forward(self.raw_threshold.float())

    def sparse_weight(self) -> Tensor:
        """W^, what the layer computes with."""
        if self.block == 1:
            if torch.compiler.is_compiling():
                return kernel.soft_threshold(self.weight, self.threshold(), self.alpha, self.lower)
            g = THRESHOLD_FUNCTIONS[self.threshold_function]
            inputs = (self.weight, self.raw_threshold, self.alpha, self.lower, g)
            return _SparseWeight.apply(*inputs)  # type: ignore[no-any-return, no-untyped-call]
        # W * max(1 - T/B, 0), B the mean |W| of the block; backward 1 or alpha to W, and to T that along W/B
        weight, threshold, size = self.weight, self.threshold(), self.magnitude().clamp(min=1e-30)
        factor = torch.where(size > threshold, 1.0, self.alpha)
        value = weight.detach() * (1.0 - threshold.detach() / size).clamp(min=0.0)
        along = (weight.detach() / size) * (threshold - threshold.detach())
        return value + factor * (weight - weight.detach() - along)

    def magnitude(self) -> Tensor:
        """What is compared with T, in float32: |W|, or for each weight the mean |W| of its block."""
        magnitude = self.weight.detach().float().abs()
        return block_expand(block_sum(magnitude, self.block) / self.block, self.block)

    def count(self) -> Tensor:
        """How many weights live, as a tensor."""
        if self.block == 1:
            return kernel.count_above(self.weight, self.threshold())
        return (self.magnitude() > self.threshold()).sum()


class ThresholdedLinear(Thresholded, SwappedLinear):
    """:class:`torch.nn.Linear` with W^ for W."""


class ThresholdedConv1d(Thresholded, SwappedConv1d):
    """:class:`torch.nn.Conv1d` with W^ for W."""


class ThresholdedConv2d(Thresholded, SwappedConv2d):
    """:class:`torch.nn.Conv2d` with W^ for W."""


class ThresholdedConv3d(Thresholded, SwappedConv3d):
    """:class:`torch.nn.Conv3d` with W^ for W."""


_CLASSES: dict[type[nn.Module], type[Thresholded]] = {
    nn.Linear: ThresholdedLinear,
    nn.Conv1d: ThresholdedConv1d,
    nn.Conv2d: ThresholdedConv2d,
    nn.Conv3d: ThresholdedConv3d,
}
_PLAIN = {thresholded: plain for plain, thresholded in _CLASSES.items()}


def attach(layer: Prunable, s: Tensor, function: str, block: int = 1) -> Thresholded:
    """Change the layer's class in place, and give it s, alpha and room for the bound of the sparse backward."""
    layer.__class__ = _CLASSES[type(layer)]  # type: ignore[assignment]
    thresholded = cast(Thresholded, layer)
    thresholded.threshold_function, thresholded.block = function, block
    thresholded.raw_threshold = nn.Parameter(s)
    thresholded.register_buffer("alpha", torch.zeros((), dtype=torch.float32, device=s.device))
    thresholded.register_buffer("lower", None)
    return thresholded


def detach(layer: Thresholded) -> None:
    """The plain layer again: undoes :func:`attach`, weight and bias as they are."""
    unguard(layer)
    del layer.raw_threshold, layer.alpha, layer.lower, layer.threshold_function, layer.block
    layer.__class__ = _PLAIN[type(layer)]  # type: ignore[assignment]


def separate(magnitude: Tensor, threshold: Tensor, mask: Tensor) -> Tensor:
    """The nearest threshold, row by row, that has the magnitudes in ``mask`` above it and the others below."""
    rows = [dim for dim in range(magnitude.dim()) if threshold.shape[dim] == 1]
    least_kept = magnitude.masked_fill(~mask, torch.inf).amin(rows, keepdim=True)
    most_dropped = magnitude.masked_fill(mask, 0.0).amax(rows, keepdim=True)
    between = torch.where(least_kept.isinf(), most_dropped * 1.001, (least_kept + most_dropped) / 2)
    return torch.where((threshold < most_dropped) | (threshold >= least_kept), between, threshold)
