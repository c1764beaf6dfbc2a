"""Gradients of the activation functions, in PyTorch operators.

``grad="y"`` is the formula in the result, as PyTorch's own backward (tanh: 1 - y^2; sigmoid: y (1 - y); exp: y). With
exact y it equals PyTorch's bits. In bf16 it is 0 from |x| = 3.469 on, where y rounds to 1; with K-TanH's y it is biased
upwards, since errors of y that cancel in the mean do not cancel in y^2.

``grad="x"`` is the derivative of the true function at the input, computed in float32 and rounded once: it neither
vanishes early nor carries a bias. All functions but tanh, sigmoid and exp have this form alone. In mode ``hard`` it is
the derivative of the piecewise linear function.

PyTorch's operators of silu, gelu and mish give NaN at infinity, where the derivative is 0 or 1, and that of gelu_tanh
from 1.8e19 on, where x^2 is infinite. To bound the input first takes up to 1.4 times as long: that is done where the
gradient is itself differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_WIDE = (torch.bfloat16, torch.float16, torch.float32)


_PYTORCH: dict[tuple[str, str], Callable[[Tensor, Tensor], Tensor]] = {
    ("tanh", "y"): torch.ops.aten.tanh_backward,
    ("sigmoid", "y"): torch.ops.aten.sigmoid_backward,
    ("exp", "y"): torch.mul,
    ("silu", "x"): torch.ops.aten.silu_backward,
    ("gelu", "x"): torch.ops.aten.gelu_backward,
    ("gelu_tanh", "x"): lambda upstream, x: torch.ops.aten.gelu_backward(upstream, x, approximate="tanh"),
    ("mish", "x"): torch.ops.aten.mish_backward,
}
# the derivative of each function is 0 or 1 from before there on: of an infinite x, or x^2 in float16, products are NaN
_FAR = 200.0
# operators of PyTorch that have no derivative of their own
_ONCE = ("silu", "mish")


def forms(function: str, mode: str) -> tuple[str, ...]:
    """Return the forms of gradient that a function has in a mode, the default first."""
    return ("y", "x") if function in ("tanh", "sigmoid", "exp") and mode != "hard" else ("x",)


def resolve(function: str, mode: str, grad: str | None) -> str:
    """Tell which form of gradient ("y" or "x") is meant; None is "y" where there is one. Raises ValueError."""
    possible = forms(function, mode)
    if grad is None:
        return possible[0]
    if grad not in possible:
        valid = " or ".join(f'"{g}"' for g in possible)
        raise ValueError(f'grad must be {valid} for {function} in mode "{mode}", got {grad!r}')
    return grad


def is_one_operator(function: str, mode: str, grad: str, dtype: torch.dtype) -> bool:
    """Tell whether PyTorch has one operator for the gradient: then it runs at the memory's speed everywhere."""
    return dtype in _WIDE and mode != "hard" and (function, grad) in _PYTORCH


def backward(upstream: Tensor, saved: Tensor, function: str, mode: str, grad: str) -> Tensor:
    """Return the gradient of the input from that of the result; ``saved`` is the result for "y", the input for "x"."""
    if saved.dtype not in _WIDE:  # 8-bit formats have no arithmetic
        return backward(upstream.float(), saved.float(), function, mode, grad).to(saved.dtype)
    if mode == "hard":
        return (upstream * hard(saved, function)).to(saved.dtype)
    if (function, grad) in _PYTORCH and not (function in _ONCE and torch.is_grad_enabled()):
        if grad == "x" and torch.is_grad_enabled():
            saved = saved.clamp(-_FAR, _FAR)
        result: Tensor = _PYTORCH[function, grad](upstream, saved)
        return result
    return (upstream.float() * _slope(saved.float(), function)).to(saved.dtype)


def _slope(x: Tensor, function: str) -> Tensor:
    """Return the derivative of the true function where PyTorch has no operator for it, or none for the second."""
    if function == "tanh":
        # sech^2 x = 4 e / (1 + e)^2,  e = exp(-2 |x|)
        e = torch.exp(-2.0 * x.abs())
        return 4.0 * e / (1.0 + e).square()
    if function == "sigmoid":
        # sigmoid(x) sigmoid(-x) = e / (1 + e)^2,  e = exp(-|x|)
        e = torch.exp(-x.abs())
        return e / (1.0 + e).square()
    if function in ("silu", "quick_gelu"):
        # of x g(k x): g (1 + k x (1 - g))
        z = (x if function == "silu" else 1.702 * x).clamp(-_FAR, _FAR)
        gate = torch.sigmoid(z)
        return gate * (1.0 + z * (1.0 - gate))
    if function == "mish":
        # t + x sigmoid(x) (1 - t^2),  t = tanh(log(1 + e^x))
        x = x.clamp(-_FAR, _FAR)
        t = torch.tanh(torch.nn.functional.softplus(x))
        return t + x * torch.sigmoid(x) * (1.0 - t * t)
    if function == "hardswish":
        return torch.where(x.abs() < 3.0, (2.0 * x + 3.0) / 6.0, (x > 0).float())
    if function == "elu":
        return torch.exp(x.clamp(max=0.0))
    return torch.sigmoid(x) if function == "softplus" else torch.exp(x)


def hard(x: Tensor, function: str) -> Tensor:
    """Return the derivative of mode ``hard`` in float32."""
    wide = x.float()
    if function == "tanh":
        return (wide.abs() < 1.0).float()
    inside = wide.abs() < 3.0
    if function == "sigmoid":
        return inside.float() / 6.0
    # x (k x + 3) / 6 inside, so (2 k x + 3) / 6
    k = 1.0 if function == "silu" else 1.702
    slope = torch.where((k * wide).abs() < 3.0, (2.0 * k * wide + 3.0) / 6.0, (wide > 0).float())
    return torch.where(torch.isnan(wide), math.nan, slope)
