"""Triton kernels of the 16-bit functions: integer operations on the tables, the same bits as everywhere.

``tanh`` exact in bf16 (64 lines) and K-TanH (32 rows of shifts) in bf16 and fp16 compute; every other function of a
format of at most 16 bits is a lookup of its answers, which stay in the cache. Needs the package ``triton``, and a GPU
or ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from rarefy.act.kernels.aten import FORMAT_OF, given_table
from rarefy.act.spec import reference
from rarefy.act.spec.table import LinearTable, ShiftTable

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _linear_kernel(  # type: ignore[no-untyped-def]
    x_pointer,
    y_pointer,
    rows_pointer,
    n,
    start: tl.constexpr,
    length: tl.constexpr,
    factor: tl.constexpr,
    fraction: tl.constexpr,
    offset: tl.constexpr,
    identity: tl.constexpr,
    last: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_pointer + at, mask=at < n, other=0).to(tl.int32) & 0xFFFF
    u = x & 0x7FFF
    d = tl.minimum(tl.maximum(u - start, 0), length)
    t = (d * factor) >> 16
    slope = tl.load(rows_pointer + 2 * t)
    base = tl.load(rows_pointer + 2 * t + 1)
    # y = offset + (B + S d mod 2^16) / 2^f
    y = offset + (((base + slope * d) & 0xFFFF) >> fraction)
    y = tl.where(u < identity, u, y) | (x & 0x8000)
    tl.store(y_pointer + at, tl.where(u > last, x, y).to(tl.int16), mask=at < n)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _shift_kernel(  # type: ignore[no-untyped-def]
    x_pointer,
    y_pointer,
    rows_pointer,
    n,
    right: tl.constexpr,
    row_mask: tl.constexpr,
    mantissa: tl.constexpr,
    identity: tl.constexpr,
    saturate: tl.constexpr,
    one: tl.constexpr,
    last: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_pointer + at, mask=at < n, other=0).to(tl.int32) & 0xFFFF
    u = x & 0x7FFF
    t = (u >> right) & row_mask
    # y = (E, (M >> r) + b)
    y = ((u & mantissa) >> tl.load(rows_pointer + 2 * t)) + tl.load(rows_pointer + 2 * t + 1)
    y = tl.where(u < identity, u, y)
    y = tl.where(u > saturate, one, y) | (x & 0x8000)
    tl.store(y_pointer + at, tl.where(u > last, x, y).to(tl.int16), mask=at < n)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _lookup_kernel(x_pointer, y_pointer, answers_pointer, n, mask: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * block + tl.arange(0, block)
    x = tl.load(x_pointer + at, mask=at < n, other=0).to(tl.int32) & mask
    tl.store(y_pointer + at, tl.load(answers_pointer + x), mask=at < n)


_tables: dict[tuple[str, str, str, str, str], tuple[Any, tuple[int, ...], Tensor]] = {}


def _plan(function: str, mode: str, dtype: torch.dtype, table: str, device: str) -> tuple[Any, tuple[int, ...], Tensor]:
    """Return the kernel, its constants and its table on the device."""
    fmt = FORMAT_OF[dtype]
    if fmt.bits > 16:
        raise TypeError(f"the Triton kernels take formats of at most 16 bits, got {fmt.name}")
    key = (function, mode, fmt.name, table, device)
    if key not in _tables:
        given = given_table(table)
        direct = reference.table_for(function, mode, fmt, given)
        kernel: Any = _lookup_kernel
        constants: tuple[int, ...] = ((1 << fmt.bits) - 1,)
        values: npt.NDArray[Any] | None = None
        if isinstance(direct, LinearTable) and direct.symmetry == "odd":
            i = direct.index
            kernel, values = _linear_kernel, np.array(direct.rows, dtype=np.int32)
            constants = (i.start, i.length, i.factor, direct.fraction_bits, direct.offset)
            constants += (direct.identity_below, fmt.last)
        elif isinstance(direct, ShiftTable) and fmt.bits == 16:
            right, m = fmt.mantissa_bits - direct.index.mantissa_bits, fmt.mantissa_bits
            kernel, values = _shift_kernel, np.array([(r, (e << m) + b) for e, r, b in direct.rows], dtype=np.int32)
            constants = (right, direct.index.rows - 1, fmt.mantissa_mask, direct.identity_below)
            constants += (direct.saturate_above, fmt.one, fmt.last)
        if values is None:
            answers = reference.answers(function, mode, fmt, given)
            values = answers.view(np.int16 if fmt.bits == 16 else np.uint8).copy()
        _tables[key] = kernel, constants, torch.from_numpy(values).to(device)
    return _tables[key]


def activation(x: Tensor, function: str, mode: str = "exact", table: str = "") -> Tensor:
    """Compute ``function`` ("tanh", "sigmoid", "silu", "gelu", "gelu_tanh") of every element, in bf16, fp16 or fp8.

    Same arguments and same bits as the operator ``rarefy::activation``; no gradient. Raises TypeError for float32.
    """
    kernel, constants, values = _plan(function, mode, x.dtype, table, str(x.device))
    x = x.contiguous()
    y = torch.empty_like(x)
    integer = torch.int16 if x.element_size() == 2 else torch.uint8
    n = x.numel()
    if n:
        grid = (triton.cdiv(n, BLOCK),)
        kernel[grid](x.view(integer), y.view(integer), values, n, *constants, BLOCK)
    return y
