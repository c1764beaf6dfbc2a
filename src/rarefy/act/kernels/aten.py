"""The same bits in plain PyTorch operators: for other devices, for torch.compile to fuse, without a native library.

A function of at most 16 bits is one gather from its 2^16 or 2^8 answers, or, on devices where arithmetic is cheap, the
integer operations of its ``linear`` or ``shift`` table. float32 is arithmetic that rounds as the reference does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rarefy.act.kernels import float32 as arithmetic
from rarefy.act.kernels import gpu
from rarefy.act.kernels import wide as doubles
from rarefy.act.spec import formats, oracle, reference, subnormals
from rarefy.act.spec.formats import Format
from rarefy.act.spec.quartic import LIMIT, begins
from rarefy.act.spec.quartic import tanh as quartic_tanh
from rarefy.act.spec.table import LinearTable, SegmentsTable, ShiftTable, Table, load

FORMAT_OF = {
    torch.bfloat16: formats.BF16,
    torch.float16: formats.FP16,
    torch.float32: formats.FP32,
    torch.float8_e4m3fn: formats.E4M3,
    torch.float8_e5m2: formats.E5M2,
}
DTYPE_OF = {fmt.name: dtype for dtype, fmt in FORMAT_OF.items()}
_INTEGER = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


@lru_cache(maxsize=64)
def given_table(text: str) -> Table | None:
    """Return the table of an operator's ``table`` argument: "" for the default, a shipped table's name, or JSON."""
    if not text:
        return None
    return Table.from_json(text) if text.startswith("{") else load(text)


def text_of(table: Table | str | Path | None) -> str:
    """Return an argument ``table`` as :func:`given_table` takes it: a file as what it holds now.

    Raises TypeError for no table, no name and no path; ValueError and OSError for a file as :func:`load`.
    """
    if table is None:
        return ""
    if isinstance(table, Table):
        return table.text
    if not isinstance(table, (str, Path)):
        raise TypeError(f"table must be a Table, the name of a shipped one or a .json file, got {type(table).__name__}")
    return _text_in(str(table)) if isinstance(table, Path) or table.endswith(".json") else table


@torch.compiler.assume_constant_result
def _text_in(path: str) -> str:
    return load(path).text


def table_of(table: Table | str | Path | None) -> Table | None:
    """Return the table that an argument means; errors as :func:`text_of`, and ValueError for an unknown name."""
    return table if isinstance(table, Table) else given_table(text_of(table))


def activation(x: Tensor, function: str, mode: str, table: str = "", arithmetic: bool | None = None) -> Tensor:
    """Compute ``function`` of every element in plain PyTorch operators, without a gradient.

    ``arithmetic`` computes 16-bit ``linear`` and ``shift`` tables instead of looking all answers up; the default does
    so except on the CPU, where Inductor makes the faster code of the gather.
    """
    fmt = FORMAT_OF[x.dtype]
    if fmt.bits == 32:
        return float32(x, function, mode, table)
    bits = x.view(_INTEGER[fmt.bits]).to(torch.int32)
    compute = arithmetic if arithmetic is not None else x.device.type != "cpu"
    how = plan(function, mode, fmt.name, table) if compute else "answers"
    if how == "linear":
        return _linear16(x, bits, function, mode, table)
    if how == "shift":
        return _shift(x, bits, function, mode, table)
    answers: Tensor = constant("answers", function, mode, fmt.name, table, str(x.device))
    result = answers[bits & ((1 << fmt.bits) - 1)]
    return result.view(x.dtype)


@torch.compiler.assume_constant_result
def plan(function: str, mode: str, fmt: str, table: str) -> str:
    """Return how the table is computed here: its form where arithmetic is cheap, else "answers"."""
    f = formats.get(fmt)
    direct = reference.table_for(function, mode, f, given_table(table))
    if isinstance(direct, LinearTable) and direct.symmetry == "odd":
        return "linear"
    if isinstance(direct, ShiftTable):
        return "shift"
    if isinstance(direct, SegmentsTable) and f.bits == 32:
        return "segments"
    return "answers"


class _Tensors:
    """The tensors of the tables as attributes: what torch.compile can read anew while it traces."""


_TENSORS = _Tensors()


def constant(what: str, function: str, mode: str, fmt: str, table: str, device: str) -> Tensor:
    """Return a tensor of the tables, made once for each device."""
    tensor: Tensor = getattr(_TENSORS, _attribute(what, function, mode, fmt, table, device))
    return tensor


_names: dict[tuple[str, ...], str] = {}


@torch.compiler.assume_constant_result
def _attribute(*key: str) -> str:
    if key not in _names:
        _names[key] = f"tensor{len(_names)}"
        setattr(_TENSORS, _names[key], _make_tensor(*key))
    return _names[key]


@torch.compiler.assume_constant_result
def numbers(function: str, mode: str, fmt: str, table: str) -> tuple[int, ...]:
    """Return the header of a table, as :func:`_linear16`, :func:`_shift` and :func:`_segments32` read it."""
    direct = _table_of(function, mode, fmt, table)
    if isinstance(direct, LinearTable):
        i = direct.index
        return i.start, i.length, i.factor, direct.fraction_bits, direct.offset, direct.identity_below
    if isinstance(direct, ShiftTable):
        right = direct.fmt.mantissa_bits - direct.index.mantissa_bits
        return right, direct.index.rows - 1, direct.identity_below, direct.saturate_above
    return direct.fraction_bits, int(direct.symmetry == "odd")


def _table_of(function: str, mode: str, fmt: str, table: str) -> Table:
    direct = reference.table_for(function, mode, formats.get(fmt), given_table(table))
    assert direct is not None
    return direct


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Within the block ``torch.jit.trace`` records nothing."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


@subnormals.kept()
def _make_tensor(what: str, function: str, mode: str, fmt: str, table: str, device: str) -> Tensor:
    gpu.refuse_capture(torch.device(device))
    f = formats.get(fmt)
    array: npt.NDArray[Any]
    if what in ("answers", "values"):
        values = reference.answers(function, mode, f, given_table(table))
        array = values.view(np.int16 if f.bits == 16 else np.uint8).copy()
    elif what == "quartic":  # by rising segment: the rows begin with the last octave's but one
        array = np.roll(np.concatenate([begins()[None], quartic_tanh().values()]), 8, axis=1)
    elif what == "powers":
        array = arithmetic.powers()
    elif what == "tail":
        array = arithmetic.tail()
    elif what == "doubles":
        array = doubles.constants()
    elif what == "scales":  # 2^(m - e), from the smallest exponent up
        array = np.ldexp(1.0, f.mantissa_bits + f.bias - np.arange(1, (f.last >> f.mantissa_bits) + 1))
    else:
        direct = _table_of(function, mode, fmt, table)
        columns = np.array(direct.rows, dtype=np.int64)
        if isinstance(direct, ShiftTable):  # (r, base)
            columns = np.stack([columns[:, 1], (columns[:, 0] << f.mantissa_bits) + columns[:, 2]], axis=1)
        # sums of segments in float32 need more than 32 bits
        array = columns.T.astype(np.int64 if isinstance(direct, SegmentsTable) else np.int32)
        if what == "factors":  # (2^-r, base)
            array = np.stack([np.ldexp(1.0, -array[0]), array[1].astype(np.float64)])
    # A mode of PyTorch that is active while a graph is traced must not see this: the result outlives the trace.
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction(), _untraced():
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return (tensor.view(DTYPE_OF[fmt]) if what == "values" else tensor).to(device)


def _finish(x: Tensor, bits: Tensor, u: Tensor, y: Tensor, fmt: Format) -> Tensor:
    """Sign of the input, NaN as it came."""
    y = torch.where(u > fmt.last, bits, y | (bits & -fmt.sign))
    return y.to(_INTEGER[fmt.bits]).view(x.dtype)


def _linear16(x: Tensor, bits: Tensor, function: str, mode: str, table: str) -> Tensor:
    fmt = FORMAT_OF[x.dtype]
    start, length, factor, fraction, offset, identity = numbers(function, mode, fmt.name, table)
    slope, base = constant("rows", function, mode, fmt.name, table, str(x.device)).unbind(0)
    u = bits & (fmt.sign - 1)
    d = (u - start).clamp(0, length)
    t = (d * factor) >> 16
    # y = offset + (B + S d mod 2^16) / 2^f
    y = offset + (((base[t] + slope[t] * d) & 0xFFFF) >> fraction)
    return _finish(x, bits, u, torch.where(u < identity, u, y), fmt)


def _shift(x: Tensor, bits: Tensor, function: str, mode: str, table: str) -> Tensor:
    fmt = FORMAT_OF[x.dtype]
    right, mask, identity, saturate = numbers(function, mode, fmt.name, table)
    shift, base = constant("rows", function, mode, fmt.name, table, str(x.device)).unbind(0)
    u = bits & (fmt.sign - 1)
    t = (u >> right) & mask
    # y = (E, (M >> r) + b)
    y = ((u & fmt.mantissa_mask) >> shift[t]) + base[t]
    y = torch.where(u < identity, u, y)
    return _finish(x, bits, u, torch.where(u > saturate, fmt.one, y), fmt)


def _segments32(x: Tensor, function: str, mode: str, table: str) -> Tensor:
    fmt = FORMAT_OF[x.dtype]
    fraction, odd = numbers(function, mode, fmt.name, table)
    first, slope, base = constant("rows", function, mode, fmt.name, table, str(x.device)).unbind(0)
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    magnitude = bits & (fmt.sign - 1)
    u = magnitude if odd else bits
    t = torch.searchsorted(first, u, right=True) - 1
    # y = (B + S d) / 2^f
    y = (base[t] + slope[t] * (u - first[t])) >> fraction
    y = torch.where(magnitude > fmt.last, bits, y | (bits & fmt.sign) if odd else y)
    return torch.where(y >= fmt.sign, y - (fmt.sign << 1), y).to(torch.int32).view(x.dtype)


def float32(x: Tensor, function: str, mode: str, table: str) -> Tensor:
    """Return the float32 form of :func:`activation`; modes "exact", "fast" and "hard" look at no bits."""
    if mode in ("exact", "fast"):
        return torch.copysign(tanh32(x), x) if function == "tanh" else _numbers32(x, function, mode)
    if mode == "hard":
        return hard32(x, function)
    how = plan(function, mode, "fp32", table)
    if how == "shift":
        return _shift(x, x.view(torch.int32), function, mode, table)
    if how == "segments":
        return _segments32(x, function, mode, table)
    return derived32(x, function, lambda z: float32(z, "tanh", mode, table))


def derived32(x: Tensor, function: str, tanh: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute mode ``ktanh`` of all but tanh in float32 from a tanh; see :mod:`rarefy.act.spec.reference`."""
    h = x * 0.5
    if function == "sigmoid":
        return 0.5 + 0.5 * tanh(h)
    if function == "quick_gelu":
        return _limit(x, h * (1.0 + tanh(0.851 * x)))
    z = h if function == "silu" else x * (reference.GELU_A + reference.GELU_B * (x * x))
    return _limit(x, h * (1.0 + tanh(z)))


def hard32(x: Tensor, function: str) -> Tensor:
    """Compute mode ``hard`` in float32; see :mod:`rarefy.act.spec.reference`."""
    if function == "tanh":
        return x.clamp(-1.0, 1.0)
    if function == "sigmoid":
        return _sixth((x + 3.0).clamp(0.0, 6.0))
    inner = x if function == "silu" else 1.702 * x
    return _limit(x, x * _sixth((inner + 3.0).clamp(0.0, 6.0)))


def _sixth(x: Tensor) -> Tensor:
    # by a number PyTorch multiplies with its reciprocal on a GPU, which rounds twice
    return x / (torch.full((), 6.0, device=x.device) if x.is_cuda else 6.0)


def _limit(x: Tensor, y: Tensor) -> Tensor:
    # -0 by negation: onnxruntime's choice of the first of two gives 0 for it
    return -torch.where(x == -math.inf, 0.0, -y)


def is_number(x: Tensor) -> Tensor:
    """Tell which elements are not NaN; not by isnan, whose negation makes onnxruntime exchange the two of a choice."""
    return x == x  # noqa: PLR0124


def keep_nan(x: Tensor, y: Tensor) -> Tensor:
    """Return ``y``, and NaN where ``x`` is; by a product, since a choice in onnxruntime may lose the sign of 0."""
    return y * torch.where(is_number(x), 1.0, x)


def _numbers32(x: Tensor, function: str, mode: str) -> Tensor:
    """Modes ``exact`` and ``fast`` in float32: of sigmoid, silu and gelu :mod:`rarefy.act.kernels.float32`."""
    if function not in oracle.TABLED:
        return keep_nan(x, doubles.exact(x, function, constant("doubles", "", "", "fp32", "", str(x.device))))
    number = torch.where(is_number(x), x, 0.0)
    table = constant("powers", "", "", "fp32", "", str(x.device))
    if mode == "fast" and function != "gelu_tanh":
        return keep_nan(x, arithmetic.fast(number, function, table))
    return keep_nan(x, arithmetic.exact(number, function, table, constant("tail", "", "", "fp32", "", str(x.device))))


def tanh32(x: Tensor) -> Tensor:
    """Compute mode ``exact`` of tanh in float32, of the magnitude of ``x``; a NaN comes back.

    See :mod:`rarefy.act.spec.quartic`.
    """
    begins, *coefficients = constant("quartic", "tanh", "exact", "fp32", "", str(x.device)).unbind(0)
    a = torch.where(is_number(x), x.abs(), 0.0).clamp(max=LIMIT)
    # the segment, without the bits of w: eight for each doubling of it
    w = a + 1.0
    octave = torch.where(w >= 8.0, 3.0, torch.where(w >= 4.0, 2.0, torch.where(w >= 2.0, 1.0, 0.0)))
    eighth = torch.where(w >= 8.0, 1.0, torch.where(w >= 4.0, 2.0, torch.where(w >= 2.0, 4.0, 8.0)))
    row = (8.0 * octave + torch.floor(w * eighth)).long() - 8
    f = a - begins[row]
    y = coefficients[4][row]
    for k in (3, 2, 1, 0):
        y = arithmetic.fused(y, f, coefficients[k][row])
    return keep_nan(x, y)
