"""The Triton kernels on tensors of a GPU: which one a function has, and the call, which costs the host microseconds.

A kernel is compiled once for each function, format and device, for tensors that begin at a multiple of 16 bytes. From
then on a call is its launch alone: nothing is looked up or waited for, so that it can be captured in a CUDA graph. What
the first call makes (the table on the device, the program) cannot be made while a graph is captured.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rarefy import kernels

#: Elements of a program, by their bytes: 128 threads that move one or two times 16 bytes each, of which a
#: multiprocessor holds enough to hide the memory's latency; more warps or longer programs move no more.
BLOCK = {1: 2048, 2: 1024, 4: 1024}
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # a multiply and an add that are joined have other bits
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Kernel:
    """One Triton kernel with its tables on one device.

    Args:
        jit: the function of Triton: pointers to the tensors' bits, those of results last, and to the tables; sizes;
            constants; block.
        dtype: of the tensors; None takes them as they are, which may be of several.
        device: of the tensors.
        tables: on the device.
        constants: what the program is compiled for.
        block: elements of a program; left out, what moves most.
    """

    def __init__(
        self,
        jit: Any,
        dtype: torch.dtype | None,
        device: torch.device,
        tables: tuple[Tensor, ...],
        constants: tuple[Any, ...],
        block: int | None = None,
    ) -> None:
        self.jit, self.tables, self.constants = jit, tables, constants
        self.integer = None if dtype is None else _INTEGER[dtype.itemsize]
        self.block = BLOCK[4 if dtype is None else dtype.itemsize] if block is None else block
        self.device = device
        self.index = -1 if device.index is None else device.index  # -1 is the CPU, of Triton's interpreter
        self.places = tuple(table.data_ptr() for table in tables)
        self.compiled: Any = None

    def __call__(self, *tensors: Tensor) -> None:
        """Compute the last tensor from the others; all dense, of one layout and size, on the kernel's device."""
        places = [tensor.data_ptr() for tensor in tensors]
        if any(place & 15 for place in places):
            # in copies, which begin where the allocator has them: at a multiple of 512 bytes
            copies = [tensor.clone() if tensor.data_ptr() & 15 else tensor for tensor in tensors]
            self(*copies)
            if copies[-1] is not tensors[-1]:
                tensors[-1].copy_(copies[-1])
            return
        n = tensors[0].numel()
        self.launch(tensors, places, -(-n // self.block), n)

    def launch(self, tensors: tuple[Tensor, ...], places: list[int], programs: int, *sizes: int) -> None:
        """Run programs on tensors that begin at these places, multiples of 16, with the sizes that the kernel takes."""
        if programs == 0:
            return
        if self.compiled is None:
            refuse_capture(self.device)
            bits = tensors if self.integer is None else tuple(tensor.view(self.integer) for tensor in tensors)
            with torch.cuda.device(self.index):
                self.compiled = self.jit[programs, 1, 1](
                    *bits, *self.tables, *sizes, *self.constants, self.block, **OPTIONS
                )
        elif self.index == torch._C._cuda_getDevice():
            self.compiled[programs, 1, 1](*places, *self.places, *sizes, *self.constants, self.block)
        else:
            with torch.cuda.device(self.index):
                self.compiled[programs, 1, 1](*places, *self.places, *sizes, *self.constants, self.block)


def refuse_capture(device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is captured: what a first call copies and loads would break it."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the first call of an activation in a format on a device makes its table there, which a CUDA graph that is"
            " being captured does not allow: call it once before the capture, with the same mode and dtype"
        )


def forward(x: Tensor, function: str, mode: str, table: str) -> Kernel | None:
    """Return the kernel ``(x, y)`` of a function on the device of ``x``; None where PyTorch's operators compute."""
    return _forward(function, mode, x.dtype, table, x.device) if runs(x.device) else None


@functools.cache
def _forward(function: str, mode: str, dtype: torch.dtype, table: str, device: torch.device) -> Kernel | None:
    refuse_capture(device)
    kernel: Kernel | None = triton(device).forward(function, mode, dtype, table, device)  # type: ignore[union-attr]
    return kernel


def backward(upstream: Tensor, saved: Tensor, function: str, mode: str, grad: str) -> Tensor:
    """Return the gradient of plain tensors in one launch; see :func:`rarefy.act.gradients.backward`."""
    kernel = _backward(function, mode, grad, saved.dtype, saved.device)
    upstream, saved = upstream.resolve_neg(), saved.resolve_neg()
    y = torch.empty_like(saved)
    if saved.stride() != y.stride():
        saved, y = saved.contiguous(), y.contiguous()
    if upstream.stride() != y.stride():
        upstream = torch.empty_like(y).copy_(upstream)
    kernel(upstream, saved, y)
    return y


@functools.cache
def _backward(function: str, mode: str, grad: str, dtype: torch.dtype, device: torch.device) -> Kernel:
    refuse_capture(device)
    kernel: Kernel = triton(device).backward(function, mode, grad, dtype, device)  # type: ignore[union-attr]
    return kernel


def runs(device: torch.device) -> bool:
    """Tell whether the Triton kernels may compute on a device here."""
    return device.type == "cuda" and kernels.isa() != "pytorch" and triton(device) is not None


@functools.cache
def triton(device: torch.device) -> ModuleType | None:
    """Return the module of the Triton kernels, or None where Triton is missing or runs nothing on this device."""
    refuse_capture(device)
    try:
        from rarefy.act.kernels import triton as module

        module.probe(device)
    except ImportError:
        return None
    except Exception as error:  # a device that is too old, no C compiler: Triton has an exception for each
        warnings.warn(f"Triton does not run on {device}, so activations run in PyTorch: {error}", stacklevel=2)
        return None
    return module
