"""The thresholds of all layers in PyTorch: for every device, dtype and layout, and what the kernels must equal.

Weights of fewer than 32 bits are computed with in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rarefy.kernels.thresholds import ThresholdedLayers


def before(
    layers: ThresholdedLayers, grads: Sequence[Tensor | None], thresholds: Tensor, alpha: Tensor, lower: Tensor | None
) -> Tensor:
    """See :meth:`rarefy.kernels.thresholds.ThresholdedLayers.before`."""
    grad_thresholds = torch.zeros_like(thresholds)
    bounds = _per_layer(layers, thresholds if lower is None else lower)
    everything = zip(
        grads, layers.latents, _per_layer(layers, thresholds), bounds, _per_layer(layers, grad_thresholds), alpha,
        strict=True,
    )  # fmt: skip
    for grad, latent, threshold, bound, grad_threshold, factor in everything:
        if grad is None:
            continue
        magnitude = latent.abs()
        # dL/dW = dL/dW^ * (1 if |W| > T, alpha if not; 0 below the bound of the sparse backward)
        masked = grad * factor.reshape(_ones(grad))
        if lower is not None:
            masked = torch.where(magnitude < bound, 0.0, masked)
        grad.copy_(torch.where(magnitude <= threshold, masked, grad))
        # dL/dT = -sum dL/dW * sign(W), with sign(0) = 0
        signed = torch.where(latent > 0, grad, torch.where(latent < 0, -grad, 0.0))
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_threshold.copy_(-signed.to(wide).sum_to_size(grad_threshold.shape))
    if layers.rows:
        torch._foreach_copy_(layers.weights, layers.latents)
    return grad_thresholds


def after(layers: ThresholdedLayers, thresholds: Tensor, shrink: Tensor) -> None:
    """See :meth:`rarefy.kernels.thresholds.ThresholdedLayers.after`."""
    if layers.rows:
        torch._foreach_copy_(layers.latents, layers.weights)
    for weight, threshold, factor in zip(layers.weights, _per_layer(layers, thresholds), shrink, strict=True):
        # W^ = 0 if |W| <= T, else W - sign(W) s T; written so that NaN passes through
        by = (factor * threshold).copysign(weight)
        weight.copy_(torch.where(weight.abs() <= threshold, 0.0, weight - by))


def count(layers: ThresholdedLayers, thresholds: Tensor) -> Tensor:
    """See :meth:`rarefy.kernels.thresholds.ThresholdedLayers.count`."""
    live = torch.zeros(len(layers.rows), dtype=torch.int64, device=thresholds.device)
    for latent, threshold, place in zip(layers.latents, _per_layer(layers, thresholds), live, strict=True):
        place.copy_((latent.abs() > threshold).sum())
    return live


def mask(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """See :func:`rarefy.kernels.thresholds.mask_`."""
    for tensor, keep in zip(tensors, masks, strict=True):
        tensor.masked_fill_(~keep, 0.0)


def _ones(tensor: Tensor) -> tuple[int, ...]:
    return (1,) * tensor.dim()


def _per_layer(layers: ThresholdedLayers, values: Tensor) -> Iterator[Tensor]:
    """Each layer's part of one value a row, as a view that broadcasts over its weight.

    It has as many dimensions as the weight: PyTorch then computes in the wider of both dtypes.
    """
    parts = torch.split(values, list(layers.rows))
    for part, weight, rows in zip(parts, layers.weights, layers.rows, strict=True):
        yield part.view((rows, *_ones(weight)[1:]) if weight.dim() else ())
