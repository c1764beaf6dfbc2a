"""Native kernels of gated units: which there are, how tensors lie in memory for them, and the calls."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rarefy import kernels
from rarefy.act.kernels import launch
from rarefy.act.kernels.aten import FORMAT_OF
from rarefy.act.kernels.slopes import lookup
from rarefy.kernels._memory import address

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_FORWARD = (*(_POINTER,) * 3, *(_SIZE,) * 4, *(_POINTER,) * 2, ctypes.c_int32)
_BACKWARD = (*(_POINTER,) * 5, *(_SIZE,) * 6, *(_POINTER,) * 4, ctypes.c_int32)
_SLOPE = (_POINTER, _POINTER, _SIZE, _POINTER, ctypes.c_int32)


class Unit(NamedTuple):
    """The kernels of one unit in one dtype: ctypes functions, addresses of what they call, and of tables."""

    forward: Any
    backward: Any
    act: int | None
    act_table: int
    slope: int | None
    slope_table: int
    alive: tuple[Any, ...]  # what the addresses belong to


_units: dict[tuple[str, str, torch.dtype, str, str | None], Unit | None] = {}


def unit_of(x: Tensor, other: Tensor, function: str, mode: str, table: str) -> Unit | None:
    """Return the kernels that may run here and read the tensors; None where there are none."""
    if not (launch.is_readable(x) and launch.is_readable(other)) or launch.watched():
        return None
    key = (function, mode, x.dtype, table, kernels.isa())
    if key not in _units:
        _units[key] = _choose(x, function, mode, table)
    return _units[key]


def _choose(x: Tensor, function: str, mode: str, table: str) -> Unit | None:
    act = launch.kernel_of(x, function, mode, table)
    fmt = FORMAT_OF[x.dtype].name
    forward = kernels.find(f"gated_{fmt}", None, *_FORWARD)
    backward = kernels.find(f"gated_backward_{fmt}", None, *_BACKWARD)
    wide = x.dtype == torch.float32
    slope = kernels.find(f"slope_{function}32" if wide else "slope16", None, *_SLOPE)
    if act is None or forward is None or backward is None or slope is None or (wide and mode == "hard"):
        return None
    slopes = None if wide else lookup(function, "hard" if mode == "hard" else "exact", fmt)
    steps = launch.steps_of(function, mode, x.dtype, table)  # whose tables the kernel reads
    return Unit(
        *(forward, backward, ctypes.cast(act[0], _POINTER).value, act[1], ctypes.cast(slope, _POINTER).value),
        0 if slopes is None else slopes.data_ptr(),
        (act, slope, slopes, steps),
    )


def ready(function: str, x: Tensor, up: Tensor | None, mode: str) -> Unit | None:
    """Return the kernels where they ran before and the tensors need no look but this: contiguous, without a transform.

    The way of common calls: what it refuses, an odd last dimension too, is looked at in full.
    """
    unit = _units.get((function, mode, x.dtype, "", kernels.isa()))
    if unit is None or not is_common(x) or launch.watched():
        return None
    if up is None:
        return unit if x.ndim and x.shape[-1] % 2 == 0 else None
    return unit if up.dtype is x.dtype and up.shape == x.shape and is_common(up) else None


def is_common(x: Tensor) -> bool:
    """Tell whether numbers lie in memory one after another, on the CPU; there is at least one."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and launch.is_plain(x)
        and x.is_contiguous()
        and not x.is_neg()
        and x.data_ptr() != 0
    )


def _places(x: Tensor, up: Tensor | None) -> tuple[int, int, int, int, int]:
    """Where the gate and up of contiguous tensors begin, and (rows, columns, stride)."""
    if up is not None:
        return x.data_ptr(), up.data_ptr(), 1, x.numel(), x.numel()
    columns = x.shape[-1] // 2
    begin, rows = x.data_ptr(), x.numel() // (2 * columns)
    return begin, begin + columns * x.element_size(), rows, columns, 2 * columns


def forward_at_once(unit: Unit, x: Tensor, up: Tensor | None) -> Tensor:
    """Compute the unit of tensors that :func:`ready` took."""
    shape = x.shape if up is not None else (*x.shape[:-1], x.shape[-1] // 2)
    out = torch.empty(shape, dtype=x.dtype)
    gate, other, rows, columns, stride = _places(x, up)
    threads = torch.get_num_threads()
    unit.forward(gate, other, out.data_ptr(), rows, columns, stride, stride, unit.act, unit.act_table, threads)
    return out


def backward_at_once(unit: Unit, upstream: Tensor, x: Tensor, up: Tensor | None) -> list[Tensor]:
    """Compute the gradients of tensors that :func:`ready` took; ``upstream`` is as common as they are."""
    found = [torch.empty(t.shape, dtype=t.dtype) for t in (x, up) if t is not None]
    gate, other, rows, columns, stride = _places(x, up)
    of_gate, of_up, *_ = _places(found[0], None if up is None else found[1])
    unit.backward(
        *(upstream.data_ptr(), gate, other, of_gate, of_up, rows, columns, stride, stride, stride, stride),
        *(unit.act, unit.act_table, unit.slope, unit.slope_table, torch.get_num_threads()),
    )
    return found


def rows_of(x: Tensor, columns: int) -> Tensor:
    """Return the tensor as rows of so many values without gaps in a row, copied where it does not lie so."""
    rows = x.resolve_neg().reshape(-1, columns)
    return rows if columns == 1 or rows.stride(1) == 1 else rows.contiguous()


def _columns(*tensors: Tensor) -> int:
    """How long a row is: all values where nothing lies between rows, else the last dimension."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return tensors[0].numel()
    return tensors[0].shape[-1]


def forward(unit: Unit, gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Compute the unit into ``out``, which is contiguous and shares memory with what it reads only where it is it."""
    if gate.numel() == 0:
        return
    columns = _columns(gate, up)
    gate, up = rows_of(gate, columns), rows_of(up, columns)
    unit.forward(
        *(address(gate), address(up), address(out), gate.shape[0], columns, gate.stride(0), up.stride(0)),
        *(unit.act, unit.act_table, torch.get_num_threads()),
    )


def backward(unit: Unit, upstream: Tensor, gate: Tensor, up: Tensor, of_gate: Tensor, of_up: Tensor) -> None:
    """Compute both gradients into ``of_gate`` and ``of_up``, whose rows are without gaps and share no memory."""
    if gate.numel() == 0:
        return
    columns = _columns(gate, up, of_gate, of_up)
    gate, up, upstream = rows_of(gate, columns), rows_of(up, columns), rows_of(upstream, columns).contiguous()
    of_gate, of_up = of_gate.view(-1, columns), of_up.view(-1, columns)
    unit.backward(
        *(address(upstream), address(gate), address(up), address(of_gate), address(of_up), gate.shape[0], columns),
        *(gate.stride(0), up.stride(0), of_gate.stride(0), of_up.stride(0)),
        *(unit.act, unit.act_table, unit.slope, unit.slope_table, torch.get_num_threads()),
    )
