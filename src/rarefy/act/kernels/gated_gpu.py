"""The Triton kernels of the gated units on tensors of a GPU: how tensors lie in memory for them, and the calls."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rarefy.act.kernels import gpu, launch
from rarefy.act.kernels.gated import columns_of, rows_of


def forward(gate: Tensor, up: Tensor, function: str, mode: str, table: str, out: Tensor) -> bool:
    """Compute a unit into ``out``, which is contiguous; False, and nothing done, where PyTorch's operators have to."""
    return _run(False, (gate, up), (out,), function, mode, table)


def backward(
    upstream: Tensor, gate: Tensor, up: Tensor, function: str, mode: str, table: str, of_gate: Tensor, of_up: Tensor
) -> bool:
    """Compute both gradients into ``of_gate`` and ``of_up``, halves of one tensor or contiguous; as :func:`forward`."""
    return _run(True, (upstream, gate, up), (of_gate, of_up), function, mode, table)


def _run(
    back: bool, given: tuple[Tensor, ...], found: tuple[Tensor, ...], function: str, mode: str, table: str
) -> bool:
    tensors, device = (*given, *found), found[0].device
    if device.type != "cuda" or launch.watched() or not all(launch.is_direct(t) for t in tensors):
        return False
    return gpu.runs(device) and run(back, given, found, function, mode, table)


def run(back: bool, given: tuple[Tensor, ...], found: tuple[Tensor, ...], function: str, mode: str, table: str) -> bool:
    """Compute what :func:`forward` and :func:`backward` do, of plain tensors."""
    n = found[0].numel()
    if n == 0:
        return True
    columns = columns_of(*given[-2:], *found)
    if columns != n and not all(_lies_well(t) for t in (*given[-2:], *found)):
        beside = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in found)
        done = run(back, tuple(t.contiguous() for t in given), beside, function, mode, table)
        for t, result in zip(found, beside, strict=True):
            t.copy_(result)
        return done
    kernel = _kernel(back, function, mode, found[0].dtype, table, found[0].device, columns != n)
    if kernel is None:
        return False
    rows = [rows_of(t, columns) for t in (*(t.contiguous() for t in given[:-2]), *given[-2:])]
    rows += [t.view(-1, columns) for t in found]
    placed = tuple(t if t.data_ptr() % 16 == 0 else t.clone() for t in rows)
    # the upstream gradient and a single result have no gaps
    strides = [t.stride(0) for t in (rows[1:] if back else rows[:2])]
    programs = n // columns * -(-columns // kernel.block)
    kernel.launch(placed, [t.data_ptr() for t in placed], programs, columns, *strides)
    for t, result in zip(found, placed[len(given) :], strict=True):
        if result.data_ptr() != t.data_ptr():
            t.copy_(result.view(t.shape))
    return True


def _lies_well(x: Tensor) -> bool:
    """Tell whether the rows of a tensor begin at multiples of 16 values."""
    *outer, inner = x.stride()
    if x.shape[-1] % 16 or inner != 1 or any(stride % 16 for stride in outer):
        return False
    return x.is_contiguous() or x.data_ptr() % 16 == 0


@functools.cache
def _kernel(
    back: bool, function: str, mode: str, dtype: torch.dtype, table: str, device: torch.device, many: bool
) -> gpu.Kernel | None:
    from rarefy.act.kernels import triton_gated

    gpu.refuse_capture(device)
    make = triton_gated.backward if back else triton_gated.forward
    return make(function, mode, dtype, table, device, many)
