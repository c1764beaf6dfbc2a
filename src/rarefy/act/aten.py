"""The same bits in plain PyTorch operators: for other devices, for torch.compile to fuse, without a native library.

A function of at most 16 bits is one gather from its 2^16 or 2^8 answers, or, on devices where arithmetic is cheap, the
integer operations of its ``linear`` or ``shift`` table. float32 is arithmetic that rounds as the reference does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from rarefy.act import formats, spec
from rarefy.act.formats import Format
from rarefy.act.quartic import LIMIT, begins
from rarefy.act.quartic import tanh as quartic_tanh
from rarefy.act.table import BitIndex, MultiplyIndex, Table, load

FORMAT_OF = {
    torch.bfloat16: formats.BF16,
    torch.float16: formats.FP16,
    torch.float32: formats.FP32,
    torch.float8_e4m3fn: formats.E4M3,
    torch.float8_e5m2: formats.E5M2,
}
_INTEGER = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


@lru_cache(maxsize=64)
def given_table(text: str) -> Table | None:
    """The table of an operator's ``table`` argument: "" for the default, a shipped table's name, or JSON."""
    if not text:
        return None
    return Table.from_json(text) if text.startswith("{") else load(text)


def activation(x: Tensor, function: str, mode: str, table: str = "", arithmetic: bool | None = None) -> Tensor:
    """``function`` of every element in plain PyTorch operators, without a gradient.

    ``arithmetic`` computes 16-bit ``linear`` and ``shift`` tables instead of looking all answers up; the default does
    so except on the CPU, where Inductor makes the faster code of the gather.
    """
    fmt = FORMAT_OF[x.dtype]
    if fmt.bits == 32:
        return _float32(x, function, mode, table)
    bits = x.view(_INTEGER[fmt.bits]).to(torch.int32)
    compute = arithmetic if arithmetic is not None else x.device.type != "cpu"
    plan = _plan(function, mode, fmt.name, table) if compute else "answers"
    if plan == "linear":
        return _linear16(x, bits, function, mode, table)
    if plan == "shift":
        return _shift(x, bits, function, mode, table)
    answers: Tensor = _constant("answers", function, mode, fmt.name, table, str(x.device))
    result = answers[bits & ((1 << fmt.bits) - 1)]
    return result.view(x.dtype)


@torch.compiler.assume_constant_result
def _plan(function: str, mode: str, fmt: str, table: str) -> str:
    """How the table is computed here: its form where arithmetic is cheap, else "answers"."""
    f = formats.get(fmt)
    direct = spec.table_for(function, mode, f, given_table(table))
    if direct is not None and direct.form == "linear" and direct.symmetry == "odd":
        return "linear"
    if direct is not None and direct.form in ("shift", "carry"):
        return "shift"
    if direct is not None and f.bits == 32:
        return "segments"
    return "answers"


class _Tensors:
    """The tensors of the tables as attributes: what torch.compile can read anew while it traces."""


_TENSORS = _Tensors()


def _constant(what: str, function: str, mode: str, fmt: str, table: str, device: str) -> Tensor:
    """A tensor of the tables, made once for each device."""
    tensor: Tensor = getattr(_TENSORS, _attribute(what, function, mode, fmt, table, device))
    return tensor


_names: dict[tuple[str, ...], str] = {}


@torch.compiler.assume_constant_result
def _attribute(*key: str) -> str:
    if key not in _names:
        _names[key] = f"tensor{len(_names)}"
        setattr(_TENSORS, _names[key], _made(*key))
    return _names[key]


@torch.compiler.assume_constant_result
def _numbers(function: str, mode: str, fmt: str, table: str) -> tuple[int, ...]:
    """The header of a linear or shift table."""
    direct = _direct(function, mode, fmt, table)
    i = direct.index
    if isinstance(i, MultiplyIndex):
        return i.start, i.length, i.factor, direct.fraction_bits, direct.offset, direct.identity_below
    if not isinstance(i, BitIndex):
        return direct.fraction_bits, int(direct.symmetry == "odd")
    f = formats.get(fmt)
    return f.mantissa_bits - i.mantissa_bits, i.rows - 1, direct.identity_below, direct.saturate_above


def _direct(function: str, mode: str, fmt: str, table: str) -> Table:
    direct = spec.table_for(function, mode, formats.get(fmt), given_table(table))
    assert direct is not None
    return direct


def _made(what: str, function: str, mode: str, fmt: str, table: str, device: str) -> Tensor:
    f = formats.get(fmt)
    if what == "answers":
        values = spec.answers(function, mode, f, given_table(table))
        array = values.view(np.int16 if f.bits == 16 else np.uint8).copy()
    elif what == "quartic":
        array = np.concatenate([begins()[None], quartic_tanh().values()])
    else:
        direct = _direct(function, mode, fmt, table)
        columns = np.array(direct.rows, dtype=np.int64)
        if direct.form in ("shift", "carry"):  # (r, base)
            columns = np.stack([columns[:, 1], (columns[:, 0] << f.mantissa_bits) + columns[:, 2]], axis=1)
        # sums of segments in float32 need more than 32 bits
        array = columns.T.astype(np.int64 if direct.form == "segments" else np.int32)
    # A mode of PyTorch that is active while a graph is traced must not see this: the result outlives the trace.
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _finish(x: Tensor, bits: Tensor, u: Tensor, y: Tensor, fmt: Format) -> Tensor:
    """Sign of the input, NaN as it came."""
    y = torch.where(u > fmt.last, bits, y | (bits & -fmt.sign))
    return y.to(_INTEGER[fmt.bits]).view(x.dtype)


def _linear16(x: Tensor, bits: Tensor, function: str, mode: str, table: str) -> Tensor:
    fmt = FORMAT_OF[x.dtype]
    start, length, factor, fraction, offset, identity = _numbers(function, mode, fmt.name, table)
    slope, base = _constant("rows", function, mode, fmt.name, table, str(x.device)).unbind(0)
    u = bits & (fmt.sign - 1)
    d = (u - start).clamp(0, length)
    t = (d * factor) >> 16
    # y = offset + (B + S d mod 2^16) / 2^f
    y = offset + (((base[t] + slope[t] * d) & 0xFFFF) >> fraction)
    return _finish(x, bits, u, torch.where(u < identity, u, y), fmt)


def _shift(x: Tensor, bits: Tensor, function: str, mode: str, table: str) -> Tensor:
    fmt = FORMAT_OF[x.dtype]
    right, mask, identity, saturate = _numbers(function, mode, fmt.name, table)
    shift, base = _constant("rows", function, mode, fmt.name, table, str(x.device)).unbind(0)
    u = bits & (fmt.sign - 1)
    t = (u >> right) & mask
    # y = (E, (M >> r) + b)
    y = ((u & fmt.mantissa_mask) >> shift[t]) + base[t]
    y = torch.where(u < identity, u, y)
    return _finish(x, bits, u, torch.where(u > saturate, fmt.one, y), fmt)


def _segments32(x: Tensor, function: str, mode: str, table: str) -> Tensor:
    fmt = FORMAT_OF[x.dtype]
    fraction, odd = _numbers(function, mode, fmt.name, table)
    first, slope, base = _constant("rows", function, mode, fmt.name, table, str(x.device)).unbind(0)
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    magnitude = bits & (fmt.sign - 1)
    u = magnitude if odd else bits
    t = torch.searchsorted(first, u, right=True) - 1
    # y = (B + S d) / 2^f
    y = (base[t] + slope[t] * (u - first[t])) >> fraction
    y = torch.where(magnitude > fmt.last, bits, y | (bits & fmt.sign) if odd else y)
    return torch.where(y >= fmt.sign, y - (fmt.sign << 1), y).to(torch.int32).view(x.dtype)


def _float32(x: Tensor, function: str, mode: str, table: str) -> Tensor:
    if mode == "exact":
        return _exact_tanh32(x, table) if function == "tanh" else _double(x, function)
    if mode == "hard":
        return hard32(x, function)
    plan = _plan(function, mode, "fp32", table)
    if plan == "shift":
        return _shift(x, x.view(torch.int32), function, mode, table)
    if plan == "segments":
        return _segments32(x, function, mode, table)
    return derived32(x, function, lambda z: _float32(z, "tanh", mode, table))


def derived32(x: Tensor, function: str, tanh: Callable[[Tensor], Tensor]) -> Tensor:
    """Mode ``ktanh`` of sigmoid, silu and gelu in float32 from a tanh; see :mod:`rarefy.act.spec`."""
    h = x * 0.5
    if function == "sigmoid":
        return 0.5 + 0.5 * tanh(h)
    z = h if function == "silu" else x * (spec.GELU_A + spec.GELU_B * (x * x))
    return _limit(x, h * (1.0 + tanh(z)))


def hard32(x: Tensor, function: str) -> Tensor:
    """Mode ``hard`` in float32; see :mod:`rarefy.act.spec`."""
    if function == "tanh":
        return x.clamp(-1.0, 1.0)
    if function == "sigmoid":
        return (x + 3.0).clamp(0.0, 6.0) / 6.0
    inner = x if function == "silu" else 1.702 * x
    return _limit(x, x * ((inner + 3.0).clamp(0.0, 6.0) / 6.0))


def _limit(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x == -math.inf, -0.0, y)


def _double(x: Tensor, function: str) -> Tensor:
    """Mode ``exact`` of sigmoid, silu and gelu in float32: computed in float64, rounded once more."""
    wide = x.double()
    if function == "sigmoid":
        return torch.sigmoid(wide).float()
    if function == "silu":
        gate = torch.sigmoid(wide)
    elif function == "gelu":
        gate = 0.5 * torch.special.erfc(wide * -math.sqrt(0.5))
    else:
        gate = torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (wide + 0.044715 * wide**3))
    return _limit(x, (wide * gate).float())


def _exact_tanh32(x: Tensor, table: str) -> Tensor:
    rows = _constant("quartic", "tanh", "exact", "fp32", table, str(x.device))
    # the clamp keeps NaN; its row is any
    a = x.abs().clamp(max=LIMIT)
    row = ((a + 1.0).view(torch.int32) >> 20) & 31
    f = a - rows[0][row]
    y = rows[5][row]
    for k in (4, 3, 2, 1):
        y = _fused(y, f, rows[k][row])
    return torch.copysign(y, x)


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The float32 nearest to ``a * b + c``; see :func:`rarefy.act.quartic.fused`."""
    p, d = a.double() * b.double(), c.double()
    s = p + d
    back = s - p
    error = (p - (s - back)) + (d - back)
    bits = s.view(torch.int64)
    step = torch.where((error > 0) == (s > 0), 1, -1)
    odd = torch.where((error != 0) & ((bits & 1) == 0), bits + step, bits)
    return odd.view(torch.float64).float()
