"""sigmoid, silu and gelu in float32, modes "exact" and "fast", in PyTorch operators: the bits of the native kernels.

Operation for operation ``native/src/act_exact-inl.h`` and ``native/src/engine/activations-inl.h``, which say why. A
fused multiply-add is made from float64, as in :func:`rarefy.act.spec.quartic.fused`. Nothing looks at bits, which
ONNX could not, and x is never clamped from one side alone, which makes infinity finite there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Numbers of float32 by the digits that C has for them.
_F = np.float32
_LOG2E = float(_F(1.44269504))
_LOG2, _LOG2_REST = float(_F(0.693147182)), float(_F(1.90465421e-9))
#: S of e^r = 1 + r + r^2 S(r), highest power first.
_SERIES = tuple(float(_F(c)) for c in (0.00138211693, 0.00836866535, 0.0416682586, 0.166665211, 0.49999994))
#: -2 sqrt(2/pi) and its product with 0.044715, each as a sum of two.
_CUBE = tuple(float(_F(c)) for c in (-1.59576893, -1.93077895e-07, -0.0713548139, -2.39883247e-09))
_LEAST = -256  # the exponent of the first of the powers


def powers() -> npt.NDArray[np.float64]:
    """Return the powers of 2 that results are scaled by."""
    return np.ldexp(1.0, np.arange(_LEAST, 256))


#: The centres of the segments and the polynomials of Phi(-a) e^(a^2/2) there, lowest power first, as C has them.
_TAIL = """
    1.51953125 2.4921875 3.921875 5.9375
      9.125 12.9406252 0.228515625 0.740234375
    0.204030886 0.141688526 0.0961032584 0.0654272363
      0.0432125069 0.0306477789 0.420458674 0.30193755
    -0.0889109746 -0.0458279103 -0.0220373143 -0.0104680657
      -0.00462815398 -0.00234086206 -0.302860916 -0.175437734
    0.0344639383 0.0137383696 0.00483783195 0.00163654843
      0.000490297971 0.000177779541 0.175625384 0.0860363916
    -0.0121806273 -0.00386305759 -0.00102132803 -0.000250351004
      -5.13957639e-05 -1.34264728e-05 -0.0875744969 -0.0372494608
    0.00398886763 0.00102801458 0.000208076744 3.75201744e-05
      5.3329909e-06 1.00879765e-06 0.0388868898 0.0146072544
    -0.00122368638 -0.000260521105 -4.09824825e-05 -5.51597486e-06
      -5.46125705e-07 -7.52903873e-08 -0.0157842673 -0.005309714
    0.000353974901 6.16109974e-05 7.88777743e-06 7.97794996e-07
      5.51833317e-08 5.45191847e-09 0.00625709398 0.00197553565
    -0.000100537305 -1.46579187e-05 -1.55467069e-06 -1.15030289e-07
      -6.13266415e-09 -4.28751673e-10 -0.0016078949 -0.000357340119
    2.83348363e-05 5.94433504e-06 2.52348769e-07 1.43696521e-08
      6.69748978e-10 5.05881691e-11 -0.0022397663 -0.00129962456
"""


def tail() -> npt.NDArray[np.float32]:
    """Return centres and coefficients by rising segment, shape [10, 8]."""
    rows = np.array(_TAIL.split(), dtype=np.float64).reshape(10, 8)
    return np.roll(rows.astype(np.float32), 2, axis=1)


def _wide(value: Tensor | float) -> Tensor | float:
    return value.double() if isinstance(value, Tensor) else value


def fused(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """Return the float32 nearest to ``a * b + c``; see :func:`rarefy.act.spec.quartic.fused`."""
    p, d = a.double() * _wide(b), _wide(c)
    s = p + d
    back = s - p
    error = (p - (s - back)) + (d - back)
    near = s.float()
    # where the sum is a tie of float32, what it lost decides: the other neighbour lies as far on the other side
    mirror = s + (s - near)
    other = mirror.float()
    tie = (other.double() == mirror) & ((other - near) * error > 0)
    return torch.where(tie, other, near)


class _Exponential(NamedTuple):
    """e^z = power (1 + high + low + square series)."""

    power: Tensor
    high: Tensor
    low: Tensor
    square: Tensor
    series: Tensor


def _power(n: Tensor, scale: int, table: Tensor) -> Tensor:
    return table[(n + (scale - _LEAST)).long()].float()


def _horner(r: Tensor, first: float, *more: float) -> Tensor:
    s = fused(r, first, more[0])
    for c in more[1:]:
        s = fused(s, r, c)
    return s


def _exponential(z: Tensor, less: Tensor | float, scale: int, table: Tensor) -> _Exponential:
    """e^(z + less), power times 2^scale."""
    n = torch.round(z.double() * _LOG2E)
    high = (z.double() - n * _LOG2).float()  # not rounded
    low = fused(n, _LOG2_REST, less)
    r = high + low
    return _Exponential(_power(n, scale, table), high, low, r * r, _horner(r, *_SERIES))


def _gate(e: _Exponential) -> tuple[Tensor, Tensor]:
    """-2^64 / (1 + e^z) = gate (1 + more)."""
    r = fused(e.square, e.series, e.high)
    high = 1.0 + r
    low = ((1.0 - high) + r) + e.low
    power, one = e.power * high, 2.0**-64
    large, small = power.clamp(min=one), power.clamp(max=one)
    total = large + small
    left = fused(e.power, low, (large - total) + small)
    gate = -1.0 / total
    return gate, fused(gate, left, fused(gate, total, 1.0))


def _gated(x: Tensor, inside: Tensor, most: float, gate: Tensor, more: Tensor) -> Tensor:
    y = fused(inside, gate, inside * (gate * more))
    return torch.where(x > most, x, y * -(2.0**-64))


def exact(x: Tensor, function: str, table: Tensor, tails: Tensor) -> Tensor:
    """Compute mode "exact" of numbers; ``table`` and ``tails`` are :func:`powers` and :func:`tail` on the device."""
    if function == "gelu":
        return _gelu(x, table, tails)
    if function == "gelu_tanh":
        inside = x.clamp(-11.0, 6.0)
        square = inside * inside
        a, a_rest, b, b_rest = _CUBE
        less = fused(inside, inside, -square)
        factor = fused(square, b, a)
        rest = fused(less, b, fused(square, b_rest, a_rest))
        more = fused(square, b, a - factor) + rest
        z = inside * factor
        e = _exponential(z, fused(inside, more, fused(inside, factor, -z)), -64, table)
        return _gated(x, inside, 6.0, *_gate(e))
    inside = x.clamp(-120.0, 25.0)
    gate, more = _gate(_exponential(-inside, 0.0, -64, table))
    if function == "sigmoid":
        return fused(gate, more, gate) * -(2.0**-64)
    return _gated(x, inside, 25.0, gate, more)


def _gelu(x: Tensor, table: Tensor, tails: Tensor) -> Tensor:
    a = x.abs().clamp(max=float(_F(14.4)))
    half = a * -0.5
    z = a * half
    e = _exponential(z, fused(a, half, -z), 24, table)
    # the segment, without the bits of w: two for each doubling of it
    w = a + 1.0
    octave = torch.where(w >= 8.0, 3.0, torch.where(w >= 4.0, 2.0, torch.where(w >= 2.0, 1.0, 0.0)))
    half_way = torch.where(w >= 8.0, 12.0, torch.where(w >= 4.0, 6.0, torch.where(w >= 2.0, 3.0, 1.5)))
    row = (2.0 * octave + torch.where(w >= half_way, 1.0, 0.0)).long()
    centre, first, *coefficients = tails.unbind(0)
    d = a - centre[row]
    p = coefficients[-1][row]
    for c in reversed(coefficients[:-1]):
        p = fused(p, d, c[row])
    begin = first[row]
    t = fused(p, d, begin)
    t_less = fused(-p, d, t - begin)
    high = fused(e.high, t, t)
    lost = fused(-e.high, t, high - t) + fused(e.high, t_less, t_less)
    low = fused(-fused(e.square, e.series, e.low), t, lost)
    factor, most = a * e.power, _not_below_zero(x) * 2.0**24
    y = fused(-factor, high, most)
    less = fused(-factor, low, fused(factor, high, y - most))
    return torch.where(x > 14.0, x, (y - less) * 2.0**-24)


def _not_below_zero(x: Tensor) -> Tensor:
    """max(x, 0) with the sign of x, by a product: a choice in onnxruntime may lose the sign of 0."""
    return torch.where(x < -1.0, -1.0, x) * torch.where(x > 0.0, 1.0, 0.0)


_QUICK = tuple(
    float(_F(c))
    for c in (
        *(1.3882530620321631e-3, 8.366520516574383e-3, 4.166720062494278e-2),
        *(0.1666654348373413, 0.4999999701976776),
    )
)
_LOG2_HIGH, _LOG2_LOW = 0.693359375, float(_F(2.12194440e-4))
_P = tuple(float(_F(c)) for c in (0.0041165836, 0.040635083, 0.18324064, 0.43830237, 0.5))
_Q = tuple(2.0**64 * float(_F(c)) for c in (0.010318626, 0.10186349, 0.46948513, 1.202526, 1.6744897, 1.0))


def _quick_power(a: Tensor, b: Tensor | float, table: Tensor) -> tuple[Tensor, Tensor]:
    """2^64 2^n and e^r - 1 of e^(a b) = 2^n e^r."""
    n = torch.round((a * b).double() * _LOG2E)
    r = fused(a, b, (n * -_LOG2_HIGH).float())
    r = fused(n, _LOG2_LOW, r)
    return _power(n, 64, table), fused(r * r, _horner(r, *_QUICK), r)


def fast(x: Tensor, function: str, table: Tensor) -> Tensor:
    """Compute mode "fast" of sigmoid, silu and gelu of numbers; ``table`` is :func:`powers` on the device."""
    scale = 2.0**64
    if function == "gelu":
        a = x.abs().clamp(max=14.5)
        p, q = _horner(a, *_P), _horner(a, *_Q)
        two, less_one = _quick_power(a, a * -0.5, table)
        tail = two * fused(p, less_one, p) / q
        return fused(-a, tail, _not_below_zero(x))
    two, less_one = _quick_power(x.abs().clamp(max=104.0), -1.0, table)
    e = fused(two, less_one, two)
    gate = torch.where(x < 0, e, scale) / (scale + e)
    return gate if function == "sigmoid" else torch.where(x < -200.0, -200.0, x) * gate
