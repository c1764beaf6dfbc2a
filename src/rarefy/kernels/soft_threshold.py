"""The soft threshold ``W^ = sign(W) * max(|W| - T, 0)`` and its annealed backward as one PyTorch operator.

The operator keeps no copy of the weights: the backward finds the mask again from W and T. On the CPU in float32 each
direction is one native pass; elsewhere the same formula runs in PyTorch. The weight gradient has the same bits on every
path; the threshold's gradient is a sum whose order, and so last bits, may differ between the native pass and PyTorch.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from rarefy import kernels
from rarefy.kernels._memory import address

_CHUNK = 1 << 15  # RAREFY_CHUNK in rarefy.h
_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


def _rows(weight: Tensor, threshold: Tensor) -> tuple[int, int, int]:
    """(rows, cols, per_row): the output channels are the outermost rows of a dense weight in any memory format."""
    if threshold.numel() == 1:
        return 1, weight.numel(), 0
    return weight.shape[0], weight.numel() // weight.shape[0], 1


def _native(weight: Tensor, threshold: Tensor) -> bool:
    """True where the native kernel applies: float32 on the CPU, dense in memory with the output channels outermost."""
    return (
        weight.dtype == threshold.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.numel() > 0
        and (
            weight.is_contiguous()
            or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
            or (weight.dim() == 5 and weight.is_contiguous(memory_format=torch.channels_last_3d))
        )
    )


def forward(weight: Tensor, threshold: Tensor) -> Tensor:
    """``sign(W) * max(|W| - T, 0)``, without autograd; see :func:`soft_threshold`."""
    kernel = kernels.find("soft_threshold_f32", None, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT32, _INT32)
    if kernel is not None and _native(weight, threshold):
        out = torch.empty_like(weight)
        threshold = threshold.contiguous()
        shape = _rows(weight, threshold)
        kernel(address(weight), address(threshold), address(out), *shape, torch.get_num_threads())
        return out
    return torch.where(weight.abs() <= threshold, 0.0, weight - threshold.copysign(weight)).to(weight.dtype)


def backward(
    grad: Tensor, weight: Tensor, threshold: Tensor, alpha: Tensor, lower: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to W and T; see :func:`soft_threshold`."""
    kernel = kernels.find(
        "soft_threshold_backward_f32",
        None,
        *(_POINTER, _POINTER, _POINTER, _POINTER, ctypes.c_float, _POINTER, _POINTER, _POINTER),
        *(_INT64, _INT64, _INT32, _INT32),
    )
    if kernel is not None and grad.dtype == torch.float32 and _native(weight, threshold):
        if grad.stride() != weight.stride():
            grad = torch.empty_like(weight).copy_(grad)
        rows, cols, per_row = _rows(weight, threshold)
        threshold = threshold.contiguous()
        grad_weight, grad_threshold = torch.empty_like(weight), torch.empty_like(threshold)
        lower = None if lower is None else lower.contiguous()
        partial = torch.empty(rows * -(-cols // _CHUNK), dtype=torch.float64)
        kernel(
            *(address(grad), address(weight), address(threshold), None if lower is None else address(lower)),
            *(float(alpha), address(grad_weight), address(grad_threshold), address(partial)),
            *(rows, cols, per_row, torch.get_num_threads()),
        )
        return grad_weight, grad_threshold
    magnitude = weight.abs()
    # h'(|W| - T) = 1 if |W| > T, alpha if not; 0 below the sparse backward's bound
    masked = grad * alpha.to(grad.dtype)
    if lower is not None:
        masked = torch.where(magnitude < lower, 0.0, masked)
    grad_weight = torch.where(magnitude <= threshold, masked, grad).to(weight.dtype)
    # dL/dT = -sum g * sign(W), with sign(0) = 0
    grad_threshold = -(grad_weight * weight.sign()).to(threshold.dtype).sum_to_size(threshold.shape)
    return grad_weight, grad_threshold


@torch.library.custom_op("rarefy::soft_threshold", mutates_args=())
def _operator(weight: Tensor, threshold: Tensor, alpha: Tensor, lower: Tensor | None = None) -> Tensor:
    return forward(weight, threshold)


@torch.library.custom_op("rarefy::soft_threshold_backward", mutates_args=())
def _operator_backward(
    grad: Tensor, weight: Tensor, threshold: Tensor, alpha: Tensor, lower: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return backward(grad, weight, threshold, alpha, lower)


@_operator.register_fake
def _(weight: Tensor, threshold: Tensor, alpha: Tensor, lower: Tensor | None = None) -> Tensor:
    return torch.empty_like(weight)


@_operator_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, threshold: Tensor, alpha: Tensor, lower: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(threshold)


def _setup(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_operator.register_autograd(
    lambda ctx, grad: (*_operator_backward(grad, *ctx.saved_tensors), None, None), setup_context=_setup
)


def soft_threshold(weight: Tensor, threshold: Tensor, alpha: Tensor, lower: Tensor | None = None) -> Tensor:
    """``sign(W) * max(|W| - T, 0)``, whose backward lets a share alpha of the gradient through to masked weights.

    Args:
        weight: W, (out, ...) of any floating dtype.
        threshold: T >= 0, of shape (1, ..., 1) for the whole layer or (out, 1, ..., 1) for every output channel.
        alpha: 0-dim tensor in [0, 1]. 0 is the sub-gradient of STR, 1 the identity straight-through estimator.
        lower: bound of the sparse backward, shaped as ``threshold``: weights with |W| below it, and masked, get no
            gradient. None lets it reach all of them.

    Source: AutoSparse (arXiv 2304.06941), the proxy derivative ``h'(x) = 1 if x > 0 else alpha`` of ``x = |W| - T``.
    """
    return _operator(weight, threshold, alpha, lower)  # type: ignore[no-any-return]


def count_above(weight: Tensor, threshold: Tensor) -> Tensor:
    """How many |W| > T, as a 0-dim int64 tensor on the weight's device (no synchronisation)."""
    kernel = kernels.find("count_above_f32", _INT64, _POINTER, _POINTER, _INT64, _INT64, _INT32)
    weight, threshold = weight.detach(), threshold.detach()
    if kernel is not None and _native(weight, threshold):
        threshold = threshold.contiguous()
        return torch.tensor(kernel(address(weight), address(threshold), *_rows(weight, threshold)))
    return (weight.abs() > threshold).sum()
