"""quick_gelu, mish, softplus, hardswish, elu and exp in float32, mode "exact": computed in float64, rounded once more.

Operation for operation ``native/src/act_double.cpp``, which says why; plain PyTorch operators, and nothing looks at
bits, which ONNX could not. Within 0.51 units of the last place.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# 1 / log 2, log 2 in two parts, and the series of e^r, highest power first, without its 1
EXP = (
    *(1.4426950408889634, 0.693147180369123816490, 1.90821492927058770002e-10),
    *(1 / 3628800, 1 / 362880, 1 / 40320, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0),
)
# log(1 + e) = s (2 + 2/3 s^2 + 2/5 s^4 ...),  s = e / (2 + e), highest power first
LOG = tuple(2 / (2 * k + 1) for k in range(12, -1, -1))


def constants() -> npt.NDArray[np.float64]:
    """Return the numbers that :func:`exact` reads, as one array: exporters write those of Python as float32."""
    return np.concatenate([[1.702], EXP, LOG, np.ldexp(1.0, -np.arange(1000))])


def exact(x: Tensor, function: str, table: Tensor) -> Tensor:
    """Compute a function, of NaN any number; ``table`` is :func:`constants` on the device of ``x``."""
    wide = torch.where(x < -1000.0, -1000.0, x).double()  # minus infinity: a finite number gives its limit
    if function == "hardswish":
        return (wide * (wide + 3.0).clamp(0.0, 6.0) / 6.0).float()
    slope, numbers = table[0], table[1:]
    z = slope * wide if function == "quick_gelu" else wide
    less_one, power = _exp_parts(z.abs(), numbers)
    e, positive = (less_one + 1.0) * power, z >= 0.0
    if function == "quick_gelu":
        y = wide * (torch.where(positive, 1.0, e) / (1.0 + e))
    elif function == "mish":
        # tanh(log(1 + e^x)) = w / (w + 2),  w = e^x (e^x + 2); over e^2x for positive x
        w = torch.where(positive, 1.0 + 2.0 * e, e * (e + 2.0))
        y = wide * (w / (w + 2.0 * torch.where(positive, e * e, 1.0)))
    elif function == "softplus":
        y = wide.clamp(min=0.0) + _log1p(e, numbers)
    elif function == "elu":
        # e^-a - 1 = 2^-n (e^r - 1) + (2^-n - 1); the second of two, since onnxruntime's first loses the sign of 0
        y = torch.where(wide < 0.0, less_one * power + (power - 1.0), wide)
    else:
        y = torch.where(positive, 1.0 / e, e)
    return y.float()


def _exp_parts(a: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """e^r - 1 and 2^-n of e^-a = 2^-n e^r, for a >= 0."""
    inverse, high, low, first, *series = numbers[: len(EXP)].unbind(0)
    a = torch.where(a == a, a, 0.0).clamp(max=690.0)  # noqa: PLR0124 - not NaN, which is no index
    # n = round(a / log 2), |r| <= log(2) / 2
    n = torch.round(a * inverse)
    r = (n * high - a) + n * low
    p = first
    for c in series:
        p = p * r + c
    return p * r, numbers[len(EXP) + len(LOG) :][n.long()]


def _log1p(e: Tensor, numbers: Tensor) -> Tensor:
    """log(1 + e), for 0 <= e <= 1."""
    s = e / (2.0 + e)
    square = s * s
    p, *series = numbers[len(EXP) : len(EXP) + len(LOG)].unbind(0)
    for c in series:
        p = p * square + c
    return s * p
