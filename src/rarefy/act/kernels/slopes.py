"""The derivatives of silu, gelu and gelu_tanh as numbers of float32: what the gradient of a gated unit multiplies by.

A format of 16 bits looks them up: computed in float64, rounded to float32. float32 computes them in float32, one
rounded operation after another as in ``native/src/gated.cpp``, so that the bits are the same: within 1e-6 of the true
derivative. In mode ``hard`` they are those of the piecewise linear function.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from rarefy.act import gradients
from rarefy.act.kernels.aten import DTYPE_OF, FORMAT_OF
from rarefy.act.spec import formats, subnormals

# of z = x (A + B x^2): twice those of rarefy.act.spec.reference, since gelu_tanh is x sigmoid(2 z) there
A = 2.0 * math.sqrt(2.0 / math.pi)
B = 0.044715 * A
# e^r = 1 + r + r^2 P(r) for |r| <= log(2) / 2, highest power first (Cephes, expf)
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# Phi(-a) = phi(a) t P(t),  t = 1 / (1 + p a), highest power first (Abramowitz and Stegun, 26.2.17)
TAIL = (1.330274429, -1.821255978, 1.781477937, -0.356563782, 0.319381530)


def slopes(x: Tensor, function: str, mode: str) -> Tensor:
    """Return the derivative of every element of a tensor of bfloat16, float16 or float32; without a gradient."""
    if x.dtype == torch.float32:
        return gradients.hard(x, function) if mode == "hard" else _slopes32(x, function)
    table = lookup(function, "hard" if mode == "hard" else "exact", FORMAT_OF[x.dtype].name).to(x.device)
    found: Tensor = table[x.view(torch.int16).to(torch.int32) & 0xFFFF]
    return found


@lru_cache(maxsize=32)
@subnormals.kept()
def lookup(function: str, mode: str, fmt: str) -> Tensor:
    """Return the derivatives for all inputs of a format of 16 bits, indexed by bits, on the CPU."""
    f = formats.get(fmt)
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        x = torch.from_numpy(f.all_bits().astype(f.dtype)).view(DTYPE_OF[fmt])
        if mode == "hard":
            return gradients.hard(x, function)
        return _slopes64(x.double(), function).float()


def _slopes64(x: Tensor, function: str) -> Tensor:
    x = x.clamp(-1000.0, 1000.0)  # beyond, each is 0 or 1
    if function == "gelu":
        # Phi(x) + x phi(x)
        phi = torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
        below: Tensor = torch.special.erfc(-x * math.sqrt(0.5))
        return 0.5 * below + x * phi
    z, inner = (x * (A + B * x * x), A + 3.0 * B * x * x) if function == "gelu_tanh" else (x, 1.0)
    # of x g(z): g + x g (1 - g) z'
    gate, rest = torch.sigmoid(z), torch.sigmoid(-z)
    return gate + x * (gate * rest * inner)


def _slopes32(x: Tensor, function: str) -> Tensor:
    if function == "gelu":
        x = x.clamp(-13.0, 13.0)
        a = x.abs()
        phi = _exp_minus(0.5 * (a * a)) * 0.3989422804
        t = 1.0 / (1.0 + 0.2316419 * a)
        p = t * TAIL[0] + TAIL[1]
        for c in TAIL[2:]:
            p = p * t + c
        tail = phi * (p * t)
        return torch.where(x < 0.0, tail, 1.0 - tail) + x * phi
    if function == "gelu_tanh":
        x = x.clamp(-10.0, 10.0)
        square = x * x
        z, inner = x * (square * B + A), square * (3.0 * B) + A
    else:
        x = z = x.clamp(-87.0, 87.0)
        inner = None
    e = _exp_minus(z.abs())
    large = 1.0 / (1.0 + e)
    small = e * large
    bend = x * (large * small)
    return torch.where(z < 0.0, small, large) + (bend if inner is None else bend * inner)


def _exp_minus(a: Tensor) -> Tensor:
    """e^-a in float32, for 0 <= a < 88."""
    # e^-a = 2^-n e^r,  n = round(a / log 2); log 2 in two parts, the first of few bits
    n = torch.round(torch.where(a == a, a, 0.0) * 1.44269504)  # noqa: PLR0124
    r = (n * 0.693359375 - a) - n * 2.12194440e-4
    p = r * EXP[0] + EXP[1]
    for c in EXP[2:]:
        p = p * r + c
    return (p * (r * r) + r + 1.0) * _power(n)


def _power(n: Tensor) -> Tensor:
    """2^-n of whole numbers up to 126, by the exponent field."""
    return ((127 - n.to(torch.int32)) << 23).view(torch.float32)
