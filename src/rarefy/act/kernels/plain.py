"""The functions without a view of a float's bits, which ONNX has not: bits are found by arithmetic in float64.

This is the decomposition of the operator ``rarefy::activation``. It has the results of
:mod:`rarefy.act.kernels.aten`, but that a NaN becomes the quiet one, and no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rarefy.act.kernels import aten
from rarefy.act.kernels.aten import FORMAT_OF
from rarefy.act.spec import formats


def activation(x: Tensor, function: str, mode: str, table: str = "") -> Tensor:
    """Compute ``function`` of every element: a gather from the answers of a short format, arithmetic in float32."""
    fmt = FORMAT_OF[x.dtype]
    if fmt.bits > 16:
        return aten.keep_nan(x, _float32(x, function, mode, table))
    wide = x.double()
    quiet = fmt.last | 1 << (fmt.mantissa_bits - 1) if fmt.infinities else fmt.sign - 1
    bits = _magnitude(wide, fmt.name) + torch.where(_negative(wide), float(fmt.sign), 0.0)
    bits = torch.where(aten.is_number(wide), bits, float(quiet))
    values: Tensor = aten.constant("values", function, mode, fmt.name, table, str(x.device))
    return values[bits.long()]


def _float32(x: Tensor, function: str, mode: str, table: str) -> Tensor:
    plan = aten.plan(function, mode, "fp32", table)
    if plan == "shift":
        return _shift(x, function, mode, table)
    if plan == "segments":
        return _segments(x, function, mode, table)
    if function == "tanh" and mode in ("exact", "fast"):
        return aten.tanh32(x) * torch.where(_negative(x), -1.0, 1.0)
    if mode in ("exact", "fast") and function not in (
        "sigmoid",
        "softplus",
        "exp",
    ):  # of the sign of x; a choice may lose that of 0
        return aten.float32(x, function, mode, table).abs() * torch.where(_negative(x), -1.0, 1.0)
    if mode == "ktanh":
        return aten.derived32(x, function, lambda z: _float32(z, "tanh", mode, table))
    return aten.float32(x, function, mode, table)


def _negative(x: Tensor) -> Tensor:
    """Tell whether the sign bit is set, that of zero too; of NaN it is no matter."""
    return (x < 0) | (1.0 / x < 0)


def _magnitude(wide: Tensor, fmt: str) -> Tensor:
    """Return the bits without the sign of numbers in float64, as whole numbers in float64; those of NaN are any."""
    f = formats.get(fmt)
    scales: Tensor = aten.constant("scales", "", "", fmt, "", str(wide.device))  # 2^(m - e), from the smallest e up
    least, most = 1 - f.bias, (f.last >> f.mantissa_bits) - f.bias
    # exporters write constants as float32, where 2^128 is infinite
    infinite = wide.abs() == math.inf
    a = torch.where(aten.is_number(wide) & ~infinite, wide.abs(), 0.0)
    e = torch.floor(torch.log2(a.clamp(min=2.0**least))).clamp(min=least, max=most)
    # a logarithm may be on the wrong side of a whole number
    leading = a * scales[(e - least).long()]
    e = e + torch.where(
        leading >= 2.0 ** (f.mantissa_bits + 1), 1.0, torch.where(leading < 2.0**f.mantissa_bits, -1.0, 0.0)
    )
    e = e.clamp(min=least, max=most)
    # a normal number's M holds the implicit bit, which is one step of the exponent field
    u = (e - least) * 2.0**f.mantissa_bits + a * scales[(e - least).long()]
    return torch.where(infinite, float(f.last), u) if f.infinities else u


def _value32(magnitude: Tensor, negative: Tensor) -> Tensor:
    """Return the float32 numbers of magnitude bits, whole numbers in float64."""
    f = formats.FP32
    scales: Tensor = aten.constant("scales", "", "", f.name, "", str(magnitude.device))
    field = torch.floor(magnitude * 2.0**-f.mantissa_bits)
    mantissa = magnitude - field * 2.0**f.mantissa_bits
    normal = torch.where(field > 0, 1.0, 0.0)
    value = (mantissa + normal * 2.0**f.mantissa_bits) / scales[(field - normal).long()]
    result: Tensor = (value * torch.where(negative, -1.0, 1.0)).float()
    return result


def _shift(x: Tensor, function: str, mode: str, table: str) -> Tensor:
    f = formats.FP32
    right, mask, identity, saturate = aten.numbers(function, mode, f.name, table)
    factor, base = aten.constant("factors", function, mode, f.name, table, str(x.device)).unbind(0)
    wide = x.double()
    u = _magnitude(wide, f.name)
    chunk = torch.floor(u * 2.0**-right)
    t = (chunk - torch.floor(chunk / (mask + 1)) * (mask + 1)).long()
    mantissa = u - torch.floor(u * 2.0**-f.mantissa_bits) * 2.0**f.mantissa_bits
    # y = (E, (M >> r) + b)
    y = torch.floor(mantissa * factor[t]) + base[t]
    y = torch.where(u < identity, u, y)
    return _value32(torch.where(u > saturate, float(f.one), y), _negative(wide))


def _segments(x: Tensor, function: str, mode: str, table: str) -> Tensor:
    f = formats.FP32
    fraction, odd = aten.numbers(function, mode, f.name, table)
    first, slope, base = aten.constant("rows", function, mode, f.name, table, str(x.device)).unbind(0)
    wide = x.double()
    negative = _negative(wide)
    u = _magnitude(wide, f.name)
    if not odd:
        u = torch.where(negative, u + f.sign, u)
    t = (u.unsqueeze(-1) >= first.double()).sum(-1) - 1
    d = u.long() - first[t]
    # y = (B + S d) / 2^f; sums need more bits than float64 has, which may round one up to the next y
    total = base[t] + slope[t] * d
    y = torch.floor(total.double() * 2.0**-fraction)
    y = y - torch.where(y.long() * (1 << fraction) > total, 1.0, 0.0)
    if not odd:
        negative = y >= f.sign
        y = torch.where(negative, y - f.sign, y)
    return _value32(y, negative)
