"""Triton kernels of the functions and their gradients, the same bits as everywhere.

A function of a format of at most 16 bits is a lookup of its answers, and its gradient of the slopes: they stay in the
cache, where reading them is faster than the integer operations of K-TanH. float32 computes:
:mod:`rarefy.act.kernels.triton_float32`. Needs the package ``triton``, and a GPU or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from rarefy.act import gradients
from rarefy.act.kernels import triton_float32
from rarefy.act.kernels.aten import FORMAT_OF, given_table
from rarefy.act.kernels.gpu import Kernel
from rarefy.act.spec import reference, subnormals
from rarefy.act.spec.table import ShiftTable

#: The bits that this version of PyTorch makes of a number too large for float8_e4m3fn: 448, or NaN.
_OVER = tl.constexpr(int(torch.tensor(1e6, device="cpu").to(torch.float8_e4m3fn).view(torch.uint8)))


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator, unused-ignore]
def _map_kernel(  # type: ignore[no-untyped-def]
    x_pointer, y_pointer, rows, n: tl.int64, compute: tl.constexpr, numbers: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """Compute y = compute(x) on bits; all blocks but the last have no mask, so that they move 16 bytes at a time."""
    start = tl.program_id(0).to(tl.int64) * block
    at = tl.arange(0, block)
    if start + block <= n:
        tl.store(y_pointer + start + at, compute(tl.load(x_pointer + start + at), rows, numbers))
    else:
        inside = at < n - start
        y = compute(tl.load(x_pointer + start + at, inside, 0), rows, numbers)
        tl.store(y_pointer + start + at, y, inside)


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator, unused-ignore]
def _gradient_kernel(  # type: ignore[no-untyped-def]
    upstream, saved, y_pointer, rows, n: tl.int64,
    derivative: tl.constexpr, numbers: tl.constexpr, name: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Compute y = upstream * derivative(saved), in float32 and rounded once; masks as in :func:`_map_kernel`."""
    start = tl.program_id(0).to(tl.int64) * block
    at = tl.arange(0, block)
    if start + block <= n:
        y = decode(tl.load(upstream + start + at), name) * derivative(tl.load(saved + start + at), rows, numbers)
        tl.store(y_pointer + start + at, encode(y, name))
    else:
        inside = at < n - start
        x = tl.load(saved + start + at, inside, 0)
        y = decode(tl.load(upstream + start + at, inside, 0), name) * derivative(x, rows, numbers)
        tl.store(y_pointer + start + at, encode(y, name), inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def lookup(bits, rows, numbers: tl.constexpr):  # type: ignore[no-untyped-def]
    """Look up what belongs to a short format's bits."""
    return tl.load(rows + (bits.to(tl.int32) & numbers[0]))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def decode(bits, name: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the numbers of bits as float32; 8-bit formats by way of the float16 that has their bits on top."""
    if name == "fp32":
        x = bits.to(tl.float32, bitcast=True)
    elif name == "bf16":
        x = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif name == "fp16":
        x = bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif name == "e5m2":
        x = (bits.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        wide = bits.to(tl.int16)
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
        x = tl.where((wide & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    return x


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def encode(y, name: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the bits of float32 numbers in a format, rounded to nearest even; too large ones as PyTorch has them.

    Conversions to bf16 and to 8 bits are not Triton's, which are not the same on all devices.
    """
    if name == "fp32":
        bits = y.to(tl.int32, bitcast=True)
    elif name == "bf16":
        wide = y.to(tl.int32, bitcast=True)
        rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
        bits = tl.where((wide & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)
    elif name == "fp16":
        bits = y.to(tl.float16).to(tl.int16, bitcast=True)
    elif name == "e5m2":
        bits = _encode8(y, 2, 15, 0x7C)
    else:
        bits = _encode8(y, 3, 7, _OVER)
    return bits


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _encode8(y, mantissa: tl.constexpr, bias: tl.constexpr, over: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the bits of an 8-bit format; ``over`` are those of what is too large."""
    wide = y.to(tl.int32, bitcast=True)
    u = wide & 0x7FFFFFFF
    cut: tl.constexpr = 23 - mantissa
    normal = ((u + ((u >> cut) & 1) + ((1 << (cut - 1)) - 1)) >> cut) - ((127 - bias) << mantissa)
    # a sum with 2^(24 - bias - mantissa) leaves a subnormal's bits last, rounded
    magic: tl.constexpr = (127 + 24 - bias - mantissa) << 23
    sum = u.to(tl.float32, bitcast=True) + tl.full(u.shape, magic, tl.int32).to(tl.float32, bitcast=True)
    small = sum.to(tl.int32, bitcast=True) - magic
    result = tl.where(u < ((128 - bias) << 23), small, tl.minimum(normal, over))
    result = tl.where(u > 0x7F800000, 0x7F, result)
    return (result | ((wide >> 24) & 0x80)).to(tl.uint8)


def parts(function: str, mode: str, dtype: torch.dtype, table: str) -> triton_float32.Parts | None:
    """Return what computes a function on bits; None for float32 tables of segments, which no kernel reads."""
    fmt, given = FORMAT_OF[dtype], given_table(table)
    if fmt.bits == 32:
        direct = reference.table_for(function, mode, fmt, given)
        if mode == "ktanh" and not isinstance(direct or reference.core(fmt, given), ShiftTable):
            return None
        return triton_float32.forward(function, mode, given)
    answers = reference.answers(function, mode, fmt, given).view(np.int16 if fmt.bits == 16 else np.uint8).copy()
    return lookup, answers, ((1 << fmt.bits) - 1,)


def forward(function: str, mode: str, dtype: torch.dtype, table: str, device: torch.device) -> Kernel | None:
    """Return the kernel ``(x, y)`` of a function, or None as :func:`parts`."""
    found = parts(function, mode, dtype, table)
    if found is None:
        return None
    compute, rows, numbers = found
    return Kernel(_map_kernel, dtype, device, (on(rows, device),), (compute, numbers))


def backward(function: str, mode: str, grad: str, dtype: torch.dtype, device: torch.device) -> Kernel:
    """Return the kernel ``(upstream, saved, y)`` of a gradient."""
    fmt = FORMAT_OF[dtype]
    if fmt.bits == 32:
        constants = (triton_float32.slope, (function, mode), fmt.name)
        return Kernel(_gradient_kernel, dtype, device, (on(np.zeros(1, dtype=np.float32), device),), constants)
    with subnormals.kept():
        saved = torch.from_numpy(fmt.decode(fmt.all_bits()).astype(np.float32))
        slopes = gradients.backward(torch.ones_like(saved), saved, function, mode, grad)
    return Kernel(_gradient_kernel, dtype, device, (slopes.to(device),), (lookup, ((1 << fmt.bits) - 1,), fmt.name))


def on(rows: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return a table on a device; all there when this returns."""
    return torch.from_numpy(np.ascontiguousarray(rows)).to(device)


def probe(device: torch.device) -> None:
    """Compile and launch the smallest kernel; raises what Triton raises where it cannot."""
    x = torch.zeros(1, dtype=torch.uint8, device=device)
    Kernel(_map_kernel, x.dtype, device, (x,), (lookup, (0,)))(x, torch.empty_like(x))
