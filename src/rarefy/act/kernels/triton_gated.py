"""Triton kernels of the gated units, forward and backward in one pass each: the arithmetic of :mod:`rarefy.act.gated`.

A row is a run of values without gaps. Tensors that have none at all are one row of any length; else a row's length and
the strides are multiples of 16, so that 16 bytes move at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from rarefy.act.kernels import slopes, triton_float32
from rarefy.act.kernels.aten import FORMAT_OF
from rarefy.act.kernels.gpu import Kernel
from rarefy.act.kernels.triton import decode, encode, lookup, on, parts

_A, _B = tl.constexpr(slopes.A), tl.constexpr(slopes.B)
_EXP, _TAIL = tl.constexpr(slopes.EXP), tl.constexpr(slopes.TAIL)
_SIZES = ["columns", "gate_stride", "up_stride", "of_gate_stride", "of_up_stride"]


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _place(columns, many: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row of this program, its values, which of them are there, and whether all are."""
    per_row = tl.cdiv(columns, block)
    row = tl.program_id(0).to(tl.int64) // per_row
    start = (tl.program_id(0).to(tl.int64) - row * per_row) * block
    if many:
        columns = tl.multiple_of(columns, 16)
    at = start + tl.arange(0, block)
    return row, at, at < columns, start + block <= columns


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator, unused-ignore]
def _forward_kernel(  # type: ignore[no-untyped-def]
    gate, up, y, rows,
    columns: tl.int64, gate_stride: tl.int64, up_stride: tl.int64,
    compute: tl.constexpr, numbers: tl.constexpr, name: tl.constexpr, many: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Y = act(gate) * up, with act rounded to the format, and the product."""
    row, at, inside, whole = _place(columns, many, block)
    if many:
        gate += tl.multiple_of(row * gate_stride, 16)
        up += tl.multiple_of(row * up_stride, 16)
        y += tl.multiple_of(row * columns, 16)
    if whole:
        h = decode(compute(tl.load(gate + at), rows, numbers), name)
        tl.store(y + at, encode(h * decode(tl.load(up + at), name), name))
    else:
        h = decode(compute(tl.load(gate + at, inside, 0), rows, numbers), name)
        tl.store(y + at, encode(h * decode(tl.load(up + at, inside, 0), name), name), inside)


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator, unused-ignore]
def _backward_kernel(  # type: ignore[no-untyped-def]
    upstream, gate, up, of_gate, of_up, rows, slope_rows,
    columns: tl.int64, gate_stride: tl.int64, up_stride: tl.int64, of_gate_stride: tl.int64, of_up_stride: tl.int64,
    compute: tl.constexpr, numbers: tl.constexpr, derivative: tl.constexpr, slope_numbers: tl.constexpr,
    name: tl.constexpr, many: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """D gate = (dy * up) * act'(gate), d up = dy * act(gate)."""
    row, at, inside, whole = _place(columns, many, block)
    if many:
        upstream += tl.multiple_of(row * columns, 16)
        gate += tl.multiple_of(row * gate_stride, 16)
        up += tl.multiple_of(row * up_stride, 16)
        of_gate += tl.multiple_of(row * of_gate_stride, 16)
        of_up += tl.multiple_of(row * of_up_stride, 16)
    if whole:
        dy, x = decode(tl.load(upstream + at), name), tl.load(gate + at)
        by = dy * decode(tl.load(up + at), name)
        tl.store(of_gate + at, encode(by * derivative(x, slope_rows, slope_numbers), name))
        tl.store(of_up + at, encode(dy * decode(compute(x, rows, numbers), name), name))
    else:
        dy, x = decode(tl.load(upstream + at, inside, 0), name), tl.load(gate + at, inside, 0)
        by = dy * decode(tl.load(up + at, inside, 0), name)
        tl.store(of_gate + at, encode(by * derivative(x, slope_rows, slope_numbers), name), inside)
        tl.store(of_up + at, encode(dy * decode(compute(x, rows, numbers), name), name), inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _clamp(x, limit: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return x within +-limit; a NaN stays."""
    return tl.where(x < -limit, -limit, tl.where(x > limit, limit, x))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _exp_minus(a):  # type: ignore[no-untyped-def]
    """e^-a in float32, for 0 <= a < 88; a sum with 1.5 * 2^23 rounds."""
    n = (tl.where(a < 88.0, a, 0.0) * 1.44269504 + 12582912.0) - 12582912.0
    r = (n * 0.693359375 - a) - n * 2.12194440e-4
    p = r * _EXP[0] + _EXP[1]
    for k in tl.static_range(2, 6):
        p = p * r + _EXP[k]
    return (p * (r * r) + r + 1.0) * ((127 - n.to(tl.int32)) << 23).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _slope32(bits, rows, numbers: tl.constexpr):  # type: ignore[no-untyped-def]
    """See :func:`rarefy.act.kernels.slopes.slopes`."""
    function: tl.constexpr = numbers[0]
    x = bits.to(tl.float32, bitcast=True)
    if function == "gelu":
        x = _clamp(x, 13.0)
        a = tl.abs(x)
        phi = _exp_minus(0.5 * (a * a)) * 0.3989422804
        t = tl.div_rn(1.0, 1.0 + 0.2316419 * a)
        p = t * _TAIL[0] + _TAIL[1]
        for k in tl.static_range(2, 5):
            p = p * t + _TAIL[k]
        tail = phi * (p * t)
        y = tl.where(x < 0.0, tail, 1.0 - tail) + x * phi
    else:
        if function == "gelu_tanh":
            x = _clamp(x, 10.0)
            z = x * ((x * x) * _B + _A)
        else:
            x = _clamp(x, 87.0)
            z = x
        e = _exp_minus(tl.abs(z))
        large = tl.div_rn(1.0, 1.0 + e)
        small = e * large
        bend = x * (large * small)
        if function == "gelu_tanh":
            bend = bend * ((x * x) * (3.0 * _B) + _A)
        y = tl.where(z < 0.0, small, large) + bend
    return y


def forward(
    function: str, mode: str, dtype: torch.dtype, table: str, device: torch.device, many: bool
) -> Kernel | None:
    """Return the kernel ``(gate, up, y)`` for one row or for ``many``; None where the activation has none."""
    found = parts(function, mode, dtype, table)
    if found is None:
        return None
    compute, rows, numbers = found
    return Kernel(_forward_kernel, dtype, device, (on(rows, device),), (compute, numbers, FORMAT_OF[dtype].name, many))


def backward(
    function: str, mode: str, dtype: torch.dtype, table: str, device: torch.device, many: bool
) -> Kernel | None:
    """Return the kernel ``(upstream, gate, up, of_gate, of_up)`` for one row or for ``many``, or None."""
    found = parts(function, mode, dtype, table)
    if found is None:
        return None
    compute, rows, numbers = found
    fmt = FORMAT_OF[dtype]
    derivative: Any = lookup
    constants: tuple[Any, ...] = ((1 << fmt.bits) - 1,)
    values = torch.from_numpy(np.zeros(1, dtype=np.float32))
    if fmt.bits == 16:
        values = slopes.lookup(function, "hard" if mode == "hard" else "exact", fmt.name)
    elif mode == "hard":
        derivative, constants = triton_float32.slope, (function, mode)
    else:
        derivative, constants = _slope32, (function,)
    tables = (on(rows, device), values.to(device))
    return Kernel(_backward_kernel, dtype, device, tables, (compute, numbers, derivative, constants, fmt.name, many))
