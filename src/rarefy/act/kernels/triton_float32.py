"""The float32 functions in Triton, on bits: the arithmetic of :mod:`rarefy.act.kernels.aten`, rounding by rounding.

The kernels are compiled without the fusion of products and sums, so that only what is written as ``tl.fma`` is one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from rarefy.act.kernels import float32 as arithmetic
from rarefy.act.kernels import wide
from rarefy.act.spec import formats, oracle, quartic, reference
from rarefy.act.spec.table import ShiftTable, Table

#: What a kernel of one function is made of: the function on bits, the table that it reads, and its constants.
Parts = tuple[Any, npt.NDArray[Any], tuple[Any, ...]]

_EXP, _LOG, _SLOPE = tl.constexpr(wide.EXP), tl.constexpr(wide.LOG), tl.constexpr(1.702)
_LOG2E, _SERIES, _QUICK = (tl.constexpr(each) for each in (arithmetic._LOG2E, arithmetic._SERIES, arithmetic._QUICK))
_LOG2, _REST = tl.constexpr(arithmetic._LOG2), tl.constexpr(arithmetic._LOG2_REST)
_HIGH, _LOW = tl.constexpr(arithmetic._LOG2_HIGH), tl.constexpr(arithmetic._LOG2_LOW)
_CUBE, _P, _Q = (tl.constexpr(each) for each in (arithmetic._CUBE, arithmetic._P, arithmetic._Q))
_FAR = tl.constexpr(float(np.float32(14.4)))
_UP, _DOWN = tl.constexpr(2.0**64), tl.constexpr(2.0**-64)
_LIMIT = tl.constexpr(quartic.LIMIT)
_A = tl.constexpr(reference.GELU_A)
_B = tl.constexpr(reference.GELU_B)
_HARD = {"gelu_tanh": "gelu", "quick_gelu": "gelu"}  # one function in mode "hard"
_NOTHING = np.zeros(1, dtype=np.int32)


def forward(function: str, mode: str, given: Table | None) -> Parts:
    """Return the parts of a function; raises TypeError for tables of segments."""
    if mode in ("exact", "fast") and function == "tanh":
        return _tanh, np.concatenate([quartic.begins()[None], quartic.tanh().values()]), ()
    if mode == "fast" and function in ("sigmoid", "silu", "gelu"):
        return _fast, _NOTHING, (function,)
    if mode in ("exact", "fast"):
        tail = arithmetic.tail() if function == "gelu" else _NOTHING
        return (_exact if function in oracle.TABLED else _wide), tail, (function,)
    # the last constant says whether minus infinity gives -0
    limit = function not in ("tanh", "sigmoid")
    if mode == "hard":
        return _hard, _NOTHING, (_HARD.get(function, function), limit)
    table = reference.table_for(function, mode, formats.FP32, given)
    rows, numbers = shift_rows(table or reference.core(formats.FP32, given))
    return (
        (_shift, rows, numbers)
        if table is not None
        else (_derived, rows, (*numbers, "gelu" if function == "gelu_tanh" else function, limit))
    )


def shift_rows(table: Table) -> tuple[npt.NDArray[Any], tuple[int, ...]]:
    """Return the rows (r, base) and the constants of :func:`shift`, and the largest magnitude of a number."""
    if not isinstance(table, ShiftTable):
        raise TypeError(f"the Triton kernels compute shift tables, {table.name!r} is one of form {table.form}")
    fmt = table.fmt
    rows = np.array([(r, (e << fmt.mantissa_bits) + b) for e, r, b in table.rows], dtype=np.int32)
    right = fmt.mantissa_bits - table.index.mantissa_bits
    numbers = (right, table.index.rows - 1, fmt.mantissa_mask, table.identity_below, table.saturate_above)
    return rows, (*numbers, fmt.one, fmt.last)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def shift(u, rows, numbers: tl.constexpr):  # type: ignore[no-untyped-def]
    """K-TanH of a magnitude's bits, in any format."""
    t = (u >> numbers[0]) & numbers[1]
    # y = (E, (M >> r) + b)
    y = ((u & numbers[2]) >> tl.load(rows + 2 * t)) + tl.load(rows + 2 * t + 1)
    y = tl.where(u < numbers[3], u, y)
    return tl.where(u > numbers[4], numbers[5], y)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _shift(bits, rows, numbers: tl.constexpr):  # type: ignore[no-untyped-def]
    u = bits & 0x7FFFFFFF
    return tl.where(u > numbers[6], bits, shift(u, rows, numbers) | (bits ^ u))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _finish(bits, y, limit: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the bits of y; a NaN of the input as it came, and with ``limit`` -0 for minus infinity."""
    result = y.to(tl.int32, bitcast=True)
    if limit:
        result = tl.where(bits == -0x800000, -0x80000000, result)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits, result)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tanh(bits, rows, numbers: tl.constexpr):  # type: ignore[no-untyped-def]
    """See :mod:`rarefy.act.spec.quartic`."""
    u = bits & 0x7FFFFFFF
    a = u.to(tl.float32, bitcast=True)
    a = tl.where(a < _LIMIT, a, _LIMIT)
    row = rows + (((a + 1.0).to(tl.int32, bitcast=True) >> 20) & 31)
    f = a - tl.load(row)
    y = tl.load(row + 160)
    y = tl.fma(y, f, tl.load(row + 128))
    y = tl.fma(y, f, tl.load(row + 96))
    y = tl.fma(y, f, tl.load(row + 64))
    y = tl.fma(y, f, tl.load(row + 32))
    y = ((y.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (bits ^ u)).to(tl.float32, bitcast=True)
    return _finish(bits, y, False)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _exp_parts(a):  # type: ignore[no-untyped-def]
    """e^r - 1 and 2^-n in float64, of which e^-a is made, for a >= 0."""
    a = tl.where(a < 690.0, a, 690.0)
    # e^-a = 2^-n e^r,  n = round(a / log 2), |r| <= log(2) / 2; a sum with 1.5 * 2^52 rounds
    n = (a * _EXP[0] + 6755399441055744.0) - 6755399441055744.0
    r = (n * _EXP[1] - a) + n * _EXP[2]
    p = r * _EXP[3] + _EXP[4]
    for k in tl.static_range(5, 13):
        p = p * r + _EXP[k]
    return p * r, ((1023 - n.to(tl.int64)) << 52).to(tl.float64, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _exp_minus(a):  # type: ignore[no-untyped-def]
    """e^-a in float64, for a >= 0."""
    least, scale = _exp_parts(a)
    return (least + 1.0) * scale


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _log1p(e):  # type: ignore[no-untyped-def]
    """log(1 + e) in float64, for 0 <= e <= 1."""
    s = e / (2.0 + e)
    square = s * s
    p = square * _LOG[0] + _LOG[1]
    for k in tl.static_range(2, 13):
        p = p * square + _LOG[k]
    return s * p


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _round(x, by: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return x by, which is not rounded before, to the nearest whole number: a sum with 1.5 * 2^23 rounds."""
    return tl.fma(x, by, 12582912.0) - 12582912.0


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _power(n, scale: tl.constexpr):  # type: ignore[no-untyped-def]
    """2^(n + scale), a normal number."""
    return ((n.to(tl.int32) + (scale + 127)) << 23).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _horner(x, numbers: tl.constexpr, count: tl.constexpr):  # type: ignore[no-untyped-def]
    s = tl.fma(x, numbers[0], numbers[1])
    for k in tl.static_range(2, count):
        s = tl.fma(s, x, numbers[k])
    return s


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _exponential(z, less, scale: tl.constexpr):  # type: ignore[no-untyped-def]
    """e^(z + less) = power (1 + high + low + square series), power times 2^scale."""
    n = _round(z, _LOG2E)
    high = tl.fma(-n, _LOG2, z)  # not rounded
    low = tl.fma(n, _REST, less)
    r = high + low
    return _power(n, scale), high, low, r * r, _horner(r, _SERIES, 5)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _gate(power, high, low, square, series):  # type: ignore[no-untyped-def]
    """-2^64 / (1 + e^z) = gate (1 + more)."""
    r = tl.fma(square, series, high)
    high = 1.0 + r
    low = ((1.0 - high) + r) + low
    whole = power * high
    large, small = tl.where(whole < _DOWN, _DOWN, whole), tl.where(whole > _DOWN, _DOWN, whole)
    total = large + small
    left = tl.fma(power, low, (large - total) + small)
    gate = tl.div_rn(-1.0, total)
    return gate, tl.fma(gate, left, tl.fma(gate, total, 1.0))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _exact(bits, rows, numbers: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sigmoid, silu and both forms of gelu; see :func:`rarefy.act.kernels.float32.exact`."""
    function: tl.constexpr = numbers[0]
    x = bits.to(tl.float32, bitcast=True)
    if function == "gelu":
        y = _exact_gelu(x, rows)
    elif function == "gelu_tanh":
        inside = tl.where(x < -11.0, -11.0, tl.where(x > 6.0, 6.0, x))
        square = inside * inside
        less = tl.fma(inside, inside, -square)
        factor = tl.fma(square, _CUBE[2], _CUBE[0])
        rest = tl.fma(less, _CUBE[2], tl.fma(square, _CUBE[3], _CUBE[1]))
        more = tl.fma(square, _CUBE[2], _CUBE[0] - factor) + rest
        z = inside * factor
        lost = tl.fma(inside, more, tl.fma(inside, factor, -z))
        power, high, low, squared, series = _exponential(z, lost, -64)
        gate, more = _gate(power, high, low, squared, series)
        y = tl.where(x > 6.0, x, tl.fma(inside, gate, inside * (gate * more)) * -_DOWN)
    else:
        inside = tl.where(x < -120.0, -120.0, tl.where(x > 25.0, 25.0, x))
        power, high, low, squared, series = _exponential(-inside, 0.0, -64)
        gate, more = _gate(power, high, low, squared, series)
        if function == "sigmoid":
            y = tl.fma(gate, more, gate) * -_DOWN
        else:
            y = tl.where(x > 25.0, x, tl.fma(inside, gate, inside * (gate * more)) * -_DOWN)
    return _finish(bits, y, False)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _exact_gelu(x, rows):  # type: ignore[no-untyped-def]
    a = tl.where(tl.abs(x) < _FAR, tl.abs(x), _FAR)
    half = a * -0.5
    z = a * half
    e_power, e_high, e_low, square, series = _exponential(z, tl.fma(a, half, -z), 24)
    # the segment: two for each doubling of a + 1
    row = rows + (((a + 1.0).to(tl.int32, bitcast=True) >> 22) - 254)
    d = a - tl.load(row)
    p = tl.load(row + 72)
    for k in tl.static_range(8, 1, -1):
        p = tl.fma(p, d, tl.load(row + 8 * k))
    begin = tl.load(row + 8)
    t = tl.fma(p, d, begin)
    t_less = tl.fma(-p, d, t - begin)
    high = tl.fma(e_high, t, t)
    lost = tl.fma(-e_high, t, high - t) + tl.fma(e_high, t_less, t_less)
    low = tl.fma(-tl.fma(square, series, e_low), t, lost)
    factor, most = a * e_power, _not_below_zero(x) * 16777216.0
    y = tl.fma(-factor, high, most)
    less = tl.fma(-factor, low, tl.fma(factor, high, y - most))
    return tl.where(x > 14.0, x, (y - less) * (1.0 / 16777216.0))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _not_below_zero(x):  # type: ignore[no-untyped-def]
    """max(x, 0) with the sign of x."""
    return tl.where(x < -1.0, -1.0, x) * tl.where(x > 0.0, 1.0, 0.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _quick_power(a, b):  # type: ignore[no-untyped-def]
    """2^64 2^n and e^r - 1 of e^(a b) = 2^n e^r."""
    n = _round(a * b, _LOG2E)
    r = tl.fma(n, _LOW, tl.fma(a, b, n * -_HIGH))
    return _power(n, 64), tl.fma(r * r, _horner(r, _QUICK, 5), r)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _fast(bits, rows, numbers: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mode "fast" of sigmoid, silu and gelu; see :func:`rarefy.act.kernels.float32.fast`."""
    function: tl.constexpr = numbers[0]
    x = bits.to(tl.float32, bitcast=True)
    if function == "gelu":
        a = tl.where(tl.abs(x) < 14.5, tl.abs(x), 14.5)
        p, q = _horner(a, _P, 5), _horner(a, _Q, 6)
        two, less_one = _quick_power(a, a * -0.5)
        tail = tl.div_rn(two * tl.fma(p, less_one, p), q)
        y = tl.fma(-a, tail, _not_below_zero(x))
    else:
        a = tl.where(tl.abs(x) < 104.0, tl.abs(x), 104.0)
        two, less_one = _quick_power(a, -1.0)
        e = tl.fma(two, less_one, two)
        y = tl.div_rn(tl.where(x < 0.0, e, _UP), _UP + e)
        if function == "silu":
            y = tl.where(x < -200.0, -200.0, x) * y
    return _finish(bits, y, False)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _wide(bits, rows, numbers: tl.constexpr):  # type: ignore[no-untyped-def]
    """quick_gelu, mish, softplus, hardswish, elu and exp, in float64; see :mod:`rarefy.act.kernels.wide`."""
    function: tl.constexpr = numbers[0]
    x = bits.to(tl.float32, bitcast=True)
    x64 = tl.where(x < -1000.0, -1000.0, x).to(tl.float64)
    a = tl.abs(x64)
    if function == "hardswish":
        inner = x64 + 3.0
        y = x64 * tl.where(inner < 0.0, 0.0, tl.where(inner > 6.0, 6.0, inner)) / 6.0
    elif function == "elu":
        least, scale = _exp_parts(a)
        # e^-a - 1 = 2^-n (e^r - 1) + (2^-n - 1)
        y = tl.where(x64 >= 0.0, x64, least * scale + (scale - 1.0))
        y = tl.where(x64 == 0.0, x64, y)
    elif function == "mish":
        # tanh(log(1 + e^x)) = w / (w + 2),  w = e^x (e^x + 2); over e^2x for positive x
        e = _exp_minus(a)
        w = tl.where(x64 >= 0.0, 1.0 + 2.0 * e, e * (e + 2.0))
        y = x64 * (w / (w + 2.0 * tl.where(x64 >= 0.0, e * e, 1.0)))
    elif function == "softplus":
        y = tl.where(x64 < 0.0, 0.0, x64) + _log1p(_exp_minus(a))
    elif function == "exp":
        e = _exp_minus(a)
        y = tl.where(x64 >= 0.0, 1.0 / e, e)
    else:
        z = _SLOPE * x64
        e = _exp_minus(tl.abs(z))
        y = x64 * (tl.where(z < 0.0, e, 1.0) / (1.0 + e))
    return _finish(bits, y.to(tl.float32), False)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _derived(bits, rows, numbers: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mode ``ktanh`` of sigmoid, silu and gelu from a shift table of tanh; see :mod:`rarefy.act.spec.reference`."""
    function: tl.constexpr = numbers[7]
    x = bits.to(tl.float32, bitcast=True)
    h = x * 0.5
    if function == "gelu":
        z = x * (_A + _B * (x * x))
    elif function == "quick_gelu":
        z = 0.851 * x
    else:
        z = h
    t = _shift(z.to(tl.int32, bitcast=True), rows, numbers).to(tl.float32, bitcast=True)
    y = 0.5 + 0.5 * t if function == "sigmoid" else h * (1.0 + t)
    return _finish(bits, y, numbers[8])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _hard(bits, rows, numbers: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mode ``hard``; a NaN, which the choices lose, comes back at the end."""
    function: tl.constexpr = numbers[0]
    x = bits.to(tl.float32, bitcast=True)
    if function == "tanh":
        y = tl.where(x < -1.0, -1.0, tl.where(x > 1.0, 1.0, x))
    else:
        inner = x * 1.702 if function == "gelu" else x
        # relu6(k x + 3) / 6
        inner = inner + 3.0
        gate = tl.div_rn(tl.where(inner < 0.0, 0.0, tl.where(inner > 6.0, 6.0, inner)), 6.0)
        y = gate if function == "sigmoid" else x * gate
    return _finish(bits, y, numbers[1])


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def slope(bits, rows, numbers: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the slopes of :mod:`rarefy.act.gradients` that PyTorch has no operator for."""
    function: tl.constexpr = numbers[0]
    mode: tl.constexpr = numbers[1]
    x = bits.to(tl.float32, bitcast=True)
    if mode == "hard":
        if function == "tanh":
            y = tl.where(tl.abs(x) < 1.0, 1.0, 0.0)
        elif function == "sigmoid":
            y = tl.where(tl.abs(x) < 3.0, 1.0 / 6.0, 0.0)
        else:
            # x (k x + 3) / 6 inside, so (2 k x + 3) / 6
            k: tl.constexpr = 1.0 if function == "silu" else 1.702
            inside = tl.div_rn((2.0 * k) * x + 3.0, 6.0)
            y = tl.where(tl.abs(k * x) < 3.0, inside, tl.where(x > 0.0, 1.0, tl.where(x <= 0.0, 0.0, x)))
    elif function == "hardswish":
        inside = tl.div_rn(2.0 * x + 3.0, 6.0)
        y = tl.where(tl.abs(x) < 3.0, inside, tl.where(x > 0.0, 1.0, 0.0))
    elif function == "elu":
        y = tl.exp(tl.where(x > 0.0, 0.0, x))
    elif function == "exp":
        y = tl.exp(x)
    elif function == "softplus":
        y = _logistic(x)
    elif function == "quick_gelu":
        z = 1.702 * x
        z = tl.where(z < -1e4, -1e4, tl.where(z > 1e4, 1e4, z))  # as in rarefy.act.gradients
        gate = _logistic(z)
        y = gate * (1.0 + z * (1.0 - gate))
    else:
        # sech^2 x = 4 e / (1 + e)^2, e = exp(-2 |x|);  sigmoid(x) sigmoid(-x) = e / (1 + e)^2, e = exp(-|x|)
        e = tl.exp(tl.abs(x) * (-2.0 if function == "tanh" else -1.0))
        w = 1.0 + e
        y = tl.div_rn((4.0 if function == "tanh" else 1.0) * e, w * w)
    return y


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _logistic(x):  # type: ignore[no-untyped-def]
    """The logistic function, which does not lose what is small."""
    e = tl.exp(-tl.abs(x))
    return tl.div_rn(tl.where(x < 0.0, e, 1.0), 1.0 + e)
